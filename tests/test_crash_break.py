"""Runs in real processes of which one breaks, hangs, or never comes: all end, and the cause is printed once."""

import os
import signal
import socket
import sys

import pytest
from crash import PATIENCE_SECONDS, Command, config
from crash_faults import before_each_pass, hang_timeout_once_it_trains, is_rank, slow_iterations
from crash_runs import HOST

import lbsgd.processes.first_cause
import lbsgd.processes.guard
import lbsgd.processes.peers
from lbsgd.errors import DataError

pytest_plugins = ("crash_fixtures",)


class Breaks:
    """Raises an error in iteration 5 of one rank."""

    def __init__(self, rank, error):
        self.rank, self.error = rank, error

    def __call__(self):
        def breaks(trainer):
            if trainer.iteration == 5 and is_rank(self.rank):
                raise self.error

        before_each_pass(breaks)


@pytest.mark.parametrize(
    "rank, error, code, words",
    [
        (1, ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
        (0, DataError("cannot decode"), 2, "cannot decode"),
    ],
)
def test_what_one_process_raises_ends_all_with_its_code_and_is_told_once(small, tmp_path, rank, error, code, words):
    with Command(small, tmp_path / "run", fault=Breaks(rank, error)) as run:
        assert run.exit_codes() == [code, code], run.console
    assert run.errors == [f"error: {words}"] and run.errors[0] in run.printed(rank)
    assert ("Traceback" in run.printed(rank)) == (code == 1) and "Traceback" not in run.printed(1 - rank)


def ffcv_thread_breaks():
    """Let rank 1's decoding thread raise after the first batches."""
    if not is_rank(1):
        return
    import lbsgd.data.ffcv_loader

    real = lbsgd.data.ffcv_loader.EpochIterator.run_pipeline

    def breaks(self, batch_slot, *arguments):
        if batch_slot == 2:
            raise OSError("the disk is gone")
        return real(self, batch_slot, *arguments)

    lbsgd.data.ffcv_loader.EpochIterator.run_pipeline = breaks


@pytest.mark.slow
def test_a_loader_thread_that_raises_ends_all(digits_data, tmp_path):
    json, data = config(tmp_path, iterations=89), ("--data_dir", digits_data)
    with Command(json, tmp_path / "run", *data, fault=ffcv_thread_breaks) as run:
        assert run.exit_codes() == [2, 2], run.console
    assert "the disk is gone" in run.errors[0] and len(run.errors) == 1


def impatient():
    """Shorten all times of the guard."""
    slow_iterations(), hang_timeout_once_it_trains(5)
    lbsgd.processes.peers.Peers.BEAT_SECONDS = lbsgd.processes.guard.LAST_WORDS_SECONDS = 0.5
    lbsgd.processes.first_cause.FIRST_CAUSE_SECONDS = 4.5


def test_a_process_that_stops_answering_is_named_within_the_timeout(small, tmp_path):
    """In one run rank 1 gets SIGSTOP, in another rank 0, which serves the store."""
    with (
        Command(small, tmp_path / "a", fault=impatient) as one,
        Command(small, tmp_path / "b", fault=impatient) as two,
    ):
        for run, stopped in ((one, 1), (two, 0)):
            run.wait_for_iteration(5)
            run.send(signal.SIGSTOP, stopped)
        for run, stopped in ((one, 1), (two, 0)):
            run.processes[1 - stopped].join(PATIENCE_SECONDS)  # a fifth of --hang_timeout
            assert run.processes[1 - stopped].exitcode == 4, run.console
        assert f"error: rank 1 on {HOST} died or has not answered since iteration" in one.console
        assert "error: nothing has moved for 5 s since iteration" in two.console and len(two.errors) == 1
        for run, stopped in ((one, 1), (two, 0)):
            run.send(signal.SIGCONT, stopped)  # a process that wakes up too late finds the others gone, and ends, too
            assert run.exit_codes() == [4, 4]


# --- before the processes have met -----------------------------------------------------------------------------------


def test_a_process_that_does_not_come_is_named(small, tmp_path):
    with Command(small, tmp_path / "run", "--hang_timeout", 2, ranks=[0]) as run:
        assert run.exit_codes() == [4], run.console
    assert "of 2 processes some did not come within 2 s: rank 1; look at their hosts" in run.errors[0]


class OtherFlags:
    """Gives flags to one rank only. Each rank has its own host, named after it."""

    def __init__(self, rank, *flags):
        self.rank, self.flags = rank, flags

    def __call__(self):
        socket.gethostname = lambda: f"host{os.environ['RANK']}"
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        if is_rank(self.rank):
            sys.argv += self.flags


def test_a_host_with_another_configuration_is_named_on_all_hosts(small, tmp_path):
    with Command(small, tmp_path / "run", fault=OtherFlags(1, "--seed", "1"), LOCAL_SIZE=1) as run:
        assert run.exit_codes() == [2, 2]
    told = "rank 1 on host1 does not have the configuration of rank 0 on host0; make them the same on all hosts"
    assert run.errors == [f"ended: by rank 1 on host1: {told}", f"error: {told}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_host_before_the_processes_meet_ends_the_others(small, tmp_path, rank):
    fault = OtherFlags(rank, "--expect_world_size", "3")
    with Command(small, tmp_path / "run", fault=fault, LOCAL_SIZE=1) as run:
        run.processes[1 - rank].join(PATIENCE_SECONDS)
        assert run.processes[1 - rank].exitcode == 2, run.console
    [told] = [
        line for line in run.errors if line.startswith("error: --expect_world_size is 3, but the world size is 2")
    ]
    assert sorted(run.errors) == sorted([told, told.replace("error: ", f"ended: by rank {rank} on host{rank}: ")])
    assert told in run.printed(rank)
