"""One run, resolved and checked: what to train, on which images, into which folder, and until when."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.config.json_file import write_json
from lbsgd.config.plan import Plan
from lbsgd.disk import is_there, locked
from lbsgd.errors import CheckpointError, ConfigError
from lbsgd.output import say
from lbsgd.report.earlier_log import has_epochs
from lbsgd.report.lines import say_fact
from lbsgd.report.run_log import LOG_NAME

if TYPE_CHECKING:  # a wrong flag is reported before torch loads
    from lbsgd.train.images import ImageSource
    from lbsgd.train.task import Task

WRITER_SECONDS = 100.0  # for a run that is still saving, and for a dead host's lock (NFS: 90 s)
POLL_SECONDS = 0.5
WRITER_NAME = ".writer"  # in the output folder, locked by the run that writes there
CHECKPOINTS = "checkpoints"  # in the output folder
WEIGHTS_NAME = "weights.pt"  # in the output folder, the float32 state_dict of a finished run


@dataclass(frozen=True)
class Every:
    """How often to save in addition to the end of each epoch: by iterations, by minutes, or neither."""

    iterations: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Run:
    """What one command asks for. Every value has been checked.

    last_iteration    where the run ends: with the schedule, or earlier
    resume            continue from the newest checkpoint in output_dir
    evaluate_only     evaluate that checkpoint and train nothing
    weights           a file with weights to evaluate instead of a checkpoint
    evaluate_every    epochs from one evaluation to the next; the epochs that judge the run are always evaluated
    compiled          whether training compiles each residual block (`compiled.compile_blocks`)
    graphed           whether training launches each residual block as CUDA graphs; None: by the rule (`graphs`)
    deterministic     whether a GPU repeats its bits (`device_rules.repeat_bits`)
    baseline          limits of the training error by epoch (`live_page.baseline_limits`); empty without a baseline
    started_from      how the run's initial weights were trained, for the log; None without any
    script            the digest of the recipe's script (`facts.script_of`), in which the runs of a row must agree
    """

    task: Task
    plan: Plan
    images: ImageSource
    output_dir: Path
    last_iteration: int
    resume: bool = False
    evaluate_only: bool = False
    weights: Path | None = None
    every: Every = field(default_factory=Every)
    evaluate_every: int = 1
    compiled: bool = False
    graphed: bool | None = None
    deterministic: bool = False
    baseline: Mapping[float, float] = field(default_factory=dict)
    started_from: str | None = None
    script: str = ""

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / CHECKPOINTS


def last_iteration(plan: Plan, epochs: int | None, max_iterations: int | None) -> int:
    """Return a run's last iteration: the schedule's last, or an earlier one that a flag names.

    Raises ConfigError if a flag is beyond the schedule's end.
    """
    for flag, asked, most in (
        ("--epochs", epochs, ceil(plan.num_epochs)),
        ("--max_iterations", max_iterations, plan.num_iterations),
    ):
        if asked and asked > most:
            raise ConfigError(
                f"{flag} {asked} is more than the {most} of {plan.name}.json; it ends a run earlier, and does not "
                "move its schedule: for a longer one change its length and lbsgd.decay there"
            )
    by_epochs = epochs * plan.iterations_per_epoch if epochs else plan.num_iterations
    return min(plan.num_iterations, max_iterations or plan.num_iterations, by_epochs)


def require_place(folder: Path, has_checkpoint: bool, *, resume: bool, evaluate_only: bool, weights: bool) -> None:
    """Raise ConfigError rather than overwrite a run, and CheckpointError if there is nothing to evaluate.

    Only rank 0 looks at the output folder, because the other hosts may not have it.
    """
    if evaluate_only and not (has_checkpoint or weights):
        raise CheckpointError(
            f"no complete checkpoint in {folder / CHECKPOINTS} to evaluate; train first, or name its --output_dir, or "
            "other --weights"
        )
    if not (evaluate_only or resume) and (has_checkpoint or is_there(folder / LOG_NAME)):
        raise ConfigError(f"{folder} already holds a run: continue it with --resume or choose another --output_dir")


def prepare_output(run: Run, newest: Path | None) -> None:
    """Check that a run may begin in its output folder (`require_place`). newest: the newest checkpoint there."""
    require_place(
        run.output_dir,
        newest is not None,
        resume=run.resume,
        evaluate_only=run.evaluate_only,
        weights=run.weights is not None,
    )
    if run.resume and not (newest or run.evaluate_only):
        # A run that was killed in its first epoch may never have had a checkpoint, so it begins again.
        if is_there(run.output_dir / WEIGHTS_NAME) or has_epochs(run.output_dir):
            raise CheckpointError(
                f"{run.output_dir} holds a run without its checkpoints, which would be written over: put one back, "
                f"choose another --output_dir, or delete {LOG_NAME} and {WEIGHTS_NAME} there to start anew"
            )
        say(f"no complete checkpoint in {run.checkpoints}: starting anew")


@contextmanager
def only_writer(folder: Path, alive: Callable[[], None] = lambda: None, most: float = inf) -> Iterator[None]:
    """Make an output folder and keep other runs out of it. Wait for a run that is still saving.

    alive: called during the wait, which takes at most WRITER_SECONDS and at most `most` seconds. Raises ConfigError if
    the folder cannot be written, or if another run goes on there. A file system without locks keeps no run out.
    """
    require_writable(folder)
    try:
        lock = open(folder / WRITER_NAME, "wb")
    except OSError as error:  # it may be another user's
        raise ConfigError(f"cannot write {error.filename} ({error.strerror}); choose another --output_dir") from None
    with lock:
        began = time.monotonic()
        while not locked(lock, wait=False):
            if time.monotonic() - began > min(most, WRITER_SECONDS):
                raise ConfigError(f"another run writes into {folder}; end it, or choose another --output_dir")
            if time.monotonic() - began < POLL_SECONDS:  # once
                say_fact("waiting", f"for another run that writes into {folder}")
            alive()
            time.sleep(POLL_SECONDS)
        yield


def begin_output(run: Run) -> None:
    """Write the run's JSON with every override, so that a run can start from it. Remove weights of an earlier end.

    Scripts rerun a command until there are weights, because only a run that has reached its end has them. Call this
    once a checkpoint to resume is known to be this run's. Raises ConfigError if the folder cannot be written.
    """
    try:
        write_json(run.output_dir / f"{run.plan.name}.json", run.plan.config)
        (run.output_dir / WEIGHTS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write into the output folder {run.output_dir} ({error.strerror})") from None


def require_writable(folder: Path) -> None:
    """Raise ConfigError if the output folder cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write into the output folder {folder} ({error.strerror}); choose another --output_dir"
        ) from None
