r"""Table 2c in miniature: recipes/digits.py with two blocks per resolution instead of one, so 14 layers.

    python tools/render_digits.py --num_val 261 --output_dir data/digits_1536
    lbsgd convert --source data/digits_1536 --data_dir data/digits_1536_ffcv
    python recipes/digits_resnet14.py --deepspeed_config ds_configs/digits/256.json --data_dir data/digits_1536_ffcv \
        --output_dir runs/digits_resnet14_256

`lbsgd reproduce table2c digits` runs it for the baseline and for the large batch.
"""

from digits import DigitsResNet

from lbsgd.commands.train import main


class DeeperDigitsResNet(DigitsResNet):
    """Only the depth differs."""

    name = "resnet14"
    blocks = 2


if __name__ == "__main__":
    main(DeeperDigitsResNet(), __doc__)
