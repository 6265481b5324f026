r"""A small Mask R-CNN for scenes of handwritten digits (tools/render_scenes.py), by the recipe of recipes/mask_rcnn.py.

    python tools/render_scenes.py
    python recipes/mask_rcnn_digits.py --deepspeed_config ds_configs/detection/scenes.json --data_dir data/scenes \
        --backbone_weights runs/reproduce/digits18/x1/seed0/weights.pt

The backbone is a ResNet-18 of recipes/resnet18.py. `lbsgd reproduce table3a table3b scenes` runs it for every row of
the paper's Table 3.
"""

from mask_rcnn import MaskRCNN

from lbsgd.commands.detect import main


class SmallMaskRCNN(MaskRCNN):
    """A quarter of the channels, fewer regions, and anchors for digits of 20 to 56 pixels."""

    name = "mask_rcnn_resnet18_fpn"
    sizes = {
        "backbone": "resnet18",
        "channels": 64,
        "anchors": (8, 16, 32, 64, 128),
        "proposals": 200,
        "regions": 64,
        "box_width": 256,
        "mask_layers": 2,
    }


if __name__ == "__main__":
    main(SmallMaskRCNN, __doc__)
