"""Runs in real processes that are stopped by a signal save in time, and end with exit code 75."""

import os
import re
import signal
import time
from itertools import count

import pytest
from crash import Command, completed, config
from crash_faults import (
    after_each_agreement,
    agree_every,
    before_each_pass,
    evaluation_never_ends,
    is_rank,
    rank_0_writes_for_ever,
    slow_iterations,
)
from crash_runs import EVERY, ITERATIONS, assert_same_parameters, saved_iteration

from lbsgd.train import checkpoint

pytest_plugins = ("crash_fixtures",)


@pytest.mark.parametrize(
    "number, rank", [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGINT, 1), (signal.SIGHUP, 0)]
)
def test_a_signal_to_one_process_saves_the_run_and_ends_all(small, whole, tmp_path, rng, number, rank):
    with Command(small, tmp_path / "run", *EVERY, fault=slow_iterations) as run:
        run.wait_for_iteration(rng.randint(3, 30))
        run.send(number, rank)
        assert run.exit_codes() == [75, 75], run.console
    [said] = run.errors
    told = r"stopped: (.+): saved after (\d+) iterations; the same command with --resume goes on"
    reason, iterations = re.fullmatch(told, said).groups()
    assert reason in (number.name, "another process was told to")
    assert int(iterations) == saved_iteration(tmp_path / "run")
    completed(small, tmp_path / "run", *EVERY, "--resume")
    assert_same_parameters(tmp_path / "run", whole)


def writes_slowly():
    slow_iterations(), evaluation_never_ends()
    write = checkpoint.write

    def slow(path, data):
        time.sleep(0.3)
        return write(path, data)

    checkpoint.write = slow


@pytest.mark.parametrize("iteration", [5, ITERATIONS])
def test_no_process_ends_before_the_checkpoint_is_written(small, tmp_path, iteration):
    """Within an epoch and at its end. A launcher sends SIGTERM, and soon SIGKILL, to all as soon as one has ended."""
    with Command(small, tmp_path / "run", fault=writes_slowly) as run:
        run.wait_for_iteration(iteration)
        run.send(signal.SIGTERM, 0, 1)
        run.wait_until(lambda: len(run.alive()) < 2, "end")
        assert checkpoint.newest(tmp_path / "run/checkpoints"), "a process has ended, and nothing is saved yet"
        assert run.exit_codes() == [75, 75]


class SlowPasses:
    """Makes the 32 passes of an iteration take 0.5 s each, others 0.01 s. The processes agree after one or two passes.

    In the third of these passes rank 1 is told to stop.
    """

    def __init__(self, iteration):
        self.iteration = iteration

    def __call__(self):
        agree_every(0.01)
        passes = count()

        def slowly(trainer):
            if trainer.iteration == self.iteration:
                print("a slow pass")
                if next(passes) == 2 and is_rank(1):
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)

        before_each_pass(slowly)


@pytest.fixture(scope="module")
def many_passes(tmp_path_factory):
    """Return a JSON with three iterations per epoch, and a run of it without faults."""
    folder = tmp_path_factory.mktemp("many_passes")
    json = config(folder, global_batch=256, iterations=3)
    completed(json, folder / "whole")
    return json, folder / "whole"


@pytest.mark.parametrize("iteration", [0, 2, 3])  # the first of the run, one inside an epoch, and the first of an epoch
def test_a_stop_gives_up_an_iteration_of_many_passes_and_it_is_done_again(many_passes, tmp_path, iteration):
    (json, whole), folder = many_passes, tmp_path / "run"
    with Command(json, folder, fault=SlowPasses(iteration)) as run:
        assert run.exit_codes() == [75, 75], run.console
    assert run.printed(1).count("a slow pass") < 10
    assert f"saved after {iteration} iterations" in run.errors[0] and saved_iteration(folder) == iteration
    completed(json, folder, "--resume")
    assert_same_parameters(folder, whole)


def test_a_stop_while_rank_0_writes_its_page_and_the_others_wait_for_it_in_the_next_epoch_loses_nobody(small, tmp_path):
    with Command(small, tmp_path / "run", fault=rank_0_writes_for_ever) as run:
        run.wait_for("writing"), run.wait_for("the next epoch", rank=1)
        time.sleep(0.5)  # rank 1 takes its batch, and goes as far as it can alone
        run.send(signal.SIGTERM, 0, 1)
        assert run.exit_codes() == [75, 75], run.console
    assert len(run.errors) == 1 and saved_iteration(tmp_path / "run") == ITERATIONS


def passes_become_twenty_times_slower():
    """Slow passes down from 0.02 s to 0.4 s, right after the processes have agreed to go on."""
    pause = [0.02]

    def slow_down(trainer):
        if trainer.iteration > 50 and pause[0] < 0.4:
            pause[0] = 0.4
            print("slower")

    after_each_agreement(slow_down)
    before_each_pass(lambda trainer: time.sleep(pause[0]))


def test_passes_that_become_much_slower_at_once_do_not_keep_a_run_from_saving_in_time(tmp_path):
    """The past speed of passes sets how often the processes agree. The guard gives up after 25 seconds."""
    json, folder = config(tmp_path, iterations=200), tmp_path / "run"
    with Command(json, folder, fault=passes_become_twenty_times_slower) as run:
        run.wait_for("slower")
        run.send(signal.SIGTERM, 1)
        assert run.exit_codes() == [75, 75], run.console
    assert saved_iteration(folder) > 50


def iteration_3_never_ends():
    def never(trainer):
        if trainer.iteration == 3:
            print("waiting for ever")
            time.sleep(1000)

    before_each_pass(never)


def test_a_second_signal_ends_a_process_at_once(small, tmp_path):
    with Command(small, tmp_path / "run", fault=iteration_3_never_ends) as run:
        for rank in (0, 1):
            run.wait_for("waiting for ever", rank)
        began = time.monotonic()
        while alive := run.alive():
            # Signals within a second count as one, because a launcher passes on what a terminal has already sent.
            run.send(signal.SIGTERM, *alive)
            time.sleep(0.2)
            assert time.monotonic() - began < 20, run.console  # after 25 s the guard gives up saving
        assert time.monotonic() - began > 1
        assert run.exit_codes() == [75, 75] and "by a second signal, SIGTERM; nothing was saved" in run.errors[0]


def passes_of_three_seconds_from_iteration_3():
    agree_every(0.01)

    def slowly(trainer):
        if trainer.iteration >= 3:
            print("a slow pass")
            time.sleep(3)

    before_each_pass(slowly)


def test_processes_that_are_stopped_one_after_another_save_all_the_same(small, tmp_path):
    """As by hand on two hosts: the second process knows of the first one's signal long before its own comes."""
    with Command(small, tmp_path / "run", fault=passes_of_three_seconds_from_iteration_3) as run:
        for rank in (0, 1):
            run.wait_for("a slow pass", rank)
            run.send(signal.SIGTERM, rank)
            time.sleep(2.2 * (rank == 0))
        assert run.exit_codes() == [75, 75], run.console
    assert len(run.errors) == 1 and saved_iteration(tmp_path / "run") >= 3


def test_what_rank_0_alone_can_refuse_ends_processes_that_no_launcher_would_end(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").touch()
    with Command(small, tmp_path / "run", "--hang_timeout", 100) as run:
        assert run.exit_codes(within=60) == [2, 2], run.console
    refused = "already holds a run: continue it with --resume or choose another --output_dir"
    assert run.errors == [f"error: {tmp_path}/run {refused}"]
