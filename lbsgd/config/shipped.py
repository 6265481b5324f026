"""The paper's grid of configurations (Fig. 1 and 3, Tables 1 and 2): one entry per file in ds_configs, and their table.

An entry holds the arguments with which `lbsgd config` writes the file, the paper's error, and the file's purpose.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbsgd.algorithm import published
from lbsgd.config.json_file import read_json, write_json
from lbsgd.config.precision import precision_of
from lbsgd.units import counted, markdown_table


@dataclass(frozen=True)
class Shipped:
    """A shipped file: its name in ds_configs without .json, its arguments for `lbsgd config`, its error and purpose."""

    name: str
    arguments: str
    error: tuple[float, float] | None
    purpose: str

    def command(self) -> list[str]:
        """Return all arguments that make `lbsgd config` print the file."""
        error = [] if self.error is None else ["--set", f"lbsgd.paper_error_pct={list(self.error)}"]
        return [*shlex.split(self.arguments), "--set", f"lbsgd.purpose={self.purpose}", *error]


def of_figure_1(global_batch: int) -> Shipped:
    """Return the entry for a global batch of Fig. 1: the linear scaling rule, with gradual warmup above 256 images."""
    name = str(global_batch) if global_batch < 1000 else f"{global_batch // 1024}k"
    error = published.ERROR_PCT[global_batch]
    return Shipped(name, f"--global_batch {global_batch}", error, purpose_in_figure_1(global_batch))


def purpose_in_figure_1(global_batch: int) -> str:
    """Return the purpose of a file of Fig. 1."""
    if global_batch == 256:
        return "the baseline: one server of 8 GPUs, lr 0.1, no warmup (Table 1)"
    if global_batch == published.LARGEST_GOOD_BATCH:
        return "the paper's run: linear scaling rule and gradual warmup match the baseline in 1 hour (Table 1)"
    if global_batch < 256:
        return "the linear scaling rule below the baseline's batch (Fig. 1)"
    if global_batch < published.LARGEST_GOOD_BATCH:
        return "the linear scaling rule and gradual warmup match the baseline (Fig. 1)"
    return "where the linear scaling rule ends: the error rises (Fig. 1)"


def of_table_3b(global_batch: int) -> Shipped:
    """Return the entry for a detector's global batch: one of Table 3b, or a larger one at which the rule holds."""
    ap = published.DETECTOR_AP.get(global_batch)
    purpose = "Table 3b: box AP {}, mask AP {} in the paper".format(*ap) if ap else "beyond the paper's Table 3b"
    return Shipped(f"detection/mask_rcnn_{global_batch}", f"--detection --global_batch {global_batch}", None, purpose)


def variant_of_8k(name: str, arguments: str, purpose: str) -> Shipped:
    """Return the entry for the run of 8k.json on other hardware or in another precision."""
    return Shipped(name, f"--global_batch 8192 {arguments}", published.ERROR_PCT[8192], purpose)


def ablation(name: str, setting: str, measured: Mapping[int, tuple[float, float]], purpose: str) -> Shipped:
    """Return the entry for a file that changes 256.json or 8k.json, as a rule in one thing."""
    kn = 8192 if name.startswith("8k") else 256
    settings = "".join(f" --set {part}" for part in setting.split())
    arguments = f"--global_batch {kn}{settings}"
    return Shipped(f"ablations/{name}", arguments, measured.get(kn), f"for comparison: {purpose}")


