"""This process's place in torch's process group; without a group, the process is alone."""

from __future__ import annotations

import os

import torch.distributed as dist


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, counted from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def require_met() -> None:
    """Raise ValueError if a launcher has started several processes, but there is no process group."""
    launched = os.environ.get("WORLD_SIZE") or "1"  # set by torchrun, DeepSpeed, Accelerate and Kubeflow
    if launched != "1" and not dist.is_initialized():
        raise ValueError(
            f"WORLD_SIZE is {launched}, but the processes have not met: call torch.distributed.init_process_group()"
            " first, or give world_size and rank"
        )
