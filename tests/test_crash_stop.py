"""Runs in real processes that are asked to stop by SIGTERM or SIGUSR1: they save in time, and end with exit code 75."""

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
    slow_iterations,
)
from crash_runs import EVERY, ITERATIONS, assert_same_parameters, saved_iteration

from lbsgd.train import checkpoint

pytest_plugins = ("crash_fixtures",)


@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
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
    """In an epoch or at its end: a launcher sends SIGTERM to all others, and soon SIGKILL, as soon as one has ended."""
    with Command(small, tmp_path / "run", fault=writes_slowly) as run:
        run.wait_for_iteration(iteration)
        run.send(signal.SIGTERM, 0, 1)
        run.wait_until(lambda: len(run.alive()) < 2, "end")
        assert checkpoint.newest(tmp_path / "run/checkpoints"), "a process has ended, and nothing is saved yet"
        assert run.exit_codes() == [75, 75]


def passes_of_iteration_2_are_slow():
    """Let 32 passes take 0.5 s each, where others take 0.01 s; the processes agree after each one or two.

    In the third one rank 1 is told to stop.
    """
    agree_every(0.01)
    passes = count()

    def slowly(trainer):
        if trainer.iteration == 2:
            print("a slow pass")
            if next(passes) == 2 and is_rank(1):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    before_each_pass(slowly)


def test_a_stop_gives_up_an_iteration_of_many_passes_and_it_is_done_again(tmp_path):
    json, folder = config(tmp_path, global_batch=256, iterations=3), tmp_path / "run"
    completed(json, tmp_path / "whole")
    with Command(json, folder, fault=passes_of_iteration_2_are_slow) as run:
        assert run.exit_codes() == [75, 75], run.console
    assert run.printed(1).count("a slow pass") < 10
    assert "saved after 2 iterations" in run.errors[0] and saved_iteration(folder) == 2
    completed(json, folder, "--resume")
    assert_same_parameters(folder, tmp_path / "whole")


def passes_become_twenty_times_slower():
    """Slow passes down from 0.02 s to 0.4 s, just when the processes have agreed to go on."""
    pause = [0.02]

    def slow_down(trainer):
        if trainer.iteration > 50 and pause[0] < 0.4:
            pause[0] = 0.4
            print("slower")

    after_each_agreement(slow_down)
    before_each_pass(lambda trainer: time.sleep(pause[0]))


def test_passes_that_become_much_slower_at_once_do_not_keep_a_run_from_saving_in_time(tmp_path):
    """How often the processes agree follows the past speed of passes; the guard gives up after 25 seconds."""
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
            # Signals within a second count as one, because a launcher passes on what a terminal has sent already.
            run.send(signal.SIGTERM, *alive)
            time.sleep(0.2)
            assert time.monotonic() - began < 20, run.console  # after 25 s the guard gives up saving
        assert time.monotonic() - began > 1
        assert run.exit_codes() == [75, 75] and "by a second signal, SIGTERM; nothing was saved" in run.errors[0]
