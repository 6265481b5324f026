"""CIFAR-10 with a small residual network: the paper's tables on 50,000 photographs, in hours on two cores.

The margin is 1 point of 10,000 validation images. Crops and decay were chosen on the baseline alone
(docs/experiments.md). So was the learning rate: the largest within the margin of the best (`lbsgd reproduce baseline_lr
cifar10 --seeds 100-101`). At a factor of 32 an epoch of 50,000 images has 12 iterations, which leave out
848 images, 1.7 %.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Deeper

ARCHIVE, FFCV = "{work_dir}/data/cifar-10-python.tar.gz", "{work_dir}/data/cifar10_ffcv"
CONVERT = ("tools/convert_imagenet_to_ffcv.py", "--raw_fraction", "1", "--max_side", "32")  # keeps the exact pixels

DATA_SET = DataSet(
    name="cifar10",
    place="a residual network of 8 layers on CIFAR-10",
    recipe="recipes/cifar10.py",
    config="ds_configs/cifar10/1k.json",
    base_batch=128,
    base_lr=0.4,
    candidate_lrs=(0.1, 0.2, 0.4),
    warmup_epochs=1,
    decay_epochs=(8, 12, 14),
    epochs=15,
    large=8,
    factors=(1, 8, 16, 32),
    micro_batch=256,
    margin_pct=1.0,
    prepare=((*CONVERT, "--source", ARCHIVE, "--data_dir", FFCV),),
    data_dir=FFCV,
    deeper=Deeper("recipes/cifar10_resnet14.py", "a residual network of 14 layers on CIFAR-10"),
)
