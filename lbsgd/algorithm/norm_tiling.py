"""How the programs of a Triton kernel divide groups of images among themselves (`norm_kernels`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """The number of values that a program works on at a time, and its number of warps (32 threads each)."""

    values: int
    warps: int


# The fastest of twenty sizes on ResNet-50's layers, on an H100 and an H200 (docs/experiments.md).
TILES = {
    "moments": Tile(1024, 2),
    "normalise": Tile(4096, 8),
    "gradients": Tile(1024, 4),
    "input gradient": Tile(8192, 8),
}
# The most programs that a kernel is divided into. A kernel that adds up has this many per group, about eight for each
# multiprocessor of an H100; any other kernel has the second number over all groups together.
PROGRAMS = 1024
VALUE_PROGRAMS = 2048
# The most splits: each program of a kernel that adds up writes the sums of one split, and then one program of the pool_
# kernel adds up all splits of its channels.
MOST_SPLITS = 512
# A program that adds up handles at least this many tiles, because writing its sums takes as long as several tiles.
FEWEST_STEPS = 8


class View(NamedTuple):
    """A group of n images as it lies in memory: (n·H·W, C, 1) in channels_last, (n, C, H·W) otherwise."""

    outer: int
    channels: int
    inner: int


def laid_out(x: Tensor, n: int) -> tuple[Tensor, View]:
    """Return x (N, C, ...), copied unless it is contiguous or in channels_last, and the view of n of its images."""
    pixels, channels = x.shape[2:].numel(), x.size(1)
    if not x.is_contiguous():
        if is_channels_last(x):
            return aligned(x), View(n * pixels, channels, 1)
        x = x.contiguous()
    return aligned(x), View(n, channels, pixels)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory, and the tensor has no gaps."""
    if x.dim() == 4:  # the frequent case, which torch answers without a view
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy if its address is not a multiple of 16, as a slice's may be."""
    return x.clone() if x.data_ptr() % 16 else x


@dataclass(frozen=True)
class Tiling:
    """Tiles of outer x channels x inner values, `steps` of them for each program, `splits` programs for all values."""

    outer: int
    channels: int
    inner: int
    steps: int
    splits: int

    @classmethod
    def of_sums(cls, view: View, values: int) -> Tiling:
        """Return how sums are divided.

        The division depends on the shape of a group alone, so a worker's bits are the same in any micro batch.
        """
        return cls._of(view, values, PROGRAMS, FEWEST_STEPS)

    @classmethod
    def of_values(cls, view: View, values: int, groups: int) -> Tiling:
        """Return how the values of all groups are divided if no result depends on the order."""
        return cls._of(view, values, ceil_div(VALUE_PROGRAMS, groups), fewest_steps=1)

    @classmethod
    def _of(cls, view: View, values: int, programs: int, fewest_steps: int) -> Tiling:
        channels = min(64, next_power_of_two(view.channels)) if view.inner == 1 else 1
        inner = min(1024, next_power_of_two(view.inner))
        outer = min(values // (channels * inner), next_power_of_two(view.outer))
        tiles, inner_blocks = ceil_div(view.outer, outer), ceil_div(view.inner, inner)
        in_all = tiles * ceil_div(view.channels, channels) * inner_blocks
        fewest = ceil_div(tiles, max(1, MOST_SPLITS // inner_blocks))
        steps = max(min(fewest_steps, tiles), ceil_div(in_all, programs), fewest)
        return cls(outer, channels, inner, steps, ceil_div(tiles, steps) * inner_blocks)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least this number."""
    return 1 << (number - 1).bit_length()
