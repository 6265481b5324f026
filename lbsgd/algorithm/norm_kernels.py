"""The Triton kernels of batch norm over groups of images (Sec. 2.3); the only module that imports triton.

`fused_norm` launches them. They read x as (G, outer, C, inner), which is (G, n·H·W, C, 1) in channels_last and
(G, n, C, H·W) otherwise. A program has one group, a block of channels and one split of a group's values. It walks over
its split in `steps` tiles of OUTER x INNER values of CHANNELS channels. Programs never add to the same place: each
writes the sums of its split, and the pool_ kernels add up the splits in a fixed order. So a group's bits depend on its
values and its shape alone.

Tiles have two dimensions, because Triton 3.6 cannot compile sums over two of three.

The kernels read and write half precision, and compute in float32.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's own test: if it holds, the kernels run in NumPy on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
# The versions whose compiled kernels `KernelLaunch` knows how to run (tests/launched): those of torch 2.8 to 2.15.
RUNS_COMPILED = triton.__version__.startswith(tuple(f"3.{minor}." for minor in range(4, 10))) and not INTERPRETED


class KernelLaunch:
    """A kernel with all its arguments except the tensors; a call launches it on the current device.

    One object serves tensors of the same types, on the same device, at addresses that are multiples of 16. In the first
    call Triton compiles or finds the kernel. Later calls reuse it, because Triton's search takes 60 µs of the host's
    time per launch, and ResNet-50 has 318 launches in a pass.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], warps: int, **constants: Any):
        self.kernel, self.numbers, self.constants, self.warps = kernel, numbers, constants, warps
        self.grid = (*grid, 1, 1)[:3]
        self.after_tensors = *numbers, *constants.values()
        self.found: Any = None

    def __call__(self, *tensors: Tensor | None, stream: int) -> None:
        """Launch the kernel on these tensors, in its order; None stands for an optional tensor that is not given."""
        found = self.found
        if found is None:
            # Triton 3.10 will no longer fuse by default, which would change bits.
            options = {"num_warps": self.warps, "enable_fp_fusion": True}
            found = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **options)
            self.found = found if RUNS_COMPILED else None
            return
        addresses = [None if each is None else each.data_ptr() for each in tensors]
        of_kernel = found.function, found.packed_metadata, None, None, None  # no profiler's hooks
        found.run(*self.grid, stream, *of_kernel, *addresses, *self.after_tensors)


def current_stream(x: Tensor) -> int:
    """Return the stream for kernels on x; 0 if the kernels are interpreted."""
    return 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(x.get_device())


