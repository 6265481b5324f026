"""COCO's average precision of boxes and masks. On any number of processes, each image is evaluated once (Sec. 5.4)."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from lbsgd.data.coco_annotations import Image, labels_of
from lbsgd.data.coco_images import ValImage
from lbsgd.processes.ending import from_rank_0
from lbsgd.train.coco_masks import OUTLINES, outlines_for_masks, outlines_of

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six of COCO's numbers
HEADS = (RPNHead, FastRCNNPredictor, MaskRCNNPredictor)  # their outputs become detections

Found = list[dict[str, Any]]


@torch.no_grad()
def coco_numbers(network: Any, batches: Iterable[ValImage], names: dict[int, str]) -> dict[str, Any]:
    """Return AP, AP50, AP75 and AP by size of boxes and masks in %. All processes must call this.

    names: {category id: name} (`labels_of`). Each image is a separate forward, so its detections do not depend on other
    images. Rank 0 compares the detections of all processes, in the order of the images' ids. A number is None if there
    is no object of its size. All are NaN if an output of the network is not a number.
    """
    images, found = [], []
    with watched_outputs(network) as finite, outlines_for_masks(network):
        for pixels, image in batches:
            [detected] = network([pixels])
            images.append(image)
            found += detections(image, detected)
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object((images, found, all(finite)), gathered or None)
    return from_rank_0(lambda: compared(gathered, names))


@contextlib.contextmanager
def watched_outputs(network: Any) -> Iterator[list[torch.Tensor]]:
    """Yield a list that holds whether all outputs of the heads so far are numbers, on the device, without a wait.

    torchvision drops a detection that is not a number, and an AP of 0 would pass for a result.
    """
    finite: list[torch.Tensor] = []

    def note(_head: Any, _inputs: Any, outputs: Any) -> None:
        finite[:] = [torch.stack([*finite, *(each.isfinite().all() for each in tree_leaves(outputs))]).all()]

    with contextlib.ExitStack() as hooks:
        for part in network.modules():
            if isinstance(part, HEADS):
                hooks.enter_context(part.register_forward_hook(note))
        yield finite


def detections(image: Image, detected: dict[str, Any]) -> Found:
    """Return an image's detections as COCO's results: boxes, and run lengths of masks. The category is the label."""
    boxes = detected["boxes"].float().cpu().numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    outlines = detected[OUTLINES] if OUTLINES in detected else outlines_of(detected["masks"])
    rows = zip(detected["labels"].tolist(), detected["scores"].tolist(), boxes.tolist(), outlines, strict=True)
    return [
        {"image_id": image.id, "category_id": label, "score": score, "bbox": box, "segmentation": outline}
        for label, score, box, outline in rows
    ]


def compared(gathered: list[tuple[list[Image], Found, bool]], names: dict[int, str]) -> dict[str, Any]:
    """Return the numbers for all processes' detections. pycocotools' own output is dropped."""
    from pycocotools.coco import COCO

    images = [image for part, _, _ in gathered for image in part]  # by id, as a split and its shares are
    # Renumbered, because pycocotools puts ids into NumPy arrays, where 2^63 becomes a float and a text loses its NUL.
    # An annotation with id 0 would match nothing, and a repeated id would be another object.
    numbers = {image.id: number for number, image in enumerate(images, start=1)}
    labels = labels_of(names)
    found = [{**each, "image_id": numbers[each["image_id"]]} for _, part, _ in gathered for each in part]
    known = (each for image in images for each in image.annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": numbers[image.id], "height": image.height, "width": image.width} for image in images],
            "categories": [{"id": labels[category], "name": name} for category, name in names.items()],
            "annotations": [
                {
                    **each,
                    "id": number,
                    "image_id": numbers[each["image_id"]],
                    "category_id": labels[each["category_id"]],
                    "iscrowd": each.get("iscrowd", 0),
                    "area": area_of(each),
                }
                for number, each in enumerate(known, start=1)
            ],
        }
        truth.createIndex()
        precisions = {**precision(truth, found, "bbox", "box"), **precision(truth, found, "segm", "mask")}
    if not all(finite for _, _, finite in gathered):
        precisions = dict.fromkeys(precisions, math.nan)
    return {**precisions, "val_images": len(images)}


def area_of(annotation: dict[str, Any]) -> float:
    """Return an object's area, or its box's area if the file has none. An area of 0 counts, as a small object."""
    width, height = annotation["bbox"][2:]
    return annotation.get("area", max(0, width) * max(0, height))


def precision(truth: Any, found: Found, kind: str, name: str) -> dict[str, float | None]:
    """Return COCO's six average precisions in %: None without any object, else 0 without any detection."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    keys = [f"val_{name}_{key}" for key in NAMES]
    other = "segmentation" if kind == "bbox" else "bbox"
    # Each kind gets its own copies: loadRes writes areas and boxes into the detections.
    copies = [{key: value for key, value in each.items() if key != other} for each in found]
    results = truth.loadRes(copies) if copies else COCO()  # loadRes looks at the first
    evaluation = COCOeval(truth, results, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {key: None if value < 0 else 100 * float(value) for key, value in zip(keys, evaluation.stats, strict=False)}
