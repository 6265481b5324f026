"""The start of a recipe: an output that cannot be written, and flags from an unset variable, are one line."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, command, environment_with, recipe, refused, script
from test_beton import write_beton

from lbsgd.commands.detect import REFUSED
from lbsgd.commands.plan_lines import print_plan
from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.simulate import NOT_SIMULATED
from lbsgd.commands.train import Request
from lbsgd.config.plan import Plan
from lbsgd.data.folder import Manifest, Split, open_data, open_val
from lbsgd.errors import ConfigError
from lbsgd.output import OutputError
from lbsgd.processes.first_cause import explained
from lbsgd.report.run_log import RunLog

JSON = ("--deepspeed_config", ROOT / "ds_configs/digits.json")
SCENES = ("--deepspeed_config", ROOT / "ds_configs/detection/scenes.json")
FULL, CLOSED, GONE = "No space left on device", "standard output is closed", "Broken pipe"
CLASSIFIER = ("recipes/digits.py", *JSON, "--fake_data")
SIMULATION = ("recipes/asynchronous.py", *JSON, "--fake_data", "--updates", "sync")


def printing_into(output, arguments):
    """Run a recipe whose standard output is a file of ours, or closed."""
    preparing = {"preexec_fn": lambda: os.close(1)} if output is None else {"stdout": output}
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        words, cwd=ROOT, env=environment_with({}), stderr=subprocess.PIPE, text=True, timeout=60, **preparing
    )


@pytest.mark.parametrize("arguments", [CLASSIFIER, SIMULATION])
@pytest.mark.parametrize("why", [FULL, CLOSED, GONE])
def test_an_output_that_takes_nothing_ends_a_recipe_with_2_and_one_line(tmp_path, arguments, why):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        output = {FULL: full, CLOSED: None, GONE: write}[why]
        done = printing_into(output, (*arguments, "--output_dir", tmp_path / "run"))
    os.close(write)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and why in done.stderr
    assert not list(tmp_path.glob("run/*.jsonl"))


@pytest.mark.parametrize(
    "file, without",
    [("asynchronous", NOT_SIMULATED), ("update_magnitude", NOT_SIMULATED), ("mask_rcnn", REFUSED)],
)
def test_help_has_no_flag_that_its_recipe_refuses(file, without):
    done = script(f"recipes/{file}.py", "--help", COLUMNS="60")
    flags = set(re.findall(r"--(\w+)", done.stdout))
    assert done.returncode == 0 and "output_dir" in flags and not flags & set(without)
    assert ("go on" in done.stdout) == (file == "mask_rcnn")  # a simulation begins again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recipe_that_is_told_to_stop_while_it_imports_ends_with_75_and_one_line(tmp_path, number):
    words = [sys.executable, *map(str, (*CLASSIFIER, "--output_dir", tmp_path / "run"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment_with({}), **pipes)
    assert process.stdout.readline()  # the plan
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    told = f"stopped: {number.name} at the start; the same command with --resume goes on\n"
    assert (process.returncode, errors) == (75, told)


def test_a_run_that_compiles_takes_no_code_that_others_may_have_written(tmp_path):
    folder = tmp_path / f"lbsgd-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    words = ("env", "-u", "TORCHINDUCTOR_CACHE_DIR", sys.executable, *CLASSIFIER, "--compile", "--max_iterations", 1)
    refused(command(*words, "--output_dir", tmp_path / "run", TMPDIR=str(tmp_path)), folder, "set TMPDIR or TORCHIND")


@pytest.mark.parametrize("given", ["0", "1000000000", "1e3"])
def test_a_timeout_that_torch_cannot_count_is_refused(given):
    refused(recipe(JSON[1], "--hang_timeout", given), "--hang_timeout", given)


def test_an_output_that_is_full_once_the_processes_have_met_is_no_bug():
    """It then prints where the files are read from."""
    error = explained(OutputError(OSError(28, FULL)), "the start", None)
    assert (error.exit_code, str(error)) == (2, f"the output cannot be written ({FULL})")


@pytest.mark.parametrize("library", [torch.empty, np.empty])
def test_a_host_whose_memory_is_full_is_no_bug(library):
    with pytest.raises((RuntimeError, MemoryError)) as full:
        library(10**15)
    error = explained(full.value, "the start", None)
    assert error.exit_code == 2 and str(error).startswith("the host's memory is full at the start (")
    assert "--micro_batch" in str(error)


@pytest.mark.parametrize("flag", ["--data_dir", "--output_dir", "--weights", "--baseline"])
def test_an_empty_name_of_a_file_or_folder_is_refused(flag):
    """It comes from an unset variable. It used to mean the default, or the current folder."""
    refused(recipe(JSON[1], flag, ""), flag, "a variable that nobody has set")


def test_an_empty_name_of_a_json_is_refused():
    refused(recipe(""), "--deepspeed_config", "a variable that nobody has set")


@pytest.mark.parametrize("flag", ["--data_dir", "--train_split", "--val_split", "--backbone_weights", "--output_dir"])
def test_an_empty_name_is_refused_by_a_detector(flag):
    refused(script("recipes/mask_rcnn_digits.py", *SCENES, flag, ""), flag, "a variable that nobody has set")


@pytest.mark.parametrize("copied", [True, False])
def test_a_classifier_that_is_evaluated_on_its_training_images_says_so(copied, digits_data, tmp_path, capsys):
    for name in ("train", "val"):
        shutil.copy(digits_data / f"{'train' if copied else name}.beton", tmp_path / f"{name}.beton")
    print_plan(Plan.read(JSON[1], 1), tmp_path / "run", open_data(tmp_path))
    warning = f"warning: {tmp_path}/val.beton holds the images of train.beton"
    assert (warning in capsys.readouterr().out) == copied


def test_an_evaluation_prints_no_schedule(tmp_path, capsys):
    """It would be the schedule of the JSON's own num_images, and of another run."""
    plan = Plan.read(JSON[1], 1)
    shown = {}
    for training in (True, False):
        print_plan(plan, tmp_path / "run", None, training)
        shown[training] = capsys.readouterr().out
    for line in ("\nlearning rate ", "\nwarmup ", "\niterations ", "global batch "):
        assert line in shown[True] and line.strip() not in shown[False], line
    assert "on             world size 1 x micro batch 32\n" in shown[False] and "\nprecision " in shown[False]


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("there", [("train.beton",), ("manifest.json",)])
def test_a_classifier_that_is_evaluated_alone_says_so_too(there, copied, digits_data, tmp_path, capsys):
    for name in ("train", "val"):
        shutil.copy(digits_data / f"{'train' if copied else name}.beton", tmp_path / f"{name}.beton")
    train, val = open_data(tmp_path).train, open_data(tmp_path).val
    manifest = Manifest([str(k) for k in range(10)], Split.of(train), Split.of(val), "", {}, 1)
    manifest.write(tmp_path / "manifest.json")
    for name in {"train.beton", "manifest.json"} - {*there}:
        (tmp_path / name).unlink()
    print_plan(Plan.read(JSON[1], 1), tmp_path / "run", open_val(tmp_path))
    warning = f"warning: {tmp_path}/val.beton holds the images of train.beton"
    assert (warning in capsys.readouterr().out) == copied


