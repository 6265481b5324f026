"""scikit-learn's digits for a ResNet-18: the backbones of Table 3, pre-trained at several global batches.

Half the epochs of the digits' own tables, because a ResNet-18 trains 80 images per second on a core; everything else
is theirs: images, factors, margin, and decay at the same shares of the run.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet

TREE, FFCV = "{work_dir}/data/digits_1536", "{work_dir}/data/digits_1536_ffcv"

DATA_SET = DataSet(
    name="digits18",
    place="ResNet-18 on scikit-learn's digits, 32x32",
    recipe="recipes/resnet18.py",
    config="ds_configs/digits/resnet18.json",
    base_batch=32,
    base_lr=0.05,
    warmup_epochs=1,
    epochs=15,
    large=8,
    factors=(1, 8, 16, 24),
    micro_batch=256,
    margin_pct=1.0,
    prepare=(
        ("tools/render_digits.py", "--num_val", "261", "--output_dir", TREE),
        ("tools/convert_imagenet_to_ffcv.py", "--source", TREE, "--data_dir", FFCV),
    ),
    data_dir=FFCV,
)
