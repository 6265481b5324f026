"""Remark 4: one random shuffle of the training images per epoch, divided among all k workers.

This module alone decides which images a process sees. Its functions depend only on their arguments: there is no state
and no lasting random generator, so a restart loses nothing.
"""

from __future__ import annotations

import numpy as np


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of all images that all workers share in this epoch (Remark 4).

    It is drawn from (seed, epoch) alone, so it is the same in every process and after every restart.
    """
    order = np.arange(int(num_images))  # FFCV's num_images is a uint64, which would change the array's type
    shuffle(order, seed, epoch)
    return order


def shuffle(numbers: np.ndarray, seed: int, epoch: int) -> None:
    """Put numbers 0 ... N - 1, an array of any integer type, into the order of this epoch, in place."""
    np.random.default_rng([seed, epoch]).shuffle(numbers)


def rank_batches(
    order: np.ndarray, *, global_batch: int, world_size: int, micro_batch: int, rank: int, first_iteration: int = 0
) -> np.ndarray:
    """Return the images of one rank, an array of shape (iterations, accumulation_steps, micro_batch) (Remark 4).

    Iteration t takes order[t·kn : (t+1)·kn]. Each rank takes one contiguous part of it, and each pass one contiguous
    part of the rank's. The epoch has floor(N/kn) iterations; the rest of the permutation is left out.

    Since a micro batch is a multiple of n, the paper's worker w of iteration t always normalises the same n images,

        order[t·kn + w·n : t·kn + (w+1)·n],

    for any world size, micro batch and number of passes: these only say where worker w lives.

    first_iteration leaves out the iterations before it, to continue in the middle of an epoch.
    Raises ValueError if kn is not a positive multiple of world_size · micro_batch, or if the iteration or the rank does
    not exist.
    """
    _require_rank(rank, world_size)
    if global_batch < 1 or micro_batch < 1:
        raise ValueError(f"global_batch ({global_batch}) and micro_batch ({micro_batch}) must be at least 1")
    if global_batch % (world_size * micro_batch):
        raise ValueError(
            f"a global batch of {global_batch} images is not a multiple of {world_size} ranks x {micro_batch} images"
        )
    iterations = len(order) // global_batch
    if not 0 <= first_iteration <= iterations:
        raise ValueError(f"iteration {first_iteration} is outside an epoch of {iterations} iterations")
    passes = global_batch // (world_size * micro_batch)
    numbers = order[: iterations * global_batch].reshape(iterations, world_size, passes, micro_batch)
    return numbers[first_iteration:, rank]


def rank_groups(order: np.ndarray, *, num_images: int, per_worker_batch: int, world_size: int, rank: int) -> np.ndarray:
    """Deal the first num_images of the order to the ranks in groups of n: an array of shape (groups, n).

    Rank r takes groups r, r + world_size, ... Together the ranks see each of these images once, in the groups that a
    single rank would see. The ranks' shares differ by at most one group.
    Raises ValueError if num_images is not a multiple of n or exceeds the order's length, or if the rank does not exist.
    """
    _require_rank(rank, world_size)
    if num_images % per_worker_batch or not 0 < num_images <= len(order):
        raise ValueError(f"{num_images} images are not a multiple of {per_worker_batch} between 1 and {len(order)}")
    return order[:num_images].reshape(-1, per_worker_batch)[rank::world_size]


def rank_share(num_images: int, *, world_size: int, rank: int) -> np.ndarray:
    """Return this rank's contiguous share of images 0 ... num_images - 1; all shares together hold each exactly once.

    The shares differ by at most one image. Some are empty if there are fewer images than ranks.
    Raises ValueError if the rank does not exist.
    """
    _require_rank(rank, world_size)
    smaller, larger_shares = divmod(num_images, world_size)  # the first shares hold one image more
    first, last = (smaller * r + min(r, larger_shares) for r in (rank, rank + 1))
    return np.arange(first, last)


def _require_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of the {world_size} ranks, counted from 0")