DIGITS = (
    "--global_batch 128 --micro_batch 32 --precision fp32 --num_images 1437 --epochs 8"
    " --set lbsgd.linear_scaling.base_lr=0.0125 --set lbsgd.linear_scaling.base_batch=32"
    " --set lbsgd.warmup.epochs=1 --set lbsgd.decay.epochs=[5,7] --set lbsgd.augmentation.resolution=32"
    " --set lbsgd.augmentation.crop_scale=[0.7,1.0] --set lbsgd.augmentation.flip=false"
)
DIGITS_GRID = (
    "--global_batch 256 --gpus 2 --precision fp32 --num_images 1536 --epochs 30"
    " --set lbsgd.linear_scaling.base_lr=0.2 --set lbsgd.linear_scaling.base_batch=32"
    " --set lbsgd.warmup.epochs=2 --set lbsgd.decay.epochs=[10,20,27] --set lbsgd.augmentation.resolution=16"
    " --set lbsgd.augmentation.crop_scale=[0.7,1.0] --set lbsgd.augmentation.flip=false"
)
DIGITS_18 = (
    "--global_batch 256 --gpus 2 --precision fp32 --num_images 1536 --epochs 15"
    " --set lbsgd.linear_scaling.base_lr=0.05 --set lbsgd.linear_scaling.base_batch=32 --set lbsgd.warmup.epochs=1"
    " --set lbsgd.decay.epochs=[5,10,13.5] --set lbsgd.augmentation.resolution=32"
    " --set lbsgd.augmentation.crop_scale=[0.7,1.0] --set lbsgd.augmentation.flip=false"
)
CIFAR10 = (
    "--global_batch 1024 --gpus 1 --precision fp32 --num_images 50000 --epochs 15"
    " --set lbsgd.linear_scaling.base_lr=0.4 --set lbsgd.linear_scaling.base_batch=128"
    " --set lbsgd.warmup.epochs=1 --set lbsgd.decay.epochs=[8,12,14] --set lbsgd.augmentation.resolution=32"
    " --set lbsgd.augmentation.crop_scale=[0.75,1.0]"
)
SCENES = (
    "--detection --global_batch 16 --num_images 1024 --set lbsgd.linear_scaling.base_lr=0.0025"
    " --set lbsgd.linear_scaling.base_batch=2 --set lbsgd.iterations=2048 --set lbsgd.decay.iterations=[1536]"
    " --set lbsgd.warmup.iterations=200 --set lbsgd.warmup.scaled=true --set lbsgd.augmentation.flip=false"
    " --set lbsgd.detection.shorter_side=112 --set lbsgd.detection.longer_side=128"
)
NO_WARMUP = "lbsgd.warmup.kind=none lbsgd.warmup.epochs=0"
UNSCALED, SQUARE_ROOT = f"lbsgd.linear_scaling.rule=fixed {NO_WARMUP}", "lbsgd.linear_scaling.rule=sqrt"
HALF_LR, DOUBLE_LR = "lbsgd.linear_scaling.base_lr=0.05", "lbsgd.linear_scaling.base_lr=0.2"
GAMMA_ONE = "lbsgd.batch_norm.zero_last_gamma=false"
INVERSE_DECAY = "lbsgd.weight_decay.scaling=inverse_lr lbsgd.weight_decay.base=0.0001"
UNCORRECTED = "lbsgd.momentum.form=lr_inside lbsgd.momentum.correction=false"

GRID = (
    *map(of_figure_1, published.ERROR_PCT),
    variant_of_8k("8k_8gpu", "--gpus 8", "8k.json on one server of 8 GPUs, in 4 passes of 256 images"),
    variant_of_8k("8k_bf16", "--precision bf16", "8k.json in bfloat16 autocast, weights in float32"),
    variant_of_8k("8k_fp32", "--precision fp32", "8k.json in float32, as the paper computed"),
    variant_of_8k("8k_zero2", "--zero_stage 2", "8k.json with gradients divided among GPUs (ZeRO-2)"),
    Shipped("digits", DIGITS, None, "make demo: scikit-learn's 1,797 digits in minutes on a CPU"),
    Shipped("digits/256", DIGITS_GRID, None, "lbsgd reproduce ... digits: the large batch of Tables 1 and 2 on digits"),
    Shipped("digits/resnet18", DIGITS_18, None, "lbsgd reproduce figure1 digits18: the backbones of Table 3 on digits"),
    Shipped("cifar10/1k", CIFAR10, None, "lbsgd reproduce ... cifar10: the large batch of Tables 1 and 2 on CIFAR-10"),
    *map(of_table_3b, (2, 4, 8, 16, 32, 64, 128)),
    Shipped("detection/scenes", SCENES, None, "lbsgd reproduce table3a table3b scenes: a small detector on digits"),
    ablation("8k_no_warmup", NO_WARMUP, published.NO_WARMUP, "lr 3.2 from the first iteration on (Table 1)"),
    ablation(
        "8k_constant_warmup",
        "lbsgd.warmup.kind=constant",
        published.CONSTANT_WARMUP,
        "lr 0.1 for 5 epochs, then a jump to 3.2 (Table 1)",
    ),
    ablation("8k_sqrt_lr", SQUARE_ROOT, published.SQRT_RULE, "lr 0.1 times the square root of 32 (Table 2a)"),
    ablation("8k_fixed_lr", UNSCALED, published.FIXED_LR, "lr 0.1, neither scaled nor warmed up (Table 2a)"),
    ablation("8k_half_lr", HALF_LR, published.HALF_LR, "lr 0.05 times 32 (Table 2a)"),
    ablation("8k_double_lr", DOUBLE_LR, published.DOUBLE_LR, "lr 0.2 times 32 (Table 2a)"),
    ablation("256_half_lr", HALF_LR, published.HALF_LR, "lr 0.05 (Table 2a)"),
    ablation("256_double_lr", DOUBLE_LR, published.DOUBLE_LR, "lr 0.2 (Table 2a)"),
    ablation("8k_gamma_one", GAMMA_ONE, published.GAMMA_ONE, "gamma 1 in each block's last batch norm (Table 2b)"),
    ablation("256_gamma_one", GAMMA_ONE, published.GAMMA_ONE, "gamma 1 in each block's last batch norm (Table 2b)"),
    ablation(
        "8k_sync_bn", "lbsgd.batch_norm.scope=all", {}, "batch norm across all GPUs, another loss function (Sec. 2.3)"
    ),
    ablation(
        "8k_inverse_weight_decay",
        INVERSE_DECAY,
        {},
        "weight decay / 32: what scaling the loss in place of the lr amounts to (Remark 1)",
    ),
    ablation("8k_no_momentum_correction", UNCORRECTED, {}, "momentum of form (10) without its correction (Remark 2)"),
)


