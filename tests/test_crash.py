"""Runs in real processes that are killed, on disks that fail or return wrong data, and resumed: nothing is lost.

Kills come at random. `LBSGD_CRASH_SEED=...`, which a failing test prints, repeats them as far as timing allows.
"""

import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from crash import RECIPE, SMALL, Command, completed, config
from crash_faults import Lingers, after_each_report, evaluation_never_ends, is_rank
from crash_runs import (
    EVERY,
    HOST,
    ITERATIONS,
    assert_same_parameters,
    assert_same_run,
    assert_same_state,
    newest,
    saved_iteration,
    weights,
)
from oracle import BOUND, distance
from test_checkpoint import complete

from lbsgd.report.run_log import read_run
from lbsgd.train import checkpoint

pytest_plugins = ("crash_fixtures",)


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def killed_run(json, folder, kills, rng, last, *flags):
    """Kill a run `kills` times, both processes or one of the two, and resume it to its end."""
    victims = [(0, 1), (0,), (1,)] * kills
    for number, ranks in enumerate(rng.sample(victims[:kills], kills)):
        done = checkpoint.newest(folder / "checkpoints")
        done = int(done.name[10:18]) if done else 0
        share = (last - done) / (kills - number + 1)
        iteration = min(last - 20, done + rng.randint(1, max(1, int(2 * share))))
        kill(json, folder, done, iteration, ranks, rng, *flags, fault=Lingers(last - 10))
    completed(json, folder, "--resume", *flags)


def kill(json, folder, done, iteration, ranks, rng, *flags, fault):
    """Resume a run and kill some of its processes a moment after an iteration. The others must end by themselves."""
    with Command(json, folder, "--resume", *flags, fault=fault) as run:
        run.wait_for_iteration(iteration) if iteration > done else run.wait_for("resuming from")
        time.sleep(rng.uniform(0, 0.03))  # an iteration takes 0.02 s: in the middle of a pass, of a save, ...
        run.send(signal.SIGKILL, *ranks)
        codes = run.exit_codes()
    assert codes == [-signal.SIGKILL if rank in ranks else 4 for rank in run.ranks], run.console
    dead = (
        "rank 0, or the way to its host, has been gone" if 0 in ranks else f"rank 1 on {HOST} died or has not answered"
    )
    assert len(run.errors) == (len(ranks) < 2) and all(dead in error for error in run.errors), run.errors


def test_a_run_killed_three_times_ends_in_the_same_bits(small, whole, tmp_path, rng):
    killed_run(small, tmp_path / "run", 3, rng, 2 * ITERATIONS, *EVERY)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_killed_twenty_times_ends_in_the_same_bits(tmp_path, rng, stage):
    json = config(tmp_path, stage=stage, iterations=150)
    completed(json, tmp_path / "whole", *EVERY)
    killed_run(json, tmp_path / "run", 20, rng, 300, *EVERY)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_runs_killed_at_any_time_for_minutes_end_in_the_same_bits(tmp_path, rng):
    """Kill runs also while they start, resume, evaluate and export. They save each iteration, or by the clock."""
    json, began, kills, runs = config(tmp_path, iterations=150), time.monotonic(), 0, 0
    completed(json, tmp_path / "whole", "--checkpoint_every", 1)
    while time.monotonic() - began < float(os.environ.get("LBSGD_SOAK_SECONDS") or 300):
        runs, folder, every = runs + 1, tmp_path / f"run_{runs}", rng.choice([1, "0.005m"])
        while killed_at_any_time(json, folder, rng, "--checkpoint_every", every):
            kills += 1
        (assert_same_run if every == 1 else assert_same_parameters)(folder, tmp_path / "whole")
        shutil.rmtree(folder)
    print(f"{runs} runs, {kills} times killed")


def killed_at_any_time(json, folder, rng, *flags):
    """Resume a run and kill processes of it within seconds. Return False if it reached its end before."""
    with Command(json, folder, "--resume", *flags, draws=True) as run:
        deadline = time.monotonic() + rng.uniform(0, 5)
        while (alive := run.alive()) and time.monotonic() < deadline:
            time.sleep(0.001)
        # Without a launcher, the death of a process that has not met the others yet goes unnoticed.
        victims = [rank for rank in alive if rng.random() < 0.7 or not run.iterations()]
        run.send(signal.SIGKILL, *victims)
        codes = dict(zip(run.ranks, run.exit_codes(), strict=True))
    assert all(codes[rank] in ((-signal.SIGKILL,) if rank in victims else (0, 4)) for rank in codes), run.console
    return bool(victims)


