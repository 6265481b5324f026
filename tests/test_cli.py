"""The command `lbsgd`: its output, its refusals, and its start within half a second."""

import json
import os
import resource
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from lbsgd.commands.flag_types import at_least_zero, interval, natural, positive, quantity
from lbsgd.commands.main import main

ROOT = Path(__file__).parent.parent
EIGHT_K = str(ROOT / "ds_configs/8k.json")


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
    )


def cpu_seconds(*arguments):
    """Measure the CPU time of a command, the least of three runs, because machines are shared."""

    def children():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = children()
        assert run(*arguments).returncode == 0
        times.append(children() - before)
    return min(times)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_the_papers_run_is(capsys):
    assert main(["plan", EIGHT_K, "--gpus", "256"]) == 0
    out = capsys.readouterr().out
    for words in (
        "kn = 8,192 images = k 256 workers x n 32",
        "η = 3.2",
        "156 an epoch of 1,281,167 images, 14,040 in 90 epochs",
        "world size 256 x micro batch 32 x 1 pass\n",
        "0 to 780",
        "by 0.00397 per iteration",
        "30 to 60",
        "12,480 to 14,040",
        "0.0032",
        "23.74 ± 0.09 %",
        "estimated",
        "> ZeRO-1",
        "51 MB of gradients in 5 buckets",
        "ring",
        "halving/doubling",
        "without overlap",
        "32 servers of 8 GPUs, 50 Gbit/s",
    ):
        assert words in out, words


def test_the_picture_in_the_terminal_rises_holds_and_falls_by_tens(capsys):
    main(["plan", EIGHT_K, "--gpus", "8"])
    rows = [line.split("┤")[1] for line in capsys.readouterr().out.splitlines() if "┤" in line]
    assert len(rows) == 9 and all(len(row) == 72 for row in rows)
    heights = [sum(" ▁▂▃▄▅▆▇█".index(row[column]) for row in rows) for column in range(72)]
    assert heights[:4] == sorted(heights[:4])  # 5 of 90 epochs are 4 columns
    assert heights[3] < heights[10] == max(heights)
    drops = [column for column in range(5, 72) if heights[column] < heights[column - 1]]
    assert drops == [24, 48, 64]  # epochs 30, 60 and 80
    steps = [heights[column - 1] - heights[column] for column in drops]
    assert max(steps) - min(steps) <= 1 < min(steps)  # each a tenth, on a logarithmic axis


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ablations/8k_constant_warmup.json"], ["0.1 ", "2.14 points"]),
        (["ablations/8k_fixed_lr.json"], ["η = 0.1", "17.93 points"]),
        (["digits.json", "--gpus", "2", "--model", "resnet18"], ["11 an epoch of 1,437", "resnet18"]),
        (["64.json"], ["on 2 GPUs"]),
        (["8k_fp32.json", "--gpus", "8"], ["yes: 5 buckets", "1 server"]),
        (
            ["8k.json", "--gpus", "8", "--set", "train_batch_size=4096", "--set", "lbsgd.warmup.epochs=2"],
            ["optimizer.params.lr: 3.2 -> 1.6", "warmup_num_steps: 780 -> 624"],
        ),
        (["8k.json", "--gpus", "4", "--images", "100000"], ["12 an epoch of 100,000"]),
        (
            ["8k.json", "--images_per_second", "2500", "--link_gbit", "400", "--gpus_per_server", "4"],
            ["2500 images/s, as given", "64 servers"],
        ),
    ],
)
def test_plan_shows_any_shipped_file_on_any_machine(capsys, arguments, words):
    assert main(["plan", str(ROOT / "ds_configs" / arguments[0]), *arguments[1:]]) == 0
    out = " ".join(capsys.readouterr().out.split(" "))
    assert all(word in out for word in words), out


