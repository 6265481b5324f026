"""Move the running statistics of all layers at once when the network's forward ends (Sec. 2.3).

Layer by layer, the host would launch eight small kernels for each of ResNet-50's 53 layers. The launches take longer
than an H100 needs to compute an update of 32 images (docs/experiments.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept:
    """What a layer keeps from one training forward to the next.

    These are not attributes of the layer, because setting a module's attribute takes the host microseconds.

    pending    the moments (2, G, C) of each pass of the iteration under way, by use within a forward
    last       the moments that moved the statistics last
    """

    def __init__(self) -> None:
        self.pending: dict[int, list[Tensor]] = {}
        self.last: Tensor | None = None
        self.forward: int | None = None  # the network's forward that used the layer last, and which use in it that was
        self.use = 0

    def use_in(self, forward: int | None) -> int:
        """Return how often the network's forward under way has used the layer before; 0 outside of any forward."""
        self.use = self.use + 1 if forward is not None and forward == self.forward else 0
        self.forward = forward
        return self.use


class Move(NamedTuple):
    """A layer's running statistics, the moments (2, G, C) of an iteration that move them, and the momentum m."""

    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor
    moments: Tensor
    momentum: float


def move_together(moves: Sequence[Move]) -> None:
    """Move the statistics of all layers: running ← (1 − m) · running + m · mean of the moments over the groups."""
    alike: dict[tuple[Any, ...], list[Move]] = {}
    seen: Counter[int] = Counter()  # a layer that a forward uses twice moves twice, one after the other
    for move in moves:
        use, moments = seen[id(move.running_mean)], move.moments
        seen[id(move.running_mean)] += 1
        kind = use, move.momentum, moments.shape[1], moments.dtype, moments.device
        alike.setdefault(kind, []).append(move)
    for _, group in sorted(alike.items(), key=lambda item: item[0][0]):
        move_alike(group)


def move_alike(moves: Sequence[Move]) -> None:
    """Move statistics that share the momentum, the number of groups, the type and the device."""
    means, variances = [move.running_mean for move in moves], [move.running_var for move in moves]
    averages = torch.cat([move.moments for move in moves], dim=2).mean(1)
    targets = [part for row in averages for part in row.split([len(mean) for mean in means])]
    torch._foreach_lerp_(means + variances, targets, moves[0].momentum)
    torch._foreach_add_([move.tracked for move in moves], 1)
