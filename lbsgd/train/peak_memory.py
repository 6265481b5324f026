"""The most memory of a GPU that torch has held so far in this process."""

from __future__ import annotations

import torch


def peak_bytes(device: torch.device | str) -> dict[str, int]:
    """Return what tensors took at most, and what torch's allocator had taken for them; nothing on a CPU.

    NCCL, cuDNN's handles and the CUDA context come on top. A CPU's memory is left out, because libraries, the loader
    and other tensors lie in it too, and none of it is what `config/memory.py` estimates.
    """
    if torch.device(device).type != "cuda":
        return {}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
