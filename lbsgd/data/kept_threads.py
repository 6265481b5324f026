"""Keep the numbers of torch's and Numba's threads, which FFCV changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numba
import torch


@contextlib.contextmanager
def keeping_threads() -> Iterator[None]:
    """Keep the numbers of torch's and Numba's threads inside. FFCV sets both on import and when a Loader is built.

    With another number of threads, sums differ in their last bits.
    """
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)
