"""The running statistics of `PerWorkerBatchNorm`: moved in training, agreed on, recomputed (Sec. 2.3 and 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbsgd.algorithm.apart import warn_of_buffers_left_apart, warn_of_statistics_left_apart
from lbsgd.algorithm.batch_norm_moves import Kept, Move, move_together
from lbsgd.algorithm.choices import Scope, Statistics
from lbsgd.algorithm.compiled_record import exporting, numbered, record_moments
from lbsgd.algorithm.grouped_norm import at_least_float32
from lbsgd.algorithm.network_forwards import NetworkForwards, within_backward
from lbsgd.algorithm.process_group import world_size
from lbsgd.errors import A_NETWORK, require_type


class RunningStatistics(_BatchNorm):
    """The part of `PerWorkerBatchNorm` that keeps running_mean and running_var, in at least float32.

    `_record` takes the moments of each training forward. The running statistics move once every `passes` forwards. A
    training forward outside of any iteration therefore shifts the count until load_state_dict resets it.
    """

    passes: int
    statistics: Statistics
    scope: Scope

    def _start_statistics(self) -> None:
        # Plain attributes, neither in the state_dict nor cast, because they outlive no iteration and no recomputation.
        self._kept = Kept()
        self._pool: Tensor | None = None  # while recomputing: count, mean and squared deviations so far (3, C)
        self._built_with = self.momentum
        self._forwards = NetworkForwards()
        self._number = numbered(self)
        self._widen()

    @property
    def last(self) -> Tensor | None:
        """The groups' means and variances (2, G, C) that moved the statistics last.

        With CUDA graphs and a single pass they are the graph's own memory, which the next forward overwrites.
        """
        return self._kept.last

    def _widen(self) -> None:
        for name in ("running_mean", "running_var"):
            self._buffers[name] = at_least_float32(self._buffers[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's has no types
        self._number = numbered(self)  # a copy is another layer

    def _running(self) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        return mean, var

    def _record(self, moments: Tensor, count: int) -> None:
        """Take in the groups' means and unbiased variances (2, G, C), each over `count` values per channel."""
        assert self.num_batches_tracked is not None
        running, tracked = self._running(), self.num_batches_tracked
        if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            self.take_in(moments, count, running, tracked, together=self._forwards.current is not None)
        elif not exporting():
            record_moments(self._number, self._forwards.number, moments, count, *running, tracked)
        elif self.passes == 1:
            self._move(moments, running, tracked)
        else:
            raise ValueError(
                f"an exported graph cannot count the {self.passes} passes of an iteration: export model.eval(), or"
                " convert with passes=1"
            )

    def take_in(
        self, moments: Tensor, count: int, running: tuple[Tensor, Tensor], tracked: Tensor, *, together: bool = False
    ) -> None:
        """Do the work of `_record` on the given statistics: the layer's own or a compiler's stand-ins.

        together: whether all layers' statistics may move at once when the network's forward ends.
        """
        if within_backward():
            return  # that forward is already recorded
        if self._pool is not None:
            self._pool = self._pooled(self._pool, moments.double(), count)
            return
        # The caller re-estimates the statistics, as update_bn does, and each forward counts.
        if self.momentum in (None, 1.0) and self.momentum != self._built_with:
            self._move(moments, running, tracked)
            return
        kept = self._kept
        pending = kept.pending.setdefault(kept.use_in(self._forwards.current), [])
        pending.append(moments)
        if self.momentum is None:  # an average over all passes needs no whole iterations, and update_bn may give none
            self._move(moments, running, tracked)
        if len(pending) >= self.passes:
            kept.last = last = pending[0] if len(pending) == 1 else torch.cat(pending, dim=1)
            pending.clear()
            if self.momentum is not None:
                self._move(last, running, tracked, together=together)

    def _pooled(self, pool: Tensor, moments: Tensor, count: int) -> Tensor:
        if self.scope == "all" and world_size() > 1 and dist.get_rank() > 0:
            return pool  # all processes hold the moments of the same images, which count once
        mean, var = moments
        groups = torch.stack([torch.full_like(mean, count), mean, var * (count - 1)])
        return _combine(torch.cat([pool[:, None], groups], dim=1))

    def _move(
        self, moments: Tensor, running: tuple[Tensor, Tensor], tracked: Tensor, *, together: bool = False
    ) -> None:
        if self.statistics == "first_worker":
            moments = moments[:, :1]
        if together and self.momentum is not None:
            self._forwards.at_the_end(move_together, Move(*running, tracked, moments, self.momentum))
            return
        tracked.add_(1)
        # momentum None is torch's cumulative average
        momentum = 1 / tracked.item() if self.momentum is None else self.momentum
        # One mean over all the iteration's groups, so that the split into passes changes no bit.
        for statistic, average in zip(running, moments.mean(1), strict=True):
            statistic.lerp_(average, momentum)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as torch does. The next forward begins an iteration; the moments of earlier passes are dropped."""
        self._kept.pending.clear()
        super()._load_from_state_dict(*args, **kwargs)
        self._widen()  # with assign=True they are the file's own tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        """Move or cast as every module does, but never cast the running statistics to half precision."""
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and at_least_float32(cast) is not cast:
                self._buffers[name] = buffer.to(cast.device, torch.float32)  # from before the cast, not rounded to half
        return self


@torch.no_grad()
def agree_statistics(model: nn.Module) -> None:
    """Make the running statistics r of all processes equal, before evaluation or a checkpoint; a collective call.

    "first_worker" takes process 0's. Otherwise r becomes the mean over the processes p. Averaging this late loses
    nothing: r_p ← (1 − m)·r_p + m·s_p is linear, so mean_p(r_p) moves by mean_p(s_p). That is the mean over all k
    workers, because every process holds equally many. One process with all k workers would hold the same.
    Any other batch norm or buffer stays as it is. Warns if such a batch norm is trained, or if such a buffer of the
    network differs between processes.
    """
    require_type(model, nn.Module, *A_NETWORK)
    if world_size() == 1:
        return
    warn_of_statistics_left_apart(model)
    warn_of_buffers_left_apart(model)
    layers = _tracking_layers(model)
    if first := [layer for layer in layers if layer.statistics == "first_worker"]:
        flat = _running_statistics(first)
        dist.broadcast(flat, src=0)
        _set_running_statistics(first, flat)
    if averaged := [layer for layer in layers if layer.statistics != "first_worker"]:
        flat = _running_statistics(averaged)
        dist.all_reduce(flat)
        _set_running_statistics(averaged, flat / world_size())


@contextmanager
def recomputing_statistics(model: nn.Module) -> Iterator[None]:
    """Replace the running statistics by the exact statistics of the images seen inside (Sec. 5.2, Fig. 4).

        with torch.no_grad(), recomputing_statistics(model.train()):
            for images in training_images:
                model(images)

    The forwards normalise per worker, as in training. Leaving is a collective call: running_mean and running_var become
    the mean and unbiased variance of all values in all processes' forwards. A process may have made none.
    num_batches_tracked and an iteration under way stay as they are, and so do frozen layers (in eval mode).
    Raises ValueError if no layer saw anything, or a layer in training mode did not.
    """
    layers = [layer for layer in _tracking_layers(model) if layer.track_running_stats]
    for layer in layers:
        mean, _ = layer._running()
        layer._pool = torch.zeros(3, layer.num_features, dtype=torch.float64, device=mean.device)
    try:
        yield
        pools = [layer._pool for layer in layers if layer._pool is not None]
    finally:
        for layer in layers:
            layer._pool = None
    if layers:
        _take_over(layers, _combine(_of_all_processes(torch.cat(pools, dim=1))))


def _take_over(layers: Sequence[RunningStatistics], pooled: Tensor) -> None:
    """Set the statistics of the layers that saw values to the pooled ones, (3, ΣC) side by side."""
    parts = pooled.split([layer.num_features for layer in layers], dim=1)
    seen = {layer: part for layer, part in zip(layers, parts, strict=True) if part[0].all()}
    if not seen or any(layer.training and layer not in seen for layer in layers):
        raise ValueError("statistics cannot be recomputed: a batch norm made no forward in training mode")
    count, mean, m2 = torch.cat(list(seen.values()), dim=1)
    _set_running_statistics(list(seen), torch.stack([mean, m2 / (count - 1)]))


def _combine(parts: Tensor) -> Tensor:
    """Pool the exact count, mean and sum of squared deviations of K sets of values: (3, K, C) -> (3, C)."""
    count, mean, m2 = parts
    total = count.sum(0)
    pooled_mean = (count * mean).sum(0) / total
    return torch.stack([total, pooled_mean, (m2 + count * (mean - pooled_mean).square()).sum(0)])


def _of_all_processes(part: Tensor) -> Tensor:
    """Gather (3, C) of every process: (3, world_size, C)."""
    parts = [torch.empty_like(part) for _ in range(world_size())]
    if len(parts) == 1:
        return part[:, None]
    dist.all_gather(parts, part)
    return torch.stack(parts, dim=1)


def _tracking_layers(model: nn.Module) -> list[RunningStatistics]:
    return [m for m in model.modules() if isinstance(m, RunningStatistics) and m.running_mean is not None]


def _running_statistics(layers: Sequence[RunningStatistics]) -> Tensor:
    """Put all layers' running means and variances side by side (2, ΣC), for a single collective call."""
    return torch.cat([torch.stack(layer._running()) for layer in layers], dim=1)


def _set_running_statistics(layers: Sequence[RunningStatistics], flat: Tensor) -> None:
    parts = flat.split([layer.num_features for layer in layers], dim=1)
    for layer, moments in zip(layers, parts, strict=True):
        for running, moment in zip(layer._running(), moments, strict=True):
            running.copy_(moment)
