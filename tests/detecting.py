"""A detector that costs a hundred thousandth of a COCO run, and images with objects for it."""

import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet

from lbsgd.algorithm.mask_rcnn import Sizes, mask_rcnn
from lbsgd.data.coco_images import Example


class Thin(ResNet):
    """A ResNet-18 with an eighth of the channels in its stages, because wide ones take two thirds of a test's time."""

    def __init__(self, weights=None, **options):
        super().__init__(BasicBlock, (2, 2, 2, 2), **options)

    def _make_layer(self, block, planes, *arguments, **options):
        return super()._make_layer(block, planes // 8, *arguments, **options)


torchvision.models.thin_resnet = Thin  # here a detector finds its backbone by name
N = 2
SIZES = Sizes("thin_resnet", 64, 128, 16, (8, 16, 32, 64, 128), proposals=50, regions=32, box_width=32, mask_layers=1)
SIDES = ((64, 80), (64, 96))


def detector(seed=0, num_classes=3):
    return mask_rcnn(num_classes, N, SIZES, seed)


def examples(number, sides=SIDES, seed=0):
    """Noisy images, each with two bright squares of two kinds."""
    generator = torch.Generator().manual_seed(seed)
    return [example(sides[i % len(sides)], 1000 * seed + i, generator) for i in range(number)]


def example(side, draw, generator):
    height, width = side
    pixels = torch.rand(3, height, width, generator=generator) / 4
    boxes, masks = [], torch.zeros(2, height, width, dtype=torch.uint8)
    for kind, mask in enumerate(masks):
        size = int(torch.randint(12, 30, (), generator=generator))
        top = int(torch.randint(0, height - size, (), generator=generator))
        left = int(torch.randint(0, width - size, (), generator=generator))
        mask[top : top + size, left : left + size] = 1
        pixels[kind, top : top + size, left : left + size] += 0.7
        boxes.append([left, top, left + size, top + size])
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([1, 2]), "masks": masks}
    return Example(pixels, {**target, "draw": torch.tensor(draw)})
