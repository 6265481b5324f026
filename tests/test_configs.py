"""ds_configs: every file is what `lbsgd config` writes, and has the paper's numbers and costs."""

import json
import re
from pathlib import Path

import pytest

from lbsgd.commands.config import generated
from lbsgd.commands.main import main
from lbsgd.config.checks.inspection import findings_of
from lbsgd.config.json_file import format_json, read_json
from lbsgd.config.keypath import get
from lbsgd.config.plan import Plan
from lbsgd.config.shipped import GRID, readme
from lbsgd.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "ds_configs"
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("**/*.json"))


def text(name):
    return (CONFIGS / f"{name}.json").read_text()


def test_the_grid_is_the_folder():
    assert sorted(shipped.name for shipped in GRID) == FILES
    powers = {"64", "128", "256", "512", "1k", "2k", "4k", "8k", "16k", "32k", "64k"}
    ablations = {
        f"ablations/8k_{name}"
        for name in (
            "no_warmup",
            "constant_warmup",
            "sqrt_lr",
            "fixed_lr",
            "half_lr",
            "double_lr",
            "gamma_one",
            "sync_bn",
            "inverse_weight_decay",
            "no_momentum_correction",
        )
    } | {f"ablations/256_{name}" for name in ("half_lr", "double_lr", "gamma_one")}
    detectors = {f"detection/mask_rcnn_{kn}" for kn in (2, 4, 8, 16, 32, 64, 128)} | {"detection/scenes"}
    others = {"8k_bf16", "8k_fp32", "8k_zero2", "8k_8gpu", "digits", "digits/256", "digits/resnet18", "cifar10/1k"}
    assert set(FILES) == powers | ablations | others | detectors


@pytest.mark.parametrize("shipped", GRID, ids=lambda shipped: shipped.name)
def test_every_shipped_file_is_what_the_tool_writes(shipped):
    assert text(shipped.name) == format_json(generated(shipped.command())) + "\n"


def test_an_edited_file_would_be_noticed():
    assert text("8k").replace("780", "781") != format_json(generated(["--global_batch", "8192"])) + "\n"


def test_the_table_is_generated_from_the_files():
    assert (CONFIGS / "README.md").read_text() == readme(CONFIGS)


def test_no_two_files_of_a_table_have_one_name_and_no_column_is_empty():
    tables = re.findall(r"(?:^\|.*\n)+", readme(CONFIGS), re.MULTILINE)
    for table in tables:
        columns = list(zip(*(row.split(" | ") for row in table.splitlines()), strict=True))
        names = [cell.partition("](")[0] for cell in columns[0]]
        assert len(set(names)) == len(names)
        assert not any(set(column[2:]) == {"-"} for column in columns)
    assert len(tables) == 3


def test_the_files_are_strict_ascii_json_that_every_tool_reads_alike():
    for name in FILES:
        assert text(name).isascii() and json.loads(text(name)) == read_json(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    "name, lr, warmup_iterations, error",
    [
        ("64", 0.025, 0, None),
        ("128", 0.05, 0, [23.49, 0.12]),
        ("256", 0.1, 0, [23.60, 0.12]),
        ("512", 0.2, 12510, [23.48, 0.09]),
        ("1k", 0.4, 6255, [23.53, 0.08]),
        ("2k", 0.8, 3125, [23.49, 0.11]),
        ("4k", 1.6, 1560, [23.56, 0.12]),
        ("8k", 3.2, 780, [23.74, 0.09]),
        ("16k", 6.4, 390, [24.79, 0.27]),
        ("32k", 12.8, 195, [27.55, 0.28]),
        ("64k", 25.6, 95, [33.96, 0.80]),
    ],
)
def test_figure_1(name, lr, warmup_iterations, error):
    plan = Plan.read(CONFIGS / f"{name}.json", 1)
    assert plan.schedule.reference_lr == lr and plan.config["optimizer"]["params"]["lr"] == lr
    assert plan.schedule.warmup_iterations == warmup_iterations
    assert (plan.per_worker_batch, plan.precision, plan.zero_stage, plan.recipe.epochs) == (32, "fp16", 1, 90)
    assert plan.recipe.paper_error_pct == error


@pytest.mark.parametrize(
    "name, code, points",
    [
        ("8k_no_warmup", "R04", 1.10),
        ("8k_constant_warmup", "R07", 2.14),
        ("8k_sqrt_lr", "R08", 2.48),
        ("8k_fixed_lr", "R08", 17.93),
        ("8k_half_lr", "R09", 0.53),
        ("8k_double_lr", "R09", 0.31),
        ("256_half_lr", "R09", 0.32),
        ("256_double_lr", "R09", 0.08),
        ("8k_gamma_one", "R13", 0.37),
        ("256_gamma_one", "R13", 0.24),
        ("8k_sync_bn", "R14", None),
        ("8k_no_momentum_correction", "R15", None),
        ("8k_inverse_weight_decay", "R16", None),
    ],
)
def test_an_ablation_has_one_finding_with_the_points_that_the_paper_lost(name, code, points):
    config = read_json(CONFIGS / f"ablations/{name}.json")
    [finding] = findings_of(config)
    assert (finding.code, finding.points, finding.severity) == (code, points, "warning")
    assert points is None or f"{points:g} points" in finding.message
    whole = read_json(CONFIGS / f"{name.partition('_')[0]}.json")
    assert config["train_batch_size"] == whole["train_batch_size"] and config["fp16"] == whole["fp16"]


