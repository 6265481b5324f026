"""Mask R-CNN with a feature pyramid (Sec. 5.4), built of torchvision's parts.

A forward takes n images (n = 2). The losses are means over the regions sampled in one forward, and a forward pads its
images to the largest. So n is a hyper-parameter, as batch norm's n is (Sec. 2.3), and not the size of a GPU's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.poolers import initLevelMapper

from lbsgd.algorithm.seeded import seeded
from lbsgd.units import shortened

FROZEN = ("conv1", "bn1", "layer1")  # Detectron's FREEZE_AT 2: the stem and the first stage keep their weights
LEVELS = (2, 3, 4, 5)  # of the pyramid that regions are pooled from: a side of their maps has 1/2^level of the pixels
LAST_LAYER = {"fc.weight", "fc.bias"}  # of a pre-trained backbone; a detector has no such layer


@dataclass(frozen=True)
class Sizes:
    """The sizes of a detector; the defaults are the paper's.

    shorter_side, longer_side    an image's shorter side in pixels, or less if its longer side would exceed longer_side
    anchors                      sides of the anchors in pixels, one per level of the pyramid
    proposals                    kept per level before suppression and per image after it; twice as many in training
    regions                      sampled per image; a quarter of them are objects
    """

    backbone: str = "resnet50"
    shorter_side: int = 800
    longer_side: int = 1333
    channels: int = 256
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    proposals: int = 1000
    regions: int = 512
    box_width: int = 1024
    mask_layers: int = 4


class Float32Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """torchvision's anchors, in float32 under autocast too: bf16 has no number between 1024 and 1032.

    They lie 2^level pixels apart. torchvision divides the image's side by the map's, which is rounded up at the last
    level: 800 rows become 13 there, which puts the anchors 61 pixels apart instead of 64. With more padding, next to a
    larger image, the same image would get other anchors.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)

    def grid_anchors(self, grid_sizes: list[Any], strides: list[Any]) -> list[torch.Tensor]:
        apart = [(2**level, 2**level) for level, _ in enumerate(grid_sizes, start=LEVELS[0])]
        anchors: list[torch.Tensor] = super().grid_anchors(grid_sizes, apart)
        return anchors


class Float32Boxes(BoxCoder):  # type: ignore[misc]  # torchvision has no types
    """torchvision's decoding of boxes from the network's outputs, in float32 under autocast too."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = super().decode_single(rel_codes.float(), boxes)
        return decoded


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """torchvision's frozen batch norm, but its float32 buffers do not turn a map back into float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        scale, bias = (each.reshape(1, -1, 1, 1).to(x.dtype) for each in (scale, bias))
        normalised: torch.Tensor = x * scale + bias
        return normalised


