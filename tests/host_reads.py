"""Counts, on a CPU, what would make the host wait for a GPU: reads of tensors' numbers, and tensors made from numbers.

    with HostReads() as reads:
        trainer.update(batches)
    reads.by("lbsgd"), reads.by("deepspeed")

A read waits until the GPU has done all its work. So does a copy of the host's own memory, unless it is pinned;
filling a tensor on the device does not. Operators are seen below autograd, and Python's calls above it, because on
a CPU a tensor's `cpu()` or `tolist()` is no operator. Copies by `to` are not seen; the tests for a GPU see them.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# The host must know the sizes, or values, of their results.
OPERATORS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
}
READS = {"cpu", "numpy", "tolist", "__array__", "pin_memory"}
COPIES = {torch.tensor, torch.as_tensor, torch.asarray}
ROOMS = ("lbsgd", "deepspeed")


class HostReads(TorchDispatchMode):
    """Counts by the innermost caller of ours or of DeepSpeed's: ("lbsgd", "trainer.update", "item")."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = Counter(), Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = function is aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1])
        if function in OPERATORS or by_mask:
            self.count("item" if function is aten._local_scalar_dense.default else str(function))
        return function(*args, **kwargs)

    def count(self, what):
        self.found[*caller(), what] += 1

    def by(self, room):
        """Return the counts of one package: {("trainer.update", "item"): 3}."""
        return {(where, what): count for (package, where, what), count in self.found.items() if package == room}


class Calls(TorchFunctionMode):
    """Python calls that are no operator on a CPU."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        # Without a device the new tensor is the host's own. Calls of `to` do not count: here every device is the CPU.
        if name in READS or (function in COPIES and kwargs.get("device") is not None):
            self.reads.count(name)
        return function(*args, **kwargs)


def caller():
    """Return the package and the place of the innermost frame that is ours or DeepSpeed's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        rooms = [room for room in ROOMS if f"/{room}/" in str(path)]
        if rooms:
            return rooms[0], f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "neither", "-"
