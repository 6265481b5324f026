"""Collective calls with the backend's own algorithms and the interface of `HalvingDoubling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from lbsgd.train.aggregation.halving_doubling import exchange


class Collective(Protocol):
    """Sums flat buffers between some processes."""

    def all_reduce(self, buffer: torch.Tensor) -> None: ...
    def reduce_scatter(self, buffer: torch.Tensor) -> torch.Tensor: ...
    def all_gather(self, buffer: torch.Tensor) -> None: ...


class Backend:
    """The backend's calls.

    gloo's reduce-scatter takes 12 times as long as its all-reduce, so instead each process sends every other its share.

    ranks, group: as in `HalvingDoubling`. Lengths of buffers are multiples of the number of ranks.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None, rank: int):
        self.ranks, self.group, self.position = ranks, group, ranks.index(rank)

    def all_reduce(self, buffer: torch.Tensor) -> None:
        dist.all_reduce(buffer, group=self.group)

    def reduce_scatter(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return this process's share of the sum, a view of its buffer. It is summed in the order of the ranks."""
        shares = buffer.chunk(len(self.ranks))
        mine = shares[self.position]
        if buffer.is_cuda:
            dist.reduce_scatter_tensor(mine, buffer, group=self.group)
            return mine
        others = [torch.empty_like(mine) if place != self.position else mine.clone() for place in range(len(shares))]
        self.exchange(shares, others)
        mine.copy_(others[0])
        for other in others[1:]:
            mine.add_(other)
        return mine

    def all_gather(self, buffer: torch.Tensor) -> None:
        shares = buffer.chunk(len(self.ranks))
        if buffer.is_cuda:
            dist.all_gather_into_tensor(buffer, shares[self.position], group=self.group)
        else:
            self.exchange([shares[self.position]] * len(shares), shares)

    def exchange(self, sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> None:
        """Exchange one tensor with each of the other processes."""
        others = [place for place in range(len(self.ranks)) if place != self.position]
        exchange(
            [(self.ranks[place], sent[place]) for place in others],
            [(self.ranks[place], received[place]) for place in others],
            self.group,
            self.group,
        )
