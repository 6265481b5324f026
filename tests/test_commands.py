"""The literal commands: what they refuse, in one line and with an exit code, and what they do on real processes."""

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from processes import free_port
from test_sources import make_official

from lbsgd.config.json_file import read_json
from lbsgd.data import beton
from lbsgd.data.loaders import EvalLoader
from lbsgd.data.share import Pixels, Share
from lbsgd.report.run_log import read_run

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/resnet50.py"
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
DIGITS = str(ROOT / "ds_configs/digits.json")


def command(*arguments, **environment):
    """Runs a command in the repository's folder, on the CPU."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "IMAGENET_DIR",
            "IMAGENET_FFCV_DIR",
            "RANK",
            "WORLD_SIZE",
            "MASTER_PORT",
            "MASTER_ADDR",
            "LOCAL_RANK",
            "LOCAL_SIZE",
            "CUDA_VISIBLE_DEVICES",
        )
    }
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**kept, **environment},
    )


def recipe(*arguments, **environment):
    """The recipe as one process, without the launcher."""
    return command(sys.executable, RECIPE, "--deepspeed_config", *arguments, **environment)


def launched(slots, *arguments, **environment):
    return command(
        LAUNCHER,
        "--quiet",
        "--num_accelerators",
        slots,
        "--master_port",
        free_port(),
        RECIPE,
        "--deepspeed_config",
        *arguments,
        **environment,
    )


def refused(done, *words, code=2):
    """One line on stderr that holds the words; no traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(str(word) in errors[0] for word in words), errors[0]


# --- bad input
# ----------------------------------------------------------------------------------------------------------


def test_without_data_one_line_says_what_was_looked_for_and_what_to_run(tmp_path):
    looked_for = tmp_path / "nothing"
    refused(recipe(DIGITS, "--data_dir", looked_for), looked_for, "train.beton", "tools/convert_imagenet_to_ffcv.py")
    refused(recipe(DIGITS, IMAGENET_FFCV_DIR=str(looked_for)), looked_for)
    (tmp_path / "empty").mkdir()
    refused(recipe(DIGITS, "--data_dir", tmp_path / "empty"), tmp_path / "empty", "train.beton")


