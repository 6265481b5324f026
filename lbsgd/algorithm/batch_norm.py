"""Batch normalisation over one worker's n images, whatever the hardware (Sec. 2.3).

The paper's loss of an image depends on the n - 1 others that its worker normalises with it, so n = 32 is a
hyper-parameter of the network and no property of a GPU. Here a process may hold several of the k workers in one micro
batch and take several passes for one iteration; neither shows in the outputs, the gradients or the running statistics.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lbsgd.algorithm.grouped_norm import at_least_float32, normalise_groups, normalise_over_processes

STATISTICS = ("average", "first_worker", "recomputed")
SCOPES = ("worker", "all")


class PerWorkerBatchNorm(_BatchNorm):
    """Batch norm of every n images by themselves; parameters, buffers and state_dict are torch's.

        y = γ · (x − mean(x)) / √(var(x) + ε) + β     over images g·n .. (g+1)·n of the micro batch, those of worker g

    x is (N, C, ...) with N a multiple of n, in fp16, bf16, fp32 or fp64; γ, β and statistics act in float32 at least.
    In eval mode the running statistics normalise. They move once every `passes` training forwards, once an iteration:

        running ← (1 − momentum) · running + momentum · average over the iteration's workers of mean(x), unbiased var(x)

    Arguments beside those of torch's batch norm:
        per_worker_batch: n.
        passes: training forwards in one iteration, the accumulation_steps.
        statistics: "average" over workers as above; "first_worker": process 0's first worker of each iteration alone;
            "recomputed": as average, to be replaced by `recomputing_statistics`.
        scope: "worker" (the paper); "all" (for comparison) normalises over all processes' images of one pass.

    Raises ValueError where N is no multiple of n, or n images hold a single value a channel.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # anything from (N, C) on

    def __init__(self, *args, per_worker_batch, passes=1, statistics="average", scope="worker", **kwargs):
        super().__init__(*args, **kwargs)
        self._configure(per_worker_batch, passes, statistics, scope)

    def _configure(self, per_worker_batch, passes, statistics, scope):
        if per_worker_batch < 1 or passes < 1:
            raise ValueError(f"per_worker_batch ({per_worker_batch}) and passes ({passes}) must be at least 1")
        if statistics not in STATISTICS or scope not in SCOPES:
            raise ValueError(f"statistics {statistics!r} must be one of {STATISTICS}, scope {scope!r} one of {SCOPES}")
        self.per_worker_batch, self.passes, self.statistics, self.scope = per_worker_batch, passes, statistics, scope
        # Plain attributes, for they never outlive an iteration or a recomputation: not in the state_dict, never cast.
        self._iteration_moments = []  # each forward's (2, G, C), until the iteration ends; ResNet-50: 0.2 MB a worker
        self._pool = None  # while recomputing: count, mean and squared deviations of all values so far (3, C)
        for name in ("running_mean", "running_var"):
            self._buffers[name] = at_least_float32(self._buffers[name])

    def extra_repr(self):
        ours = ("per_worker_batch", "passes", "statistics", "scope")
        return ", ".join([super().extra_repr()] + [f"{name}={getattr(self, name)}" for name in ours])

    def forward(self, input):
        self._check_input_dim(input)
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        if self.scope == "all" and _world_size() > 1:
            output, moments, count = normalise_over_processes(input, weight, bias, self.eps)
        else:
            n = self.per_worker_batch if self.scope == "worker" else len(input)
            output, moments, count = normalise_groups(input, weight, bias, n, self.eps)
        if self.running_mean is not None:
            self._record(moments, count)
        return output

    def _record(self, moments, count):
        """Takes note of the groups' means and unbiased variances (2, G, C), each over `count` values a channel."""
        if self._pool is not None:
            self._record_in_pool(moments.double(), count)
            return
        self._iteration_moments.append(moments)
        if len(self._iteration_moments) >= self.passes:
            self._move_running_statistics()

    def _record_in_pool(self, moments, count):
        if self.scope == "all" and _world_size() > 1 and dist.get_rank() > 0:
            return  # all processes hold the moments of the same images: they count once
        mean, var = moments
        groups = torch.stack([torch.full_like(mean, count), mean, var * (count - 1)])
        self._pool = _combine(torch.cat([self._pool[:, None], groups], dim=1))

    def _move_running_statistics(self):
        moments = torch.cat(self._iteration_moments, dim=1)
        self._iteration_moments = []
        if self.statistics == "first_worker":
            moments = moments[:, :1]
        self.num_batches_tracked.add_(1)
        # momentum None is torch's cumulative average
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        # All the iteration's groups in one mean: no trace is left of how they were split into passes, not a bit.
        for running, average in zip((self.running_mean, self.running_var), moments.mean(1)):
            running.lerp_(average, momentum)

    def _apply(self, fn, recurse=True):
        """Moves as every module, but a cast to half passes the running statistics by: no round trip through half."""
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if at_least_float32(cast) is not cast:
                self._buffers[name] = buffer.to(cast.device)
        return self


