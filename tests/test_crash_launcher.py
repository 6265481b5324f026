"""Runs whose launcher dies, stops, or passes signals on: they end with it, and leave no process behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from crash import RECIPE, Command, config
from crash_faults import slow_iterations
from crash_runs import (
    HOST,
    saved_iteration,
)

import lbsgd.commands.train
from lbsgd.processes.environment import free_port

pytest_plugins = ("crash_runs",)


class LauncherDies:
    """The launcher that started the processes, here another one's number, has died when they have imported all they need."""

    def __init__(self, pid):
        self.pid = pid

    def __call__(self):
        slow_iterations()
        launcher, start = psutil.Process(self.pid), lbsgd.commands.train.start
        lbsgd.commands.train.launchers = lambda: [launcher] if launcher.status() != psutil.STATUS_ZOMBIE else []

        def too_late(*arguments):
            launcher.kill()
            start(*arguments)

        lbsgd.commands.train.start = too_late


def test_a_launcher_that_dies_while_the_processes_start_is_missed(small, tmp_path):
    with subprocess.Popen(["sleep", "1000"]) as launcher:
        with Command(small, tmp_path / "run", ranks=[0], world_size=1, fault=LauncherDies(launcher.pid)) as run:
            assert run.exit_codes(within=30) == [75], run.console
        launcher.kill()
    assert run.errors[0].startswith(f"stopped: its launcher (process {launcher.pid}) is gone")


class Launched:
    """A long run as DeepSpeed's command starts it; its processes once they train, or import, and none of them on leaving."""

    def __init__(self, folder, *flags, importing=False):
        self.run, self.flags, self.printed, self.importing = folder / "run", flags, folder / "console", importing
        self.json = config(folder, iterations=5000)

    def __enter__(self):
        with self.printed.open("w") as console:
            self.command = subprocess.Popen(
                [
                    Path(sys.executable).with_name("deepspeed"),
                    "--quiet",
                    "--num_accelerators",
                    "2",
                    "--master_port",
                    str(free_port()),
                    RECIPE,
                    "--deepspeed_config",
                    self.json,
                    "--fake_data",
                    "--output_dir",
                    self.run,
                    *self.flags,
                ],
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        try:
            self.wait_for(
                lambda: "\noutput  " in self.printed.read_text() if self.importing else self.lines_of_log() > 3
            )
            mine = [
                process for process in psutil.Process().children(recursive=True) if str(self.run) in process.cmdline()
            ]
            self.deepspeed, self.launch, *self.ranks = sorted(
                mine, key=lambda process: (process.create_time(), process.pid)
            )
            assert "deepspeed.launcher.launch" in self.launch.cmdline() and len(self.ranks) == 2
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.command.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.command.wait()

    def lines_of_log(self):
        log = self.run / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def wait_for(self, true):
        deadline = time.monotonic() + 120
        while not true():
            assert self.command.poll() is None and time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.01)

    def errors_at_the_end(self, within=30):
        """What launch.py's processes print when they end; fails where one is left after so many seconds."""
        assert psutil.wait_procs([self.launch, *self.ranks], timeout=within)[1] == [], self.printed.read_text()
        return [
            line
            for line in self.printed.read_text().splitlines()
            if line.startswith(("error: ", "stopped: ", "ended: "))
        ]


@pytest.mark.parametrize("dies", [pytest.param("deepspeed", marks=pytest.mark.slow), "launch.py"])
def test_a_run_whose_launcher_was_killed_saves_and_ends(tmp_path, dies):
    """The kernel tells the ranks about the death of their parent, launch.py, and they look for `deepspeed` above it."""
    with Launched(tmp_path) as run:
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        [error] = run.errors_at_the_end()
    reason = "SIGTERM" if dies == "launch.py" else rf"its launcher \(process {run.deepspeed.pid}\) is gone"
    # Rank 0 speaks, and may have learnt it from the other one a moment before it found out by itself.
    [saved] = re.findall(rf"stopped: (?:{reason}|another process was told to): saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["deepspeed", "launch.py"])
def test_a_launcher_that_is_killed_during_the_imports_leaves_no_process_behind(tmp_path, dies):
    with Launched(tmp_path, importing=True) as run:
        time.sleep(1)  # rank 1 may have begun a little later; PyTorch takes some seconds more
        assert not run.lines_of_log()
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        errors = run.errors_at_the_end()
    if dies == "deepspeed":  # the kernel's SIGTERM for launch.py's death comes before anybody is there to tell
        assert len(errors) == 1 and f"its launcher (process {run.deepspeed.pid}) is gone at the " in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_the_launcher_or_to_all_saves_and_ends_the_run(tmp_path, number, to_all):
    """launch.py alone passes SIGTERM on; a scheduler's SIGTERM, or Ctrl-C, reaches all processes, and launch.py adds its own."""
    with Launched(tmp_path) as run:
        os.killpg(run.command.pid, number) if to_all else os.kill(run.launch.pid, number)
        [error] = run.errors_at_the_end()
    [saved] = re.findall(r"stopped: .+: saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("number, within", [(signal.SIGKILL, 20), (signal.SIGSTOP, 70)])
def test_under_the_launcher_a_process_that_dies_or_stops_ends_all(tmp_path, number, within):
    """launch.py kills a process that is stopped 30 s after it has asked it to end, which it does once another has ended."""
    with Launched(tmp_path, "--hang_timeout", "10") as run:
        run.ranks[1].send_signal(number)
        [error] = run.errors_at_the_end(within)
    assert f"error: rank 1 on {HOST} died or does not answer since iteration" in error
