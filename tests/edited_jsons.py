"""Shipped JSONs with some values replaced, and changes that make each of them wrong."""

from pathlib import Path

from lbsgd.config.json_file import read_json

CONFIGS = Path(__file__).parent.parent / "ds_configs"


def edited(name="8k", **changes):
    """A shipped JSON with the values at dotted paths (written with __) replaced; None deletes."""
    config = read_json(CONFIGS / f"{name}.json")
    for path, value in changes.items():
        *blocks, last = path.split("__")
        target = config
        for block in blocks:
            target = target[block]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return config


WRONG = [
    # changes of the JSON                                             the code, the key, and words of the finding
    (dict(optimizer__params__lr=0.1), "R01", "optimizer.params.lr", ["is 0.1", "makes it 3.2"]),
    (dict(scheduler__params__warmup_num_steps=1000), "R01", "scheduler.params.warmup_num_steps", ["1000", "780"]),
    (dict(scheduler__params__warmup_min_lr=0.0), "R01", "scheduler.params.warmup_min_lr", ["is 0.0", "0.1"]),
    (dict(train_batch_size=4096), "R01", "optimizer.params.lr", ["is 3.2", "makes it 1.6"]),
    (dict(scheduler__params__warmup_type=None), "D10", "scheduler.params.warmup_type", ["logarithmic"]),
    (dict(scheduler__type="WarmupDecayLR"), "D09", "scheduler.type", ["WarmupDecayLR"]),
    (dict(gradient_clipping=None), "D08", "gradient_clipping", ["not set", "1.0"]),
    (dict(gradient_clipping=1.0), "D08", "gradient_clipping", ["1.0"]),
    (dict(zero_optimization__stage=0), "D11", "zero_optimization.stage", ["fp16", "65536 times too small"]),
    (dict(zero_optimization__stage=3), "D17", "zero_optimization.stage", ["3", "0, 1 or 2"]),
    (dict(zero_allow_untested_optimizer=None), "D18", "zero_allow_untested_optimizer", ["refuses SGD"]),
    (dict(optimizer__type="sgd"), "D06", "optimizer.type", ['"sgd"', '"SGD"']),
    (dict(optimizer__params__dampening=0.1), "D07", "optimizer.params", ["dampening"]),
    (dict(elasticity={}), "D01", "elasticity", ["removed"]),
    (dict(train_batchsize=1), "D02", "train_batchsize", ["did you mean train_batch_size"]),
    (dict(train_batch_size="auto"), "D04", "train_batch_size", ['"auto"']),
    (dict(optimizer__params__lr="auto"), "D21", "optimizer.params.lr", ["Hugging Face"]),
    (dict(gradient_allreduce_op="sum"), "D05", "gradient_allreduce_op", ["Remark 3"]),
    (dict(bf16={"enabled": True}, fp16=None), "D13", "bf16", ["torch_autocast"]),
    (dict(bfloat16={"enabled": True}, fp16=None), "D13", "bfloat16", ["torch_autocast"]),
    (dict(torch_autocast={"enabled": True, "dtype": "float16"}, fp16=None), "D14", "torch_autocast.dtype", ["float16"]),
    (dict(torch_autocast={"enabled": True, "dtype": "bfloat16"}), "D15", "torch_autocast", ["choose one"]),
    (dict(data_types={"buffer_dtype": "fp16"}), "D16", "data_types.buffer_dtype", ["running statistics"]),
    (
        dict(zero_optimization__offload_optimizer={"device": "cpu"}),
        "D19",
        "zero_optimization.offload_optimizer",
        ["Adam"],
    ),
    (dict(optimizer__params__momentum=None), "R05", "optimizer.params.momentum", ["is not set"]),
    (dict(optimizer__params__momentum=9), "R05", "optimizer.params.momentum", ["is 9", "below 1"]),
    (dict(optimizer__params__weight_decay=-1), "R05", "optimizer.params.weight_decay", ["-1"]),
    (dict(optimizer__params__nesterov=None), "R06", "optimizer.params.nesterov", ["is not set"]),
    (dict(optimizer__params__momentum=0), "D25", "optimizer.params.nesterov", ["momentum 0"]),
    (dict(communication_data_type="fp16", fp16=None), "D22", "communication_data_type", ["delete"]),
    (dict(managed_gradient_accumulation=False), "D23", "managed_gradient_accumulation", ["every pass"]),
    (dict(steps_per_print="10"), "D24", "steps_per_print", ['"10"']),
    (dict(scheduler__params__warmup_typ="linear"), "D26", "scheduler.params", ["warmup_typ"]),
    (dict(fp16__enabled="true"), "D27", "fp16.enabled", ['"true"']),
    (dict(torch_autocast={"enable": True}), "D28", "torch_autocast", ["enable"]),
    (dict(gradient_accumulation_steps=7), "F05", "gradient_accumulation_steps", ["is 7", "32 passes"]),
    (
        dict(lbsgd__batch_norm={"statistics": "recomputed", "statistics_images": 3_200_000}),
        "F04",
        "lbsgd.batch_norm.statistics_images",
        ["3200000", "1281167"],
    ),
    (dict(lbsgd__warmup__epoch=5), "R10", "lbsgd.warmup.epoch", ["is an unknown key"]),
    (dict(lbsgd__ema=0.999), "R10", "lbsgd.ema", ["is an unknown key", "docs/in_your_project.md"]),
    (dict(lbsgd__label_smoothing=0.1), "R10", "lbsgd.label_smoothing", ["is an unknown key", "`loss` of a recipe"]),
    (dict(lbsgd__warmup__epochs=None), "R11", "lbsgd.warmup.epochs", ["missing", "the paper has 5"]),
    (dict(lbsgd__warmup__kind="slow"), "R12", "lbsgd.warmup.kind", ["gradual", "slow"]),
    (dict(lbsgd__warmup__epochs=0), "R12", "lbsgd.warmup.kind", ["0 epochs"]),
    (dict(lbsgd__epochs="90"), "R12", "lbsgd.epochs", ['"90"']),
    (dict(lbsgd__decay__epochs=[60, 30]), "R12", "lbsgd.decay.epochs", ["ascend"]),
    (dict(lbsgd__decay__epochs=[3, 60]), "R12", "lbsgd.decay", ["inside"]),
    (
        dict(lbsgd__momentum={"form": "lr_outside", "correction": False}),
        "R12",
        "lbsgd.momentum.correction",
        ["by construction"],
    ),
    (dict(lbsgd__weight_decay={"scaling": "inverse_lr"}), "R12", "lbsgd.weight_decay", ["base"]),
    (dict(lbsgd__batch_norm={"statistics": "recomputed"}), "R12", "lbsgd.batch_norm.statistics_images", ["needed"]),
    (
        dict(lbsgd__batch_norm={"scope": "all", "statistics": "first_worker"}),
        "R12",
        "lbsgd.batch_norm.scope",
        ["average"],
    ),
    (dict(lbsgd__augmentation={"crop_scale": [1.0, 0.5]}), "R12", "lbsgd.augmentation.crop_scale", ["smaller first"]),
    (
        dict(lbsgd__detection={"shorter_side": 1334}),
        "R12",
        "lbsgd.detection.shorter_side",
        ["1334 is longer than longer_side 1333"],
    ),
]
