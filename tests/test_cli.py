"""The command `lbsgd`: its output, its refusals, and its start within half a second."""

import ast
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from argparse import ArgumentTypeError
from itertools import pairwise
from pathlib import Path

import pytest
from tool_modules import load_tool

from lbsgd.commands.flag_types import OneLineParser, at_least_zero, interval, natural, positive, quantity
from lbsgd.commands.help import kept_line
from lbsgd.commands.main import main
from lbsgd.commands.reader import reader_may_leave
from lbsgd.commands.recipe_flags import overrides_of, parser
from lbsgd.commands.simulate import run_simulation
from lbsgd.commands.train import Request, run_recipe
from lbsgd.config.checks.inspection import findings_of
from lbsgd.config.json_file import read_json
from lbsgd.config.plan import Plan

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
    """Measure the CPU time of a command."""

    def children():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = children()
    assert run(*arguments).returncode == 0
    return children() - before


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_the_papers_run_is(capsys):
    assert main(["plan", EIGHT_K, "--gpus", "256"]) == 0
    out = capsys.readouterr().out
    for words in (
        "kn = 8,192 images = k 256 workers x n 32",
        "η = 3.2",
        "156 per epoch of 1,281,167 images, 14,040 in 90 epochs",
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
    assert heights[:4] == sorted(heights[:4])  # 5 of 90 epochs take 4 columns
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
        (["digits.json", "--gpus", "2", "--model", "resnet18"], ["11 per epoch of 1,437", "resnet18"]),
        (["64.json"], ["on 2 GPUs"]),
        (["8k_fp32.json", "--gpus", "8"], ["yes: 5 buckets", "1 server"]),
        (
            ["8k.json", "--gpus", "8", "--set", "train_batch_size=4096", "--set", "lbsgd.warmup.epochs=2"],
            ["optimizer.params.lr: 3.2 -> 1.6", "warmup_num_steps: 780 -> 624"],
        ),
        (["8k.json", "--gpus", "4", "--images", "100000"], ["12 per epoch of 100,000"]),
        (  # the paper's 352 GPUs (Sec. 5.5)
            ["8k_fp32.json", "--gpus", "352", "--global_batch", "11264"],
            ["halving/doubling needs 2, 4, 8, ... servers, not 44"],
        ),
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


def test_no_column_is_cut_where_no_terminal_gives_a_width():
    """Rich assumes 80 columns for a pipe and cuts what does not fit: `0.0682221 to 16.3…`."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for variables in ({}, {"TERM": "dumb"}, {"COLUMNS": "40"}):
        done = subprocess.run(
            [sys.executable, "-m", "lbsgd", "plan", "ds_configs/detection/mask_rcnn_16.json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**environment, **variables},
        )
        assert "0.06822 to 16.37  500 to 120,000      0.02" in done.stdout, done.stdout
        assert "0.006667 -> 0.02, by 2.67e-05 per iteration" in done.stdout and "…" not in done.stdout


def test_epochs_have_four_digits_or_all_that_are_whole(capsys):
    lengths = ["--set", "lbsgd.epochs=123456", "--set", "lbsgd.decay.epochs=[33.3333333,12345.5,100000]"]
    assert main(["plan", EIGHT_K, *lengths]) == 0
    out = capsys.readouterr().out
    assert " 33.33 to 12,346 " in out and " 100,000 to 123,456 " in out


@pytest.mark.parametrize(
    "arguments, gpus, passes",
    [
        (["--micro_batch", "16", "--set", "lbsgd.batch_norm.per_worker_batch=16"], 512, "1 pass"),
        (["--set", "lbsgd.batch_norm.per_worker_batch=64", "--micro_batch", "64"], 128, "1 pass"),
        (["--global_batch", "4096"], 128, "1 pass"),
        (["--micro_batch", "256"], 32, "1 pass"),
        ([], 256, "1 pass"),
        (["--set", "gradient_accumulation_steps=4"], 64, "4 passes"),
    ],
)
def test_without_gpus_as_many_take_the_global_batch_in_one_pass_or_those_that_flags_say(
    capsys, arguments, gpus, passes
):
    assert main(["plan", EIGHT_K, *arguments]) == 0
    out = capsys.readouterr().out
    assert f"8k.json on {gpus} GPUs" in out and f"x {passes}\n" in out


def printing_into(stream, arguments, buffered):
    """Run the command with its output into a stream, which Python flushes after each write or when a buffer is full."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *([] if buffered else ["-u"]), "-m", "lbsgd", *arguments],
        cwd=ROOT,
        stdout=stream,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", EIGHT_K],
        ["plan", EIGHT_K, "--json"],
        ["check", EIGHT_K],
        ["check", "--explain", "all"],
        ["config", "--global_batch", "256"],
        ["reproduce", "table1", "digits", "--list"],
        ["report", "results/digits/runs/x1"],
    ],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_behind_the_output_is_one_line(arguments, buffered):
    with open("/dev/full", "w") as full:
        done = printing_into(full, arguments, buffered)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written (No space left on device)\n")


