"""--cuda_graphs: each residual block's forward, and its backward, is launched at once, as a CUDA graph.

With n = 32 images a GPU computes faster than its host launches kernels one by one (docs/gpu.md). One graph per block,
so that gradients still arrive block by block, and what hangs on them, aggregation and ZeRO, runs as before. What could
differ from the recording is looked at before each replay: another size, mode or precision runs the block as it is, and
weights that lie elsewhere are recorded again. Evaluation runs as it is. The bits are those of the plain run.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.resnet import BasicBlock, Bottleneck

from lbsgd.algorithm.fused_blocks import FusedBasicBlock, FusedBottleneck, is_bare
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm, PerWorkerBatchNorm2d
from lbsgd.errors import ConfigError
from lbsgd.train.kernels import kind_of_device
from lbsgd.train.recording import CudaRecorder, Recorder, Recording

BLOCKS = BasicBlock, Bottleneck, FusedBasicBlock, FusedBottleneck
LAYERS = nn.Conv2d, PerWorkerBatchNorm2d, nn.ReLU, nn.Sequential, nn.Identity
WARM_UP = 2  # passes that run as they are first: libraries choose their algorithms, and Triton compiles


def graph_blocks(model: nn.Module, passes: int, recorder: Recorder | None = None) -> int:
    """Have each of a network's residual blocks replayed in training; return how many there are.

    passes: those of an update. recorder: by default CUDA's.
    Raises ConfigError without a GPU, and for a network whose blocks cannot be recorded.
    """
    blocks = [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise ConfigError(
            "--cuda_graphs: this network has no residual blocks of torchvision's kind, which are what is recorded; "
            "leave the flag out"
        )
    if not all(map(has_bare_parts, blocks)):
        raise ConfigError(
            "--cuda_graphs: a part of a residual block has hooks or a forward of its own, which a graph would not run; "
            "leave the flag out"
        )
    if any(isinstance(module, PerWorkerBatchNorm) and module.scope == "all" for module in model.modules()):
        raise ConfigError(
            '--cuda_graphs: batch norm of scope "all" waits for the other processes inside a block, which no graph '
            "records; leave the flag out"
        )
    if recorder is None and not torch.cuda.is_available():
        raise ConfigError("--cuda_graphs: there is no GPU here; leave the flag out")
    graphs = Graphs(passes, recorder)
    for block in blocks:
        block.forward = GraphedBlock(block, graphs)  # the instance's own, which no state_dict has
    return len(blocks)


def has_bare_parts(block: nn.Module) -> bool:
    """Whether calls of a block's parts run their classes' forwards and nothing else."""
    return all(is_bare(part) for part in block.modules() if part is not block)


def by_rule(model: nn.Module, world_size: int, device: torch.device, compiled: bool) -> tuple[bool, str]:
    """Return whether training is graphed where nobody says it, and why: where it was measured, and cannot show.

    The blocks must be exactly torchvision's, of layers that do nothing in Python but what a recording keeps.
    """
    blocks = [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if kind_of_device(device) != "cuda":
        return False, f"the rule for {kind_of_device(device)}"
    if world_size > 1:
        return False, "the rule for several processes, with which nobody has measured it"
    if compiled:
        return False, "the rule beside --compile"
    if not blocks or not all(type(block) in BLOCKS and has_bare_parts(block) and of_layers(block) for block in blocks):
        return False, "the rule for a network that is not of torchvision's residual blocks"
    return True, "the rule for one GPU"


def of_layers(block: nn.Module) -> bool:
    return all(type(part) in LAYERS for part in block.modules() if part is not block)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Let Python collect its garbage before and not inside: what frees GPU memory there would spoil a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """The recordings of a network, made together, in the order in which its blocks ran."""

    def __init__(self, passes: int, recorder: Recorder | None):
        self.passes, self.recorder = passes, recorder
        self.ran: list[GraphedBlock] = []  # in the forward under way, or in the one that was recorded
        self.warm = 0

    def note(self, block: GraphedBlock) -> bool:
        """Note that a block is about to run; return whether all can be recorded first."""
        if block in self.ran:  # another forward begins
            self.warm += 1
            if self.warm >= WARM_UP:
                return True
            self.ran = []
        self.ran.append(block)
        return False

    def record(self) -> None:
        """Record all forwards in order, and then the backwards from the last one on, as training runs them.

        So the memory of a recording is free for the next one where it is free in training.
        """
        recorder = self.recorder or CudaRecorder()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # Each replay must cast the weights: a cast that autocast kept would be that of the recording's.
        with nothing_collected(), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            before = None
            for block in self.ran:
                block.record_forward(recorder, before)
                before = block
            behind: Recording | None = None
            for block in reversed(self.ran):
                behind = block.record_backward(behind)

    def forget(self) -> None:
        """Drop all recordings; the next passes run as they are, and are then recorded."""
        for block in self.ran:
            block.recording = None
        self.ran, self.warm = [], 0


class GraphedBlock:
    """The forward of one block: as it is until the recording, and a replay of that afterwards."""

    def __init__(self, block: nn.Module, graphs: Graphs):
        self.block, self.graphs, self.plain = block, graphs, block.forward
        self.recording: Recording | None = None
        self.kind: tuple[Any, ...] = ()
        # Of the last pass before the recording: where input and output lay, and the strides of the output's gradient.
        self.from_to = 0, 0
        self.grad_stride: tuple[int, ...] = ()
        self.waiting: weakref.ref[Any] | None = None  # the last replay, while its backward is to come

    def __call__(self, x: Tensor) -> Tensor:
        if not self.block.training or not torch.is_grad_enabled() or self.is_waiting():
            return self.as_it_is(x)
        if self.recording is not None and self.recording.addresses_now() != self.recording.addresses:
            self.graphs.forget()
        if self.recording is None:
            if not self.graphs.note(self):
                return self.warm_up(x)
            self.graphs.record()
        if signature(x) != self.kind:
            return self.as_it_is(x)
        assert self.recording is not None
        y = Replayed.apply(self, x, *self.recording.parameters)  # type: ignore[no-untyped-call]  # torch's has no types
        return y

    def warm_up(self, x: Tensor) -> Tensor:
        """Run as it is, and note what the recording needs to know."""
        y = self.as_it_is(x)
        self.kind, self.from_to = signature(x), (x.data_ptr(), y.data_ptr())

        def note(grad: Tensor) -> None:
            dense = torch.empty_like(grad).stride() == grad.stride()
            self.grad_stride = (grad if dense else grad.contiguous()).stride()

        y.register_hook(note)
        return y

    def as_it_is(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(x)
        return y

    def is_waiting(self) -> bool:
        """Whether a replay's backward may still come, which another replay would spoil."""
        return self.waiting is not None and self.waiting() is not None

    def record_forward(self, recorder: Recorder, before: GraphedBlock | None) -> None:
        if before is not None and before.recording is not None and before.from_to[1] == self.from_to[0]:
            x = before.recording.y.detach()
        else:
            shape, stride, dtype, device, *_ = self.kind
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        *_, requires_grad, _ = self.kind
        self.recording = Recording(self.block, self.plain, x.requires_grad_(requires_grad), recorder)

    def record_backward(self, behind: Recording | None) -> Recording:
        assert self.recording is not None
        y = self.recording.y
        if behind is not None and behind.x.data_ptr() == y.data_ptr() and behind.grad_x is not None:
            grad_y = behind.grad_x  # written there by the block behind, so a replay has nothing to copy
        else:
            grad_y = torch.empty_strided(y.shape, self.grad_stride, dtype=y.dtype, device=y.device)
        self.recording.record_backward(grad_y)
        return self.recording


def signature(x: Tensor) -> tuple[Any, ...]:
    """Return all that fixes which kernels a block launches."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, autocast


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: GraphedBlock, x: Tensor, *parameters: Tensor) -> Tensor:
        assert block.recording is not None
        ctx.recording, ctx.block = block.recording, block
        block.waiting = weakref.ref(ctx)
        return ctx.recording.forward(x, block.graphs.passes > 1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ctx.block.waiting = None
        return None, *ctx.recording.backward(grad_y, ctx.block.graphs.passes > 1)
