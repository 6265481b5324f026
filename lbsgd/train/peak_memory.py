"""The most GPU memory that torch has held so far in this process."""

from __future__ import annotations

import torch


def peak_bytes(device: torch.device | str) -> dict[str, int]:
    """Return the most memory that tensors took, and that torch's allocator had reserved. Empty on a CPU.

    NCCL, cuDNN's handles and the CUDA context are not included. A CPU's memory is left out, because it also holds
    libraries, the loader and other tensors, which `config/memory.py` does not estimate.
    """
    if torch.device(device).type != "cuda":
        return {}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
