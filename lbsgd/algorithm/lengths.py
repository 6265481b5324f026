"""How many images a network may have been called with, whatever its arguments look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def lengths_of(inputs: Any) -> tuple[int, ...]:
    """Return the lengths of all tensors, and of all lists of tensors, in a network's inputs; one is that of the images.

    Looks into tuples, lists, mappings and dataclasses of any depth. Each length comes once, in their order, without 0.
    """
    found: list[int] = []
    _collect(inputs, found)
    return tuple(found)


def _collect(value: Any, found: list[int]) -> None:
    if isinstance(value, torch.Tensor):
        _add(value.shape[0] if value.dim() else 0, found)
    elif isinstance(value, (tuple, list)):
        if isinstance(value, list) and any(isinstance(item, (torch.Tensor, Mapping)) for item in value):
            _add(len(value), found)  # one image each, as for torchvision's detectors
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _collect(getattr(value, field.name), found)


def _add(length: int, found: list[int]) -> None:
    if length and length not in found:
        found.append(length)