def test_output_that_could_not_be_written_is_not_written_again(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"), reader_may_leave():
            print("lost")
        os.write(full.fileno(), b"goes nowhere")  # Python 3.14 prints an error of the stream that it frees


@pytest.mark.parametrize(
    "arguments",
    [["plan", EIGHT_K], ["check", EIGHT_K], ["check", "--explain", "all"], ["report", "results/digits/runs/x1"]],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_who_leaves_ends_the_command_in_silence(arguments, buffered):
    read, write = os.pipe()
    os.close(read)
    done = printing_into(write, arguments, buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["check", "--explain", "all", "--markdown"], 0, ""),
        (["check", "tests/fixtures/foreign"], 1, ""),
        (["check", EIGHT_K, "nowhere.json"], 2, "error: nowhere.json: "),
        (["report", "results/digits/runs/x1", "nowhere"], 2, "error: no run log at nowhere"),
        (["--help"], 0, ""),
        (["reproduce", "table1", "digits", "--list"], 0, ""),
        (["reproduce", "table1", "digits"], 2, "error: the output cannot be written (Broken pipe)\n"),
    ],
)
def test_a_reader_who_leaves_changes_no_exit_code_and_ends_no_work_in_silence(arguments, code, said):
    read, write = os.pipe()
    os.close(read)
    done = printing_into(write, arguments, buffered=True)
    os.close(write)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_report_whose_reader_leaves_is_written(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = printing_into(write, ["report", "results/digits/runs/x1", "--output_dir", str(tmp_path)], buffered=False)
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "index.html").exists()


@pytest.mark.parametrize("command", ["convert", "convert --verify", "reproduce table1 digits"])
def test_work_begins_only_where_it_can_say_how_it_ends(command, tmp_path):
    line = f"exec {sys.executable} -m lbsgd {command} >&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; send it to a file, or to /dev/null\n"


@pytest.mark.parametrize("command", ["plan", "check"])
def test_a_closed_output_is_no_traceback(command):
    line = f"exec {sys.executable} -m lbsgd {command} {EIGHT_K} >&-"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# A C library writes its warnings to descriptor 2, whatever file that is.
CLOSED = """
import os, sys
from lbsgd.output import hold_closed_streams
hold_closed_streams()
with open(sys.argv[1], "wb") as file:
    os.write(2, b"a warning of a C library")
    os.system("echo and of a program >&2")
print("an error", file=sys.stderr, flush=True)
"""


def test_a_closed_stderr_is_not_a_file_that_is_opened_later(tmp_path):
    line = shlex.join([sys.executable, "-c", CLOSED, str(tmp_path / "log")])
    done = subprocess.run(["sh", "-c", f"exec {line} <&- 2>&-"], cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, (tmp_path / "log").read_bytes()) == (0, b"", b"")


@pytest.mark.parametrize(
    "name, begin",
    [
        ("main", lambda: main(["plan"])),
        ("train", lambda: run_recipe(parser(""), Request, lambda request: None)),
        ("simulate", lambda: run_simulation(parser(""), lambda request: None)),
    ],
)
def test_every_command_holds_the_place_of_a_closed_stderr_before_it_opens_a_file(monkeypatch, name, begin):
    def held():
        raise InterruptedError

    monkeypatch.setattr(f"lbsgd.commands.{name}.hold_closed_streams", held)
    with pytest.raises(InterruptedError):
        begin()