def test_plan_for_machines_is_json(capsys):
    assert main(["plan", EIGHT_K, "--gpus", "256", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["global_batch"] == 8192 and plan["learning_rates"][1]["lr"] == "3.2"
    assert plan["prediction"]["ring"]["with_overlap_seconds"] < plan["prediction"]["ring"]["without_overlap_seconds"]
    assert plan["memory_bytes"]["stage_1"]["total"] > 10**9


def test_plan_draws_the_schedule(tmp_path, capsys):
    for name, form in (("8k.png", b"\x89PNG"), ("8k.pdf", b"%PDF")):
        assert main(["plan", EIGHT_K, "--png", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(form)
        assert str(tmp_path / name) in capsys.readouterr().out.replace("\n", "")
    assert main(["plan", str(ROOT / "ds_configs/256.json"), "--png", str(tmp_path / "256.png")]) == 0


def test_a_picture_is_drawn_through_a_symlink_and_takes_no_file_of_others(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    (tmp_path / "link.png.tmp").write_text("theirs")
    assert main(["plan", EIGHT_K, "--png", str(tmp_path / "link.png")]) == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").stat().st_size > 1000
    assert (tmp_path / "link.png.tmp").read_text() == "theirs"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["plan", "nothing.json"], ["nothing.json", "cannot be read"]),
        (["plan", EIGHT_K, "--gpus", "3"], ["256 workers", "fit: 1, 2, 4"]),
        (["plan", EIGHT_K, "--set", "optimizer.params.lr=1"], ["follows"]),
        (["plan", EIGHT_K, "--set", "lbsgd.epochs"], ["lbsgd.warmup.epochs=2"]),
        (["plan", EIGHT_K, "--set", "train_batch_size=many"], ["train_batch_size", "'many'"]),
        (["plan", EIGHT_K, "--model", "vit"], ["vit", "resnet50"]),
        (["plan", EIGHT_K, "--png", "schedule.txt"], ["schedule.txt", ".png"]),
        (["plan", EIGHT_K, "--png", "/no/such/folder/a.png"], ["/no/such/folder/a.png", "cannot be written"]),
        (["plan", str(ROOT / "tests/fixtures/foreign/lowercase_sgd.json")], ["optimizer.type", "SGD"]),
        (["plan", str(ROOT / "tests/fixtures/foreign/nothing_to_say.json")], ["lbsgd"]),
        (["config"], ["--global_batch 8192"]),
        (["config", "--global_batch", "100"], ["96 or 128"]),
        (["config", "--global_batch", "256", "--output", "/no/such/folder/a.json"], ["/no/such/folder/a.json"]),
    ],
)
def test_impossible_input_is_one_line_each_and_exit_code_2(capsys, arguments, words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in error.splitlines()), error
    assert all(word in error for word in words), error


# --- types of flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (positive, "1", 1),
        (positive, "8192", 8192),
        (natural, "0", 0),
        (quantity, "2.5e3", 2500.0),
        (interval, "50", (50, None)),
        (interval, "10m", (None, 10.0)),
        (interval, "0.5m", (None, 0.5)),
    ],
)
def test_a_flag_takes_what_its_type_says(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    "kind, refused, reason",
    [
        (positive, ["0", "-1", "+1", "1.0", "1_000", "²", "٣", "many", "", "9" * 31], "whole number of at least 1"),
        (positive, ["1000000000000"], "too large"),
        (natural, ["-1", "1.5", "²", ""], "whole number of at least 0"),
        (quantity, ["0", "-2", "nan", "inf", "fast"], "number above 0"),
        (at_least_zero, ["-1", "nan", "inf", "fast"], "number of at least 0"),
        (interval, ["0", "m", "0m", "infm", "10h", "-5"], "neither a number of iterations"),
    ],
)
def test_a_flag_refuses_anything_else(kind, refused, reason):
    for text in refused:
        with pytest.raises(ArgumentTypeError, match=reason):
            kind(text)


# --- the command itself -----------------------------------------------------------------------------------------------


def half_a_second():
    """Half a second of CPU time or, where others use the cores too, six times what pydantic and rich take to load."""
    reference = cpu_seconds("-c", "import pydantic, rich.console")  # 0.12 s beside 0.41 s for a check of 31 files
    return max(0.5, 6 * reference)


@pytest.mark.parametrize("command", [["-m", "lbsgd", "plan"], ["tools/plan.py"]])
def test_plan_starts_in_half_a_second(command):
    assert cpu_seconds(*command, EIGHT_K, "--gpus", 256) < half_a_second()


@pytest.mark.parametrize("command", [["-m", "lbsgd", "check"], ["tools/check.py"]])
def test_check_starts_in_half_a_second(command):
    assert cpu_seconds(*command, *sorted((ROOT / "ds_configs").glob("**/*.json"))) < half_a_second()


def test_import_takes_no_time_and_loads_nothing_heavy():
    assert cpu_seconds("-c", "import lbsgd") < 0.3
    loaded = run(
        "-c",
        "import lbsgd, lbsgd.commands.main, sys; lbsgd.commands.main.main(['plan', 'ds_configs/8k.json', '--json']); "
        "lbsgd.Plan, lbsgd.LargeMinibatchSGD; print(*sys.modules)",
    ).stdout.split()
    assert "lbsgd.config.plan" in loaded
    assert not {"torch", "deepspeed", "torchvision", "ffcv", "matplotlib", "numpy", "psutil"} & set(loaded)
    assert "torch" in run("-c", "import lbsgd, sys; lbsgd.decay_groups; print(*sys.modules)").stdout.split()


def test_the_thin_files_and_the_module_are_one_command():
    printed = {
        run(*command, "--global_batch", 512, "--precision", "bf16").stdout
        for command in (["-m", "lbsgd", "config"], ["tools/config.py"])
    }
    assert len(printed) == 1 and printed != {""}


def test_help_names_every_command():
    text = run("-m", "lbsgd", "--help").stdout
    assert all(f"lbsgd {name}" in text for name in ("plan", "check", "config", "report"))
    assert run("-m", "lbsgd").returncode == 2


def test_the_console_command_is_this_one():
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "lbsgd = lbsgd.commands.main:main"


def test_resnet101_is_a_recipe_like_resnet50():
    done = run("recipes/resnet101.py", "--deepspeed_config", EIGHT_K, "--data_dir", "/no/data")
    assert done.returncode == 2 and "/no/data" in done.stderr and "Traceback" not in done.stderr
    names = {}
    exec((ROOT / "recipes/resnet101.py").read_text(), names)
    import torch

    from lbsgd.config.memory import NETWORKS
    from lbsgd.config.plan import Plan

    with torch.device("meta"):
        model = names["ResNet101"]().network(1000, Plan.read(EIGHT_K, 8))
    assert sum(p.numel() for p in model.parameters()) == NETWORKS["resnet101"].num_parameters
    assert "22.36 ± 0.09" in names["__doc__"]
    for recipe in ("resnet50", "resnet101"):  # a recipe is a page
        assert len((ROOT / f"recipes/{recipe}.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_the_reference_pages_build_without_a_warning(tmp_path):
    done = run("tools/reference.py", tmp_path / "api")
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    page = (tmp_path / "api/lbsgd.html").read_text()
    assert all(name in page for name in ("MomentumCorrectedSGD", "LargeMinibatchLR", "Remark 2"))
    assert (tmp_path / "api/lbsgd/commands/plan_time.html").is_file() and (tmp_path / "api/index.html").is_file()
