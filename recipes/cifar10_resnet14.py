r"""Table 2c on photographs: recipes/cifar10.py with two blocks per resolution instead of one, so 14 layers.

    lbsgd convert --source cifar-10-python.tar.gz --data_dir data/cifar10_ffcv --raw_fraction 1 --max_side 32
    python recipes/cifar10_resnet14.py --deepspeed_config ds_configs/cifar10/1k.json --data_dir data/cifar10_ffcv \
        --output_dir runs/cifar10_resnet14_1k

`lbsgd reproduce longer_table2c cifar10` runs it for the baseline and for the large batch.
"""

from cifar10 import SmallResNet

from lbsgd.commands.train import main


class DeeperSmallResNet(SmallResNet):
    """Only the depth differs."""

    name = "resnet14"
    blocks = 2


if __name__ == "__main__":
    main(DeeperSmallResNet(), __doc__)
