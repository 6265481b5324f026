"""A detector's masks as run lengths, without a map of the whole image per mask.

torchvision resizes each mask of 28x28 to its box and pastes it into a float map of the image, so 100 detections in an
image of 4000x3000 take 5 GB, and copies of them as much again. Here one map of bytes serves all masks of an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

from lbsgd.algorithm.mask_rcnn import PerForwardMaskRCNN
from lbsgd.errors import missing_pycocotools

OUTLINES = "outlines"  # the run lengths, in place of torchvision's "masks"
LIKELY = 0.5  # a pixel belongs to an object if its probability is above

Detected = dict[str, Any]
Size = tuple[int, int]


@contextlib.contextmanager
def outlines_for_masks(network: Any) -> Iterator[None]:
    """Inside, a network or an engine's network returns `OUTLINES` instead of masks pasted into the image.

    A network of any other class than these two, or around them, may use its masks, and still returns them.
    """
    detector = getattr(network, "module", network)
    if type(detector) not in (MaskRCNN, PerForwardMaskRCNN):
        yield
        return
    detector.transform.postprocess = partial(postprocessed, detector.transform)
    try:
        yield
    finally:
        del detector.transform.postprocess


def postprocessed(transform: Any, result: list[Detected], resized: list[Size], sizes: list[Size]) -> list[Detected]:
    """Return what torchvision's `postprocess` does: boxes in pixels of the original images, but `OUTLINES`."""
    masks = [detected.pop("masks") for detected in result]
    found: list[Detected] = type(transform).postprocess(transform, result, resized, sizes)
    for detected, small, size in zip(found, masks, sizes, strict=True):
        detected[OUTLINES] = outlines_in_boxes(small, detected["boxes"], size)
    return found


def outlines_in_boxes(masks: torch.Tensor, boxes: torch.Tensor, size: Size) -> list[dict[str, Any]]:
    """Return the run lengths of masks that torchvision would paste into an image.

    masks: probabilities, (D, 1, M, M). boxes: their places inside the image, (D, 4) in pixels. size: the image's height
    and width.
    """
    height, width = size
    masks, scale = expand_masks(masks.float().cpu(), padding=1)
    places = expand_boxes(boxes.float().cpu(), scale).to(torch.int64)
    image, found = np.zeros((height, width, 1), np.uint8, order="F"), []
    for mask, (left, top, right, bottom) in zip(masks, places.tolist(), strict=True):
        sides = bottom - top + 1, right - left + 1
        likely = nn.functional.interpolate(mask[None], size=sides, mode="bilinear", align_corners=False)[0, 0] > LIKELY
        rows, columns = inside(top, sides[0], height), inside(left, sides[1], width)
        window = image[rows.start : rows.stop, columns.start : columns.stop, 0]
        window[:] = likely[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left].numpy()
        found += encoded(image)
        window[:] = 0
    return found


def inside(first: int, length: int, end: int) -> range:
    """Return the part of `length` pixels from `first` on that lies in an image of `end` pixels."""
    return range(max(first, 0), min(first + length, end))


def outlines_of(pasted: torch.Tensor) -> list[dict[str, Any]]:
    """Return the run lengths of masks of the image's size, (D, 1, height, width), as other detectors return them."""
    return encoded(np.asfortranarray((pasted[:, 0] > LIKELY).permute(1, 2, 0).to(torch.uint8).cpu().numpy()))


def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
    """Return COCO's run lengths of masks, (height, width, D)."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise missing_pycocotools(error) from error
    lengths: list[dict[str, Any]] = mask.encode(masks)
    return lengths