@triton.jit
def _place(outer, channels, inner, steps, OUTER: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr):
    """Return a program's c, the offset of its first tile, the offsets in the tile, its `o`s, and which c, i exist."""
    blocks = tl.cdiv(inner, INNER)
    split = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    value = tl.arange(0, OUTER * INNER)[:, None]
    i = (split % blocks) * INNER + value % INNER
    first = (split // blocks) * steps * OUTER
    o = value // INNER
    at = (tl.program_id(2).to(tl.int64) * outer + first) * channels * inner  # a tensor may hold more than 2^31 values
    return c, at, (o * channels + c) * inner + i, first + o, (c < channels) & (i < inner)


@triton.jit
def _sum(tile):
    """Add up all values of each channel: (values, channels) -> (1, channels)."""
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def _pooled(count, mean, m2):
    """Pool the exact count, mean and sum of squared deviations of many sets of values per channel."""
    total = tl.maximum(_sum(count), 1.0)
    pooled = _sum(count * mean) / total
    return _sum(count), pooled, _sum(m2 + count * (mean - pooled) * (mean - pooled))


@triton.jit
def _standardised(x, mean, rstd, weight, bias):
    """Return x̂ = (x − mean) · rstd and γ · x̂ + β. Forward and backward must agree on the sign of the latter."""
    x_hat = (x - mean) * rstd
    return x_hat, x_hat * weight + bias


@triton.jit
def _statistics(stats, weight, bias, c, channels):
    """Return a group's mean and 1/√(var + ε), and γ and β, for these channels in float32."""
    own = stats + tl.program_id(2) * channels + c
    mean = tl.load(own, c < channels, 0.0)
    rstd = tl.load(own + 2 * tl.num_programs(2) * channels, c < channels, 0.0)
    gamma, beta = tl.full(mean.shape, 1.0, tl.float32), tl.zeros(mean.shape, tl.float32)
    if weight is not None:
        gamma = tl.load(weight + c, c < channels, 0.0).to(tl.float32)
    if bias is not None:
        beta = tl.load(bias + c, c < channels, 0.0).to(tl.float32)
    return mean, rstd, gamma, beta


@triton.jit
def partial_moments(
    x, parts, outer, channels, inner, steps, OUTER: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr
):
    """Write count, mean and sum of squared deviations of each split by Welford's recurrence: parts (3, G, S, C)."""
    c, at, within, o, exists = _place(outer, channels, inner, steps, OUTER, CHANNELS, INNER)
    mean = tl.zeros((OUTER * INNER, CHANNELS), tl.float32)
    m2, count = mean, mean
    for step in range(steps):
        inside = exists & (o < outer)
        value = tl.load(x + at + within, inside, 0.0).to(tl.float32)
        # A lane that is once outside stays outside, so a lane inside has seen `step` values before this one.
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        m2 += delta * (value - mean)
        count += tl.where(inside, 1.0, 0.0)
        at += OUTER * channels * inner
        o += OUTER
    count, mean, m2 = _pooled(count, mean, m2)
    own = parts + (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + c
    plane = tl.num_programs(2) * tl.num_programs(1) * channels
    tl.store(own, count, c < channels)
    tl.store(own + plane, mean, c < channels)
    tl.store(own + 2 * plane, m2, c < channels)


@triton.jit
def pool_moments(parts, stats, count, eps, splits, channels, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pool the splits: stats (3, G, C) become mean, unbiased variance and 1/√(var + ε), each over `count` values."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    s = tl.arange(0, SPLITS)[:, None]
    inside = (s < splits) & (c < channels)
    own = parts + (tl.program_id(1) * splits + s) * channels + c
    plane = tl.num_programs(1) * splits * channels
    counts, means = tl.load(own, inside, 0.0), tl.load(own + plane, inside, 0.0)
    _, mean, m2 = _pooled(counts, means, tl.load(own + 2 * plane, inside, 0.0))
    to = stats + tl.program_id(1) * channels + c
    tl.store(to, mean, c < channels)
    tl.store(to + tl.num_programs(1) * channels, m2 / (count - 1), c < channels)
    tl.store(to + 2 * tl.num_programs(1) * channels, 1.0 / tl.sqrt_rn(m2 / count + eps), c < channels)


@triton.jit
def normalise(
    x, residual, y, stats, weight, bias, outer, channels, inner, steps,
    RELU: tl.constexpr, OUTER: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write y = γ · x̂ + β, plus the residual if there is one, through a ReLU if asked for."""
    c, at, within, o, exists = _place(outer, channels, inner, steps, OUTER, CHANNELS, INNER)
    mean, rstd, gamma, beta = _statistics(stats, weight, bias, c, channels)
    for _ in range(steps):
        inside = exists & (o < outer)
        x_hat, value = _standardised(tl.load(x + at + within, inside, 0.0).to(tl.float32), mean, rstd, gamma, beta)
        if residual is not None:
            value += tl.load(residual + at + within, inside, 0.0).to(tl.float32)
        if RELU:
            value = tl.where(value > 0, value, tl.where(value == value, 0.0, value))  # NaN passes, as through torch's
        tl.store(y + at + within, value.to(y.dtype.element_ty), inside)
        at += OUTER * channels * inner
        o += OUTER


@triton.jit
def partial_gradients(
    grad_y, x, y, grad_z, parts, stats, weight, bias, outer, channels, inner, steps,
    RELU: tl.constexpr, OUTER: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write Σdz and Σdz·x̂ of each split, parts (2, G, S, C); dz is dy if the ReLU let the value pass, else 0.

    With a residual, y shows which values passed, and dz is written, because it is the residual's gradient.
    """
    c, at, within, o, exists = _place(outer, channels, inner, steps, OUTER, CHANNELS, INNER)
    mean, rstd, gamma, beta = _statistics(stats, weight, bias, c, channels)
    sum_dz = tl.zeros((OUTER * INNER, CHANNELS), tl.float32)
    sum_dz_x_hat = sum_dz
    for _ in range(steps):
        inside = exists & (o < outer)
        dz = tl.load(grad_y + at + within, inside, 0.0)
        value = tl.load(x + at + within, inside, 0.0).to(tl.float32)
        x_hat, z = _standardised(value, mean, rstd, gamma, beta)
        if y is not None:
            dz = tl.where(tl.load(y + at + within, inside, 0.0) > 0, dz, 0.0).to(dz.dtype)
            tl.store(grad_z + at + within, dz, inside)
        elif RELU:
            dz = tl.where(z > 0, dz, 0.0).to(dz.dtype)
        sum_dz += dz.to(tl.float32)
        sum_dz_x_hat += tl.where(inside, dz.to(tl.float32) * x_hat, 0.0)
        at += OUTER * channels * inner
        o += OUTER
    own = parts + (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(own, _sum(sum_dz), c < channels)
    tl.store(own + tl.num_programs(2) * tl.num_programs(1) * channels, _sum(sum_dz_x_hat), c < channels)


@triton.jit
def pool_gradients(parts, sums, splits, channels, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up the splits of each group: sums (2, G, C), Σdz and Σdz·x̂."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    s = tl.arange(0, SPLITS)[:, None]
    inside = (s < splits) & (c < channels)
    own = parts + (tl.program_id(1) * splits + s) * channels + c
    to = sums + tl.program_id(1) * channels + c
    plane = tl.num_programs(1) * channels
    tl.store(to, _sum(tl.load(own, inside, 0.0)), c < channels)
    tl.store(to + plane, _sum(tl.load(own + plane * splits, inside, 0.0)), c < channels)


@triton.jit
def input_gradient(
    grad_z, x, grad_x, sums, stats, weight, bias, count, outer, channels, inner, steps,
    RELU: tl.constexpr, OUTER: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write dx = γ/√(var + ε) · (dz − mean(dz) − x̂ · mean(dz · x̂)). With RELU, grad_z is dy, not yet dz."""
    c, at, within, o, exists = _place(outer, channels, inner, steps, OUTER, CHANNELS, INNER)
    mean, rstd, gamma, beta = _statistics(stats, weight, bias, c, channels)
    own = sums + tl.program_id(2) * channels + c
    mean_dz = tl.load(own, c < channels, 0.0) / count
    mean_dz_x_hat = tl.load(own + tl.num_programs(2) * channels, c < channels, 0.0) / count
    for _ in range(steps):
        inside = exists & (o < outer)
        dz = tl.load(grad_z + at + within, inside, 0.0).to(tl.float32)
        value = tl.load(x + at + within, inside, 0.0).to(tl.float32)
        x_hat, z = _standardised(value, mean, rstd, gamma, beta)
        if RELU:
            dz = tl.where(z > 0, dz, 0.0)
        dx = gamma * rstd * (dz - mean_dz - x_hat * mean_dz_x_hat)
        tl.store(grad_x + at + within, dx.to(grad_x.dtype.element_ty), inside)
        at += OUTER * channels * inner
        o += OUTER