class PerWorkerBatchNorm1d(PerWorkerBatchNorm, nn.BatchNorm1d):
    """`PerWorkerBatchNorm` of (N, C) or (N, C, L)."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class PerWorkerBatchNorm2d(PerWorkerBatchNorm, nn.BatchNorm2d):
    """`PerWorkerBatchNorm` of (N, C, H, W)."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class PerWorkerBatchNorm3d(PerWorkerBatchNorm, nn.BatchNorm3d):
    """`PerWorkerBatchNorm` of (N, C, D, H, W)."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim


_KINDS = {
    nn.BatchNorm1d: PerWorkerBatchNorm1d,
    nn.BatchNorm2d: PerWorkerBatchNorm2d,
    nn.BatchNorm3d: PerWorkerBatchNorm3d,
    nn.SyncBatchNorm: PerWorkerBatchNorm,
}


def convert_batch_norm(model, per_worker_batch, passes=1, statistics="average", scope="worker"):
    """Makes every batch norm of a model, at any depth, a `PerWorkerBatchNorm` (arguments there); returns the model.

    A module only changes its class: parameters, buffers, hooks, momentum, ε and mode remain the very objects they are.
    Raises ValueError for a batch norm that is not torch's own and may do more, which would be lost.
    """
    for name, module in model.named_modules():
        # By type, for torchvision names the shortcuts' batch norms `downsample.1`: a search for "bn" misses them.
        if isinstance(module, _BatchNorm):
            kind = _KINDS.get(type(module), type(module))
            if not issubclass(kind, PerWorkerBatchNorm):
                raise ValueError(
                    f"{name or 'the model'} is a {kind.__name__}, not torch's own batch norm; put one of"
                    f" {', '.join(plain.__name__ for plain in _KINDS)} in its place before converting"
                )
            module.__class__ = kind
            module._configure(per_worker_batch, passes, statistics, scope)
    return model


@torch.no_grad()
def agree_statistics(model):
    """Makes the running statistics r of all processes equal, before evaluation or a checkpoint; a collective call.

    "first_worker" takes process 0's. Otherwise r becomes the mean over the processes p, and averaging this late loses
    nothing: r_p ← (1 − m)·r_p + m·s_p is linear, so mean_p(r_p) moves by mean_p(s_p), which is the mean over all k
    workers, as every process holds equally many. One process with all k workers would hold the same.
    """
    if _world_size() == 1:
        return
    layers = _tracking_layers(model)
    if first := [layer for layer in layers if layer.statistics == "first_worker"]:
        flat = _running_statistics(first)
        dist.broadcast(flat, src=0)
        _set_running_statistics(first, flat)
    if averaged := [layer for layer in layers if layer.statistics != "first_worker"]:
        flat = _running_statistics(averaged)
        dist.all_reduce(flat)
        _set_running_statistics(averaged, flat / _world_size())


@contextmanager
def recomputing_statistics(model):
    """Replaces the running statistics by the exact ones of the images seen inside (Sec. 5.2, Fig. 4).

        with torch.no_grad(), recomputing_statistics(model.train()):
            for images in training_images:
                model(images)

    The forwards normalise per worker, as in training. On leaving, a collective call, running_mean and running_var are
    the mean and unbiased variance of all values in all processes' forwards, of which a process may have had none.
    num_batches_tracked and an iteration under way are left alone. Raises ValueError where a layer saw nothing at all.
    """
    layers = _tracking_layers(model)
    for layer in layers:
        layer._pool = torch.zeros(3, layer.num_features, dtype=torch.float64, device=layer.running_mean.device)
    try:
        yield
        count, mean, m2 = _combine(_of_all_processes(torch.cat([layer._pool for layer in layers], dim=1)))
    finally:
        for layer in layers:
            layer._pool = None
    if not count.all():
        raise ValueError("statistics cannot be recomputed: a batch norm made no forward in training mode")
    _set_running_statistics(layers, torch.stack([mean, m2 / (count - 1)]))


def _combine(parts):
    """Exact count, mean and sum of squared deviations of K sets of values taken together: (3, K, C) -> (3, C)."""
    count, mean, m2 = parts
    total = count.sum(0)
    pooled_mean = (count * mean).sum(0) / total
    return torch.stack([total, pooled_mean, (m2 + count * (mean - pooled_mean).square()).sum(0)])


def _of_all_processes(part):
    """(3, C) of this process -> (3, world_size, C)."""
    parts = [torch.empty_like(part) for _ in range(_world_size())]
    if len(parts) == 1:
        return part[:, None]
    dist.all_gather(parts, part)
    return torch.stack(parts, dim=1)


def _tracking_layers(model):
    return [m for m in model.modules() if isinstance(m, PerWorkerBatchNorm) and m.running_mean is not None]


def _running_statistics(layers):
    """All layers' running means and variances side by side (2, ΣC): one collective call serves for all."""
    return torch.cat([torch.stack([layer.running_mean, layer.running_var]) for layer in layers], dim=1)


def _set_running_statistics(layers, flat):
    for layer, (mean, var) in zip(layers, flat.split([layer.num_features for layer in layers], dim=1)):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1
