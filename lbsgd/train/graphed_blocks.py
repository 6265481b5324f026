"""A network's residual blocks as `graphs` runs them: first plainly, then recorded, then replayed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lbsgd.algorithm.network_forwards import within_backward
from lbsgd.errors import ConfigError, one_line
from lbsgd.train.recording import CudaRecorder, Recorder, Recording, has_bare_parts

END = 2**31  # a place after all others


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Collect Python's garbage first, and none inside, because freeing GPU memory breaks a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """The recordings of a network's blocks, made together and replayed in the same order, because they share memory.

    A recording may use the memory that the last one has left, as in training. So forwards must come in the order of
    their recording, and backwards in the reverse order. A forward out of order runs plainly. A backward raises.
    """

    def __init__(self, passes: int, recorder: Recorder | None):
        self.passes, self.recorder = passes, recorder
        self.stream: torch.cuda.Stream | None = None
        self.recorded: list[GraphedBlock] = []
        self.forget()

    def forget(self) -> None:
        """Drop all recordings. The next two passes run plainly, and then the blocks are recorded again."""
        for block in self.recorded:
            block.recording = None
        self.recorded = []
        self.ran: list[GraphedBlock] = []  # in the current forward
        self.ran_before: list[GraphedBlock] = []  # in the previous forward
        self.last, self.last_backward = -1, END  # places in `recorded` of the last replays

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what copies cannot share."""
        copied = Graphs(self.passes, self.recorder)
        return dict(vars(copied))

    def begin(self, network: nn.Module, inputs: Any) -> None:
        """Begin a forward of the network: record its blocks if two forwards have run the same ones.

        Raises ConfigError if they cannot be recorded. If they ran plainly instead, processes could differ.
        """
        if not network.training or not torch.is_grad_enabled() or within_autograd():
            return
        self.last, self.last_backward = -1, END
        if not all(block.recording is not None and block.recording.holds() for block in self.recorded):
            self.forget()
        if not self.recorded:
            fitting = [block for block in self.ran if block.fits(self.ran)]
            if fitting and self.ran == self.ran_before:
                try:
                    self.record(fitting)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise ConfigError(
                        f"CUDA graphs: the residual blocks cannot be recorded here ({one_line(error)}); train with "
                        "--no-cuda_graphs, which gives the same bits"
                    ) from error
            self.ran_before, self.ran = self.ran, []

    def record(self, blocks: Sequence[GraphedBlock]) -> None:
        """Record all forwards in order, then all backwards in reverse order."""
        recorder = self.recorder
        if recorder is None:
            self.stream = self.stream or torch.cuda.Stream()  # torch has 32 in all, shared with others
            recorder = CudaRecorder(self.stream)
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with nothing_collected():
            # Each replay must cast the weights. A cast kept by autocast would be the recording's.
            with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
                before = None
                for block in blocks:
                    block.record_forward(recorder, before)
                    before = block
            with torch.autocast("cuda", enabled=False):  # like training's backward
                behind: Recording | None = None
                for block in reversed(blocks):
                    behind = block.record_backward(behind)
        self.recorded = list(blocks)
        for place, block in enumerate(blocks):
            block.place = place


@dataclass(frozen=True)
class Kind:
    """Everything that decides which kernels a block launches, and the address of its input."""

    address: int
    form: tuple[Any, ...]  # shape, strides, type, device
    requires_grad: bool
    autocast: Any

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return cls(x.data_ptr(), (x.shape, x.stride(), x.dtype, x.device), x.requires_grad, autocast)

    def is_like(self, other: Kind) -> bool:
        """Whether both are the same except for the input's address."""
        return replace(self, address=other.address) == other


