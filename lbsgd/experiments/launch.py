"""One run of a grid as a process of its recipe: its command, its share of the machine, and how it ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO

from lbsgd.config.derive import images_per_pass
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.disk import exists, locked
from lbsgd.errors import ConfigError
from lbsgd.experiments.checkout import CODE_FOLDER, ROOT, Checkout
from lbsgd.experiments.grid import DataSet, Job, Row
from lbsgd.processes.control_groups import usable_cores
from lbsgd.processes.ports import free_port
from lbsgd.processes.signals import catch, end_with
from lbsgd.report.run_log import DIVERGED, LOG_NAME, read_run

# Parts of a diverged run's last words. A run of an old commit prints them, but does not write DIVERGED.
SAID_OF_DIVERGENCE = ("is not a number", "are not numbers", "overflow fp16")
PATIENCE_SECONDS = 24 * 3600  # a run at low priority may stand still for long on a busy machine


@dataclass(frozen=True)
class Machine:
    """What a grid may use: runs at a time, threads per run, and the GPUs by CUDA's names."""

    side_by_side: int
    threads: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls, data: DataSet, side_by_side: int | None) -> Machine:
        """Return this machine. Raises ConfigError if runs that take all GPUs are to run side by side."""
        cores, gpus = usable_cores(), visible_gpus()
        if gpus and data.gpus_per_run == 0 and (side_by_side or 1) > 1:
            raise ConfigError(f"reproduce: a run of {data.name} takes all GPUs; leave --side_by_side out")
        fitting = cores if not gpus else 1 if data.gpus_per_run == 0 else len(gpus) // data.gpus_per_run
        count = side_by_side or max(1, fitting)
        return cls(count, max(1, cores // count), gpus)

    def gpu_of(self, slot: int) -> dict[str, str]:
        """Return the environment that gives a run one GPU, if several runs share several GPUs."""
        if len(self.gpus) < 2 or self.side_by_side < 2:
            return {}
        return {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}


@dataclass(frozen=True)
class Grid:
    """What the runs of a grid have in common.

    work_dir    the folder of data and of other runs' files
    runs        the folder of these runs and of their code
    epochs      end every run earlier
    """

    data: DataSet
    work_dir: Path
    runs: Path
    machine: Machine
    epochs: int | None = None

    def epochs_of(self, row: Row) -> int | None:
        """Return the epochs after which a row's runs end early, by the grid or by the row itself; None without."""
        return min((given for given in (self.epochs, row.epochs) if given), default=None)


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that the runs may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = (device.strip() for device in visible.split(","))
        return tuple(takewhile(lambda device: device and not device.startswith("-"), devices))  # as CUDA reads it
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    return tuple(map(str, range(sum(line.startswith("GPU ") for line in listed.splitlines()))))


def settings_of(job: Job, data: DataSet) -> list[str]:
    """Return the recipe's flags that make the row: global batch, seed and other settings."""
    flags = ["--global_batch", str(job.global_batch(data)), "--seed", str(job.seed)]
    return [*flags, *(part for setting in job.row.settings for part in ("--set", setting))]


def plan_of(job: Job, data: DataSet, folder: Path) -> Plan:
    """Return the plan of a run on one process. Raises ConfigError if the row is not possible."""
    global_batch = job.global_batch(data)
    overrides = Overrides(
        global_batch=global_batch,
        micro_batch=images_per_pass(global_batch, data.per_worker_batch, 1, data.micro_batch),
        seed=job.seed,
        settings=job.row.settings,
    )
    return Plan.read(folder / data.config, 1, overrides=overrides)


def command(job: Job, grid: Grid, place: Path | None = None) -> list[str]:
    """Return the command of a run for the grid's code folder, with relative paths because the log keeps it.

    place    another folder to start it in, with the repository's own code, because the grid's may not exist yet
    """
    code, data = ROOT if place else grid.runs / CODE_FOLDER, grid.data

    def path(target: Path) -> str:
        return os.path.relpath(target, place or code)

    global_batch = job.global_batch(data)
    gpus = grid.machine.gpus[: data.gpus_per_run or None]
    processes = max(p for p in range(1, max(1, len(gpus)) + 1) if global_batch // data.per_worker_batch % p == 0)
    micro_batch = images_per_pass(global_batch, data.per_worker_batch, processes, data.micro_batch)
    epochs = grid.epochs_of(job.row)
    return [
        *launcher(gpus[:processes]),
        path(code / (job.row.script or data.recipe)),
        *job.row.flags,
        *(part for flag, file in job.inputs(grid.work_dir).items() for part in (flag, path(file))),
        *("--deepspeed_config", path(code / data.config)),
        *settings_of(job, data),
        *("--micro_batch", str(micro_batch)),
        *("--data_dir", path(Path(data.data_dir.format(work_dir=grid.work_dir)))),
        *("--output_dir", path(job.folder(grid.runs))),
        *("--loader_threads", str(max(1, grid.machine.threads // processes))),
        *(() if job.row.is_simulated else ("--hang_timeout", str(PATIENCE_SECONDS))),
        *(("--epochs", str(epochs)) if epochs else ()),
        "--resume",
    ]


def launcher(gpus: tuple[str, ...]) -> list[str]:
    """Return the command that starts a recipe: Python, or for several GPUs DeepSpeed's launcher.

    Raises ConfigError if the GPUs have names and not numbers.
    """
    if len(gpus) < 2:
        return [sys.executable]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, *on_gpus(gpus), "--master_port", str(free_port())]


def on_gpus(gpus: Sequence[str]) -> list[str]:
    """Return the flags with which DeepSpeed's launcher takes these GPUs of this host.

    Given only their count, it takes the first ones and ignores CUDA_VISIBLE_DEVICES. Raises ConfigError if the GPUs
    have names and not numbers.
    """
    if names := [gpu for gpu in gpus if not gpu.isdecimal()]:
        raise ConfigError(f"CUDA_VISIBLE_DEVICES has {names[0]}; DeepSpeed's launcher takes numbers alone")
    return ["--include", f"localhost:{','.join(gpus)}"]


@dataclass
class Started:
    """A started run. Its process holds the lock of its folder, even after the grid that started it has ended."""

    job: Job
    slot: int
    process: subprocess.Popen
    lock: IO
    output: Path
    said_before: int = 0  # bytes of output of earlier starts

    def last_words(self) -> str:
        """Return the error line of this start's output, or its last line."""
        said = self.output.read_bytes()[self.said_before :].decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()] or ["(no output)"]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines)[-1]

    def note_divergence(self) -> None:
        """Write DIVERGED next to the log if the run printed that it diverged. Runs of old commits do not write it."""
        words = self.last_words()
        if any(said in words for said in SAID_OF_DIVERGENCE) and not exists(self.output.parent / DIVERGED):
            (self.output.parent / DIVERGED).write_text(words + "\n")


def start(job: Job, grid: Grid, checkout: Checkout, slot: int) -> Started | None:
    """Start a run; None if another process runs it, or has just finished it."""
    folder, machine = job.folder(grid.runs), grid.machine
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    if not locked(lock, wait=False) or is_done(folder):
        lock.close()
        return None
    environment = checkout.environment(OMP_NUM_THREADS=str(machine.threads), **machine.gpu_of(slot))
    with open(folder / "output.txt", "ab") as output:
        said_before = output.tell()
        process = subprocess.Popen(
            command(job, grid),
            cwd=checkout.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            preexec_fn=partial(end_with_grid, os.getpid()),
        )
    return Started(job, slot, process, lock, folder / "output.txt", said_before)


def end_with_grid(grid: int) -> None:
    """Ask the kernel for SIGTERM when the grid dies (Linux), so that its runs save and end.

    A run ignores Ctrl-C, because the grid gets it too and stops its runs. Other signals get their default action,
    because the fork inherits the grid's handlers, which would only note them. Then the recipe sets its own handlers,
    also that of Ctrl-C.
    """
    catch(signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(grid)


# --- how it ended -----------------------------------------------------------------------------------------------------


def is_done(folder: Path) -> bool:
    """Whether a run has reached its end or has diverged."""
    if exists(folder / DIVERGED):
        return True
    return exists(folder / LOG_NAME) and read_run(folder).result is not None


def clear_up(folder: Path) -> None:
    """Delete the checkpoints of a finished run, 90 MB for a ResNet-18. Its weights stay."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "lock").unlink(missing_ok=True)