class DrawnSampler:
    """torchvision's sampler of positives and negatives, with a generator per image instead of torch's global one.

    The global generator would give an image other samples on another number of processes. `begin` says which images
    the next call is about. Numbers are drawn on the host, so that every device takes the same samples.
    """

    def __init__(self, num_samples: int, positive_fraction: float, purpose: int):
        self.num_samples, self.positive_fraction, self.purpose = num_samples, positive_fraction, purpose
        self.draws: Sequence[int] = ()

    def begin(self, draws: Sequence[int]) -> None:
        self.draws = draws

    def __call__(self, matched: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return a mask of the positives and one of the negatives for each image's matches (0: background)."""
        assert len(matched) == len(self.draws), "begin() must name the images of this forward"
        masks = [self.sample(matches, draw) for matches, draw in zip(matched, self.draws, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def sample(self, matches: torch.Tensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        # NumPy's, because torch's generator takes 32 bits of a seed, which anchors and regions would share.
        generator = np.random.default_rng([self.purpose, draw])
        positive, negative = torch.where(matches >= 1)[0], torch.where(matches == 0)[0]
        wanted = min(len(positive), int(self.num_samples * self.positive_fraction))
        chosen = self.chosen(matches, positive, wanted, generator)
        return chosen, self.chosen(matches, negative, self.num_samples - wanted, generator)

    @staticmethod
    def chosen(like: torch.Tensor, places: torch.Tensor, number: int, generator: np.random.Generator) -> torch.Tensor:
        mask = torch.zeros_like(like, dtype=torch.uint8)
        if len(places):
            drawn = generator.choice(len(places), min(number, len(places)), replace=False)
            mask[places[torch.from_numpy(drawn).to(places.device)]] = 1
        return mask


class PerForwardMaskRCNN(MaskRCNN):  # type: ignore[misc]  # torchvision has no types
    """Mask R-CNN that splits a training batch into forwards of n images, each with its own losses.

    In training it takes images and targets (with `draw`, the key of an image's samples). It returns the sum of
    torchvision's five losses, averaged over the forwards. In evaluation it takes any images, as torchvision's does.
    """

    def __init__(self, *arguments: Any, per_forward: int, **options: Any):
        super().__init__(*arguments, **options)
        self.per_forward = per_forward
        rpn, heads = self.rpn, self.roi_heads
        for part in (rpn, heads):
            part.box_coder = Float32Boxes(part.box_coder.weights)
        rpn.fg_bg_sampler = DrawnSampler(rpn.fg_bg_sampler.batch_size_per_image, 0.5, purpose=1)
        heads.fg_bg_sampler = DrawnSampler(heads.fg_bg_sampler.batch_size_per_image, 0.25, purpose=2)
        for pool in (heads.box_roi_pool, heads.mask_roi_pool):
            # torchvision guesses both from the first images without their padding: 40 pixels would double all scales.
            pool.scales = [2.0**-level for level in LEVELS]
            pool.map_levels = initLevelMapper(LEVELS[0], LEVELS[-1], pool.canonical_scale, pool.canonical_level)

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        if not self.training:
            return super().forward(images)
        assert targets is not None and len(images) % self.per_forward == 0
        parts = range(0, len(images), self.per_forward)
        losses = [self.loss_of(images[i : i + self.per_forward], targets[i : i + self.per_forward]) for i in parts]
        return torch.stack(losses).mean()

    def loss_of(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Return the sum of the losses of one forward."""
        draws = [int(target["draw"]) for target in targets]
        self.rpn.fg_bg_sampler.begin(draws)
        self.roi_heads.fg_bg_sampler.begin(draws)
        known = [{name: value for name, value in target.items() if name != "draw"} for target in targets]
        losses: dict[str, torch.Tensor] = super().forward(images, known)
        return torch.stack([loss.float() for loss in losses.values()]).sum()


def mask_rcnn(num_classes: int, per_forward: int, sizes: Sizes, seed: int) -> PerForwardMaskRCNN:
    """Return a detector of num_classes and the background, with frozen batch norm and a backbone without weights.

    It is initialised as Detectron's: the pyramid and the boxes' hidden layers uniformly in ± √(3/inputs), which is
    Caffe2's XavierFill; the boxes' outputs normally with std 0.01 and 0.001; everything else as torchvision does.
    The weights are drawn from `seed` alone, on the CPU. The caller's random state does not change, on GPUs either.
    """
    device = torch.get_default_device()
    with seeded(seed):
        backbone = pyramid(sizes.backbone, sizes.channels)
        width = sizes.channels
        anchors = Float32Anchors(tuple((side,) for side in sizes.anchors), ((0.5, 1.0, 2.0),) * len(sizes.anchors))
        head, predictor = TwoMLPHead(width * 7**2, sizes.box_width), FastRCNNPredictor(sizes.box_width, num_classes + 1)
        for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        for layer in (head.fc6, head.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        detector = PerForwardMaskRCNN(
            backbone,
            per_forward=per_forward,
            min_size=sizes.shorter_side,
            max_size=sizes.longer_side,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=2 * sizes.proposals,
            rpn_pre_nms_top_n_test=sizes.proposals,
            rpn_post_nms_top_n_train=2 * sizes.proposals,
            rpn_post_nms_top_n_test=sizes.proposals,
            box_head=head,
            box_predictor=predictor,
            box_batch_size_per_image=sizes.regions,
            mask_head=MaskRCNNHeads(width, (width,) * sizes.mask_layers, 1),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        )
    detector.to(device)
    return detector


def pyramid(name: str, channels: int) -> BackboneWithFPN:
    """Return a ResNet with a feature pyramid; batch norm, the stem and the first stage are frozen."""
    resnet = getattr(torchvision.models, name)(weights=None, norm_layer=FrozenNorm)
    for part, parameter in resnet.named_parameters():
        parameter.requires_grad_(part.split(".")[0] not in FROZEN)
    stages = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}
    widths = [resnet.inplanes // 8 * 2**stage for stage in range(4)]
    return BackboneWithFPN(resnet, stages, widths, channels)


def load_backbone(detector: PerForwardMaskRCNN, weights: dict[str, Any], where: str) -> None:
    """Load a classifier's weights into the ResNet below the pyramid; only its last layer may be left over.

    Raises ValueError if a weight is missing or does not fit, because a partly random backbone would train, but badly.
    The error names `where` the weights come from.
    """
    body = detector.backbone.body
    own = body.state_dict()
    counters = {name for name in weights if str(name).endswith("num_batches_tracked")}  # frozen norm counts nothing
    shapes = {name: getattr(weights[name], "shape", None) for name in own.keys() & weights.keys()}
    tensors = {name: weights[name] for name, shape in shapes.items() if shape is not None}
    for what, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has in addition", weights.keys() - own.keys() - LAST_LAYER - counters),
        ("has as no tensor", {name for name, shape in shapes.items() if shape is None}),
        ("has in another shape", {name for name, shape in shapes.items() if shape != own[name].shape}),
        ("has not as floats", {name for name, tensor in tensors.items() if not tensor.is_floating_point()}),
    ):
        if names:
            raise ValueError(f"{where} {what} {shortened(sorted(map(str, names)))}: not a backbone of this detector")
    body.load_state_dict({name: weights[name] for name in own})
