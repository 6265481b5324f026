"""Real processes of a run that a test can kill, stop and start again.

    with Command(config, folder, "--checkpoint_every", 7) as run:
        run.wait_for_iteration(12)
        run.send(signal.SIGKILL, 0, 1)
        assert run.exit_codes() == [-9, -9]

Each is forked from a server that has done its imports, which saves seven seconds.
"""

import gc
import json
import os
import re
import runpy
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import forking

from lbsgd.config.json_file import read_json
from lbsgd.processes.ports import free_port

pytest.register_assert_rewrite("crash_runs")  # so that its failures show the differences

TESTS = Path(__file__).parent
RECIPE, SMALL = str(TESTS / "crash_recipe.py"), str(TESTS / "cluster/small.py")
PATIENCE_SECONDS = 120  # enough even on a busy machine


def config(folder, *, stage=0, global_batch=16, iterations=40, epochs=2):
    """Write a JSON into `folder`, made from tests/cluster/small.json; iterations: per epoch."""
    values = read_json(TESTS / "cluster/small.json")
    lr = 0.0125 * global_batch / 4
    values |= {"train_batch_size": global_batch, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 1}
    values["zero_optimization"]["stage"] = stage
    values["optimizer"]["params"]["lr"] = values["scheduler"]["params"]["warmup_max_lr"] = lr
    values["scheduler"]["params"] |= {"warmup_min_lr": 0.0125, "warmup_num_steps": iterations}
    values["lbsgd"] |= {
        "epochs": epochs,
        "num_images": global_batch * iterations,
        "warmup": {"kind": "gradual", "epochs": 1},
        "linear_scaling": {"rule": "linear", "base_lr": 0.0125, "base_batch": 4},
        "decay": {"epochs": []},
    }
    path = Path(folder) / f"crash_{stage}_{global_batch}_{iterations}_{epochs}.json"
    path.write_text(json.dumps(values))
    return path


def forked(function, *arguments, output, **environment):
    """Start a process that runs function(*arguments) and prints into the file `output`."""
    process = forking.Process(target=_run, args=(str(output), environment, function, arguments))
    process.start()
    return process


def _run(output, environment, function, arguments):
    gc.freeze()  # no garbage collection looks through the imported modules
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    function(*arguments)


def lines_that_end(text):
    """Return the console lines that say why a run has ended."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopped: ", "ended: "))]


class Command:
    """The processes of one command with --fake_data, started as by a launcher. On leaving, all are ended.

    fault: called in each process before the recipe, to break something; it can read RANK.
    ranks: the ranks to start, by default all. environment: more variables.
    draws: whether a run that ends well draws its curves, which takes a third of a short run's time.
    """

    def __init__(
        self,
        config,
        output_dir,
        *flags,
        world_size=2,
        ranks=None,
        recipe=RECIPE,
        fault=None,
        draws=False,
        **environment,
    ):
        arguments = ["--deepspeed_config", config, "--output_dir", output_dir, *flags]
        arguments += [] if "--data_dir" in flags else ["--fake_data"]
        self.start = recipe, list(map(str, arguments)), fault, draws
        self.ranks = range(world_size) if ranks is None else ranks
        self.environment = {
            "WORLD_SIZE": world_size,
            "LOCAL_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            **environment,
        }
        self.folder = Path(tempfile.mkdtemp(prefix="console_", dir=Path(output_dir).parent))

    def __enter__(self):
        self.processes = {}
        for rank in self.ranks:
            local = {"RANK": rank, "LOCAL_RANK": rank % int(self.environment["LOCAL_SIZE"])}
            environment = {name: str(value) for name, value in (self.environment | local).items()}
            self.processes[rank] = forked(_recipe, *self.start, output=self.folder / str(rank), **environment)
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.kill()
        self.exit_codes()

    def printed(self, rank):
        path = self.folder / str(rank)
        return path.read_text() if path.exists() else ""

    @property
    def console(self):
        return "".join(map(self.printed, self.ranks))

    @property
    def errors(self):
        return lines_that_end(self.console)

    def alive(self):
        return [rank for rank, process in self.processes.items() if process.is_alive()]

    def wait_until(self, true, what):
        """Wait until true(). Fail if all processes end first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert self.alive() or true(), f"ended before {what}:\n{self.console}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.console}"
            time.sleep(0.005)

    def wait_for(self, text, rank=0):
        self.wait_until(lambda: text in self.printed(rank), text)

    def wait_for_iteration(self, number):
        """Wait until `number` iterations are done, and printed."""
        self.wait_until(lambda: self.iterations() >= number, f"iteration {number}")

    def iterations(self):
        return int((re.findall(r"  iteration +(\d+)/", self.printed(0)) or [0])[-1])

    def send(self, number, *ranks):
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def exit_codes(self, within=PATIENCE_SECONDS):
        """Return the exit codes in rank order, negative for a signal. Fail if a process still runs after that time."""
        deadline = time.monotonic() + within
        for rank, process in self.processes.items():
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} still runs after {within:g} s:\n{self.console}"
        return [process.exitcode for process in self.processes.values()]

    def finish(self):
        """Wait for the run's end, which must be a success."""
        assert set(self.exit_codes()) == {0}, self.console
        return self


def _recipe(script, arguments, fault, draws):
    sys.argv = [script, *arguments]
    if not draws:
        from matplotlib.figure import Figure

        Figure.savefig = lambda *_, **__: None
    if fault:
        fault()
    runpy.run_path(script, run_name="__main__")


def completed(*arguments, **options):
    """Run a command to its end. Its output can still be read afterwards."""
    with Command(*arguments, **options) as run:
        return run.finish()
