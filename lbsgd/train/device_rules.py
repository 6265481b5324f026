"""The layout of images and weights, as devices and DeepSpeed want it, and what computes batch norm, by the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def scalars_sent(engine_class: Any) -> Iterator[None]:
    """Let a DeepSpeed engine that is made inside send parameters without a dimension, at which 0.19.8 raises."""
    send = engine_class._broadcast_model

    def send_all(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        send(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    engine_class._broadcast_model = send_all
    try:
        yield
    finally:
        engine_class._broadcast_model = send


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
