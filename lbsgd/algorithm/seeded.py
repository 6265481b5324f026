"""Weights that are drawn from a seed alone, so that every process builds the same network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, on the CPU whatever the default device; the caller's random state does not change.

    Nor does that of GPUs, which torch.manual_seed would seed and nothing would restore.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
