r"""Mask R-CNN with ResNet-50 and a feature pyramid on COCO, by the linear scaling rule (Sec. 5.4, Table 3).

    deepspeed --num_gpus 8 recipes/mask_rcnn.py --deepspeed_config ds_configs/detection/mask_rcnn_16.json \
        --data_dir data/coco --backbone_weights runs/8k/weights.pt

The paper reached 35.6 box AP and 33.6 mask AP with 16 images per update; this repository has not trained on COCO yet.
docs/detection.md has the data and the commands. Every forward takes n = 2 images. torchvision's parts differ from the
paper's reference, Detectron:

* an anchor's centre is the upper left corner of its cell; Detectron's is the middle
* anchors that cross the image's border are trained on, and proposals inside crowds count as background; Detectron
  leaves both out
* 2,000 proposals are kept per image in training; Detectron keeps 2,000 of both images together
* the loss of boxes bends at 1/9 in both stages
* images are resized on the device with torch's bilinear interpolation, and padded to multiples of 32

Two things differ by choice:

* warmup starts at η/3 and rises each iteration like Detectron's, but momentum needs no correction (form (9), Remark 2)
* there are two aspect ratios, tall and wide, and the pairs come from the one shuffle of an epoch (Remark 4)
"""

from lbsgd.commands.detect import main
from lbsgd.errors import DataError
from lbsgd.report.measure import DETECTOR


class MaskRCNN:
    """Images and objects: torchvision's five losses in training, COCO's average precision in evaluation."""

    name = "mask_rcnn_resnet50_fpn"
    counts, judged_by = (), DETECTOR
    sizes: dict = {}  # of the network, if they are not the paper's

    def __init__(self, request):
        self.request, self.names = request, request.val.names

    def network(self, num_classes, plan):
        from lbsgd.algorithm.mask_rcnn import Sizes, load_backbone, mask_rcnn

        sides = plan.recipe.detection
        sizes = Sizes(shorter_side=sides.shorter_side, longer_side=sides.longer_side, **self.sizes)
        detector = mask_rcnn(num_classes, plan.per_worker_batch, sizes, plan.recipe.seed)
        weights = self.request.backbone()
        if weights is not None:
            try:
                load_backbone(detector, weights, self.request.flags.backbone_weights)
            except ValueError as error:
                raise DataError(f"--backbone_weights: {error}") from None
        return detector

    def loss(self, network, batch):
        return network([example.pixels for example in batch], [example.target for example in batch]), []

    def evaluate(self, network, batches):
        from lbsgd.train.coco_evaluation import coco_numbers

        return coco_numbers(network, batches, self.names)


if __name__ == "__main__":
    main(MaskRCNN, __doc__)
