"""Random states as tensors, so that a resumed run draws what an uninterrupted one would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_states(rank: int) -> dict[str, torch.Tensor]:
    """Return this process's random states (torch on CPU and GPU, NumPy, Python) as tensors of bytes and integers."""
    state = np.random.get_state(legacy=False)["state"]
    keys, position = state["key"], state["pos"]
    states: dict[str, torch.Tensor] = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position]),
        "python": torch.tensor(random.getstate()[1]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"{name}.{rank}": state for name, state in states.items()}


def restore_random_states(states: dict[str, torch.Tensor], rank: int) -> None:
    """Put back what `random_states` of this rank returned."""
    torch.set_rng_state(states[f"torch.{rank}"])
    keys = states[f"numpy.{rank}"].tolist()
    np.random.set_state(("MT19937", np.array(keys[:-1], dtype=np.uint32), keys[-1], 0, 0.0))
    random.setstate((3, tuple(states[f"python.{rank}"].tolist()), None))
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])
