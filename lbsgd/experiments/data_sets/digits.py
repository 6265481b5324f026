"""scikit-learn's handwritten digits: the paper's tables in minutes on two cores.

1,536 of the 1,797 images train, so that factors 1, 2, 4, 8, 16 and 24 leave out no image of an epoch. The margin is
2.6 of the 261 validation images. Epochs and decay are in the proportion of Sec. 5.1 (90: 30, 60, 80). The learning
rate is chosen on the baseline alone: the largest within the margin of the best (`lbsgd reproduce baseline_lr digits`).

The network is small because a ResNet-18 at 32x32 trains 80 images per second on a core, a tenth of this one's: oneDNN
spends 60 % of the time in its last stage, whose maps are of one pixel.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Deeper

TREE, FFCV = "{work_dir}/data/digits_1536", "{work_dir}/data/digits_1536_ffcv"

DATA_SET = DataSet(
    name="digits",
    place="a residual network of 8 layers on scikit-learn's digits, 16x16",
    recipe="recipes/digits.py",
    config="ds_configs/digits/256.json",
    base_batch=32,
    base_lr=0.2,
    candidate_lrs=(0.025, 0.05, 0.1, 0.2),
    warmup_epochs=2,
    decay_epochs=(10, 20, 27),
    epochs=30,
    large=8,
    factors=(1, 2, 4, 8, 16, 24),
    micro_batch=256,
    margin_pct=1.0,
    prepare=(
        ("tools/render_digits.py", "--num_val", "261", "--output_dir", TREE),
        ("tools/convert_imagenet_to_ffcv.py", "--source", TREE, "--data_dir", FFCV),
    ),
    data_dir=FFCV,
    deeper=Deeper("recipes/digits_resnet14.py", "a residual network of 14 layers on scikit-learn's digits, 16x16"),
)
