"""How the programs of a Triton kernel divide groups of images among them (`norm_kernels`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

TILE = 4096  # values: 16 for each of a program's 256 threads
PROGRAMS = 256  # for each group, about: two for each multiprocessor of an H100
MOST_SPLITS = 128


class View(NamedTuple):
    """A group of n images as it lies in memory: (n·H·W, C, 1) in channels_last, (n, C, H·W) otherwise."""

    outer: int
    channels: int
    inner: int


def laid_out(x: Tensor, n: int) -> tuple[Tensor, View]:
    """Return x (N, C, ...) and the view of n of its images; a contiguous copy of x if it lies in any other way."""
    pixels, channels = x[0, 0].numel(), x.size(1)
    if not x.is_contiguous():
        if x.movedim(1, -1).is_contiguous():
            return x, View(n * pixels, channels, 1)
        x = x.contiguous()
    return x, View(n, channels, pixels)


@dataclass(frozen=True)
class Tiling:
    """Tiles of outer x channels x inner values, `steps` of them for each program, `splits` programs for all values.

    It depends on the shape of a group alone, so a worker's bits are the same in a micro batch of any size.
    """

    outer: int
    channels: int
    inner: int
    steps: int
    splits: int

    @classmethod
    def of(cls, view: View) -> Tiling:
        channels = min(64, power_of_two(view.channels)) if view.inner == 1 else 1
        inner = min(1024, power_of_two(view.inner))
        outer = min(TILE // (channels * inner), power_of_two(view.outer))
        tiles, inner_blocks = ceil_div(view.outer, outer), ceil_div(view.inner, inner)
        wanted = ceil_div(PROGRAMS, ceil_div(view.channels, channels) * inner_blocks)
        steps = ceil_div(tiles, min(wanted, max(1, MOST_SPLITS // inner_blocks)))
        return cls(outer, channels, inner, steps, ceil_div(tiles, steps) * inner_blocks)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least this number."""
    return 1 << (number - 1).bit_length()
