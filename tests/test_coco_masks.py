"""A detector's masks become the run lengths of those that torchvision pastes, with one map for all of an image."""

import tracemalloc

import numpy as np
import pytest
import torch
from detecting import detector
from hypothesis import given, settings
from hypothesis import strategies as some
from pycocotools import mask as coco
from torchvision.models.detection.roi_heads import paste_masks_in_image

from lbsgd.algorithm.mask_rcnn import PerForwardMaskRCNN
from lbsgd.train.coco_masks import OUTLINES, outlines_for_masks, outlines_in_boxes, outlines_of

HEIGHT, WIDTH = 37, 53


def smooth(count, seed):
    drawn = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(drawn, 5, 1, 2)


BOXES = some.lists(
    some.tuples(*(some.floats(0, end, width=32) | some.sampled_from((0.0, end)) for end in (WIDTH, HEIGHT) * 2)),
    max_size=4,
)


@given(boxes=BOXES, seed=some.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_outlines_are_those_of_the_masks_that_torchvision_pastes(boxes, seed):
    """Also of boxes at the borders and of boxes without an area."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2, 2)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    masks = smooth(len(boxes), seed)
    pasted = paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH))
    found = outlines_in_boxes(masks, boxes, (HEIGHT, WIDTH))
    assert found == outlines_of(pasted) and len(found) == len(boxes)
    assert np.array_equal(coco.decode(found).transpose(2, 0, 1), (pasted[:, 0] > 0.5).numpy()) if found else True


def test_a_probability_of_a_half_is_outside_and_half_precision_is_widened_first():
    masks, boxes, size = torch.full((1, 1, 28, 28), 0.5), torch.tensor([[105.0, 104.0, 330.3, 220.7]]), (300, 400)
    for found in (outlines_in_boxes(masks, boxes, size), outlines_of(torch.full((1, 1, 5, 5), 0.5))):
        assert not coco.decode(found).any()
    half = smooth(1, seed=3).bfloat16(), boxes.bfloat16()
    wide = [each.float() for each in half]
    assert outlines_in_boxes(*half, size) == outlines_in_boxes(*wide, size)


def test_a_detector_returns_the_outlines_of_its_masks_and_afterwards_masks_again():
    network = detector(num_classes=3).eval()
    pixels = torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        [pasted] = network([pixels])
        with outlines_for_masks(network):
            [found] = network([pixels])
        [again] = network([pixels])
    assert len(pasted["boxes"]) > 0 and found["boxes"].equal(pasted["boxes"]) and "masks" not in found
    assert found[OUTLINES] == outlines_of(pasted["masks"]) and again["masks"].equal(pasted["masks"])


class Filtered(PerForwardMaskRCNN):
    """A user's detector that works on its masks."""


def test_a_detector_of_another_class_keeps_its_masks():
    own, around = detector().eval(), torch.nn.Sequential(detector().eval())
    own.__class__ = Filtered
    for network in own, around:
        with torch.no_grad(), outlines_for_masks(network):
            [found] = network([torch.rand(3, 60, 90)])
        assert "masks" in found


def test_a_detector_that_fails_has_its_own_function_again():
    network = detector(num_classes=3).eval()
    with pytest.raises(KeyboardInterrupt), outlines_for_masks(network):
        raise KeyboardInterrupt
    assert "postprocess" not in vars(network.transform)


def test_a_hundred_masks_of_a_large_image_take_the_memory_of_one():
    """torchvision takes 4 bytes per pixel and mask, here 1.2 GB."""
    height, width, count = 1500, 2000, 100
    boxes = torch.tensor([[100.0, 100.0, 1900.0, 1400.0]]).repeat(count, 1)
    tracemalloc.start()
    found = outlines_in_boxes(smooth(count, seed=0), boxes, (height, width))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count and most < 3 * height * width