def test_tables_1_and_2_have_their_learning_rates_in_deepspeeds_own_blocks():
    lrs = {
        name: read_json(CONFIGS / f"ablations/{name}.json")["optimizer"]["params"]["lr"]
        for name in ("8k_sqrt_lr", "8k_fixed_lr", "8k_half_lr", "8k_double_lr", "256_half_lr", "256_double_lr")
    }
    assert lrs == {
        "8k_sqrt_lr": pytest.approx(0.1 * 32**0.5),
        "8k_fixed_lr": 0.1,
        "8k_half_lr": 1.6,
        "8k_double_lr": 6.4,
        "256_half_lr": 0.05,
        "256_double_lr": 0.2,
    }
    block = read_json(CONFIGS / "ablations/8k_inverse_weight_decay.json")
    assert block["optimizer"]["params"]["weight_decay"] == pytest.approx(1e-4 / 32)


def test_the_variants_of_8k_are_the_same_run():
    whole = Plan.read(CONFIGS / "8k.json", 8)
    variants = {name: Plan.read(CONFIGS / f"{name}.json", 8) for name in ("8k_bf16", "8k_fp32", "8k_zero2", "8k_8gpu")}
    assert all(plan.identity() == whole.identity() and plan.schedule == whole.schedule for plan in variants.values())
    assert [(plan.precision, plan.zero_stage) for plan in variants.values()] == [
        ("bf16", 0),
        ("fp32", 0),
        ("fp16", 2),
        ("fp16", 1),
    ]
    today = variants["8k_8gpu"]
    assert (today.micro_batch, today.accumulation_steps, today.per_worker_batch) == (256, 4, 32)


def test_a_configuration_of_ones_own_is_complete_and_checked(tmp_path, capsys):
    assert main("config --global_batch 12288 --gpus 96 --precision fp16".split()) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["train_micro_batch_size_per_gpu"] == 128 and config["optimizer"]["params"]["lr"] == 4.8
    path = tmp_path / "12k.json"
    assert main(["config", "--global_batch", "12288", "--gpus", "96", "--output", str(path)]) == 0
    assert read_json(path) == config and Plan.read(path, 96).accumulation_steps == 1
    [finding] = findings_of(config)  # the paper measured 8k and 16k, and nothing between
    assert (finding.code, finding.points) == ("R20", None) and "points" not in finding.message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--global_batch 100", ["100", "96 or 128"]),
        ("--global_batch 8192 --gpus 96", ["256 workers", "96 processes", "fit: 1, 2, 4"]),
        ("--global_batch 8192 --micro_batch 48 --gpus 2", ["48", "fit: 32, 64"]),
        ("--global_batch 8192 --precision fp16 --zero_stage 0", ["fp16", "65536 times too small"]),
        ("--global_batch 8192 --num_images 8000", ["8192", "8000"]),
        ("--global_batch 8192 --set lbsgd.warmup.kind=slow", ["slow"]),
    ],
)
def test_numbers_that_cannot_go_together_are_refused(arguments, words):
    with pytest.raises(ConfigError) as caught:
        generated(arguments.split())
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "settings, found",
    [
        ("train_micro_batch_size_per_gpu=64", {"train_micro_batch_size_per_gpu": 64}),
        ("steps_per_print=7", {"steps_per_print": 7}),
        ("steps_per_print=null", {"steps_per_print": None}),
        ("zero_optimization.stage=2", {"zero_optimization.stage": 2, "lbsgd.aggregation": None}),
        ("fp16=null", {"fp16": None, "zero_optimization.stage": 0}),
        ("fp16=null zero_optimization=null", {"zero_optimization": None}),
        ("lbsgd.aggregation=null", {"lbsgd.aggregation": None}),
    ],
)
def test_a_setting_is_in_the_file(settings, found):
    arguments = " ".join(f"--set {setting}" for setting in settings.split())
    config = generated(f"--global_batch 8192 --gpus 8 {arguments}".split())
    assert {key: get(config, key) for key in found} == found


def test_a_detectors_setting_is_in_the_file():
    config = generated("--detection --global_batch 16 --set zero_optimization=null".split())
    assert "zero_optimization" not in config


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--micro_batch 32 --set train_micro_batch_size_per_gpu=64", ["train_micro_batch_size_per_gpu=64"]),
        ("--zero_stage 1 --set zero_optimization.stage=2", ["zero_optimization.stage=2"]),
        ("--precision fp32 --set fp16.enabled=true", ["--precision fp32", "disagree"]),
        ("--set gradient_accumulation_steps=7", ["gradient_accumulation_steps=7", "8 processes make it 4"]),
    ],
)
def test_a_setting_is_never_overruled_in_silence(arguments, words):
    with pytest.raises(ConfigError) as caught:
        generated(f"--global_batch 8192 --gpus 8 {arguments}".split())
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/inside", "a" * 300])
def test_a_grid_that_cannot_be_written_is_one_line(folder, capsys):
    assert main(["config", "--all", folder]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written" in said and folder in said


def test_the_micro_batch_is_the_largest_of_whole_workers_up_to_256():
    def micro(arguments):
        return generated(arguments.split())["train_micro_batch_size_per_gpu"]

    assert [micro(f"--global_batch 8192 --gpus {gpus}") for gpus in (1, 8, 32, 64, 256)] == [256, 256, 256, 128, 32]
    assert micro("--global_batch 768 --gpus 2") == 192  # 12 workers a GPU: 6 x 32, two passes
    assert micro("--global_batch 352 --gpus 1") == 32  # 11 workers: one at a time
