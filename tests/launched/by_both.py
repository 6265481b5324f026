"""Launch each kernel of batch norm by Triton and by `KernelLaunch`, with cuda.c in the place of NVIDIA's driver.

    python tests/launched/by_both.py FOLDER_OF_LIBCUDA

Prints by kernel, as JSON, whether both launches are alike to the byte, and whether their first values are the addresses
of the tensors. Without Triton's search in between, another version of Triton may expect other arguments.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

from lbsgd.algorithm.fused_norm import Launches
from lbsgd.algorithm.norm_tiling import View

GROUPS, CHANNELS, PIXELS, STREAM = 2, 64, 49, 7
MOST_VALUES, BEFORE_VALUES = 32, 7  # as in cuda.c


class AbsentGpu(CudaDriver):
    """Triton's driver for an H100 that is not there."""

    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (9, 0)


class Cuda:
    """The stand-in for the driver, which keeps the last launch."""

    def __init__(self, folder: Path):
        library = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self.num_values = ctypes.c_int.in_dll(library, "num_values")
        self.sizes = (ctypes.c_int * MOST_VALUES).in_dll(library, "sizes")
        self.launch = (ctypes.c_uint64 * (BEFORE_VALUES + MOST_VALUES)).in_dll(library, "launch")

    def expect(self, types):
        """Read values of these types in the next launches."""
        self.num_values.value = len(types)
        self.sizes[: len(types)] = [8 if each[0] == "*" or each.endswith("64") else 4 for each in types]

    def launched(self, launch, tensors):
        """Launch a kernel, and return what came of it."""
        ctypes.memset(self.launch, 0, ctypes.sizeof(self.launch))
        launch(*tensors, stream=STREAM)
        return list(self.launch)


def compared(cuda, launch, tensors):
    cuda.expect([])
    launch(*tensors, stream=STREAM)  # compiles
    cuda.expect([each for each in launch.found.src.signature.values() if each != "constexpr"])
    by_us = cuda.launched(launch, tensors)
    launch.found = None
    by_triton = cuda.launched(launch, tensors)
    addresses = [each.data_ptr() for each in tensors if each is not None]
    return {
        "alike": by_us == by_triton,
        "addresses": by_us[BEFORE_VALUES : BEFORE_VALUES + len(addresses)] == addresses,
    }


def cases(residual):
    """Each kernel's launch and its tensors. A tensor that is None is no argument of the compiled kernel."""
    types = torch.float16, torch.float32, torch.float32
    run = Launches(View(32 * PIXELS, CHANNELS, 1), GROUPS, 1e-5, True, residual, types, 0)
    x, y, grad_x, grad_y, added, grad_z = torch.empty(6, GROUPS * 32 * PIXELS, CHANNELS, dtype=types[0])
    weight, bias = torch.empty(2, CHANNELS)
    stats, sums, of_x = run.sums(3, x), run.sums(2, x), (weight, bias)
    parts, parts_of_gradients = run.parts(x), run.parts_of_gradients(x)
    yield "moments", run.moments, (x, parts)
    yield "pool_moments", run.pool_moments, (parts, stats)
    yield "normalise", run.normalise, (x, added if residual else None, y, stats, *of_x)
    masked = (y, grad_z) if residual else (None, None)
    yield "gradients", run.gradients, (grad_y, x, *masked, parts_of_gradients, stats, *of_x)
    yield "pool_gradients", run.pool_gradients, (parts_of_gradients, sums)
    yield "input_gradient", run.input_gradient, (grad_y, x, grad_x, sums, stats, *of_x)


def main():
    cuda = Cuda(Path(sys.argv[1]))
    triton.runtime.driver.set_active(AbsentGpu())
    found = {}
    for residual in (False, True):
        for name, launch, tensors in cases(residual):
            found[f"{name}{', residual' * residual}"] = compared(cuda, launch, tensors)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
