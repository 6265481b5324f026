"""Choose the part of an image to use: random crops and flips for training, the centre crop for tests (Sec. 5.1).

A crop is a compiled function of (key, image, height, width) that returns (top, left, height, width, mirrored). It keeps
no state. Its random numbers come from splitmix64, with a key that depends on seed and epoch and a position that depends
on the image. So an image's crop is the same on any thread, in any batch and process, and after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit

ASPECT_RATIO = (3 / 4, 4 / 3)
CENTRE_FRACTION = 224 / 256  # the paper tests on the central 224 pixels of images whose shorter side has 256
NUM_TRIES = 10


def crop_key(seed: int, epoch: int) -> np.uint64:
    """Return the key of one epoch's crops and flips."""
    return np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]


@njit(nogil=True)
def uniform(key, position):
    """Return the number at this position of the splitmix64 sequence that starts at key, a float64 in [0, 1).

    Every constant is a uint64, because Numba computes in float64 as soon as one operand is an int64.
    """
    z = np.uint64(key) + np.uint64(0x9E3779B97F4A7C15) * (position + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


def random_resized_crop(scale: tuple[float, float], flip: bool) -> Callable:
    """Return the training crop, distributed like torchvision's RandomResizedCrop and RandomHorizontalFlip.

    The box covers scale[0] to scale[1] of the area. The logarithm of its aspect ratio is uniform from log 3/4 to
    log 4/3. If ten tries do not fit into the image, the crop is the largest central box with such a ratio. With flip,
    half of the images are mirrored.
    """
    smallest, area_range = scale[0], scale[1] - scale[0]
    narrowest, log_range = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1] / ASPECT_RATIO[0])

    # Compiled here, not by FFCV, whose relaxed floating-point arithmetic may round differently on other machines.
    @njit(nogil=True)
    def draw(key, image, height, width):
        first = np.uint64(image) * np.uint64(1 + 4 * NUM_TRIES)
        mirrored = flip and uniform(key, first) < 0.5
        for attempt in range(NUM_TRIES):
            position = first + np.uint64(1 + 4 * attempt)
            area = height * width * (smallest + area_range * uniform(key, position))
            ratio = math.exp(narrowest + log_range * uniform(key, position + np.uint64(1)))
            w, h = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform(key, position + np.uint64(2)) * (height - h + 1))
                left = int(uniform(key, position + np.uint64(3)) * (width - w + 1))
                return top, left, h, w, mirrored
        h = min(height, int(round(width / ASPECT_RATIO[0])))
        w = min(width, int(round(height * ASPECT_RATIO[1])))
        return (height - h) // 2, (width - w) // 2, h, w, mirrored

    return draw


@njit(nogil=True)
def centre_crop(key, image, height, width):
    """Return the test crop, the central square with 224/256 of the shorter side."""
    side = max(1, int(CENTRE_FRACTION * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side, False


@njit(nogil=True)
def mirror(image):
    """Reverse the rows of an image (height, width, colours) in place."""
    last = image.shape[1] - 1
    for y in range(image.shape[0]):
        for x in range(image.shape[1] // 2):
            for c in range(image.shape[2]):
                image[y, x, c], image[y, last - x, c] = image[y, last - x, c], image[y, x, c]
