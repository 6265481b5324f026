"""The paper's numbers, to compare with: errors on ImageNet, AP on COCO, the sizes of both, and a GPU's speed.

Errors are top-1 in %, mean and std of 5 runs, of ResNet-50 unless another network is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MeanAndStd = tuple[float, float]

IMAGENET_IMAGES, EPOCHS = 1_281_167, 90
COCO_IMAGES = 117_266  # images of train2017 that have an object (Sec. 5.4)
# A GPU's speed: the paper's epochs in 29 hours on one server of 8 P100, including aggregation inside the server.
IMAGES_PER_SECOND = IMAGENET_IMAGES * EPOCHS / (29 * 3600) / 8

# Figures 1 and 3: linear scaling rule, gradual warmup above 256. None: no number to compare with.
ERROR_PCT: dict[int, MeanAndStd | None] = {
    64: None,
    128: (23.49, 0.12),
    256: (23.60, 0.12),
    512: (23.48, 0.09),
    1024: (23.53, 0.08),
    2048: (23.49, 0.11),
    4096: (23.56, 0.12),
    8192: (23.74, 0.09),
    16384: (24.79, 0.27),
    32768: (27.55, 0.28),
    65536: (33.96, 0.80),
}

# Tables 1, 2a and 2b: errors with one change, by the global batch at which it was measured.
NO_WARMUP = {8192: (24.84, 0.37)}
CONSTANT_WARMUP = {8192: (25.88, 0.56)}
SQRT_RULE = {8192: (26.22, 0.03)}
FIXED_LR = {8192: (41.67, 0.10)}
HALF_LR = {256: (23.92, 0.10), 8192: (24.27, 0.08)}
DOUBLE_LR = {256: (23.68, 0.09), 8192: (24.05, 0.18)}
GAMMA_ONE = {256: (23.84, 0.18), 8192: (24.11, 0.07)}

RESNET_101 = {256: (22.08, 0.06), 8192: (22.36, 0.09)}  # Table 2c

# Table 3, box AP and mask AP: by the global batch of the pre-training (a), and by that of the detector itself (b).
PRE_TRAINING_AP = {
    256: (35.9, 33.9),
    512: (35.8, 33.8),
    1024: (35.9, 33.9),
    2048: (35.9, 33.9),
    4096: (35.8, 33.8),
    8192: (35.8, 33.9),
    16384: (35.1, 33.2),
}
DETECTOR_AP = {2: (35.7, 33.6), 4: (35.7, 33.7), 8: (35.7, 33.5), 16: (35.6, 33.6)}

PER_WORKER_BATCH = 32  # n, the same for every global batch (Sec. 2.3)
LARGEST_GOOD_BATCH = 8192  # beyond it the error rises (Fig. 1)


@dataclass(frozen=True)
class Loss:
    """Points of top-1 error that the paper lost, and the global batch at which it lost them."""

    points: float
    global_batch: int

    def points_at(self, global_batch: int) -> float | None:
        """Return the points if they were measured at this very batch, else None."""
        return self.points if global_batch == self.global_batch else None


def loss_of(measured: Mapping[int, MeanAndStd], global_batch: int) -> Loss:
    """Return the points that a change lost at the measured batch nearest to this one.

    measured: errors with the change, by global batch. Each is compared with the recipe at the same batch.
    """
    nearest = min(measured, key=lambda kn: abs(kn.bit_length() - global_batch.bit_length()))
    return Loss(_points_between(measured[nearest], ERROR_PCT[nearest]), nearest)


def loss_to_size(global_batch: int) -> Loss | None:
    """Return the points that the largest measured batch beyond 8,192 and up to this one lost against 256 images."""
    measured = [kn for kn in ERROR_PCT if LARGEST_GOOD_BATCH < kn <= global_batch]
    return Loss(_points_between(ERROR_PCT[max(measured)], ERROR_PCT[256]), max(measured)) if measured else None


def points_of_lr(global_batch: int, lr: float) -> tuple[float, str] | None:
    """Return the points lost by a learning rate that the paper tried at this global batch, and the rate's name.

    The names are fixed, sqrt, half and double (Table 2a). Returns None for any other learning rate or batch.
    """
    linear = 0.1 * global_batch / 256
    tried = {
        "fixed": (0.1, FIXED_LR),
        "sqrt": ((0.1 * linear) ** 0.5, SQRT_RULE),
        "half": (linear / 2, HALF_LR),
        "double": (linear * 2, DOUBLE_LR),
    }
    for name, (value, measured) in tried.items():
        if global_batch in measured and abs(lr - value) < 0.01 * value:
            return _points_between(measured[global_batch], ERROR_PCT[global_batch]), name
    return None


def _points_between(error: MeanAndStd | None, reference: MeanAndStd | None) -> float:
    assert error is not None and reference is not None
    return round(error[0] - reference[0], 2)
