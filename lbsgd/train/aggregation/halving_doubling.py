"""Recursive halving and doubling (Sec. 4), the paper's all-reduce: 2·log2(p) steps, 2·(p−1)/p of the bytes.

In step d of halving, two processes that differ in bit d of their positions exchange one half of what they still have,
and add. So each ends with 1/p of the sum. Doubling takes the same steps back. Low bits come first, so if a server's
ranks are neighbours, the sum inside the server is complete before a byte leaves it. Every element is summed in one
order, ((g0+g1)+(g2+g3))+..., which depends neither on the buffer's size nor on the process that ends up with the
element. In a ring the order depends on both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist


class HalvingDoubling:
    """The algorithm between p = 2^m processes.

    ranks    the processes in the order of their positions
    group    a group that nothing else uses at the same time
    back     another such group, for messages from higher positions to lower; by default the same group. gloo keeps one
             connection per pair and group, and sends at half the speed while it receives on it

    Buffers are flat and contiguous, and their length is a multiple of p.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        group: dist.ProcessGroup | None,
        rank: int,
        back: dist.ProcessGroup | None = None,
    ):
        self.ranks, self.position = ranks, ranks.index(rank)
        self.up, self.down = group, back or group
        self.scratch: dict[torch.dtype, torch.Tensor] = {}

    def all_reduce(self, buffer: torch.Tensor) -> None:
        """Put the sum over the processes into each process's buffer."""
        self.reduce_scatter(buffer)
        self.all_gather(buffer)

    def reduce_scatter(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return this process's share of the sum as a view of the buffer. The rest of the buffer is undefined."""
        share = buffer
        for bit, kept, sent in self.halves(buffer):
            received = self.room(kept)
            self.exchange(bit, sent, received)
            kept.add_(received)
            share = kept
        return share

    def all_gather(self, buffer: torch.Tensor) -> None:
        """Fill the buffer with the shares of all processes, which lie where `reduce_scatter` left them."""
        for bit, kept, other in reversed([*self.halves(buffer)]):
            self.exchange(bit, kept, other)

    def halves(self, buffer: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (bit, half that this process keeps, half that it sends) for each bit, the lowest first."""
        bit = 1
        while bit < len(self.ranks):
            low, high = buffer.chunk(2)
            buffer, given = (high, low) if self.position & bit else (low, high)
            yield bit, buffer, given
            bit *= 2

    def exchange(self, bit: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        partner = self.ranks[self.position ^ bit]
        ways = (self.down, self.up) if self.position & bit else (self.up, self.down)
        exchange([(partner, sent)], [(partner, received)], *ways)

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for a half, which is reused the next time."""
        room = self.scratch.get(like.dtype)
        if room is None or room.numel() < like.numel():
            room = self.scratch[like.dtype] = torch.empty_like(like)
        return room[: like.numel()]


def exchange(
    sent: Sequence[tuple[int, torch.Tensor]],
    received: Sequence[tuple[int, torch.Tensor]],
    group: dist.ProcessGroup | None,
    back: dist.ProcessGroup | None,
) -> None:
    """Send to other ranks through one group while receiving through another. Return when both are done."""
    out = [dist.P2POp(dist.isend, tensor, rank, group) for rank, tensor in sent]
    home = [dist.P2POp(dist.irecv, tensor, rank, back) for rank, tensor in received]
    # NCCL waits forever unless one call holds the messages of both ways, and a call takes only one group.
    calls = [out + home] if group is back else [out, home]
    for work in [work for messages in calls if messages for work in dist.batch_isend_irecv(messages)]:
        work.wait()
