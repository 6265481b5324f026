"""Batch normalisation over one worker's n images, whatever the hardware (Sec. 2.3).

The paper's loss of an image depends on the n - 1 other images that its worker normalises with it. So n = 32 is a
hyper-parameter of the network and no property of a GPU. Here a process may hold several of the k workers in one micro
batch and take several passes per iteration. Neither shows in the outputs, the gradients or the running statistics.
"""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lbsgd.algorithm.batch_norm_statistics import RunningStatistics, agree_statistics, recomputing_statistics
from lbsgd.algorithm.choices import Scope, Statistics
from lbsgd.algorithm.grouped_norm import at_least_float32, normalise_groups, normalise_over_processes, world_size

__all__ = [
    "PerWorkerBatchNorm",
    "PerWorkerBatchNorm1d",
    "PerWorkerBatchNorm2d",
    "PerWorkerBatchNorm3d",
    "Scope",
    "Statistics",
    "agree_statistics",
    "convert_batch_norm",
    "recomputing_statistics",
]


class PerWorkerBatchNorm(RunningStatistics):
    """Batch norm of every n images by themselves; parameters, buffers and state_dict are torch's.

        y = γ · (x − mean(x)) / √(var(x) + ε) + β     over images g·n .. (g+1)·n of the micro batch, those of worker g

    x is (N, C, ...) with N a multiple of n, in fp16, bf16, fp32 or fp64; γ, β and statistics act in float32 at least.
    In eval mode the running statistics normalise. They move once every `passes` training forwards, once per iteration:

        running ← (1 − momentum) · running + momentum · average over the iteration's workers of mean(x), unbiased var(x)

    Arguments beside those of torch's batch norm:
        per_worker_batch: n.
        passes: training forwards per iteration, the accumulation_steps.
        statistics: "average" over workers as above; "first_worker": process 0's first worker of each iteration alone;
            "recomputed": as average, to be replaced by `recomputing_statistics`.
        scope: "worker" (the paper); "all" (for comparison) normalises over all processes' images of one pass.

    Raises ValueError for arguments that are none of these, and in forward if N is no multiple of n or n images hold a
    single value per channel.
    """

    def __init__(
        self,
        *args: Any,
        per_worker_batch: int,
        passes: int = 1,
        statistics: Statistics = "average",
        scope: Scope = "worker",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._configure(per_worker_batch, passes, statistics, scope)

    def _configure(self, per_worker_batch: int, passes: int, statistics: Statistics, scope: Scope) -> None:
        if per_worker_batch < 1 or passes < 1:
            raise ValueError(f"per_worker_batch ({per_worker_batch}) and passes ({passes}) must be at least 1")
        for name, value, choices in (("statistics", statistics, Statistics), ("scope", scope, Scope)):
            if value not in get_args(choices):
                raise ValueError(f"{name} {value!r} must be one of {get_args(choices)}")
        self.per_worker_batch, self.passes, self.statistics, self.scope = per_worker_batch, passes, statistics, scope
        self._start_statistics()

    def extra_repr(self) -> str:
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's has no types
        ours = ("per_worker_batch", "passes", "statistics", "scope")
        return ", ".join([torchs, *(f"{name}={getattr(self, name)}" for name in ours)])

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        if self.scope == "all" and world_size() > 1:
            output, moments, count = normalise_over_processes(input, weight, bias, self.eps)
        else:
            n = self.per_worker_batch if self.scope == "worker" else len(input)
            output, moments, count = normalise_groups(input, weight, bias, n, self.eps)
        if self.running_mean is not None:
            self._record(moments, count)
        return output


class PerWorkerBatchNorm1d(nn.BatchNorm1d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C) or (N, C, L)."""


class PerWorkerBatchNorm2d(nn.BatchNorm2d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C, H, W)."""


class PerWorkerBatchNorm3d(nn.BatchNorm3d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C, D, H, W)."""


_KINDS: dict[type[_BatchNorm], type[PerWorkerBatchNorm]] = {
    nn.BatchNorm1d: PerWorkerBatchNorm1d,
    nn.BatchNorm2d: PerWorkerBatchNorm2d,
    nn.BatchNorm3d: PerWorkerBatchNorm3d,
    nn.SyncBatchNorm: PerWorkerBatchNorm,
}


def convert_batch_norm(
    model: nn.Module,
    per_worker_batch: int,
    passes: int = 1,
    statistics: Statistics = "average",
    scope: Scope = "worker",
) -> nn.Module:
    """Turn every batch norm of a model, at any depth, into a `PerWorkerBatchNorm` (arguments there); return the model.

    Only a module's class changes: parameters, buffers, hooks, momentum, ε and mode remain the very same objects.
    Raises ValueError for a batch norm that is not torch's own, because whatever it does beyond torch's would be lost.
    """
    for name, module in model.named_modules():
        # By type: torchvision names the shortcuts' batch norms `downsample.1`, so a search for "bn" misses them.
        if isinstance(module, _BatchNorm):
            kind = _KINDS.get(type(module), type(module))
            if not issubclass(kind, PerWorkerBatchNorm):
                raise ValueError(
                    f"{name or 'the model'} is a {kind.__name__}, not torch's own batch norm; put one of"
                    f" {', '.join(plain.__name__ for plain in _KINDS)} in its place before converting"
                )
            module.__class__ = kind
            assert isinstance(module, PerWorkerBatchNorm)
            module._configure(per_worker_batch, passes, statistics, scope)
    return model
