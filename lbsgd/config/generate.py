"""`lbsgd config`: generate a complete, checked DeepSpeed JSON from a global batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lbsgd.algorithm.published import COCO_IMAGES, EPOCHS, IMAGENET_IMAGES
from lbsgd.config.checks import fit
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import CONSISTENCY, DEVIATIONS, deepspeed_findings
from lbsgd.config.checks.rule import findings_by
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import images_per_pass
from lbsgd.config.keypath import get, is_count, put
from lbsgd.config.overrides import Overrides, override, require_kept, require_passes
from lbsgd.config.precision import FP16, precision_of
from lbsgd.config.schema import Recipe
from lbsgd.errors import ConfigError

WHERE = "lbsgd config"
# With it ResNet-50 at 224 pixels has 11 GB of activations in half precision, 22 in float32 (config/memory.py).
MOST_IMAGES_PER_PASS = 256

# The paper's recipe (Sec. 5.1) in fp16; `override` puts in the flags' values and derives the rest.
PAPER: dict[str, Any] = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 32,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0001}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 0.1, "warmup_num_steps": 1, "warmup_type": "linear"},
    },
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": True,
        "reduce_bucket_size": 6_000_000,
        "allgather_bucket_size": 30_000_000,
    },
    "fp16": FP16,
    "data_types": {"keep_in_fp32_modules": ["running_mean", "running_var"]},
    "timers": {"throughput": {"enabled": False}},
    "steps_per_print": 10,
    "lbsgd": {
        "epochs": EPOCHS,
        "num_images": IMAGENET_IMAGES,
        "linear_scaling": {"rule": "linear", "base_lr": 0.1, "base_batch": 256},
        "warmup": {"kind": "gradual", "epochs": 5},
        "decay": {"epochs": [30, 60, 80], "factor": 0.1},
        "momentum": {"form": "lr_outside", "correction": True},
        "weight_decay": {"on_batch_norm": False, "scaling": "none"},
        "batch_norm": {"per_worker_batch": 32, "scope": "worker", "statistics": "average", "zero_last_gamma": True},
        "augmentation": {"resolution": 224, "crop_scale": [0.08, 1.0], "flip": True},
        "aggregation": {"hierarchy": "auto", "between": "auto"},
        "seed": 0,
    },
}

SHARED = "scheduler gradient_clipping zero_allow_untested_optimizer zero_optimization timers steps_per_print".split()
# Mask R-CNN's recipe (Sec. 5.4, Table 3b) in fp32: Detectron's 2x schedule for 16 images per update.
DETECTOR: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {
        "type": "SGD",
        "params": {"lr": 0.02, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0001},
    },
    **{key: PAPER[key] for key in SHARED},
    "lbsgd": {
        "iterations": 160_000,
        "num_images": COCO_IMAGES,
        "linear_scaling": {"rule": "linear", "base_lr": 0.02, "base_batch": 16},
        "warmup": {"kind": "gradual", "iterations": 500, "start_fraction": 1 / 3, "scaled": False},
        "decay": {"iterations": [120_000], "factor": 0.1},
        "momentum": {"form": "lr_outside", "correction": True},
        "biases": {"lr_factor": 2.0, "weight_decay": False},
        "batch_norm": {"per_worker_batch": 2},
        "augmentation": {"flip": True},
        "detection": {"shorter_side": 800, "longer_side": 1333},
        "aggregation": {"hierarchy": "auto", "between": "auto"},
        "seed": 0,
    },
}


def generate(overrides: Overrides, *, gpus: int | None = None, detection: bool = False) -> dict[str, Any]:
    """Return the paper's JSON with the overrides, checked: `lbsgd check` finds no error in it.

    gpus: the number of GPUs to choose the micro batch for, by default k with one worker each. Unless overridden, the
    micro batch is the largest of at most 256 images that divides a GPU's share, and the ZeRO stage is 1 in fp16, else
    0. detection: Mask R-CNN on COCO in fp32 and forwards of 2, instead of a classifier on ImageNet in fp16. Raises
    ConfigError if the numbers do not fit together, or if two overrides give different values for one key.
    """
    if detection and overrides.epochs:
        raise ConfigError(f"{WHERE}: a detector's run is counted in iterations: use --set lbsgd.iterations=N")
    config, recipe = override(DETECTOR if detection else paper_scaled_to(overrides), overrides)
    gpus = gpus or max(1, config["train_batch_size"] // recipe.batch_norm.per_worker_batch)
    asked = overrides.values()
    put_defaults(config, defaults_of(config, recipe, gpus), asked)
    if get(config, "zero_optimization.stage", 0) not in (0, 1) and not is_asked("lbsgd.aggregation", asked):
        config["lbsgd"].pop("aggregation", None)  # ZeRO-2 itself reduces in every pass
    require_kept(config, asked)
    require_passes(config, asked, gpus)
    planned = Planned(config, recipe, gpus)
    refuse(WHERE, deepspeed_findings(config))
    refuse(WHERE, findings_by(CONSISTENCY + DEVIATIONS, planned))
    refuse(WHERE, findings_by(fit.RULES, planned))
    return in_paper_order(config)


def paper_scaled_to(overrides: Overrides) -> dict[str, Any]:
    """Return PAPER, with warmup and decay points scaled to the overrides' number of epochs."""
    paper = copy.deepcopy(PAPER)
    for key, value in scaled_epochs(overrides).items():
        put(paper, key, value)
    return paper


