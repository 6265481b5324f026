"""ImageNet with ResNet-50, as in the paper: the baseline of 256 images, and 8,192 images on all GPUs of the machine.

The margin is rounded from the paper's own difference between the two, 0.14 points, plus twice the standard deviation of
its large batch, 0.09.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Deeper

DATA_SET = DataSet(
    name="imagenet",
    place="ResNet-50 on ImageNet",
    recipe="recipes/resnet50.py",
    config="ds_configs/8k.json",
    base_batch=256,
    base_lr=0.1,
    candidate_lrs=(0.05, 0.1, 0.2),
    warmup_epochs=5,
    decay_epochs=(30, 60, 80),
    epochs=90,
    large=32,
    factors=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    micro_batch=256,
    margin_pct=0.3,
    prepare=(),
    data_dir="{work_dir}/data/imagenet_ffcv",
    gpus_per_run=0,
    deeper=Deeper("recipes/resnet101.py", "ResNet-101 on ImageNet"),
)
