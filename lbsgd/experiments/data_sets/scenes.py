"""Scenes of scikit-learn's digits: Table 3 in hours on two cores, with a small detector.

2,048 iterations of 2 images are 4 epochs of 1,024 scenes, for every row. The learning rate is divided by 10 at three
quarters of the run; the warmup takes 400 images. The margin is 3 points of average precision on 200 scenes: "level"
means a 95 % interval of the difference within ± 3. Backbones are runs of digits18 with the same seed.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet

SCENES = "{work_dir}/data/scenes"

DATA_SET = DataSet(
    name="scenes",
    place="a small Mask R-CNN on scenes of scikit-learn's digits",
    recipe="recipes/mask_rcnn_digits.py",
    config="ds_configs/detection/scenes.json",
    base_batch=2,
    base_lr=0.0025,
    warmup_epochs=0,
    decay_epochs=(),
    epochs=4,
    large=8,
    factors=(1, 2, 4, 8),
    micro_batch=2,
    margin_pct=3.0,
    prepare=(("tools/render_scenes.py", "--output_dir", SCENES),),
    data_dir=SCENES,
    per_worker_batch=2,
    complete="annotations/instances_val.json",
    is_detection=True,
)
