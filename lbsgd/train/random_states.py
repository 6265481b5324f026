"""Seed a process's random numbers, and keep their states as tensors, so that a resumed run draws what it would have.

Images and their crops are drawn elsewhere, from (seed, epoch, image). What a network or a loss draws, as dropout and
mixup do, comes from the generators here.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.distributed as dist

from lbsgd.train.facts import accelerator_kind


def seed_random_numbers(*numbers: int) -> None:
    """Seed torch on CPU and GPU, NumPy and Python from some numbers, such as the run's seed, rank and iteration."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(numbers).generate_state(3).tolist()
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def random_states(rank: int) -> dict[str, torch.Tensor]:
    """Return this process's random states (torch on CPU and GPU, NumPy, Python) as tensors of bytes and integers."""
    numpy, python = np.random.get_state(legacy=False), random.getstate()
    keys, position = numpy["state"]["key"], numpy["state"]["pos"]
    kept = python[2]  # Python and NumPy draw normal numbers in pairs and keep the second
    states: dict[str, torch.Tensor] = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position]),
        "python": torch.tensor(python[1]),
        "normal": torch.tensor(
            [numpy["has_gauss"], numpy["gauss"], kept is not None, kept or 0.0], dtype=torch.float64
        ),
    }
    if accelerator_kind() == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"{name}.{rank}": state for name, state in states.items()}


def gather_random_states(states: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return on rank 0 what `random_states` returned on all processes, nothing elsewhere. All processes must call this.

    device: where collective calls find their tensors. The states travel as bytes, equally many from each process. As
    Python objects those of 2,048 processes took each process 0.7 s to unpickle; as bytes they take rank 0 0.12 s to
    cut apart, and the others 0.02 s (one core of an AMD EPYC). For a gather NCCL would open connections.
    """
    mine = torch.cat([state.contiguous().view(torch.uint8).flatten() for state in states.values()]).to(device)
    everybodys = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(everybodys, mine)
    if dist.get_rank() > 0:
        return {}
    found, sizes = {}, [state.nbytes for state in states.values()]
    for rank, whole in enumerate(everybodys.cpu().view(-1, len(mine))):
        for (name, state), part in zip(states.items(), whole.split(sizes), strict=True):
            kind = name.partition(".")[0]
            found[f"{kind}.{rank}"] = part.clone().view(state.dtype).view(state.shape)
    return found


def restore_random_states(states: dict[str, torch.Tensor], rank: int) -> None:
    """Restore what `random_states` returned for this rank."""
    torch.set_rng_state(states[f"torch.{rank}"])
    keys = states[f"numpy.{rank}"].tolist()
    normal = states.get(f"normal.{rank}", torch.zeros(4, dtype=torch.float64)).tolist()  # missing in early checkpoints
    np.random.set_state(("MT19937", np.array(keys[:-1], dtype=np.uint32), keys[-1], int(normal[0]), normal[1]))
    random.setstate((3, tuple(states[f"python.{rank}"].tolist()), normal[3] if normal[2] else None))
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])
