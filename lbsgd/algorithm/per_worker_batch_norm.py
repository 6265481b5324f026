"""Batch normalisation over one worker's n images, on any hardware (Sec. 2.3).

In the paper, an image's loss depends on the n - 1 other images that its worker normalises with it. So n = 32 is a
hyper-parameter of the network, not a property of a GPU. Here a process may hold several of the k workers in one micro
batch and take several passes per iteration. Neither affects the outputs, the gradients or the running statistics.
"""

from __future__ import annotations

from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from lbsgd.algorithm.batch_norm_statistics import RunningStatistics
from lbsgd.algorithm.choices import Implementation, Scope, Statistics
from lbsgd.algorithm.grouped_norm import at_least_float32, normalise_groups, normalise_over_processes
from lbsgd.algorithm.network_forwards import within_backward
from lbsgd.algorithm.process_group import world_size
from lbsgd.errors import require_number


class PerWorkerBatchNorm(RunningStatistics):
    """Batch norm of each group of n images; parameters, buffers and state_dict are torch's.

        y = γ · (x − mean(x)) / √(var(x) + ε) + β     over images g·n .. (g+1)·n of the micro batch, those of worker g

    x is (N, C, ...) with N a multiple of n, in fp16, bf16, fp32 or fp64; γ, β and statistics act in at least float32.
    If the network has made more rows of its images, such as tokens or windows, a pass must hold one worker's n images.
    Then all rows are normalised together.
    Eval mode uses the running statistics; without any it normalises all N images together, as torch's batch norm does.
    The running statistics move once every `passes` training forwards, which is once per iteration:

        running ← (1 − momentum) · running + momentum · average over the iteration's workers of mean(x), unbiased var(x)

    All layers' statistics move together at the end of a forward of the converted network.
    A module that one forward uses twice moves its statistics twice per iteration, first by all passes' first uses. A
    forward that gradient checkpointing repeats inside backward does not count. A training forward outside of any
    iteration does count, and shifts the count of later ones until load_state_dict resets it. If momentum is None, or
    has become 1 since the layer was built, the caller averages over forwards, as torch.optim.swa_utils.update_bn does,
    and every forward moves the statistics.

    Arguments in addition to those of torch's batch norm:
        per_worker_batch: n.
        passes: training forwards per iteration, the accumulation_steps.
        statistics: "average" over workers as above; "first_worker": process 0's first worker of each iteration alone;
            "recomputed": as average, to be replaced by `recomputing_statistics`.
        scope: "worker" (the paper); "all" (for comparison) normalises over all processes' images of one pass.
        implementation: "loop"; "triton" computes training forwards on a GPU with the kernels of `fused_norm`.

    Raises ValueError for any other argument. forward raises it if N is not a multiple of n, if n images hold a single
    value per channel, or if several workers' images have become more rows than images.
    """

    implementation: Implementation = "loop"  # also of layers pickled before there was a choice

    def __init__(
        self,
        *args: Any,
        per_worker_batch: int,
        passes: int = 1,
        statistics: Statistics = "average",
        scope: Scope = "worker",
        implementation: Implementation = "loop",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_choices(per_worker_batch, passes, statistics, scope, implementation)
        self._configure(per_worker_batch, passes, statistics, scope, implementation)

    def _configure(
        self,
        per_worker_batch: int,
        passes: int,
        statistics: Statistics,
        scope: Scope,
        implementation: Implementation,
    ) -> None:
        self.per_worker_batch, self.passes, self.statistics, self.scope = per_worker_batch, passes, statistics, scope
        self.implementation = implementation
        self._start_statistics()

    def extra_repr(self) -> str:
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's has no types
        ours = ("per_worker_batch", "passes", "statistics", "scope", "implementation")
        return ", ".join([torchs, *(f"{name}={getattr(self, name)}" for name in ours)])

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def __prepare_scriptable__(self) -> NoReturn:
        raise ValueError(
            "torch.jit.script takes torch's own batch norm only: load this network's state_dict into the network as it"
            " was before its conversion, or use torch.jit.trace or torch.export"
        )

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.training:
            return self.forward_in_training(input)
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.batch_norm(input, mean, var, weight, bias, mean is None, 0.0, self.eps)

    def forward_in_training(self, input: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Normalise per worker and record the moments; the ReLU and the residual are for `fused_blocks` alone."""
        self._check_input_dim(input)
        if self.scope == "all" and world_size() > 1:
            weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
            output, moments, count = normalise_over_processes(input, weight, bias, self.eps)
        else:
            rows = input.size(0)
            n = self._rows_of_a_worker(rows) if self.scope == "worker" else rows
            affine = self.weight, self.bias
            how = self.implementation
            output, moments, count = normalise_groups(input, *affine, n, self.eps, how, relu=relu, residual=residual)
        if self.track_running_stats and self.running_mean is not None:
            self._record(moments, count)
        return output

    def _rows_of_a_worker(self, rows: int) -> int:
        """Return n, or all rows if the network has made more rows of one worker's images, such as tokens or windows."""
        images, n = self._forwards.images, self.per_worker_batch
        if images is None and not torch.compiler.is_compiling() and within_backward():
            images = self._forwards.last_images
        if images is None or rows <= images:
            return n
        if images != n:
            raise ValueError(
                f"the network makes {rows} rows of {images} images before a batch norm, which cannot tell one worker's"
                f" rows from another's: give each pass the images of one worker, a micro batch of {n}"
            )
        return rows


def require_choices(
    per_worker_batch: int, passes: int, statistics: Statistics, scope: Scope, implementation: Implementation
) -> None:
    """Raise ValueError for arguments that no `PerWorkerBatchNorm` can have."""
    require_number(per_worker_batch, "per_worker_batch", 1, whole=True)
    require_number(passes, "passes", 1, whole=True)
    for name, value, choices in (
        ("statistics", statistics, Statistics),
        ("scope", scope, Scope),
        ("implementation", implementation, Implementation),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name} {value!r} must be one of {get_args(choices)}")


def as_leaf(module: nn.Module, input: Proxy) -> Tensor:
    """Have torch.fx record a call of the whole module, as it does for torch's own layers."""
    tracer: Any = input.tracer
    output: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})
    return output


class PerWorkerBatchNorm1d(nn.BatchNorm1d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C) or (N, C, L)."""


class PerWorkerBatchNorm2d(nn.BatchNorm2d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C, H, W)."""


class PerWorkerBatchNorm3d(nn.BatchNorm3d, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm` of (N, C, D, H, W)."""
