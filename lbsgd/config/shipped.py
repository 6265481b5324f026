"""The paper's grid of configurations (Fig. 1 and 3, Tables 1 and 2): every file in ds_configs as a line, and their table.

A line holds the arguments with which `lbsgd config` writes the file, the paper's error, and what the file is for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbsgd.algorithm import published as paper
from lbsgd.config.json_file import precision_of, read_json, write_json


@dataclass(frozen=True)
class Shipped:
    """A shipped file: its name in ds_configs, without .json, the arguments of `lbsgd config`, error and purpose."""

    name: str
    arguments: str
    error: tuple[float, float] | None
    purpose: str

    def command(self) -> list[str]:
        """The arguments with which `lbsgd config` prints the file."""
        error = [] if self.error is None else ["--set", f"lbsgd.paper_error_pct={list(self.error)}"]
        return [*shlex.split(self.arguments), "--set", f"lbsgd.purpose={self.purpose}", *error]


def of_figure_1(global_batch: int, gpus: str = "") -> Shipped:
    """The linear scaling rule, with gradual warmup above 256 images."""
    name = str(global_batch) if global_batch < 1000 else f"{global_batch // 1024}k"
    purposes = {
        256: "the baseline: one server of 8 GPUs, lr 0.1, no warmup (Table 1)",
        8192: "the paper's run: linear scaling rule and gradual warmup match the baseline in 1 hour (Table 1)",
    }
    below = "the linear scaling rule below the baseline's batch (Fig. 1)"
    above = "the linear scaling rule and gradual warmup match the baseline (Fig. 1)"
    beyond = "where the linear scaling rule ends: the error rises (Fig. 1)"
    kind = below if global_batch < 256 else above if global_batch <= paper.LARGEST_GOOD_BATCH else beyond
    return Shipped(
        name, f"--global_batch {global_batch}", paper.ERROR_PCT[global_batch], purposes.get(global_batch, kind)
    )


def ablation(name: str, setting: str, measured: dict, purpose: str) -> Shipped:
    """One thing changed in 256.json or 8k.json."""
    kn = 8192 if name.startswith("8k") else 256
    settings = "".join(f" --set {part}" for part in setting.split())
    return Shipped(
        f"ablations/{name}", f"--global_batch {kn}{settings}", measured.get(kn), f"for comparison: {purpose}"
    )


EIGHT_K = paper.ERROR_PCT[8192]
GRID = (
    *map(of_figure_1, paper.ERROR_PCT),
    Shipped(
        "8k_8gpu", "--global_batch 8192 --gpus 8", EIGHT_K, "8k.json on one server of 8 GPUs, in 4 passes of 256 images"
    ),
    Shipped(
        "8k_bf16", "--global_batch 8192 --precision bf16", EIGHT_K, "8k.json in bfloat16 autocast, weights in float32"
    ),
    Shipped("8k_fp32", "--global_batch 8192 --precision fp32", EIGHT_K, "8k.json in float32, as the paper computed"),
    Shipped(
        "8k_zero2", "--global_batch 8192 --zero_stage 2", EIGHT_K, "8k.json with gradients divided among GPUs (ZeRO-2)"
    ),
    Shipped(
        "digits",
        "--global_batch 128 --micro_batch 32 --precision fp32 --num_images 1437 --epochs 8"
        " --set lbsgd.linear_scaling.base_lr=0.0125 --set lbsgd.linear_scaling.base_batch=32"
        " --set lbsgd.warmup.epochs=1 --set lbsgd.decay.epochs=[5,7] --set lbsgd.augmentation.resolution=32"
        " --set lbsgd.augmentation.crop_scale=[0.7,1.0] --set lbsgd.augmentation.flip=false",
        None,
        "make demo: scikit-learn's 1,797 digits in minutes on a CPU",
    ),
    Shipped(
        "digits/256",
        "--global_batch 256 --gpus 1 --precision fp32 --num_images 1536 --epochs 30"
        " --set lbsgd.linear_scaling.base_lr=0.05 --set lbsgd.linear_scaling.base_batch=32"
        " --set lbsgd.warmup.epochs=2 --set lbsgd.decay.epochs=[10,20,27] --set lbsgd.augmentation.resolution=32"
        " --set lbsgd.augmentation.crop_scale=[0.7,1.0] --set lbsgd.augmentation.flip=false",
        None,
        "lbsgd reproduce ... digits: the large batch of Tables 1 and 2 on scikit-learn's digits",
    ),
    Shipped(
        "cifar10/1k",
        "--global_batch 1024 --gpus 1 --precision fp32 --num_images 50000 --epochs 18"
        " --set lbsgd.linear_scaling.base_lr=0.1 --set lbsgd.linear_scaling.base_batch=128"
        " --set lbsgd.warmup.epochs=1 --set lbsgd.decay.epochs=[6,12,16] --set lbsgd.augmentation.resolution=32"
        " --set lbsgd.augmentation.crop_scale=[0.5,1.0]",
        None,
        "lbsgd reproduce ... cifar10: the large batch of Tables 1 and 2 on CIFAR-10",
    ),
    ablation(
        "8k_no_warmup",
        "lbsgd.warmup.kind=none lbsgd.warmup.epochs=0",
        paper.NO_WARMUP,
        "lr 3.2 from the first iteration on (Table 1)",
    ),
    ablation(
        "8k_constant_warmup",
        "lbsgd.warmup.kind=constant",
        paper.CONSTANT_WARMUP,
        "lr 0.1 for 5 epochs, then a jump to 3.2 (Table 1)",
    ),
    ablation(
        "8k_sqrt_lr", "lbsgd.linear_scaling.rule=sqrt", paper.SQRT_RULE, "lr 0.1 times the square root of 32 (Table 2a)"
    ),
    ablation(
        "8k_fixed_lr",
        "lbsgd.linear_scaling.rule=fixed lbsgd.warmup.kind=none lbsgd.warmup.epochs=0",
        paper.FIXED_LR,
        "lr 0.1, not scaled (Table 2a)",
    ),
    ablation("8k_half_lr", "lbsgd.linear_scaling.base_lr=0.05", paper.HALF_LR, "lr 0.05 times 32 (Table 2a)"),
    ablation("8k_double_lr", "lbsgd.linear_scaling.base_lr=0.2", paper.DOUBLE_LR, "lr 0.2 times 32 (Table 2a)"),
    ablation("256_half_lr", "lbsgd.linear_scaling.base_lr=0.05", paper.HALF_LR, "lr 0.05 (Table 2a)"),
    ablation("256_double_lr", "lbsgd.linear_scaling.base_lr=0.2", paper.DOUBLE_LR, "lr 0.2 (Table 2a)"),
    ablation(
        "8k_gamma_one",
        "lbsgd.batch_norm.zero_last_gamma=false",
        paper.GAMMA_ONE,
        "gamma 1 in each block's last batch norm (Table 2b)",
    ),
    ablation(
        "256_gamma_one",
        "lbsgd.batch_norm.zero_last_gamma=false",
        paper.GAMMA_ONE,
        "gamma 1 in each block's last batch norm (Table 2b)",
    ),
    ablation(
        "8k_sync_bn", "lbsgd.batch_norm.scope=all", {}, "batch norm across all GPUs, another loss function (Sec. 2.3)"
    ),
    ablation(
        "8k_inverse_weight_decay",
        "lbsgd.weight_decay.scaling=inverse_lr lbsgd.weight_decay.base=0.0001",
        {},
        "weight decay / 32: what scaling the loss in place of the lr amounts to (Remark 1)",
    ),
    ablation(
        "8k_no_momentum_correction",
        "lbsgd.momentum.form=lr_inside lbsgd.momentum.correction=false",
        {},
        "momentum of form (10) without its correction (Remark 2)",
    ),
)


# --- the files and their table ------------------------------------------------------------------------------------------


def write_grid(folder: Path, write: Callable[[list[str]], dict[str, Any]]) -> None:
    """Every file of the grid as write(arguments of `lbsgd config`) has it, and the README that explains them."""
    for shipped in GRID:
        path = folder / f"{shipped.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, write(shipped.command()))
    (folder / "README.md").write_text(readme(folder), encoding="utf-8")


def readme(folder: Path) -> str:
    """ds_configs/README.md, generated from the files."""
    files = [(shipped, read_json(folder / f"{shipped.name}.json")) for shipped in GRID]
    rows = [
        (shipped, [f"[{Path(shipped.name).name}]({shipped.name}.json)", *described(config)])
        for shipped, config in files
    ]
    tables = {
        place: table(row for shipped, row in rows if shipped.name.startswith("ablations/") == place)
        for place in (False, True)
    }
    commands = "\n".join(f"{shipped.name + '.json':42}{shipped.arguments}" for shipped in GRID)
    return README.format(grid=tables[False], ablations=tables[True], commands=commands)


def table(rows) -> str:
    """Markdown of the files' rows."""
    heads = ["file", "kn", "k × n", "η", "warmup", "precision, ZeRO stage", "paper, top-1 error %", "what for"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def described(config: dict) -> list[str]:
    """A file's row: kn, k × n, η, warmup, precision, error in the paper, purpose."""
    block, kn = config["lbsgd"], config["train_batch_size"]
    n, warmup, error = block["batch_norm"]["per_worker_batch"], block["warmup"], block.get("paper_error_pct")
    ramp = (
        "-"
        if warmup["kind"] == "none"
        else f"{warmup['kind']}, {warmup['epochs']:g} epoch{'s' * (warmup['epochs'] != 1)}"
    )
    return [
        f"{kn:,}",
        f"{kn // n:,} × {n}",
        f"{config['optimizer']['params']['lr']:.4g}",
        ramp,
        f"{precision_of(config)}, {config['zero_optimization']['stage']}",
        "{:.2f} ± {:.2f}".format(*error) if error else "-",
        block["purpose"].removeprefix("for comparison: "),
    ]


README = """\
<!-- Written by `python -m lbsgd config --all ds_configs` from the files; a test compares. -->
# Configurations

Every file is a complete DeepSpeed JSON with the explicit numbers in DeepSpeed's own blocks, and the intent in an `lbsgd`
block that plain DeepSpeed ignores. They are for ResNet-50 on ImageNet's 1,281,167 images; on other data, and with flags such
as `--global_batch` or `--set`, lbsgd derives the numbers again and prints them. The error is the paper's: mean ± standard
deviation of 5 runs, each the median of its last 5 epochs. Nobody has trained ImageNet with this repository yet.

k is the number of workers, each normalising n = 32 images, whatever the number of GPUs: any divisor of k will do. In fp16 all
GPUs hold the momentum together (ZeRO-1); bf16 is autocast over float32 weights.

{grid}

## For comparison

Each changes one thing in 256.json or 8k.json; `lbsgd check` says what it costs.

{ablations}

## How they were written

`python -m lbsgd config` with these arguments (and purpose and error, by `--set`) prints each file; `--all ds_configs` writes
all of them, and this page. `python -m lbsgd plan FILE --gpus 8` shows what a file means on 8 GPUs.

```
{commands}
```
"""
