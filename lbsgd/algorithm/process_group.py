"""This process's place in torch's process group; without a group it is alone."""

from __future__ import annotations

import os

import torch.distributed as dist


def world_size() -> int:
    """Return the number of processes; 1 if torch.distributed has joined none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which process this is, counted from 0; 0 if torch.distributed has joined none."""
    return dist.get_rank() if dist.is_initialized() else 0


def require_met() -> None:
    """Raise ValueError if a launcher says that there are several processes, and torch.distributed has joined none."""
    launched = os.environ.get("WORLD_SIZE") or "1"  # torchrun's, DeepSpeed's, Accelerate's and Kubeflow's
    if launched != "1" and not dist.is_initialized():
        raise ValueError(
            f"WORLD_SIZE is {launched}, but the processes have not met: call torch.distributed.init_process_group()"
            " first, or give world_size and rank"
        )