@pytest.mark.slow
def test_a_run_on_ffcv_data_killed_three_times_ends_in_the_same_bits(digits_data, tmp_path, rng):
    json = config(tmp_path, iterations=1437 // 16)
    flags = ("--data_dir", digits_data, *EVERY)
    completed(json, tmp_path / "whole", *flags)
    killed_run(json, tmp_path / "run", 3, rng, 2 * (1437 // 16), *flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number, ranks", [(signal.SIGKILL, (0, 1)), (signal.SIGTERM, (0,)), (signal.SIGTERM, (1,))])
def test_a_run_that_ended_in_an_evaluation_evaluates_again(small, whole, tmp_path, number, ranks):
    with Command(small, tmp_path / "run", *EVERY, fault=evaluation_never_ends) as run:
        for rank in (0, 1):
            run.wait_for("evaluating", rank)
        run.send(number, *ranks)
        codes = run.exit_codes()
    if number == signal.SIGTERM:
        assert codes == [75, 75], run.console
        assert run.errors == ["stopped: SIGTERM at evaluation, batch 0; the same command with --resume goes on"]
    assert read_run(tmp_path / "run").epochs == [] and saved_iteration(tmp_path / "run") == ITERATIONS
    if number == signal.SIGKILL:
        completed(small, tmp_path / "run", *EVERY, "--resume")
        assert_same_run(tmp_path / "run", whole)


# --- another world size ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eighteen_iterations(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eighteen") / "run"
    completed(small, folder, "--max_iterations", 18, recipe=SMALL)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_goes_on_on_another_number_of_processes_with_the_same_images(eighteen_iterations, tmp_path, stage):
    """Two processes, then one, then two; without dropout, whose masks belong to processes.

    DeepSpeed alone refuses this for stages 1 and 2.
    """
    json, folder = config(tmp_path, stage=stage, iterations=ITERATIONS), tmp_path / "run"
    for world_size, last in ((2, 6), (1, 12), (2, 18)):
        completed(json, folder, "--resume", "--max_iterations", last, world_size=world_size, recipe=SMALL)
    ours, theirs = (
        {name: tensor for name, tensor in weights(run).items() if "num_batches_tracked" not in name}
        for run in (folder, eighteen_iterations)
    )
    assert distance(ours, theirs) < BOUND
    ours, theirs = (
        [record["train_loss"] for record in read_run(run).iterations] for run in (folder, eighteen_iterations)
    )
    assert len(ours) == 18 and ours == pytest.approx(theirs, rel=BOUND)


# --- what a recipe draws ---------------------------------------------------------------------------------------------


def test_dropout_is_drawn_from_the_seed_by_each_process_for_itself(tmp_path):
    json, runs = config(tmp_path, iterations=8), [tmp_path / "a", tmp_path / "b"]
    for folder in runs:
        completed(json, folder, "--max_iterations", 3)
    assert_same_state(*runs)
    random = newest(runs[0])[0]["random"]
    for name in ("torch", "numpy", "python"):
        assert not torch.equal(random[f"{name}.0"], random[f"{name}.1"])


def test_on_another_number_of_processes_dropout_is_drawn_from_seed_and_iteration_also_by_a_changed_script(tmp_path):
    json, begun, runs = config(tmp_path, iterations=8), tmp_path / "begun", [tmp_path / "a", tmp_path / "b"]
    completed(json, begun, "--max_iterations", 3)
    changed = tmp_path / "changed.py"
    changed.write_text(Path(RECIPE).read_text() + "# another word\n")
    for folder, script in zip(runs, (RECIPE, changed), strict=True):
        shutil.copytree(begun, folder)
        run = completed(json, folder, "--resume", "--max_iterations", 4, world_size=1, recipe=str(script))
        assert ("warning: the recipe's script has changed" in run.console) == (script == changed)
    assert_same_state(*runs)
    first, resumed = (read_run(folder).resumes[0]["environment"]["script"] for folder in runs)
    assert first == read_run(begun).header["environment"]["script"] != resumed
    anew = tmp_path / "anew"
    completed(json, anew, "--max_iterations", 1, world_size=1)
    assert not torch.equal(newest(anew)[0]["random"]["torch.0"], newest(runs[0])[0]["random"]["torch.0"])


# --- the disk --------------------------------------------------------------------------------------------------------


def disk_fails_for_a_while():
    """From iteration 22 to 39, limit files to 90 kB: weights.safetensors is larger, the log is not."""

    def limit(trainer, iteration):
        if iteration in (22, 39):
            trainer.saver.wait()  # iteration 21's checkpoint may still be being written
            print(f"after iteration {iteration} the newest is {checkpoint.newest(trainer.saver.folder).name}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (90_000 if iteration == 22 else -1, -1))

    if is_rank(0):
        after_each_report(limit)


def test_a_disk_that_fails_for_a_while_loses_nothing(small, whole, tmp_path):
    run = completed(small, tmp_path / "run", *EVERY, fault=disk_fails_for_a_while)
    assert "after iteration 39 the newest is iteration_00000021" in run.console
    failed = re.findall(
        r"warning: the checkpoint of iteration (\d+) could not be written \(.*File too large\); the one before it "
        r"stands, training goes on, and the next one is tried",
        run.console,
    )
    assert failed == ["28", "35"]
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(small, whole, copy):
    damaged = checkpoint.newest(copy / "checkpoints") / "momentum.safetensors"
    flip_a_bit(damaged)
    run = completed(small, copy, *EVERY, "--resume")
    assert f"warning: {damaged} is not as it was written" in run.console and "resuming from" in run.console
    assert f"{copy}/checkpoints/iteration_00000075" in run.console
    assert_same_run(copy, whole)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda path: flip_a_bit(path / "weights.safetensors"), "weights.safetensors is not as it was written"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json'"),
    ],
    ids=["a flipped bit", "no manifest"],
)
def test_with_no_whole_checkpoint_left_a_run_stops_rather_than_starts_over(small, copy, damage, told):
    for path in complete(copy / "checkpoints"):
        damage(path)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with Command(small, copy, *EVERY, "--resume") as run:
        assert run.exit_codes() == [2, 2]
    [error] = run.errors
    assert error.count(told) == 3 and "no whole checkpoint is left" in error
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
