"""Runs whose launcher dies, stops, or passes signals on end with it, and leave no process behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from crash import PATIENCE_SECONDS, RECIPE, Command, config, lines_that_end
from crash_faults import slow_iterations
from crash_runs import (
    HOST,
    saved_iteration,
)

import lbsgd.commands.train
from lbsgd.processes.ports import free_port

pytest_plugins = ("crash_fixtures",)


class LauncherDies:
    """Lets the launcher die while the processes import. Another process plays the launcher."""

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
            assert run.exit_codes() == [75], run.console
        launcher.kill()
    assert run.errors[0].startswith(f"stopped: its launcher (process {launcher.pid}) is gone")


def command_of(process):
    """Return a process's command line; empty if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Launched:
    """A long run started by DeepSpeed's command, once its processes train, or import. On leaving, all are ended."""

    def __init__(self, folder, *flags, importing=False):
        self.run, self.flags, self.printed, self.importing = folder / "run", flags, folder / "console", importing
        self.json = config(folder, iterations=5000)

    def __enter__(self):
        with self.printed.open("w") as console:
            self.command = subprocess.Popen(
                [*self.launcher(), *self.recipe()], stdout=console, stderr=console, start_new_session=True
            )
        try:
            self.wait_for(lambda: "\noutput  " in self.printed.read_text())
            children = psutil.Process().children(recursive=True)
            mine = [process for process in children if str(self.run) in command_of(process)]
            mine.sort(key=lambda process: (process.create_time(), process.pid))
            self.deepspeed, self.launch, *self.ranks = mine
            assert "deepspeed.launcher.launch" in self.launch.cmdline() and len(self.ranks) == 2
            self.wait_for(self.all_import if self.importing else lambda: self.lines_of_log() > 3)
        except BaseException:
            self.__exit__()
            raise
        return self

    def launcher(self):
        deepspeed = Path(sys.executable).with_name("deepspeed")
        return [deepspeed, "--quiet", "--num_accelerators", "2", "--master_port", str(free_port())]

    def recipe(self):
        return [RECIPE, "--deepspeed_config", self.json, "--fake_data", "--output_dir", self.run, *self.flags]

    def __exit__(self, *_):
        try:
            os.killpg(self.command.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.command.wait()

    def all_import(self):
        """Return whether all ranks have begun to import PyTorch, which takes some seconds."""
        return all("libtorch" in Path(f"/proc/{process.pid}/maps").read_text() for process in self.ranks)

    def lines_of_log(self):
        log = self.run / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def wait_for(self, true):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert self.command.poll() is None and time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.01)

    def errors_at_the_end(self):
        """Return the lines with which the ranks end. Fail if launch.py or one of them does not end."""
        left = psutil.wait_procs([self.launch, *self.ranks], timeout=PATIENCE_SECONDS)[1]
        assert left == [], self.printed.read_text()
        return lines_that_end(self.printed.read_text())


@pytest.mark.parametrize("dies", [pytest.param("deepspeed", marks=pytest.mark.slow), "launch.py"])
def test_a_run_whose_launcher_was_killed_saves_and_ends(tmp_path, dies):
    """The kernel notifies the ranks of the death of their parent, launch.py. They watch `deepspeed` above it."""
    with Launched(tmp_path) as run:
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        [error] = run.errors_at_the_end()
    dead = run.launch if dies == "launch.py" else run.deepspeed
    reason = rf"its launcher \(process {dead.pid}\) is gone"
    if dies == "launch.py":
        reason += "|SIGTERM"  # the kernel sends it a moment before other processes can see that launch.py has ended
    # Rank 0 prints. The other rank may have told it a moment before it found out by itself.
    [saved] = re.findall(rf"stopped: (?:{reason}|another process was told to): saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["deepspeed", "launch.py"])
def test_a_launcher_that_is_killed_during_the_imports_leaves_no_process_behind(tmp_path, dies):
    with Launched(tmp_path, importing=True) as run:
        assert not run.lines_of_log()
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        errors = run.errors_at_the_end()
    # On launch.py's death the kernel's SIGTERM ends ranks that still import, before a guard can say why.
    # launch.py's SIGTERM does the same to a rank 0 that still imports when rank 1 ends, and only rank 0 prints.
    assert len(errors) <= (dies == "deepspeed")
    assert all(f"its launcher (process {run.deepspeed.pid}) is gone at the " in error for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_the_launcher_or_to_all_saves_and_ends_the_run(tmp_path, number, to_all):
    """launch.py passes SIGTERM on. A scheduler's SIGTERM, or Ctrl-C, reaches all, and launch.py's comes in addition."""
    with Launched(tmp_path) as run:
        os.killpg(run.command.pid, number) if to_all else os.kill(run.launch.pid, number)
        [error] = run.errors_at_the_end()
    [saved] = re.findall(r"stopped: .+: saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_under_the_launcher_a_process_that_dies_or_stops_ends_all(tmp_path, number):
    """Once another process has ended, launch.py sends SIGTERM to a stopped one, too, and kills it 30 s later."""
    with Launched(tmp_path, "--hang_timeout", "30") as run:
        run.ranks[1].send_signal(number)
        [error] = run.errors_at_the_end()
    assert f"error: rank 1 on {HOST} died or has not answered since iteration" in error
