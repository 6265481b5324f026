"""Batch norm of groups of images in Triton, with the ReLU and the residual that follow it in a block (Sec. 2.3).

        y = γ · (x − mean(x)) / √(var(x) + ε) + β        or relu(that)        or relu(that + residual)

One kernel reads x for the moments, and one writes y. In the backward, one kernel reads dy and x for Σdz and Σdz·x̂,
where dz is dy through the ReLU's gradient, and one writes dx. In both directions a small kernel adds up the
partial sums in between. So the ReLU and the residual need no extra pass over memory. Importing this module imports
triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lbsgd.algorithm import norm_kernels as kernels
from lbsgd.algorithm.norm_kernels import KernelLaunch
from lbsgd.algorithm.norm_tiling import (
    TILES,
    Tiling,
    View,
    aligned,
    ceil_div,
    is_channels_last,
    laid_out,
    next_power_of_two,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS, MOST_SUMS = 32, 4096  # that one program of a pool_ kernel adds up
MOST_PIXELS = 2**20
FEWEST_PIXELS = 512  # in NCHW; smaller maps take the kernels up to 1.9 times as long as the loop


def can_take(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor: in fp16, bf16 or fp32 on a GPU, or in Triton's interpreter on a CPU.

    They cannot run on maps of more than a million pixels, such as large volumes, which have more splits than one
    program adds up. Small maps in NCHW are left to the loop.
    """
    there, pixels = x.device.type == ("cpu" if kernels.INTERPRETED else "cuda"), x.shape[2:].numel()
    if not there or x.dtype not in DTYPES or pixels > MOST_PIXELS:
        return False
    return pixels == 1 or pixels >= FEWEST_PIXELS or is_channels_last(x)


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
    """Normalise each group of n images; return y, and the groups' means and unbiased variances (2, G, C).

    x is (N, C, ...), N a multiple of n. γ and β are (C), in any precision, or None. A residual has the shape and
    type of x and needs relu=True. A gradient of gradients raises RuntimeError.
    """
    assert residual is None or (relu and residual.dtype == x.dtype and residual.shape == x.shape)
    weight, bias = (None if each is None else aligned(each.contiguous()) for each in (weight, bias))
    y, stats = _FusedNorm.apply(x, residual, weight, bias, n, eps, relu)  # type: ignore[no-untyped-call]
    return y, stats[:2]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Any, bias: Any, n: int, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor]:
        x, view = laid_out(x, n)
        types = x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype
        run = launches(view, x.size(0) // n, eps, relu, residual is not None, types, x.get_device())
        residual = None if residual is None else in_the_layout_of(x, residual)
        y, parts, stats = torch.empty_like(x), run.parts(x), run.sums(3, x)
        with torch.cuda.device_of(x):  # Triton launches on the current device; autograd's thread sets x's itself
            stream = kernels.current_stream(x)
            run.moments(x, parts, stream=stream)
            run.pool_moments(parts, stats, stream=stream)
            run.normalise(x, residual, y, stats, weight, bias, stream=stream)
        # Without a residual, x itself tells which values passed the ReLU.
        ctx.save_for_backward(x, None if residual is None else y, stats, weight, bias)
        ctx.run = run
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, y, stats, weight, bias = ctx.saved_tensors
        needs_x, _, *needs_affine = ctx.needs_input_grad[:4]
        run, grad_y, stream = ctx.run, in_the_layout_of(x, grad_y), kernels.current_stream(x)
        grad_z = grad_y if y is None else torch.empty_like(x)
        parts, sums = run.parts_of_gradients(x), run.sums(2, x)
        run.gradients(grad_y, x, y, grad_z, parts, stats, weight, bias, stream=stream)
        run.pool_gradients(parts, sums, stream=stream)
        grad_x = torch.empty_like(x) if needs_x else None
        if needs_x:
            run.input_gradient(grad_z, x, grad_x, sums, stats, weight, bias, stream=stream)
        # Over all groups, Σdz is the gradient of β and Σdz·x̂ that of γ.
        grad_bias, grad_weight = (sums.sum(1) if run.groups > 1 else sums.squeeze(1)).unbind()
        affine = zip((grad_weight, grad_bias), (weight, bias), needs_affine, strict=True)
        grad_affine = (grad.to(each.dtype) if needed else None for grad, each, needed in affine)
        return grad_x, None if y is None else grad_z, *grad_affine, None, None, None


def in_the_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """Return the other tensor with the strides of x, copied if its own differ."""
    return aligned(other) if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


class Launches:
    """The launches of the kernels over G groups of one shape; the tensors are given in each call.

    types: of x, γ and β. The types and the device are part of the key under which `launches` keeps an object, because
    Triton compiles a kernel for one type and one device.
    """

    def __init__(
        self, view: View, groups: int, eps: float, relu: bool, residual: bool, types: tuple[Any, ...], device: int
    ):
        self.groups, self.channels = groups, view.channels
        count = view.outer * view.inner  # values per channel in each group

        def over_tiles(kernel: Any, tiling: Tiling, warps: int, *numbers: float, **flags: bool) -> KernelLaunch:
            grid = ceil_div(view.channels, tiling.channels), tiling.splits, groups
            sizes = {"OUTER": tiling.outer, "CHANNELS": tiling.channels, "INNER": tiling.inner}
            return KernelLaunch(kernel, grid, (*numbers, *view, tiling.steps), warps, **flags, **sizes)

        def over_splits(kernel: Any, splits: int, *numbers: float) -> KernelLaunch:
            channels = min(MOST_CHANNELS, max(1, MOST_SUMS // next_power_of_two(splits)))
            grid = ceil_div(view.channels, channels), groups
            sizes = {"SPLITS": next_power_of_two(splits), "CHANNELS": channels}
            return KernelLaunch(kernel, grid, (*numbers, splits, view.channels), 4, **sizes)

        def sums(tile: str) -> tuple[Tiling, int]:
            return Tiling.of_sums(view, TILES[tile].values), TILES[tile].warps

        def values(tile: str) -> tuple[Tiling, int]:
            return Tiling.of_values(view, TILES[tile].values, groups), TILES[tile].warps

        self.moments = over_tiles(kernels.partial_moments, *(moments := sums("moments")))
        self.pool_moments = over_splits(kernels.pool_moments, moments[0].splits, count, eps)
        self.normalise = over_tiles(kernels.normalise, *values("normalise"), RELU=relu)
        self.gradients = over_tiles(kernels.partial_gradients, *(gradients := sums("gradients")), RELU=relu)
        self.pool_gradients = over_splits(kernels.pool_gradients, gradients[0].splits)
        # With a residual, this kernel is given dz, which has already been through the ReLU's gradient.
        behind = relu and not residual
        self.input_gradient = over_tiles(kernels.input_gradient, *values("input gradient"), count, RELU=behind)
        self.splits, self.splits_of_gradients = moments[0].splits, gradients[0].splits

    def parts(self, x: Tensor) -> Tensor:
        """Allocate the moments of each split."""
        return x.new_empty(3, self.groups, self.splits, self.channels, dtype=torch.float32)

    def parts_of_gradients(self, x: Tensor) -> Tensor:
        """Allocate the sums over the gradients of each split."""
        return x.new_empty(2, self.groups, self.splits_of_gradients, self.channels, dtype=torch.float32)

    def sums(self, num: int, x: Tensor) -> Tensor:
        """Allocate `num` sums of each group: (num, G, C)."""
        return x.new_empty(num, self.groups, self.channels, dtype=torch.float32)


launches = lru_cache(4096)(Launches)  # keeps the kernels found for each shape; ResNet-50 has 18 shapes
