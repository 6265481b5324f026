"""Which kernels a device computes with: the layout of images and weights, and what computes batch norm."""

from __future__ import annotations

import torch

from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.norm_rule import implementation_for
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Return channels_last for tensor cores; on a CPU our batch norm is faster without (docs/experiments.md)."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def norm_implementation(plan: Plan, device: torch.device | str) -> tuple[Implementation, str]:
    """Return what computes batch norm in training on a device, and why. Raises ConfigError if it cannot."""
    kind = torch.device(device).type
    try:
        return implementation_for(plan.recipe.batch_norm.implementation, kind, memory_format(kind))
    except ValueError as error:
        raise ConfigError(f"{plan.name}: lbsgd.batch_norm: {error}") from error
