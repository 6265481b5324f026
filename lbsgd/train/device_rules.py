"""Rules by the kind of device: the layout of images and weights, and what computes batch norm."""

from __future__ import annotations

import torch
from torch import nn

from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.norm_rule import implementation_for
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError

# The layout of images and weights: tensor cores want it, and most networks are faster in it on a CPU
# (docs/experiments.md).
LAYOUT = torch.channels_last


def lay_out(model: nn.Module, layout: torch.memory_format = LAYOUT) -> None:
    """Put weights of four dimensions, as of convolutions over images, into a layout; others become contiguous."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and layout != torch.contiguous_format:
            parameter.data = parameter.data.contiguous(memory_format=layout)
        elif parameter.stride() != (plain := torch.empty(parameter.shape, device="meta")).stride():
            # .contiguous() would keep the strides of dimensions of one element, which DeepSpeed looks at.
            parameter.data = torch.empty_like(plain, dtype=parameter.dtype, device=parameter.device).copy_(
                parameter.data
            )


def repeat_bits() -> None:
    """Let cuDNN use only algorithms that add in the same order each time, as our kernels always do."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # which may choose another algorithm each time


def kind_in_rule(device: torch.device) -> str:
    """Return the device's type, or "a GPU of another kind" for one older than the A100 or not NVIDIA's."""
    if device.type != "cuda" or (torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        return device.type
    return "a GPU of another kind"


def norm_implementation(plan: Plan, device: torch.device | str) -> tuple[Implementation, str]:
    """Return what computes batch norm in training on a device, and why. Raises ConfigError if it cannot."""
    try:
        return implementation_for(plan.recipe.batch_norm.implementation, kind_in_rule(torch.device(device)), LAYOUT)
    except ValueError as error:
        raise ConfigError(f"{plan.name}: lbsgd.batch_norm: {error}") from error