FOLDERS = ("ablations", "detection")  # with their own tables in the README
HEADS = ("file", "kn", "k × n", "η", "warmup", "precision, ZeRO stage", "paper, top-1 error %", "what for")


def write_grid(folder: Path, write: Callable[[list[str]], dict[str, Any]]) -> None:
    """Write the README and every file of the grid, which `write` makes from arguments of `lbsgd config`."""
    for shipped in GRID:
        path = folder / f"{shipped.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, write(shipped.command()))
    (folder / "README.md").write_text(readme(folder), encoding="utf-8")


def readme(folder: Path) -> str:
    """Return ds_configs/README.md, generated from the files."""
    files = [(shipped, read_json(folder / f"{shipped.name}.json")) for shipped in GRID]
    rows = [(folder_of(shipped), [link(shipped), *json_cells(config)]) for shipped, config in files]
    tables = {name: table([row for of, row in rows if of == name]) for name in ("", *FOLDERS)}
    commands = "\n".join(f"{shipped.name + '.json':42}{shipped.arguments}" for shipped in GRID)
    return README.format(grid=tables[""], **{name: tables[name] for name in FOLDERS}, commands=commands)


def folder_of(shipped: Shipped) -> str:
    """Return the folder whose table a file belongs to."""
    folder = shipped.name.rpartition("/")[0]
    return folder if folder in FOLDERS else ""


def link(shipped: Shipped) -> str:
    """Return a link to a file, labelled with its path from the folder of its table."""
    return f"[{shipped.name.removeprefix(f'{folder_of(shipped)}/')}]({shipped.name}.json)"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the files' rows as Markdown, without columns that are empty for all files."""
    columns = [column for column in zip(HEADS, *rows, strict=True) if set(column[1:]) != {"-"}]
    heads, *others = zip(*columns, strict=True)
    return markdown_table(heads, others)


def json_cells(config: Mapping[str, Any]) -> list[str]:
    """Return a file's row: kn, k × n, η, warmup, precision, error in the paper, purpose."""
    block, kn = config["lbsgd"], config["train_batch_size"]
    n, warmup, error = block["batch_norm"]["per_worker_batch"], block["warmup"], block.get("paper_error_pct")
    updates = config["scheduler"]["params"]["warmup_num_steps"]
    length = counted(warmup["epochs"], "epoch") if "epochs" in warmup else counted(updates, "iteration")
    ramp = f"{warmup['kind']}, {length}"
    return [
        f"{kn:,}",
        f"{kn // n:,} × {n}",
        f"{config['optimizer']['params']['lr']:.4g}",
        "-" if warmup["kind"] == "none" else ramp,
        f"{precision_of(config)}, {config['zero_optimization']['stage']}",
        "{:.2f} ± {:.2f}".format(*error) if error else "-",
        block["purpose"].removeprefix("for comparison: "),
    ]


README = """\
<!-- Written by `python -m lbsgd config --all ds_configs` from the files; a test compares. -->
# Configurations

Every file is a complete DeepSpeed JSON. DeepSpeed's own blocks hold the explicit numbers. The `lbsgd` block, which
plain DeepSpeed ignores, holds the recipe that the numbers follow from. On other data, and with flags such as
`--global_batch` or `--set`, lbsgd derives the numbers again and prints the changes. The files are for ResNet-50 on
ImageNet's 1,281,167 images, except for the detectors and those that name digits or CIFAR-10.

* **k × n**: k workers, each of which normalises n = 32 images, on any number of GPUs that divides k.
* **precision**: in fp16 the GPUs divide the momentum among them (ZeRO-1); bf16 is autocast over float32 weights.
* **error**: the paper's mean ± standard deviation of 5 runs, each the median of its last 5 epochs. ImageNet has not
  been trained with this code yet.

{grid}

## Detectors

Mask R-CNN on COCO ([docs/detection.md](../docs/detection.md)) in forwards of n = 2 images. The schedule has 160,000
iterations of 16 images, and 16/kn times as many at another kn. The warmup always has 500 iterations. scenes.json is for
drawn scenes of digits, with other lengths.

{detection}

## For comparison

Each file changes one thing in 256.json or 8k.json, except 8k_fixed_lr, which changes two: an lr that is not scaled has
no warmup either. `lbsgd check` says what the change costs.

{ablations}

## How they were written

`python -m lbsgd config` with these arguments prints each file (`--set` adds purpose and error). With `--all ds_configs`
it writes all files and this page. `python -m lbsgd plan FILE --gpus 8` shows what a file means on 8 GPUs.

```
{commands}
```
"""