def scaled_epochs(overrides: Overrides) -> dict[str, Any]:
    """Return the paper's warmup and decay, by key path, as the same fractions of a run with other epochs.

    They are rounded to a tenth of an epoch; those that a flag sets are left out. The result is empty if the epochs are
    the paper's or not a count.
    """
    asked = overrides.values()
    epochs = asked.get("lbsgd.epochs", EPOCHS)
    if epochs == EPOCHS or not is_count(epochs):
        return {}

    def scaled(epoch: float) -> float:
        moved = round(epoch * epochs / EPOCHS, 1)
        return int(moved) if moved == int(moved) else moved

    points = {
        "lbsgd.warmup.epochs": scaled(get(PAPER, "lbsgd.warmup.epochs")),
        "lbsgd.decay.epochs": [scaled(epoch) for epoch in get(PAPER, "lbsgd.decay.epochs")],
    }
    return {key: value for key, value in points.items() if not is_asked(key, asked)}


def defaults_of(config: Mapping[str, Any], recipe: Recipe, gpus: int) -> dict[str, Any]:
    """Return the default values, by key path, that follow from batch, data and precision."""
    kn, n = config["train_batch_size"], recipe.batch_norm.per_worker_batch
    most = MOST_IMAGES_PER_PASS if recipe.detection is None else n
    return {
        "train_micro_batch_size_per_gpu": images_per_pass(kn, n, gpus, most),
        "zero_optimization.stage": int(precision_of(config) == "fp16"),
        "steps_per_print": 100 if recipe.num_images // kn >= 1000 else 10,  # 8 to 60 lines per epoch
    }


def put_defaults(config: dict[str, Any], defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Put in the defaults of the keys that no flag sets."""
    for key, default in defaults.items():
        if not is_asked(key, asked):
            put(config, key, default)


def is_asked(key: str, asked: Mapping[str, Any]) -> bool:
    """Whether a flag sets a key, the block around it, or a key inside it."""
    return any(f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in asked)


def in_paper_order(config: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON with its keys in the order of PAPER, and the lbsgd block's in the order of `Recipe`."""
    order, fields = list(PAPER), list(Recipe.model_fields)
    config["lbsgd"] = dict(sorted(config["lbsgd"].items(), key=lambda item: fields.index(item[0])))
    return dict(sorted(config.items(), key=lambda item: order.index(item[0] if item[0] in order else "fp16")))
