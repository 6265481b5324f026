"""Share an epoch's permutation (Remark 4) as one array between all processes of a host."""

from __future__ import annotations

import numpy as np

from lbsgd.algorithm.shuffle import epoch_order, shuffle
from lbsgd.data.host_files import key_of, shared

SHARED_FROM = 1 << 18  # images; a smaller order (1 MB) is drawn as fast as it is looked up


def host_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return `epoch_order`; for many images as uint32, 4 bytes per image and host.

    One process draws it, and the others map it. The order is the same, number for number.
    """
    if not SHARED_FROM <= num_images < 1 << 32:
        return epoch_order(num_images, seed, epoch)

    def drawn() -> np.ndarray:
        order = np.arange(num_images, dtype=np.uint32)
        shuffle(order, seed, epoch)
        return order

    # NumPy promises the same order only within a version.
    return shared("order", key_of(num_images, seed, epoch, np.__version__), drawn).view(np.uint32)