@pytest.mark.parametrize("weights", ["weights.pt", "checkpoints/iteration_00000768.1/weights.safetensors"])
@pytest.mark.parametrize("classes, warned", [("ab", False), ("ac", True), ("abc", True)])
def test_labels_that_meant_other_classes_in_training_are_told(classes, warned, weights, tmp_path, capsys):
    write_beton(tmp_path / "val.beton", [0, 1])
    val = open_val(tmp_path).val
    Manifest([*"ab"], Split.of(val), Split.of(val), "", {}, 1).write(tmp_path / "manifest.json")
    header = {"model": "small", **Plan.read(JSON[1], 1).as_dict(), "classes": [*classes]}
    with RunLog(tmp_path / "run", header):
        (tmp_path / "run" / weights).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / weights).touch()
    asked = [
        JSON[0],
        str(JSON[1]),
        "--data_dir",
        str(tmp_path),
        "--evaluate_only",
        "--weights",
        f"{tmp_path}/run/{weights}",
    ]
    Request(parser("").parse_args(asked)).require_place()
    assert ("in training and is" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("statistics", [None, "recomputed"])
def test_an_evaluation_asks_nothing_of_the_training_images_unless_it_recomputes_statistics(statistics, tmp_path):
    """F03, and the rules of the schedule, compare the JSON with training data, which are not read here."""
    write_beton(tmp_path / "val.beton", [0, 1, 2])
    write_beton(tmp_path / "train.beton", [0, 1, 2])
    asked = [JSON[0], str(JSON[1]), "--data_dir", str(tmp_path), "--evaluate_only"]
    if statistics:
        key = "lbsgd.batch_norm.statistics"
        asked += ["--set", f"{key}={statistics}", "--set", f"{key}_images=32"]
        with pytest.raises(ConfigError, match="more than the 3 images of the training data"):
            Request(parser("").parse_args(asked))
    else:
        request = Request(parser("").parse_args(asked))
        assert request.plan == Plan.read(JSON[1], 1) and request.data.val.num_images == 3


@pytest.mark.parametrize("flag", ["--from", "--output", "--all"])
def test_an_empty_name_is_refused_where_a_json_is_written(flag):
    refused(command(sys.executable, "-m", "lbsgd", "config", flag, ""), flag, "a variable that nobody has set")


@pytest.mark.parametrize("left", ["log.jsonl", "checkpoints/iteration_00000003"])
def test_an_output_folder_with_a_run_is_refused_before_anything_heavy_is_imported(left, tmp_path):
    (tmp_path / "run" / left).mkdir(parents=True)
    asked = [*JSON, "--fake_data", "--output_dir", tmp_path / "run"]
    request = Request(parser("").parse_args([str(each) for each in asked]))
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        request.require_place()


@pytest.mark.parametrize(
    "flags, words", [((), "cannot write into the output folder"), (("--evaluate_only",), "Not a directory")]
)
def test_a_file_as_output_folder_is_refused_before_anything_heavy_is_imported(flags, words, tmp_path):
    (tmp_path / "file").touch()
    asked = ["recipes/digits.py", *JSON, "--fake_data", "--output_dir", tmp_path / "file", *flags]
    done = command(sys.executable, "-X", "importtime", *asked)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE) and done.stdout == ""
