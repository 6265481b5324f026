"""Batch norm of groups of images in Triton, with the ReLU and the residual that follow it in a block (Sec. 2.3).

        y = γ · (x − mean(x)) / √(var(x) + ε) + β        or relu(that)        or relu(that + residual)

One kernel reads x for the moments, one writes y. Backward, one reads dy and x for Σdz and Σdz·x̂, where dz is dy behind
the ReLU, and one writes dx. Two small kernels add up in between. So ReLU and residual cost no pass over memory of their
own. Importing this module imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lbsgd.algorithm import norm_kernels as kernels
from lbsgd.algorithm.norm_tiling import Tiling, View, ceil_div, laid_out, power_of_two

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNELS = 32  # of a program that adds up
MOST_PIXELS = 2**20


def can_take(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor: in fp16, bf16 or fp32 on a GPU, or in Triton's interpreter on a CPU.

    Maps of more than a million pixels, such as large volumes, have more splits than one program adds up.
    """
    there = x.device.type == ("cpu" if kernels.INTERPRETED else "cuda")
    return there and x.dtype in DTYPES and x.shape[2:].numel() <= MOST_PIXELS


def normalise_fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    eps: float,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise every n images by themselves; return y, and the groups' means and unbiased variances (2, G, C).

    x is (N, C, ...), N a multiple of n; γ and β are (C), in any precision, or None. A residual has the shape and
    type of x and goes with relu. A gradient of gradients raises RuntimeError.
    """
    assert residual is None or (relu and residual.dtype == x.dtype and residual.shape == x.shape)
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    y, stats = _FusedNorm.apply(x, residual, weight, bias, n, eps, relu)  # type: ignore[no-untyped-call]
    return y, stats[:2]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Any, bias: Any, n: int, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor]:
        x, view = laid_out(x, n)
        launch = Launch(view, Tiling.of(view), len(x) // n)
        residual = None if residual is None else in_the_layout_of(x, residual)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):  # Triton launches on the current one; autograd's thread has x's
            stats = launch.statistics(x, eps)
            launch.over_tiles(kernels.normalise, x, residual, y, stats, weight, bias, RELU=relu)
        # Without a residual, x itself tells where the ReLU let pass.
        ctx.save_for_backward(x, None if residual is None else y, stats, weight, bias)
        ctx.launch, ctx.relu = launch, relu
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, y, stats, weight, bias = ctx.saved_tensors
        needs_x, _, *needs_affine = ctx.needs_input_grad[:4]
        launch, grad_y = ctx.launch, in_the_layout_of(x, grad_y)
        grad_z = grad_y if y is None else torch.empty_like(x)
        parts = launch.parts(2, x)
        given = stats, weight, bias
        launch.over_tiles(kernels.partial_gradients, grad_y, x, y, grad_z, parts, *given, RELU=ctx.relu)
        sums = x.new_empty(2, launch.groups, x.size(1), dtype=torch.float32)
        affine = [None if each is None else torch.empty_like(each) for each in (weight, bias)]
        launch.over_splits(kernels.pool_gradients, (), parts, sums, *affine, launch.groups)
        grad_x = torch.empty_like(x) if needs_x else None
        if needs_x:
            relu = ctx.relu and y is None
            launch.over_tiles(kernels.input_gradient, grad_z, x, grad_x, sums, *given, launch.count, RELU=relu)
        grad_affine = (grad if needed else None for grad, needed in zip(affine, needs_affine, strict=True))
        return grad_x, None if y is None else grad_z, *grad_affine, None, None, None


def in_the_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """Return the other tensor with the strides of x, a copy if it has others."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


@dataclass(frozen=True)
class Launch:
    """The launches of the kernels over G groups of one shape."""

    view: View
    tiling: Tiling
    groups: int

    @property
    def count(self) -> int:
        """Values per channel in each group."""
        return self.view.outer * self.view.inner

    def statistics(self, x: Tensor, eps: float) -> Tensor:
        """Return each group's mean, unbiased variance and 1/√(var + ε): (3, G, C) in float32."""
        parts = self.parts(3, x)
        stats = x.new_empty(3, self.groups, self.view.channels, dtype=torch.float32)
        self.over_tiles(kernels.partial_moments, x, parts)
        self.over_splits(kernels.pool_moments, (self.groups,), parts, stats, self.count, eps)
        return stats

    def parts(self, num: int, x: Tensor) -> Tensor:
        """Return room for so many sums of each split."""
        return x.new_empty(num, self.groups, self.tiling.splits, self.view.channels, dtype=torch.float32)

    def over_tiles(self, kernel: Any, *arguments: Any, **flags: bool) -> None:
        view, tiling = self.view, self.tiling
        grid = ceil_div(view.channels, tiling.channels), tiling.splits, self.groups
        tile = {"OUTER": tiling.outer, "CHANNELS": tiling.channels, "INNER": tiling.inner}
        kernel[grid](*arguments, *view, tiling.steps, **flags, **tile, num_warps=8)

    def over_splits(self, kernel: Any, groups: tuple[int, ...], *arguments: Any) -> None:
        grid = ceil_div(self.view.channels, CHANNELS), *groups
        splits = self.tiling.splits
        kernel[grid](*arguments, splits, self.view.channels, SPLITS=power_of_two(splits), CHANNELS=CHANNELS)