def test_what_is_wrong_in_every_version_of_deepspeed_is_printed(tmp_path, capsys):
    path = tmp_path / "a.json"
    blocks = '"elasticity": {}, "fp16": {"enabled": "maybe"}, "zero_optimization": {"stage": 9}'
    path.write_text(f'{{"train_batch_size": 8, "gradient_clipping": 0.0, {blocks}}}')
    errors = [each for each in findings_of(read_json(path), "0.19") if each.severity == "error"]
    found = [each for each in errors if each.key != "elasticity"]  # which 0.18 still accepts
    assert main(["check", str(path), "--deepspeed", "0.18..0.19"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(found) > 1 and out[-len(found) - 1].endswith(f"the same in all, {len(found)} errors:")
    for finding, line in zip(found, out[-len(found) :], strict=True):
        assert line.split(maxsplit=2) == [finding.code, finding.key, finding.message]


def test_plan_for_machines_is_json(capsys):
    assert main(["plan", EIGHT_K, "--gpus", "256", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["global_batch"] == 8192 and plan["learning_rates"][1]["lr"] == "3.2"
    assert plan["prediction"]["ring"]["with_overlap_seconds"] < plan["prediction"]["ring"]["without_overlap_seconds"]
    assert plan["memory_bytes"]["stage_1"]["total"] > 10**9 and plan["bytes_per_iteration"] > 10**7


def test_plan_takes_what_a_recipe_lays_over_the_json(capsys):
    flags = (
        "--global_batch 512 --micro_batch 64 --resolution 160 --precision bf16 --seed 7 --set lbsgd.epochs=80".split()
    )
    assert main(["plan", str(ROOT / "ds_configs/256.json"), "--gpus", "1", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    recipe = parser("").parse_args(["--deepspeed_config", "ds_configs/256.json", *flags])
    trained = Plan.read("ds_configs/256.json", 1, overrides=overrides_of(recipe)).as_dict()
    assert {key: planned[key] for key in trained} == json.loads(json.dumps(trained))
    assert trained["precision"] == "bf16" and trained["accumulation_steps"] == 8


def test_the_run_time_hides_nothing_where_the_json_forbids_overlap(capsys):
    settings = ["--set", "zero_optimization.overlap_comm=false"]
    fp32 = str(ROOT / "ds_configs/8k_fp32.json")
    assert main(["plan", fp32, "--gpus", "256"]) == 0
    assert "the run: 0.93 to 1.23 h for 14,040 iterations" in capsys.readouterr().out
    assert main(["plan", fp32, "--gpus", "256", *settings]) == 0
    out = capsys.readouterr().out
    # 264.5 ms with halving/doubling between servers, as NCCL's tree, to 315.4 ms with its ring
    assert "the run: 1.03 to 1.23 h for 14,040 iterations" in out
    assert "overlap in this JSON: no" in out and "> flat ring" in out and "% to " not in out
    [flat] = [line.split() for line in out.splitlines() if line.startswith(" > flat ring")]
    assert flat[-1] == "73.5%"
    for given, overlaps in (([], True), (settings, False)):
        assert main(["plan", fp32, "--gpus", "256", "--json", *given]) == 0
        assert json.loads(capsys.readouterr().out)["overlaps"] is overlaps


@pytest.mark.parametrize("file", ["8k", "detection/mask_rcnn_128"])
def test_an_aggregation_that_cannot_run_is_refused_before_anything_is_printed(tmp_path, capsys, file):
    flags = ["--gpus", "8", "--gpus_per_server", "3", "--set", "lbsgd.aggregation.hierarchy=servers"]
    picture = tmp_path / "plan.png"
    assert main(["plan", str(ROOT / f"ds_configs/{file}.json"), *flags, "--png", str(picture)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "servers needs equally many processes on each, and these have 2 x 3, 2" in error
    assert error.count("\n") == 1 and not picture.exists()


def test_one_gpu_aggregates_nothing(capsys):
    command = ["plan", str(ROOT / "ds_configs/8k.json"), "--gpus", "1"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  reduced: nothing, on one GPU" in lines
    assert "  overlap in this JSON: no: one GPU aggregates nothing" in lines
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bytes_per_iteration"], found["overlaps"]) == (0, False)


NOT_ITS_SPEED = "the speed is ResNet-50's at 224 pixels; give --images_per_second"


@pytest.mark.parametrize(
    "arguments",
    [["8k.json", "--model", "resnet18"], ["8k.json", "--set", "lbsgd.augmentation.resolution=160"], ["digits.json"]],
)
def test_no_time_is_computed_with_the_speed_of_another_network(capsys, arguments):
    name, *flags = arguments
    file = [str(ROOT / "ds_configs" / name), "--gpus_per_server", "1", "--gpus", "2"]
    assert main(["plan", *file, *flags]) == 0
    out = capsys.readouterr().out
    assert out.count(NOT_ITS_SPEED) == 1
    assert not any(word in out for word in ("compute:", "the run:", "efficiency", "with overlap", "images/s"))
    assert "aggregation" in out and "reduced:" in out  # these do not depend on it
    assert main(["plan", *file, *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["images_per_second"] is None and set(plan["prediction"]["ring"]) == {
        "algorithm",
        "gradient_seconds",
        "weight_seconds",
    }
    assert main(["plan", *file, *flags, "--images_per_second", "500"]) == 0
    out = capsys.readouterr().out
    assert NOT_ITS_SPEED not in out and "the run:" in out and "500 images/s, as given" in out


@pytest.mark.parametrize(
    "name, machine, words",
    [
        ("8k_fp32", "p100-2017", None),
        ("8k_fp32", "dgx-a100", "the speed is in mixed precision, and this JSON is fp32"),
        ("8k_fp32", "dgx-h100", "the speed is in mixed precision, and this JSON is fp32"),
        ("8k", "p100-2017", "the speed is in fp32, and this JSON is fp16"),
        ("8k_bf16", "p100-2017", "the speed is in fp32, and this JSON is bf16"),
        ("8k", "dgx-a100", None),
        ("8k_bf16", "dgx-h100", None),
    ],
)
def test_a_speed_in_another_precision_is_told(capsys, name, machine, words):
    file = [str(ROOT / f"ds_configs/{name}.json"), "--gpus", "256", "--machine", machine]
    assert main(["plan", *file]) == 0
    out = capsys.readouterr().out
    assert (words or "the run:") in out and ("the speed is" in out) == (words is not None)
    assert "as given" not in out
    assert main(["plan", *file, "--images_per_second", "900"]) == 0
    assert "the speed is" not in capsys.readouterr().out


def test_plan_draws_the_schedule(tmp_path, capsys):
    for name, form in (("8k.png", b"\x89PNG"), ("8k.pdf", b"%PDF")):
        assert main(["plan", EIGHT_K, "--png", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(form)
        assert str(tmp_path / name) in capsys.readouterr().out.replace("\n", "")
    assert main(["plan", str(ROOT / "ds_configs/256.json"), "--png", str(tmp_path / "256.png")]) == 0


@pytest.mark.parametrize(
    "command",
    [["plan", EIGHT_K, "--png", "a.png"], ["report", ROOT / "results/digits/runs/x1", "--output_dir", "report"]],
)
def test_the_backend_that_jupyter_gives_each_command_draws_nothing_here(command, tmp_path):
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-m", "lbsgd", *map(str, command)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **backend}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob("*.png"))


def test_a_name_that_looks_like_mathematics_or_is_no_text_is_drawn(tmp_path, capsys):
    """Matplotlib parses text between two dollars as TeX."""
    for name in (r"a$\foo$b.json", "run$1 $_.json", os.fsdecode(b"a\xff.json"), "a\x01\n.json"):
        (tmp_path / name).write_text(Path(EIGHT_K).read_text())
        assert main(["plan", str(tmp_path / name), "--png", str(tmp_path / "a.svg")]) == 0
        assert (tmp_path / "a.svg").stat().st_size > 1000


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
        (["plan", EIGHT_K, "--set", "train_batch_size=many"], ["train_batch_size", '"many"']),
        (["plan", EIGHT_K, "--model", "vit"], ["vit", "resnet50"]),
        (["plan", EIGHT_K, "--png", "schedule.txt"], ["schedule.txt", ".png"]),
        (["plan", EIGHT_K, "--png", "schedule.pgf"], ["schedule.pgf", ".png, .svg or .pdf"]),
        (["plan", EIGHT_K, "--png", "schedule"], ["schedule", ".png, .svg or .pdf"]),
        (["plan", EIGHT_K, "--png", "/no/such/folder/a.png"], ["cannot write /no/such/folder/a.png"]),
        (
            ["plan", str(ROOT / "tests/fixtures/foreign/lowercase_sgd.json")],
            ["has no lbsgd block", "lbsgd config --global_batch 256 --gpus GPUS --output FILE"],
        ),
        (["plan", str(ROOT / "tests/fixtures/foreign/nothing_to_say.json")], ["lbsgd"]),
        (
            ["plan", EIGHT_K, "--global_batch", "4096", "--set", "train_batch_size=2048"],
            ["--global_batch 4096", "2048"],
        ),
        (
            ["plan", EIGHT_K, "--num_images", "50000", "--set", "lbsgd.num_images=60000"],
            ["--num_images 50000", "60000"],
        ),
        (["plan", EIGHT_K, "--set", "lbsgd.seed=1", "--set", "lbsgd.seed=2"], ["lbsgd.seed=1", "lbsgd.seed=2"]),
        (["check", "nothing.json"], ["nothing.json", "cannot be read (No such file or directory)"]),
        (["check", EIGHT_K, "nothing.json", "--json"], ["nothing.json", "cannot be read"]),
        (["check", "--deepspeed", "0.18..0.19", "nothing.json"], ["nothing.json", "cannot be read"]),
        (["check", "a" * 300], ["a" * 300, "cannot be read (File name too long)"]),
        (["check", "--explain", "D12", EIGHT_K, "--json"], ["--explain", "FILE", "--json"]),
        (["check", "--explain", "all", "--markdown", "--fix"], ["--explain", "--fix"]),
        (["check", "--explain", "D12", "--deepspeed", "0.18", "--for", "lightning"], ["--deepspeed", "--for"]),
        (["check", "--markdown", EIGHT_K], ["--markdown", "--explain all"]),
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
        (positive, ["0", "-1", "+1", "1.0", "1_000", "²", "٣", "many", ""], "whole number of at least 1"),
        (positive, ["1000000000000", "9" * 31, "9" * 5000], "too large"),
        (natural, ["-1", "1.5", "²", ""], "whole number of at least 0"),
        (natural, ["1000000000000", "9" * 31], "too large"),
        (interval, ["1000000000000", "9" * 31], "too large"),
        (quantity, ["0", "-2", "nan", "inf", "fast", "1_000", "٣"], "number above 0"),
        (quantity, ["1e300", "1e-300"], "too large or too small"),
        (at_least_zero, ["-1", "nan", "inf", "fast"], "number of at least 0"),
        (interval, ["0", "m", "0m", "infm", "10h", "-5"], "neither a number of iterations"),
    ],
)
def test_a_flag_refuses_anything_else(kind, refused, reason):
    for text in refused:
        with pytest.raises(ArgumentTypeError, match=reason):
            kind(text)


# --- the command itself -----------------------------------------------------------------------------------------------


def starts_in_half_a_second(*command):
    """Whether one of five runs does or, on a busy machine, takes at most six times as long as pydantic and rich."""

    def limit():
        return 6 * cpu_seconds("-c", "import pydantic, rich.console")  # 0.12 s, against 0.41 s for a check of 31 files

    return any((found := cpu_seconds(*command)) < 0.5 or found < limit() for _ in range(5))


@pytest.mark.parametrize("command", [["-m", "lbsgd", "plan"], ["tools/plan.py"]])
def test_plan_starts_in_half_a_second(command):
    assert starts_in_half_a_second(*command, EIGHT_K, "--gpus", 256)


@pytest.mark.parametrize("command", [["-m", "lbsgd", "check"], ["tools/check.py"]])
def test_check_starts_in_half_a_second(command):
    assert starts_in_half_a_second(*command, *sorted((ROOT / "ds_configs").glob("**/*.json")))


def test_import_takes_no_time_and_loads_nothing_heavy():
    assert any(cpu_seconds("-c", "import lbsgd") < 0.3 for _ in range(5))
    loaded = run(
        "-c",
        "import lbsgd, lbsgd.commands.main, sys; lbsgd.commands.main.main(['plan', 'ds_configs/8k.json', '--json']); "
        "lbsgd.Plan, lbsgd.LargeMinibatchSGD; print(*sys.modules)",
    ).stdout.split()
    assert "lbsgd.config.plan" in loaded
    assert not {"torch", "deepspeed", "torchvision", "ffcv", "matplotlib", "numpy", "psutil"} & set(loaded)
    assert "lbsgd.experiments.catalogue" not in loaded  # only `reproduce` needs it, for its flags
    assert "torch" in run("-c", "import lbsgd, sys; lbsgd.decay_groups; print(*sys.modules)").stdout.split()


def test_the_thin_files_and_the_module_are_one_command():
    printed = {
        run(*command, "--global_batch", 512, "--precision", "bf16").stdout
        for command in (["-m", "lbsgd", "config"], ["tools/config.py"])
    }
    assert len(printed) == 1 and printed != {""}


def test_help_names_every_command():
    text = run("-m", "lbsgd", "--help").stdout
    listed = re.findall(r"^  (\w+) +\S", text.split("\ncommands:\n")[1], flags=re.MULTILINE)
    assert listed == ["plan", "check", "config", "convert", "report", "reproduce"]
    bare = run("-m", "lbsgd")
    assert bare.returncode == 2 and bare.stdout == "" and bare.stderr == f"{text}\nerror: name one of these commands\n"


def test_the_version_is_that_of_setup_cfg(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    [version] = re.findall(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)
    assert ended.value.code == 0 and capsys.readouterr().out == f"lbsgd {version}\n"


COMMANDS = ("", "plan", "check", "config", "convert", "report", "reproduce")


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal_and_fills_it(command, columns, monkeypatch, capsys):
    def help_in(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    text = help_in(columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns, max(lines, key=len)
    assert text.split() == help_in(1000).split()
    paragraph = text.split("\n\n")[1].splitlines()  # the next word would not have fitted into the line before
    assert all(len(line) + 1 + len(after.split()[0]) > columns - 2 for line, after in pairwise(paragraph))


@pytest.mark.parametrize("columns", ["1", "2", "3"])
def test_a_terminal_narrower_than_any_word_ends_no_command(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0 and capsys.readouterr().out


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
    assert (tmp_path / "api/lbsgd/config/prediction.html").is_file() and (tmp_path / "api/index.html").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", ""],
        ["plan", EIGHT_K, "--png", ""],
        ["report", ""],
        ["report", "runs", "--output_dir", ""],
        ["report", "--update", ""],
        ["reproduce", "table1", "digits", "--results", ""],
        ["reproduce", "table1", "digits", "--work_dir", ""],
        ["convert", "--source", ""],
        ["convert", "--data_dir", ""],
    ],
)
def test_an_empty_name_is_not_the_current_folder(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "'' is no name of a file or a folder" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("draw_detections", ["", "--data_dir", "data"]),
        ("draw_detections", ["run", "--data_dir", ""]),
        ("demo", ["--work_dir", ""]),
        ("bench_convert", ["--images", ""]),
        ("bench_gpu", ["speed", "--output_dir", ""]),
        ("bench_loader", [""]),
        ("bench_start", [""]),
        ("bench_step", ["--data_dir", ""]),
    ],
)
def test_an_empty_name_is_not_the_current_folder_of_a_tool(tool, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as ended:
        load_tool(tool).main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "'' is no name of a file or a folder" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["chekc"], ["plan", "--gpus", "0", str(EIGHT_K)], ["report", "--bogus", "runs"]])
def test_a_wrong_flag_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_a_command_in_help_can_be_pasted_also_where_it_takes_several_lines():
    command = "    deepspeed --hostfile hosts recipes/resnet50.py --deepspeed_config ds_configs/8k.json"
    *lines, comment = kept_line(f"{command}      # many hosts", 40)
    assert len(lines) == 4 and max(map(len, [*lines, comment])) <= 40 and comment.split() == ["#", "many", "hosts"]
    assert "\n".join(lines).replace("\\\n", "").split() == command.split()
    assert kept_line("  " + "words " * 10, 40)[0].endswith("words")


RECIPES = sorted((ROOT / "recipes").glob("*.py"), key=lambda path: path.name)


def commands_in(text):
    """Return the words of each command that a reader would paste: indented by four spaces, up to the last backslash."""
    text = text.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if re.match(" {4}(python|deepspeed|lbsgd) ", line)
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_can_be_pasted_from_its_help(recipe, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    source = recipe.read_text()
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    helped = OneLineParser(description=docstring).format_help()
    meant = commands_in(source.partition('"""')[2].partition('"""')[0])
    assert commands_in(helped) == meant and all(len(command) > 1 for command in meant)
    assert not re.search(r"\S {2,}-", helped.partition("options:")[0])  # a gap left by a joined line


def test_each_item_of_a_list_begins_a_line_of_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "42")
    text = "Two:\n\n* the first, which is longer\n  than one line of the text\n* the second"
    helped = OneLineParser(description=text).format_help()
    assert "\n* the first, which is longer than one\n  line of the text\n* the second\n" in helped


def test_the_usage_of_a_recipe_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    usage = parser("A recipe.").format_usage()
    assert max(map(len, usage.splitlines())) <= 60 and "--compile | --cuda_graphs" in " ".join(usage.split())


def test_an_error_moves_no_cursor_whatever_a_file_holds(tmp_path, capsys):
    config = json.loads(Path(EIGHT_K).read_text())
    config["lbsgd"]["\x1b[2Jseed\a"] = 0
    (tmp_path / "a.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "a.json")]) == 2
    assert "lbsgd.?[2Jseed? is an unknown key" in capsys.readouterr().err
