r"""The residual network of recipes/cifar10.py on scikit-learn's digits at 16x16, seconds per epoch on one core.

    python tools/render_digits.py --num_val 261 --output_dir data/digits_1536
    lbsgd convert --source data/digits_1536 --data_dir data/digits_1536_ffcv
    python recipes/digits.py --deepspeed_config ds_configs/digits/256.json --data_dir data/digits_1536_ffcv \
        --output_dir runs/digits_256

`lbsgd reproduce table1 digits` runs it for every row of the paper's Table 1.
"""

from cifar10 import SmallResNet

from lbsgd.commands.train import main


class DigitsResNet(SmallResNet):
    """The network at full resolution, which is small here."""

    stem_stride = 1


if __name__ == "__main__":
    main(DigitsResNet(), __doc__)