class GraphedBlock:
    """The forward of one block: plain until the recording, then a replay of it."""

    def __init__(self, block: nn.Module, graphs: Graphs):
        self.block, self.graphs, self.plain = block, graphs, block.forward
        self.recording: Recording | None = None
        self.takes_output = False  # the input lies where the previous block writes it
        self.place = 0
        self.waiting: weakref.ref[Any] | None = None  # the last replay, until its backward comes
        # From the last passes before the recording: inputs, output, and the strides of the output's gradient.
        self.took_before: Kind | None = None
        self.took: Kind | None = None
        self.gave: Kind | None = None
        self.grad_stride: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what copies cannot share. A copy makes its own recording."""
        return {**vars(self), "recording": None, "waiting": None}

    def __call__(self, x: Tensor) -> Tensor:
        if not self.block.training or not torch.is_grad_enabled() or within_autograd():
            return self.as_it_is(x)
        if self.recording is None:
            return self.as_it_is(x) if self.graphs.recorded else self.warm_up(x)
        if not self.can_replay(x, self.recording):
            return self.as_it_is(x)
        self.graphs.last = self.place
        y = Replayed.apply(self, x, *self.recording.parameters)  # type: ignore[no-untyped-call]  # torch's has no types
        return y  # type: ignore[no-any-return]

    def as_it_is(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(x)
        return y

    def can_replay(self, x: Tensor, recording: Recording) -> bool:
        """Whether x is of the recording's kind, and no replay whose backward is still to come would be spoilt."""
        waits = any(block.is_waiting() for block in self.graphs.recorded[self.place :])
        if waits or self.place <= self.graphs.last or self.took is None or not Kind.of(x).is_like(self.took):
            return False
        # A copy into the previous block's output would spoil that block's backward.
        return not self.takes_output or x.data_ptr() == recording.x.data_ptr()

    def is_waiting(self) -> bool:
        return self.waiting is not None and self.waiting() is not None

    # --- before the recording -----------------------------------------------------------------------------------------

    def warm_up(self, x: Tensor) -> Tensor:
        """Run plainly, and note what the recording needs to know."""
        y = self.as_it_is(x)
        self.graphs.ran.append(self)
        self.took_before, self.took = self.took, Kind.of(x)
        self.gave, self.grad_stride = Kind.of(y), None

        def note(grad: Tensor) -> None:
            dense = torch.empty_like(grad).stride() == grad.stride()
            self.grad_stride = (grad if dense else grad.contiguous()).stride()

        if y.requires_grad:
            y.register_hook(note)
        return y

    def fits(self, ran: Sequence[GraphedBlock]) -> bool:
        """Whether two forwards each ran the block once, on the same kind of input, with a gradient and bare parts."""
        if self.took is None or self.took_before is None or not self.took.is_like(self.took_before):
            return False
        return self.grad_stride is not None and ran.count(self) == 1 and has_bare_parts(self.block)

    # --- the recording ------------------------------------------------------------------------------------------------

    def record_forward(self, recorder: Recorder, before: GraphedBlock | None) -> None:
        assert self.took is not None
        shape, stride, dtype, device = self.took.form
        gave = before.gave if before else None
        self.takes_output = gave is not None and (gave.address, gave.form) == (self.took.address, self.took.form)
        if before is not None and before.recording is not None and self.takes_output:
            x = before.recording.y.detach()
        else:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        self.recording = Recording(self.block, self.plain, x.requires_grad_(self.took.requires_grad), recorder)

    def record_backward(self, behind: Recording | None) -> Recording:
        assert self.recording is not None and self.grad_stride is not None
        y = self.recording.y
        if behind is not None and behind.x.data_ptr() == y.data_ptr() and behind.grad_x is not None:
            grad_y = behind.grad_x  # written there by the next block, so a replay copies nothing
        else:
            grad_y = torch.empty_strided(y.shape, self.grad_stride, dtype=y.dtype, device=y.device)
        self.recording.record_backward(grad_y)
        return self.recording


def within_autograd() -> bool:
    """Whether gradient checkpointing reruns a forward inside backward, or hooks take what a forward saves."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return within_backward() or hooks is not None


class Replayed(torch.autograd.Function):
    """A block's replay, forward and backward. Raises RuntimeError for a backward that comes twice or out of order."""

    @staticmethod
    def forward(ctx: Any, block: GraphedBlock, x: Tensor, *parameters: Tensor) -> Tensor:
        assert block.recording is not None
        ctx.recording, ctx.block, ctx.place = block.recording, block, block.place
        block.waiting = weakref.ref(ctx)
        return ctx.recording.forward(x, block.graphs.passes > 1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        block: GraphedBlock = ctx.block
        recording: Recording = ctx.recording
        place: int = ctx.place
        if block.waiting is None or block.waiting() is not ctx or place >= block.graphs.last_backward:
            raise RuntimeError(
                "CUDA graphs: a residual block's backward came twice, or not in the order of the blocks; use "
                "--no-cuda_graphs"
            )
        block.waiting, block.graphs.last_backward = None, place
        return None, *recording.backward(grad_y, block.graphs.passes > 1)
