"""Rules about detectors, which are JSONs with an lbsgd.detection block (Sec. 5.4)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.precision import precision_of

LR_OF_AN_IMAGE = 0.02 / 16  # Detectron's, on COCO
FEWEST_IMAGES = 100_000  # of a data set of COCO's size; smaller ones need other learning rates
LARGEST_KNOWN_BATCH = 128
IMAGES_OF_A_FORWARD = 2


def over_8k(**changes: Any) -> dict[str, Any]:
    """Return the patch that turns ds_configs/8k.json into a detector's without findings, with changes by key path."""
    patch: dict[str, Any] = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"params": {"lr": 0.02}},
        "scheduler": {"params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02, "warmup_num_steps": 500}},
        "fp16": None,
        "data_types": None,
        "zero_optimization": {"stage": 0},
        "lbsgd": {
            "purpose": None,
            "paper_error_pct": None,
            "epochs": None,
            "iterations": 160_000,
            "num_images": 117_266,
            "linear_scaling": {"base_lr": 0.02, "base_batch": 16},
            "warmup": {"epochs": None, "iterations": 500, "start_fraction": 0.5},
            "decay": {"epochs": None, "iterations": [120_000]},
            "batch_norm": {"per_worker_batch": 2},
            "detection": {},
        },
    }
    for path, value in changes.items():
        *blocks, last = path.split("__")
        place = patch
        for name in blocks:
            place = place[name]
        place[last] = value
    return patch


@rule(
    "M01",
    "a detector in fp16",
    lbsgd="error",
    why="fp16.auto_cast converts the boxes among the inputs, too, and half precision has no coordinate between 1024 "
    "and 1026: boxes move by up to a pixel.",
    fix="use fp32, or bf16 as torch_autocast: lbsgd's boxes stay in float32",
    example=over_8k(fp16={"enabled": True, "auto_cast": True}, zero_optimization={"stage": 1}, lbsgd__aggregation=None),
)
def half_precision(planned: Planned) -> Iterator[Hit]:
    if planned.recipe.detection and precision_of(planned.config) == "fp16":
        yield Hit("fp16.enabled", "is true, but box coordinates do not survive it")


@rule(
    "M02",
    "a learning rate of another number of images",
    lbsgd="warning",
    why="Detectron's 0.02 belongs to 16 images on all GPUs together. If it is taken for the images of one GPU, or "
    "left as it is on fewer GPUs, it is wrong by the number of GPUs. This is the most frequent question about "
    "detectors' learning rates.",
    fix="give base_lr and base_batch that belong together: 0.02 and 16 on COCO, whatever the number of GPUs",
    example=over_8k(
        lbsgd__linear_scaling={"base_lr": 0.02, "base_batch": 2},
        optimizer={"params": {"lr": 0.16}},
        scheduler={"params": {"warmup_min_lr": 0.08, "warmup_max_lr": 0.16, "warmup_num_steps": 500}},
    ),
)
def lr_of_all_images(planned: Planned) -> Iterator[Hit]:
    scaling, recipe = planned.recipe.linear_scaling, planned.recipe
    times = scaling.base_lr / scaling.base_batch / LR_OF_AN_IMAGE
    if recipe.detection and recipe.num_images >= FEWEST_IMAGES and not 0.51 < times < 1.99:
        said = f"is {scaling.base_lr:g} for {scaling.base_batch} images, {times:.3g} times Detectron's 0.02 for 16"
        yield Hit("lbsgd.linear_scaling.base_lr", f"{said} images of all GPUs")


@rule(
    "M03",
    "a detector beyond the linear rule",
    lbsgd="warning",
    why="MLPerf's reference runs of Mask R-CNN follow the linear rule from 8 to 128 images an update, and need 12 to "
    "15 epochs (one of 60 needs 20). With 256 images their learning rate is 0.24, where the rule's is 0.32, and the "
    "schedule is longer: 17 epochs. No run by the rule beyond 128 is known.",
    fix="use 128 images at most, or a smaller learning rate and a longer schedule",
    example=over_8k(
        train_batch_size=256,
        optimizer={"params": {"lr": 0.32}},
        scheduler={"params": {"warmup_min_lr": 0.16, "warmup_max_lr": 0.32, "warmup_num_steps": 500}},
    ),
)
def beyond_the_rule(planned: Planned) -> Iterator[Hit]:
    kn = planned.global_batch
    if planned.recipe.detection and kn > LARGEST_KNOWN_BATCH:
        yield Hit("train_batch_size", f"is {kn}, and runs by the rule are known up to {LARGEST_KNOWN_BATCH} images")


@rule(
    "M04",
    "forwards of another number of images",
    lbsgd="warning",
    why="A detector's losses are means over the regions sampled in one forward, and a forward pads its images to the "
    "largest. So n is a hyper-parameter, as batch norm's is (Sec. 2.3); the paper's is 2.",
    fix="use 2; a micro batch of several n runs as forwards of n, so it needs no other n to fill a GPU",
    example=over_8k(lbsgd__batch_norm={"per_worker_batch": 4}, train_micro_batch_size_per_gpu=4),
)
def images_of_a_forward(planned: Planned) -> Iterator[Hit]:
    n = planned.per_worker_batch
    if planned.recipe.detection and n != IMAGES_OF_A_FORWARD:
        yield Hit("lbsgd.batch_norm.per_worker_batch", f"is {n}: another loss function than that of n = 2")


@rule(
    "M05",
    "settings of a batch norm that is frozen",
    lbsgd="error",
    why="A detector keeps its backbone's statistics: with 2 images a forward new ones would be noise.",
    fix="leave out all but per_worker_batch",
    example=over_8k(
        lbsgd__batch_norm={"per_worker_batch": 2, "statistics": "recomputed", "statistics_images": 16},
    ),
)
def frozen_batch_norm(planned: Planned) -> Iterator[Hit]:
    if planned.recipe.detection:
        for key, value in planned.recipe.batch_norm.model_dump(exclude_defaults=True).items():
            if key not in ("per_worker_batch", "statistics_images"):  # goes with statistics
                yield Hit(f"lbsgd.batch_norm.{key}", f"is {json.dumps(value)}, but batch norm is frozen")


@rule(
    "M06",
    "a classifier's sizes for a detector",
    lbsgd="error",
    why="A detector crops nothing and has sides of its own, so resolution and crop_scale would change nothing.",
    fix="leave it out; lbsgd.detection.shorter_side and longer_side are a detector's sizes",
    example=over_8k(lbsgd__augmentation={"resolution": 512}),
)
def sizes_of_a_classifier(planned: Planned) -> Iterator[Hit]:
    if planned.recipe.detection:
        for key, value in planned.recipe.augmentation.model_dump(exclude_defaults=True).items():
            if key != "flip":
                yield Hit(f"lbsgd.augmentation.{key}", f"is {json.dumps(value)}, and a detector does not read it")
