"""This process's place in torch's process group; without a group it is alone."""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Return the number of processes; 1 if torch.distributed has joined none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which process this is, counted from 0; 0 if torch.distributed has joined none."""
    return dist.get_rank() if dist.is_initialized() else 0
