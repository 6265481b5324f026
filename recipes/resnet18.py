"""ResNet-18 with the paper's recipe: recipes/resnet50.py with a network for small images and small machines.

    python recipes/resnet18.py --deepspeed_config ds_configs/digits.json --data_dir data/digits_ffcv

`lbsgd reproduce table1 digits` runs it for every row of the paper's Table 1 (docs/results.md).
"""

from resnet50 import ResNet50

from lbsgd.commands.train import main


class ResNet18(ResNet50):
    name = "resnet18"


if __name__ == "__main__":
    main(ResNet18(), __doc__)
