"""A residual block's forward and backward, recorded once and then replayed, on a GPU as CUDA graphs (`graphs`).

A replay runs the recording's kernels on their old addresses, without any Python. So it overwrites the tensors of the
previous replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lbsgd.algorithm.batch_norm_statistics import RunningStatistics
from lbsgd.algorithm.fused_blocks import is_bare

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Replay]:
        """Return the function's tensors, and a callable that computes their values again, in place."""


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool, because they are replayed in the order of their recording."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), stream

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Replay]:
        graph = torch.cuda.CUDAGraph()
        # thread_local, because autograd's own thread and NCCL's watchdog may query the GPU meanwhile.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            tensors = function()
        return tensors, graph.replay


def has_bare_parts(block: nn.Module) -> bool:
    """Whether calling a block's parts runs their classes' forwards and nothing else."""
    return all(map(is_bare, parts_of(block)))


def parts_of(block: nn.Module) -> list[nn.Module]:
    """Return the modules within a block, at any depth."""
    return [part for part in block.modules() if part is not block]


class Recording:
    """The recording of a block: its forward when this is built, its backward by `record_backward`.

    x           an input of the kind that the block takes, or the previous block's output, which saves a copy
    forward     the block's own
    """

    def __init__(self, block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, recorder: Recorder):
        self.recorder, self.x = recorder, x
        self.parameters = [each for each in block.parameters() if each.requires_grad]
        self.parts = [(part, part.training) for part in parts_of(block)]
        self.tensors = [
            (table, name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for part in block.modules()
            for table in (part._parameters, part._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.notes: list[tuple[RunningStatistics, int]] = []  # each batch norm that ran, and its values per channel
        self.output: Tensor | None = None  # with what its backward needs

        def run() -> Sequence[Tensor]:
            with collecting(block) as found, standing_in(block) as self.stand_ins:
                self.output = forward(self.x)
            self.notes = [(norm, count) for norm, _, count in found]
            return [self.output.detach(), *(moments for _, moments, _ in found)]

        (self.y, *self.moments), self.replay_forward = recorder.record(run)

    def holds(self) -> bool:
        """Whether the block still has the recorded tensors, at the same addresses and trained alike, and bare parts."""
        return all(part.training is mode and is_bare(part) for part, mode in self.parts) and all(
            table.get(name) is tensor and tensor.data_ptr() == address and tensor.requires_grad is trained
            for table, name, tensor, address, trained in self.tensors
        )

    def record_backward(self, grad_y: Tensor) -> None:
        """Record the backward from this gradient of y. Each replay brings its values.

        A parameter that the forward does not use has no gradient, as without a recording.
        """
        self.grad_y = grad_y
        reached: list[bool] = []

        def run() -> Sequence[Tensor]:
            assert self.output is not None
            wanted = [self.x] * self.x.requires_grad + self.stand_ins
            grads = torch.autograd.grad(self.output, wanted, self.grad_y, allow_unused=True)
            reached[:] = [grad is not None for grad in grads]
            return [grad for grad in grads if grad is not None]

        found, self.replay_backward = self.recorder.record(run)
        values = iter(found)
        grads = [next(values) if has_one else None for has_one in reached]
        self.grad_x = grads[0] if self.x.requires_grad else None
        self.grads = grads[self.x.requires_grad :]

    def forward(self, x: Tensor, keeps_moments: bool) -> Tensor:
        """Replay the forward on x and record its batch norms' moments. keeps_moments: they must outlast a replay."""
        if x.data_ptr() != self.x.data_ptr():
            self.x.detach().copy_(x)
        increment_version(self.y)  # whatever has saved the previous replay's values gets autograd's error
        self.replay_forward()
        for (norm, count), moments in zip(self.notes, self.moments, strict=True):
            norm._record(moments.clone() if keeps_moments else moments, count)
        return self.y.detach()

    def backward(self, grad_y: Tensor, keeps_gradients: bool) -> tuple[Tensor | None, ...]:
        """Replay the backward, and return the gradients of x and of the parameters.

        keeps_gradients: they must outlast the next replay. autograd copies a gradient that is held elsewhere, and else
        makes the gradient itself `.grad`.
        """
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if parameter.grad is not None and grad is not None and parameter.grad.data_ptr() == grad.data_ptr():
                parameter.grad = parameter.grad.clone()  # from a backward without an update after it
        if grad_y.data_ptr() != self.grad_y.data_ptr():
            self.grad_y.copy_(grad_y)
        self.replay_backward()
        grad_x = None if self.grad_x is None else self.grad_x.detach()
        return grad_x, *(grad if keeps_gradients or grad is None else grad.detach() for grad in self.grads)


@contextmanager
def standing_in(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Replace a block's parameters by autograd leaves that share their memory. Yield the trainable ones.

    autograd ties a parameter's leaf to the stream on which it was first requested, as ZeRO does, and a recording must
    not wait for that stream. Nor may it call the parameter's hooks, which are for gradients of training.
    """
    own = {id(each): each for each in block.parameters()}
    stand_ins = {key: nn.Parameter(each.detach(), each.requires_grad) for key, each in own.items()}
    places = [(part._parameters, name) for part in block.modules() for name in part._parameters]
    before = [(table, name, table[name]) for table, name in places]
    for table, name, parameter in before:
        if parameter is not None:
            table[name] = stand_ins[id(parameter)]
    try:
        yield [stand_ins[key] for key, each in own.items() if each.requires_grad]
    finally:
        for table, name, parameter in before:
            table[name] = parameter


@contextmanager
def collecting(block: nn.Module) -> Iterator[list[tuple[RunningStatistics, Tensor, int]]]:
    """Collect (layer, moments, count) of the forwards inside, in order, without moving the running statistics."""
    norms: list[Any] = [module for module in block.modules() if isinstance(module, RunningStatistics)]
    found: list[tuple[RunningStatistics, Tensor, int]] = []

    def note_of(norm: RunningStatistics) -> Callable[[Tensor, int], None]:
        return lambda moments, count: found.append((norm, moments, count))

    for norm in norms:
        norm._record = note_of(norm)
    try:
        yield found
    finally:
        for norm in norms:
            del norm._record
