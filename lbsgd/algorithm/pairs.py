"""Group n images of one orientation into a forward, from the epoch's one shuffle (Sec. 5.4, Remark 4).

A detector's forward pads its images to the largest, so images of one orientation waste less. The groups must not
depend on how the work is divided, so they are formed from the shared permutation before it is cut into iterations.
"""

from __future__ import annotations

import numpy as np


def grouped_order(order: np.ndarray, kinds: np.ndarray, n: int) -> np.ndarray:
    """Return the images reordered so that each group of n, counted from the start, has one kind.

    order    a permutation of the images
    kinds    the kind of each image, by its number
    n        images of a forward

    The images of a kind keep their order, and the groups come in the order in which `order` completes them, so a
    random permutation stays random. Up to n - 1 images of each kind are left over. They come last, in their order, and
    only their groups can mix kinds.

    Raises ValueError if n is not positive.
    """
    if n < 1:
        raise ValueError(f"a forward of {n} images: use 1 at least")
    kind_of = kinds[order]
    groups, completed, left = [], [], []
    for kind in np.unique(kind_of):
        places = np.flatnonzero(kind_of == kind)
        whole = len(places) // n * n
        groups.append(places[:whole].reshape(-1, n))
        completed.append(groups[-1][:, -1])
        left.append(places[whole:])
    if not groups:
        return order
    by_completion = np.argsort(np.concatenate(completed), kind="stable")
    places = np.concatenate([np.concatenate(groups)[by_completion].reshape(-1), np.sort(np.concatenate(left))])
    return order[places]