def test_the_converter_without_a_source_says_what_was_looked_for(tmp_path):
    converter = [sys.executable, "tools/convert_imagenet_to_ffcv.py"]
    refused(
        command(*converter, "--data_dir", tmp_path / "out", IMAGENET_DIR=str(tmp_path / "jpegs")), tmp_path / "jpegs"
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def spoilt(digits_data, tmp_path):
    """A copy of the digits' data folder that a test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.beton", "val.beton", "manifest.json"):
        (folder / name).write_bytes((Path(digits_data) / name).read_bytes())
    return folder


def test_a_file_that_is_not_ffcvs_is_refused(spoilt):
    (spoilt / "train.beton").write_bytes(b"\xff\xd8\xff\xe0 a JPEG" * 1000)
    refused(recipe(DIGITS, "--data_dir", spoilt), spoilt / "train.beton")


@pytest.mark.parametrize("missing_bytes", [1, 1000, 500_000])
def test_a_truncated_file_is_refused(spoilt, missing_bytes):
    path = spoilt / "train.beton"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing_bytes)
    refused(recipe(DIGITS, "--data_dir", spoilt), path)


def with_labels(path, change):
    """Rewrites the label column of an FFCV file in place."""
    labels = beton.BetonFile.open(path).labels
    header = np.fromfile(path, dtype=beton.HEADER, count=1)[0]
    record = np.dtype([("image", beton.IMAGE), ("label", beton.LABEL)], align=True)
    table = np.memmap(
        path,
        dtype=record,
        mode="r+",
        shape=(int(header["num_images"]),),
        offset=beton.HEADER.itemsize + 2 * beton.FIELD.itemsize,
    )
    assert (table["label"] == labels).all()
    table["label"] = change(labels.copy())
    table.flush()


def test_a_label_outside_the_classes_is_refused(spoilt):
    def one_wrong(labels):
        labels[7] = 10
        return labels

    (spoilt / "manifest.json").unlink()
    with_labels(spoilt / "val.beton", one_wrong)
    refused(recipe(DIGITS, "--data_dir", spoilt), "val.beton", "7", "10")


def test_a_validation_set_of_another_data_set_is_refused(spoilt):
    (spoilt / "val.beton").write_bytes((spoilt / "train.beton").read_bytes())
    refused(recipe(DIGITS, "--data_dir", spoilt), "val.beton", "manifest.json")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"train_batch_size": 128,}', ["line 1"]),
        (None, ["train_batch_sise", "did you mean train_batch_size"]),
    ],
)
def test_a_json_that_does_not_parse_or_has_a_typo_is_refused(tmp_path, text, words):
    config = read_json(DIGITS)
    config["train_batch_sise"] = 128
    path = tmp_path / "typo.json"
    path.write_text(text or json.dumps(config))
    refused(recipe(path, "--fake_data"), path, *words)


def test_a_json_that_disagrees_with_itself_is_refused_with_both_numbers(tmp_path):
    config = read_json(DIGITS)
    config["optimizer"]["params"]["lr"] = 0.4
    path = tmp_path / "disagrees.json"
    path.write_text(json.dumps(config))
    refused(recipe(path, "--fake_data"), "optimizer.params.lr", "is 0.4", "makes it 0.05")


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = recipe(
            DIGITS,
            "--fake_data",
            "--output_dir",
            tmp_path,
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    refused(done, "--master_port")


def test_fewer_images_than_one_global_batch_are_refused(digits_data):
    refused(recipe(ROOT / "ds_configs/8k.json", "--data_dir", digits_data), "8192", "1437", "--global_batch")


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(recipe(DIGITS, "--fake_data", "--output_dir", tmp_path / "file" / "run"), tmp_path / "file" / "run")


def test_an_unexpected_number_of_processes_is_refused():
    refused(recipe(DIGITS, "--fake_data", "--expect_world_size", 256), "256", "1 processes")


def test_a_missing_hostfile_is_refused_and_no_rank_hangs(tmp_path):
    """DeepSpeed itself only warns and would train on one host."""
    done = command(
        LAUNCHER,
        "--hostfile",
        tmp_path / "hosts",
        "--num_accelerators",
        2,
        RECIPE,
        "--deepspeed_config",
        ROOT / "ds_configs/8k.json",
        "--fake_data",
    )
    refused(done, tmp_path / "hosts", "does not exist")


def test_a_flag_that_is_no_number_is_refused():
    done = recipe(DIGITS, "--micro_batch", "many")
    assert done.returncode == 2 and "'many' is not a whole number" in done.stderr


@pytest.mark.parametrize("flag, most", [("--epochs", 8), ("--max_iterations", 88)])
def test_a_flag_that_ends_earlier_cannot_end_later(tmp_path, flag, most):
    refused(recipe(DIGITS, "--fake_data", flag, most + 1, "--output_dir", tmp_path), flag, most + 1, "lbsgd.epochs")


def test_help_shows_the_command_and_every_flag():
    done = recipe(DIGITS, "--help")
    assert done.returncode == 0
    assert "deepspeed --hostfile hosts recipes/resnet50.py --deepspeed_config ds_configs/8k.json" in done.stdout
    for flag in (
        "--output_dir",
        "--resume",
        "--evaluate_only",
        "--epochs",
        "--max_iterations",
        "--global_batch",
        "--micro_batch",
        "--resolution",
        "--precision",
        "--loader_threads",
        "--seed",
        "--fake_data",
        "--data_dir",
        "--expect_world_size",
        "--checkpoint_every",
        "--hang_timeout",
        "--in_memory",
    ):
        assert flag in done.stdout


# --- runs
# ---------------------------------------------------------------------------------------------------------------

SMALL = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The digits' recipe with k = 4 workers of 4 images: iterations of a tenth of a second, 89 an epoch."""
    config = {**read_json(DIGITS), **SMALL, "steps_per_print": 1}
    config["lbsgd"] |= {
        "epochs": 2,
        "linear_scaling": {"rule": "linear", "base_lr": 0.01, "base_batch": 4},
        "decay": {"epochs": [], "factor": 0.1},
    }
    config["lbsgd"]["batch_norm"] |= {"per_worker_batch": 4}
    config["optimizer"]["params"]["lr"] = 0.04
    config["scheduler"]["params"] |= {"warmup_min_lr": 0.01, "warmup_max_lr": 0.04, "warmup_num_steps": 89}
    folder = tmp_path_factory.mktemp("config")
    config["tensorboard"] = {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"}
    path = folder / "small.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def fake_run(small, tmp_path_factory):
    """Three iterations on fake data in two processes."""
    folder = tmp_path_factory.mktemp("fake")
    done = launched(2, small, "--fake_data", "--max_iterations", 3, "--output_dir", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_two_runs_with_the_same_seed_log_identical_losses(small, fake_run, tmp_path):
    done = launched(2, small, "--fake_data", "--max_iterations", 3, "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    losses = [
        [record["train_loss"] for record in read_run(folder).iterations] for folder in (fake_run, tmp_path / "again")
    ]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_the_log_begins_with_the_plan_and_the_environment(fake_run):
    run = read_run(fake_run).header
    assert run["model"] == "resnet50" and run["global_batch"] == 16 and run["iterations_per_epoch"] == 89
    assert run["environment"]["packages"]["deepspeed"] == "0.19.8" and run["world_size"] == 2
    assert [record["lr"] for record in read_run(fake_run).iterations] == [
        pytest.approx(0.01 + 0.03 * t / 89) for t in range(3)
    ]


def test_tensorboard_has_the_numbers_of_the_log_when_the_json_asks(small, fake_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = [EventAccumulator(str(path)) for path in sorted((small.parent / "tensorboard").glob("events*"))[:1]]
    events.Reload()
    for name in ("lr", "train_loss", "images_per_second", "data_wait_pct"):
        shown = events.Scalars(f"lbsgd/{name}")
        assert [event.step for event in shown] == [16, 32, 48]  # images seen
        assert [event.value for event in shown] == pytest.approx(
            [record[name] for record in read_run(fake_run).iterations]
        )


def test_a_run_goes_on_where_it_stopped_on_another_number_of_processes(small, fake_run, tmp_path):
    """One process, twice the passes: the same images, so almost the same losses; and then another recipe is refused."""
    folder = tmp_path / "run"
    for source in fake_run.rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(fake_run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    refused(recipe(small, "--fake_data", "--output_dir", folder), folder, "--resume")
    refused(recipe(small, "--fake_data", "--output_dir", folder, "--resume", "--seed", 1), "recipe.seed")
    done = recipe(small, "--fake_data", "--max_iterations", 4, "--output_dir", folder, "--resume")
    assert done.returncode == 0 and f"resuming from {folder}/checkpoints/iteration_00000003" in done.stdout, done.stderr
    assert [record["iteration"] for record in read_run(folder).iterations] == [0, 1, 2, 3]
    uninterrupted = recipe(small, "--fake_data", "--max_iterations", 4, "--output_dir", tmp_path / "whole")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    ours, theirs = (read_run(path).iterations[3]["train_loss"] for path in (folder, tmp_path / "whole"))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_checkpoint_of_another_network_is_refused(small, fake_run):
    """The same recipe as a ResNet-18: the first layer that differs is named."""
    code = (
        "import sys; sys.path.insert(0, 'recipes'); sys.argv = ['r18', *sys.argv[1:]]\n"
        "from resnet50 import ResNet50; from lbsgd.commands.train import main\n"
        "class ResNet18(ResNet50): name = 'resnet18'\n"
        "main(ResNet18(), '')"
    )
    done = command(
        sys.executable, "-c", code, "--deepspeed_config", small, "--fake_data", "--resume", "--output_dir", fake_run
    )
    refused(done, "network.", "there", "here")


def test_resume_without_a_checkpoint_says_so_and_starts_and_evaluate_only_refuses(small, tmp_path):
    refused(recipe(small, "--fake_data", "--evaluate_only", "--output_dir", tmp_path / "a"), "no complete checkpoint")
    done = recipe(small, "--fake_data", "--resume", "--max_iterations", 1, "--output_dir", tmp_path / "b")
    assert done.returncode == 0 and "no complete checkpoint" in done.stdout and "starting anew" in done.stdout


def test_a_loss_that_is_not_a_number_stops_all_ranks_names_the_iteration_and_keeps_the_checkpoint(
    small, fake_run, tmp_path
):
    """An lr of 1e9 from iteration 0 on: the loss of iteration 2 is not a number."""
    config = read_json(small)
    config["lbsgd"] |= {"linear_scaling": {"rule": "fixed", "base_lr": 1e9, "base_batch": 4}}
    config["optimizer"]["params"]["lr"] = 1e9
    config["scheduler"]["params"] |= {"warmup_min_lr": 1e9, "warmup_max_lr": 1e9}
    path = tmp_path / "diverges.json"
    path.write_text(json.dumps(config))
    done = launched(2, path, "--fake_data", "--max_iterations", 5, "--output_dir", tmp_path / "run")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "error: the loss of iteration 2 is not a number" in done.stderr, done.stderr
    assert "no checkpoint was written yet" in done.stderr


def test_the_result_of_a_real_run_is_a_network_of_torchvision_with_the_error_reported(digits_data, tmp_path):
    """One epoch on the digits through FFCV: torchvision's network with the exported file errs on the same images."""
    done = launched(2, DIGITS, "--data_dir", digits_data, "--epochs", 1, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    [epoch] = read_run(tmp_path / "run").epochs
    assert epoch["val_images"] == 360 and epoch["iteration"] == 11
    network = torchvision.models.resnet50(num_classes=10)
    network.load_state_dict(torch.load(tmp_path / "run/weights.pt"))
    network.eval()
    images = EvalLoader(
        beton.BetonFile.open(Path(digits_data) / "val.beton"),
        batch=60,
        share=Share(),
        pixels=Pixels(resolution=32, device="cpu"),
        threads=1,
    )
    with torch.no_grad(), closing(images):
        correct = sum(int((network(x).argmax(1) == y).sum()) for x, y in images)
    assert correct == epoch["val_correct_top1"]
    assert epoch["val_top1_error_pct"] == pytest.approx(100 * (360 - correct) / 360)
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000
    again = recipe(DIGITS, "--data_dir", digits_data, "--output_dir", tmp_path / "run", "--evaluate_only")
    assert f"top-1 error {epoch['val_top1_error_pct']:.2f} %" in again.stdout, again.stderr


def test_the_readme_leads_from_the_official_archives_to_a_run(small, tmp_path):
    """Its commands after `make setup`, with other names, on archives of the real layout with 12 training images."""
    make_official(tmp_path / "imagenet")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    section = (ROOT / "README.md").read_text().split("### 1. Train ImageNet")[1]
    setup, convert, train = [line.strip() for line in section.split("\n\n")[1].splitlines()]
    assert setup == "make setup && . .venv/bin/activate"

    def run(line, *more):
        for name, other in (
            ("/data/imagenet_ffcv", tmp_path / "ffcv"),
            ("/data/imagenet", tmp_path / "imagenet"),
            ("ds_configs/8k.json", small),
            ("hostfile hosts", f"hostfile {tmp_path / 'hosts'}"),
        ):
            line = line.replace(name, str(other))
        program, *arguments = shlex.split(line)
        done = command(Path(sys.executable).with_name(program), *more[:3], *arguments, *more[3:])
        assert done.returncode == 0, done.stdout + done.stderr

    run(convert)
    run(
        train,
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--set",
        "train_batch_size=8",
        "--max_iterations",
        1,
        "--output_dir",
        tmp_path / "run",
    )
    done = read_run(tmp_path / "run")
    assert (done.header["world_size"], done.header["num_images"], len(done.iterations)) == (2, 12, 1)


@pytest.mark.slow
def test_a_hostfile_of_two_slots_makes_one_real_update_of_8192_images(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    done = command(
        LAUNCHER,
        "--hostfile",
        tmp_path / "hosts",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        RECIPE,
        "--deepspeed_config",
        "ds_configs/8k.json",
        "--fake_data",
        "--max_iterations",
        1,
        "--precision",
        "fp32",
        "--resolution",
        32,
        "--output_dir",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "run")
    assert (run.header["world_size"], run.header["accumulation_steps"], run.header["global_batch"]) == (2, 128, 8192)
    assert [record["lr"] for record in run.iterations] == [0.1]
    assert run.iterations[0]["train_loss"] == pytest.approx(6.9, abs=0.2)  # log(1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_ends_below_8_percent_with_every_seed(tmp_path, seed):
    done = command(sys.executable, "tools/demo.py", "--seed", seed, "--work_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [log] = tmp_path.glob("runs/*/log.jsonl")
    assert read_run(log).result["val_top1_error_pct"] <= 8
    assert (log.parent / "curves.png").stat().st_size > 10_000
