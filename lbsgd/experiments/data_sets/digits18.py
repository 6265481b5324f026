"""scikit-learn's digits for a ResNet-18: the backbones of Table 3, pre-trained at several global batches.

It has half the epochs of the digits' own tables, because a ResNet-18 trains 80 images per second on a core. Images,
margin, and the decay's shares of the run are the same.
"""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.data_sets import digits

DATA_SET = replace(
    digits.DATA_SET,
    name="digits18",
    place="ResNet-18 on scikit-learn's digits, 32x32",
    recipe="recipes/resnet18.py",
    deeper=None,
    config="ds_configs/digits/resnet18.json",
    base_lr=0.05,
    candidate_lrs=(),
    warmup_epochs=1,
    decay_epochs=(5, 10, 13.5),
    epochs=15,
    factors=(1, 8, 16, 24),
)
