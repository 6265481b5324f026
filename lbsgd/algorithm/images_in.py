"""How many images a network is called with, whatever its arguments look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

DEEPEST = 4  # of nested inputs


def images_in(inputs: Iterable[Any], n: int) -> int | None:
    """Return the first length of a tensor, or of a list of tensors, that is a multiple of n; None without tensors.

    Each worker has n images, so other lengths are those of class weights, boxes or positions. If there is no multiple,
    return the first length, because the images do not fill the workers. Looks into tuples, lists, mappings and
    dataclasses.
    """
    found: list[int] = []
    for value in inputs:
        _collect(value, found, DEEPEST)
    return next((length for length in found if length % n == 0), found[0] if found else None)


def _collect(value: Any, found: list[int], levels: int) -> None:
    """Add the lengths in a value of at most some levels, in their order."""
    if isinstance(value, torch.Tensor):
        if value.dim() and not value.is_nested:
            found.append(value.shape[0])
    elif not levels:
        return
    elif isinstance(value, (tuple, list)):
        first = value[0] if value else 0
        if isinstance(first, (torch.Tensor, Mapping)):
            found.append(len(value))  # one image each, as for torchvision's detectors
        if not isinstance(first, (int, float, str)):
            for item in value:
                _collect(item, found, levels - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, levels - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _collect(getattr(value, field.name, None), found, levels - 1)
