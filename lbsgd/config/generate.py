"""`lbsgd config`: a complete, checked DeepSpeed JSON from a global batch. Nobody writes these files by hand."""

from __future__ import annotations

from typing import Any

from lbsgd.algorithm.published import EPOCHS, IMAGENET_IMAGES
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import consistency_findings, deepspeed_findings, fit_findings
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import divisors
from lbsgd.config.overrides import Overrides, override
from lbsgd.config.precision import set_precision
from lbsgd.config.schema import Recipe

WHERE = "lbsgd config"
# ResNet-50 at 224 pixels then has 11 GB of activations in half precision, 22 in float32 (commands/plan_memory.py).
MOST_IMAGES_PER_PASS = 256


def template(global_batch: int, micro_batch: int, num_images: int, epochs: int) -> dict[str, Any]:
    """Return the paper's recipe (Sec. 5.1) in fp16; `override` puts in the numbers that follow from kn."""
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
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
        "fp16": {
            "enabled": True,
            "auto_cast": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"keep_in_fp32_modules": ["running_mean", "running_var"]},
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10,
        "lbsgd": {
            "epochs": epochs,
            "num_images": num_images,
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


def generate(
    global_batch: int,
    *,
    gpus: int | None = None,
    micro_batch: int | None = None,
    precision: str = "fp16",
    zero_stage: int | None = None,
    num_images: int = IMAGENET_IMAGES,
    epochs: int = EPOCHS,
    settings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return a checked JSON for kn images per update.

    gpus: the number of GPUs that the micro batch is chosen for, by default k with one worker each. The micro batch is
    the largest of at most 256 images that divides a GPU's share. zero_stage: by default 1 in fp16, else 0. settings:
    those of --set. Raises ConfigError where the numbers cannot go together.
    """
    config, recipe = override(template(global_batch, 1, num_images, epochs), Overrides(settings=settings))
    n, kn = recipe.batch_norm.per_worker_batch, config["train_batch_size"]
    gpus = gpus or max(1, kn // n)
    config["train_micro_batch_size_per_gpu"] = micro_batch or images_per_pass(kn, n, gpus)
    set_precision(config, precision)
    config["zero_optimization"]["stage"] = int(precision == "fp16") if zero_stage is None else zero_stage
    if config["zero_optimization"]["stage"] > 1:
        config["lbsgd"].pop("aggregation", None)  # ZeRO-2 reduces in every pass by itself
    config["steps_per_print"] = 100 if recipe.num_images // kn >= 1000 else 10  # 8 to 60 lines per epoch
    planned = Planned(config, recipe, gpus)
    refuse(WHERE, deepspeed_findings(config))
    refuse(WHERE, consistency_findings(planned))
    refuse(WHERE, fit_findings(planned))
    return in_order(config)


def images_per_pass(global_batch: int, per_worker_batch: int, gpus: int) -> int:
    """Return the largest micro batch of whole workers that divides a GPU's share of kn, at most 256 images."""
    workers = global_batch // (gpus * per_worker_batch)
    fitting = [d for d in divisors(workers) if d * per_worker_batch <= MOST_IMAGES_PER_PASS]
    return per_worker_batch * max(fitting, default=1)


def in_order(config: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON with its keys in the order of the template, and those of the block in the order of `Recipe`."""
    order, fields = list(template(1, 1, 1, 1)), list(Recipe.model_fields)
    config["lbsgd"] = dict(sorted(config["lbsgd"].items(), key=lambda item: fields.index(item[0])))
    return dict(sorted(config.items(), key=lambda item: order.index(item[0] if item[0] in order else "fp16")))
