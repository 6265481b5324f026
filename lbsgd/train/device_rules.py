"""Choices by the kind of device: the layout of images and weights, and what computes batch norm."""

from __future__ import annotations

import os

import torch
from torch import nn

from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.norm_rule import implementation_for
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError

# The layout of images and weights. Tensor cores need it, and most networks are faster with it on a CPU
# (docs/experiments.md).
LAYOUT = torch.channels_last
A100 = (8, 0)  # the compute capability from which NVIDIA's GPUs compute in bf16


def lay_out(model: nn.Module, layout: torch.memory_format = LAYOUT) -> None:
    """Put weights with four dimensions, such as those of 2-d convolutions, into a layout. Make others contiguous."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and layout != torch.contiguous_format:
            parameter.data = parameter.data.contiguous(memory_format=layout)
        elif parameter.stride() != (plain := torch.empty(parameter.shape, device="meta")).stride():
            # .contiguous() would keep the strides of one-element dimensions, which DeepSpeed checks.
            parameter.data = torch.empty_like(plain, dtype=parameter.dtype, device=parameter.device).copy_(
                parameter.data
            )


def repeat_bits() -> None:
    """Let cuDNN and NCCL use only algorithms that add in the same order each time, as our kernels always do.

    Call this before the processes join torch's group, because NCCL reads its variable only once.
    """
    # NVSwitches, which add gradients from an H100 on, take them in any order (NVIDIA/nccl#1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it may choose another algorithm each time


def kind_in_rule(device: torch.device) -> str:
    """Return the device's type, or "a GPU of another kind" for a GPU older than the A100 or not NVIDIA's."""
    if device.type != "cuda" or (torch.version.cuda and torch.cuda.get_device_capability(device) >= A100):
        return device.type
    return "a GPU of another kind"


def emulated_bf16(plan: Plan, device: torch.device) -> str:
    """Return what to say of a plan in bf16 on a GPU that only emulates it, else "".

    It is not an error, because the results are right. torch's own check, and DeepSpeed's, count emulation as support.
    """
    if plan.precision != "bf16" or device.type != "cuda" or not torch.version.cuda:
        return ""
    if (capability := torch.cuda.get_device_capability(device)) >= A100:
        return ""
    name, faster = torch.cuda.get_device_name(device), "fp32" if plan.recipe.detection else "fp16"
    return (
        f"{name} (compute capability {capability[0]}.{capability[1]}) only emulates bf16: results are right, but slow; "
        f"use --precision {faster}, or an A100 or newer"
    )


def norm_implementation(plan: Plan, device: torch.device | str) -> tuple[Implementation, str]:
    """Return what computes batch norm in training on a device, and why. Raises ConfigError if it cannot."""
    try:
        return implementation_for(plan.recipe.batch_norm.implementation, kind_in_rule(torch.device(device)), LAYOUT)
    except ValueError as error:
        raise ConfigError(f"{plan.name}: lbsgd.batch_norm: {error}") from error
