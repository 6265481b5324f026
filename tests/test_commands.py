"""The literal commands on real processes, from the JSON to the exported network."""

import json
import shlex
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from commands import DIGITS, LAUNCHER, RECIPE, ROOT, command, joined, refused, script
from crash import SMALL as SMALL_RECIPE  # with a network that is built, trained and saved in no time
from processes import free_port
from test_sources import make_official

from lbsgd.config.json_file import read_json
from lbsgd.convert.convert import convert
from lbsgd.data import beton
from lbsgd.data.loaders import EvalLoader
from lbsgd.data.share import Pixels, Share
from lbsgd.report.groups import has_diverged
from lbsgd.report.run_log import read_run
from lbsgd.train.run import Run, begin_output, prepare_output

SMALL = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}


def test_help_shows_the_command_and_every_flag():
    done = command(sys.executable, RECIPE, "--help")
    assert done.returncode == 0
    command_line = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "deepspeed --hostfile hosts recipes/resnet50.py --deepspeed_config ds_configs/8k.json" in command_line
    for flag in (
        "--output_dir",
        "--resume",
        "--evaluate_only",
        "--weights",
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


def run_small(*arguments):
    return script(SMALL_RECIPE, "--deepspeed_config", *arguments)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The digits' recipe with k = 4 workers of 4 images: 89 iterations per epoch, each a tenth of a second."""
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
    arguments = ("--deepspeed_config", small, "--fake_data", "--max_iterations", 3, "--output_dir", folder / "run")
    done = joined(2, SMALL_RECIPE, *arguments)
    assert [each.returncode for each in done] == [0, 0], done
    return folder / "run"


def test_two_runs_with_the_same_seed_log_identical_losses(small, fake_run, tmp_path):
    arguments = ("--deepspeed_config", small, "--fake_data", "--max_iterations", 3, "--output_dir", tmp_path / "again")
    done = joined(2, SMALL_RECIPE, *arguments)
    assert [each.returncode for each in done] == [0, 0], done
    assert "data           seeded random images (--fake_data)\n" in done[0].stdout
    losses = [
        [record["train_loss"] for record in read_run(folder).iterations] for folder in (fake_run, tmp_path / "again")
    ]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_the_log_begins_with_the_plan_and_the_environment(fake_run):
    run = read_run(fake_run).header
    assert run["model"] == "small" and run["global_batch"] == 16 and run["iterations_per_epoch"] == 89
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
    """On one process with twice the passes: the same images, so nearly the same losses. Another recipe is refused."""
    folder = tmp_path / "run"
    for source in fake_run.rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(fake_run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    log = folder / "log.jsonl"  # as if the noise had been measured
    log.write_text(log.read_text().replace('{"kind": "iteration",', '{"kind": "iteration", "noise_scale": 9.0,'))
    refused(run_small(small, "--fake_data", "--output_dir", folder), folder, "--resume")
    files = [next(folder.glob("*.json")), folder / "weights.pt"]
    before = [file.read_bytes() for file in files]
    refused(run_small(small, "--fake_data", "--output_dir", folder, "--resume", "--seed", 1), "lbsgd.seed")
    assert [file.read_bytes() for file in files] == before  # a refusal changes nothing
    done = run_small(small, "--fake_data", "--max_iterations", 4, "--output_dir", folder, "--resume")
    assert done.returncode == 0 and f"resuming from {folder}/checkpoints/iteration_00000003" in done.stdout, done.stderr
    assert [record["iteration"] for record in read_run(folder).iterations] == [0, 1, 2, 3]
    assert "Gradient noise" in (folder / "index.html").read_text()
    uninterrupted = run_small(small, "--fake_data", "--max_iterations", 4, "--output_dir", tmp_path / "whole")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    ours, theirs = (read_run(path).iterations[3]["train_loss"] for path in (folder, tmp_path / "whole"))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_checkpoint_of_another_network_is_refused(small, fake_run, tmp_path):
    """The first layer that differs is named."""
    (tmp_path / "other.py").write_text(
        "from cluster.small import Small; from lbsgd.commands.train import main; from torch import nn\n"
        "class Other(Small):\n"
        "    def network(self, num_classes, plan):\n"
        "        layers = super().network(num_classes, plan)\n"
        "        layers[-1] = nn.Linear(16, num_classes, bias=False)\n"
        "        return layers\n"
        "main(Other(), '')\n"
    )
    arguments = ("--deepspeed_config", small, "--fake_data", "--resume", "--output_dir", fake_run)
    refused(script(tmp_path / "other.py", *arguments), "network.7.bias", "there", "here")


def test_resume_without_a_checkpoint_says_so_and_starts_and_evaluate_only_refuses(small, tmp_path):
    refused(
        run_small(small, "--fake_data", "--evaluate_only", "--output_dir", tmp_path / "a"), "no complete checkpoint"
    )
    done = run_small(small, "--fake_data", "--resume", "--max_iterations", 1, "--output_dir", tmp_path / "b")
    assert done.returncode == 0 and "no complete checkpoint" in done.stdout and "starting anew" in done.stdout


def test_a_loss_that_is_not_a_number_stops_all_ranks_names_the_iteration_and_keeps_the_checkpoint(
    small, fake_run, tmp_path
):
    """An lr of 1e9 from iteration 0 on. The loss of iteration 2 is not a number."""
    config = read_json(small)
    config["lbsgd"] |= {"linear_scaling": {"rule": "fixed", "base_lr": 1e9, "base_batch": 4}}
    config["optimizer"]["params"]["lr"] = 1e9
    config["scheduler"]["params"] |= {"warmup_min_lr": 1e9, "warmup_max_lr": 1e9}
    path = tmp_path / "diverges.json"
    path.write_text(json.dumps(config))
    arguments = ("--deepspeed_config", path, "--fake_data", "--max_iterations", 5, "--output_dir", tmp_path / "run")
    done = joined(2, SMALL_RECIPE, *arguments)
    assert [each.returncode for each in done] == [3, 3], done
    [error] = "".join(each.stderr for each in done).splitlines()
    assert "error: the loss of iteration 2 is not a number; no checkpoint was written yet" in error
    assert has_diverged(read_run(tmp_path / "run"))


def keep_few(tree, folder, per_class):
    """Link to the first images of each class in a new tree. per_class: how many, by split."""
    for split, count in per_class.items():
        for source in (tree / split).iterdir():
            (folder / split / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                (folder / split / source.name / image.name).symlink_to(image)


def test_the_result_of_a_real_run_is_a_network_of_torchvision_with_the_error_reported(digits_tree, tmp_path):
    """After an epoch on digits through FFCV, torchvision's network with the exported file makes the same errors."""
    digits_data = tmp_path / "digits"
    keep_few(digits_tree, tmp_path / "tree", {"train": 26, "val": 6})
    convert(tmp_path / "tree", digits_data, max_side=500, quality=90, num_processes=1, overwrite=False)
    recipe = ("recipes/resnet18.py", "--deepspeed_config", DIGITS, "--resolution", 16)
    run = ("--output_dir", tmp_path / "run")
    done = joined(2, *recipe, "--data_dir", digits_data, "--epochs", 1, *run)
    assert [each.returncode for each in done] == [0, 0], done
    [epoch] = read_run(tmp_path / "run").epochs
    assert epoch["val_images"] == 60 and epoch["iteration"] == 2
    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(torch.load(tmp_path / "run/weights.pt"))
    network.eval()
    images = EvalLoader(
        beton.BetonFile.open(digits_data / "val.beton"),
        batch=30,
        share=Share(),
        pixels=Pixels(resolution=16, device="cpu"),
        threads=1,
    )
    with torch.no_grad(), closing(images):
        correct = sum(int((network(x).argmax(1) == y).sum()) for x, y in images)
    assert correct == epoch["val_correct_top1"]
    assert epoch["val_top1_error_pct"] == pytest.approx(100 * (60 - correct) / 60)
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000
    for name in ("val.beton", "manifest.json"):  # all that an evaluation needs
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.copy(digits_data / name, tmp_path / "val")
    again = script(*recipe, "--data_dir", tmp_path / "val", *run, "--evaluate_only")
    judged = f"top-1 error {epoch['val_top1_error_pct']:.2f} %"
    assert judged in again.stdout and "\nval " in again.stdout and "\ntrain " not in again.stdout, again.stderr
    assert "per epoch" not in again.stdout and "learning rate" not in again.stdout
    weights = ("--data_dir", digits_data, "--output_dir", tmp_path / "b", "--weights", tmp_path / "run/weights.pt")
    assert f"weights.pt: {judged}" in script(*recipe, *weights, "--evaluate_only").stdout
    assert not (tmp_path / "b").exists()
    refused(script(*recipe, *weights), "--weights goes with --evaluate_only")


def test_the_readme_leads_from_the_official_archives_to_a_run(small, tmp_path):
    """Its commands after `make setup`, with other names, on archives with the real layout and 12 training images."""
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
        done = command(Path(sys.executable).with_name(program), *more[:5], *arguments, *more[5:])
        assert done.returncode == 0, done.stdout + done.stderr

    run(convert)
    run(
        train,
        *("--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", free_port()),
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


def test_weights_are_there_only_of_a_run_that_has_reached_its_end(tmp_path):
    """A script that looks for them must queue a run again that --epochs 1 has ended."""
    plan = SimpleNamespace(name="8k", config={"train_batch_size": 8192})
    run = Run(None, plan, None, tmp_path, 1, resume=True)
    (tmp_path / "weights.pt").write_bytes(b"of epoch 1")
    prepare_output(run, newest=tmp_path / "checkpoints/iteration_00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]  # the checkpoint may still be another run's
    begin_output(run)
    assert [path.name for path in tmp_path.iterdir()] == ["8k.json"]
