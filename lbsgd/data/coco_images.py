"""Load COCO's images and objects as batches on the device, through torch's DataLoader (Sec. 5.4).

An image's flip, and in the network the samples of its anchors and regions, are drawn per (seed, epoch, image). So they
are the same on any number of processes and loader workers, and after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lbsgd.algorithm.pairs import grouped_order
from lbsgd.data.coco_annotations import CocoSplit, Image
from lbsgd.data.coco_loader import loaded
from lbsgd.data.pil_image import ImageError, opened, orientation_of, rgb_pixels, turned
from lbsgd.data.share import Cut, EvalData, Share, TrainData
from lbsgd.errors import DataError, missing_pycocotools

Target = dict[str, torch.Tensor]


class Example(NamedTuple):
    """A training image and its objects in the form of torchvision's detectors.

    pixels: uint8 (3, H, W), a quarter of float32's bytes to hand over; `to` converts them to float32
    target: boxes float32 (N, 4), labels int64 (N,), masks uint8 (N, H, W), and `draw`, the key of the image's samples
    """

    pixels: torch.Tensor
    target: Target

    def to(self, device: torch.device | str) -> Example:
        moved = {name: on_device(value, device) for name, value in self.target.items() if name != "draw"}
        pixels = as_fractions(on_device(self.pixels, device))
        return Example(pixels, {**moved, "draw": self.target["draw"]})  # the key stays on the host


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to a device; if its memory is pinned, the host does not wait for the device's earlier work."""
    return tensor.to(device, non_blocking=True)


def as_fractions(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels as float32 in 0 ... 1, the range of torchvision's detectors."""
    return pixels.float() / 255


class ValImage(NamedTuple):
    """A validation image's pixels and its entry in the annotations."""

    pixels: torch.Tensor
    image: Image


def draw_of(seed: int, epoch: int, number: int) -> int:
    """Return 63 random bits for an image of an epoch; the lowest bit is its flip."""
    return int(np.random.SeedSequence([seed, epoch, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pixels_of(image: Image) -> torch.Tensor:
    """Return an image's pixels, uint8 (3, H, W), turned by EXIF; 16-bit samples are scaled as the converter does.

    Annotations belong to the image as it is shown, because annotation tools draw on that. Raises DataError if the file
    is not an image, or does not have the listed size.
    """
    try:
        data = image.path.read_bytes()
        file = opened(data)
        array = rgb_pixels(file, data)
        orientation = orientation_of(file)  # now the whole file has been read
        array = turned(array, orientation)
    except (ImageError, OSError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{image.path} cannot be decoded ({said}); fetch it again") from error
    if array.shape[:2] != (image.height, image.width):
        why = "the file belongs to other annotations"
        if orientation > 4 and array.shape[:2] == (image.width, image.height):
            why = f"its EXIF orientation {orientation} turns it: make it 1 if they are of the pixels before the turn"
        raise DataError(
            f"{image.path} has {array.shape[1]}x{array.shape[0]} pixels, its annotations say "
            f"{image.width}x{image.height}; {why}"
        )
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def mask_of(outline: Any, image: Image) -> np.ndarray:
    """Return the mask of a segmentation (polygons or run lengths) as uint8 (H, W)."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise missing_pycocotools(error) from error
    try:
        if isinstance(outline, dict) and not isinstance(outline["counts"], list):
            encoded = outline
        else:
            parts = mask.frPyObjects(outline, image.height, image.width)
            encoded = mask.merge(parts) if isinstance(parts, list) else parts
        decoded: np.ndarray = mask.decode(encoded)
    except (ValueError, OverflowError) as error:
        raise DataError(f"image {image.id} ({image.path.name}): an outline cannot be decoded ({error})") from None
    return decoded


def example_of(image: Image, label_of: dict[int, int], draw: int, flip: bool) -> Example:
    """Return a training image with its objects, mirrored if flips are on and its draw says so."""
    objects, pixels = image.objects(), pixels_of(image)
    boxes = torch.tensor([image.box_of(each) for each in objects], dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(objects), image.height, image.width, dtype=torch.uint8)
    for mask, each in zip(masks, objects, strict=True):
        mask.copy_(torch.from_numpy(mask_of(each["segmentation"], image)))
    if flip and draw & 1:
        pixels, masks = pixels.flip(-1), masks.flip(-1)
        boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], dim=1)
    labels = torch.tensor([label_of[each["category_id"]] for each in objects], dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "draw": torch.tensor(draw)}
    return Example(pixels, target)


class _Examples(Dataset):
    """The training images of one epoch by number, for loader workers."""

    def __init__(self, split: CocoSplit, seed: int, epoch: int, flip: bool):
        self.images, self.label_of = split.images, split.label_of
        self.seed, self.epoch, self.flip = seed, epoch, flip

    def __getitem__(self, number: int) -> Example:
        draw = draw_of(self.seed, self.epoch, number)
        return example_of(self.images[number], self.label_of, draw, self.flip)


class _ValImages(Dataset):
    def __init__(self, split: CocoSplit):
        self.images = split.images

    def __getitem__(self, number: int) -> ValImage:
        image = self.images[number]
        return ValImage(pixels_of(image), image)


class CocoTrain(TrainData):
    """The training images in batches of micro_batch; each group of n in a row has one orientation."""

    def __init__(
        self,
        split: CocoSplit,
        cut: Cut,
        *,
        per_forward: int,
        flip: bool,
        loader_workers: int,
        device: torch.device | str,
    ):
        super().__init__(len(split), cut)
        self.split, self.per_forward, self.flip = split, per_forward, flip
        self.loader_workers, self.device = loader_workers, device

    def order(self, epoch: int) -> np.ndarray:
        return grouped_order(super().order(epoch), self.split.is_tall, self.per_forward)

    def batches(self, numbers: np.ndarray, epoch: int) -> Iterator[Any]:
        examples = _Examples(self.split, self.cut.seed, epoch, self.flip)
        passes = numbers.reshape(-1, self.cut.micro_batch).tolist()
        for batch in loaded(examples, passes, self.loader_workers, self.device):
            yield [example.to(self.device) for example in batch]


class CocoEval(EvalData):
    """The validation images, one per batch, so that no image is padded to another's size."""

    def __init__(self, split: CocoSplit, *, loader_workers: int, device: torch.device | str, share: Share):
        super().__init__(len(split), share)
        self.split, self.loader_workers, self.device = split, loader_workers, device

    def __iter__(self) -> Iterator[Any]:
        numbers = [[number] for number in self.numbers.tolist()]
        for [image] in loaded(_ValImages(self.split), numbers, self.loader_workers, self.device):
            yield image._replace(pixels=as_fractions(on_device(image.pixels, self.device)))
