"""ResNet-18 with the paper's recipe: recipes/resnet50.py with a network for small images and small machines.

    python recipes/resnet18.py --deepspeed_config ds_configs/digits.json --data_dir data/digits_ffcv

`lbsgd reproduce figure1 digits18` runs it: the backbones of Table 3 in miniature (docs/detection.md).
"""

from resnet50 import ResNet50

from lbsgd.commands.train import main


class ResNet18(ResNet50):
    name = "resnet18"


if __name__ == "__main__":
    main(ResNet18(), __doc__)
