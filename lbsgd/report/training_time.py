"""How long a run has trained, and on how many processes."""

from __future__ import annotations

from lbsgd.report.run_log import LoggedRun
from lbsgd.units import clock


def training_time(run: LoggedRun) -> str | None:
    """Return `1:02:05`, the sum of `seconds` over the epochs; None if epochs are missing, and for a simulation.

    `seconds` includes an epoch's updates, its waits for images and for the loader's start, and its waits for
    checkpoints. It excludes evaluations, the start of processes, the time between a stop and --resume, and lost work.
    """
    if len(run.epochs) < max(1, run.epochs_done) or any("simulated_time" in record for record in run.epochs):
        return None
    return clock(sum(record["seconds"] for record in run.epochs), with_hours=True)


def processes(run: LoggedRun) -> str | None:
    """Return `8`, or `4 to 8` for a run that was resumed on another number; None if the log does not tell."""
    # A published log's resume has only what differs from the first line.
    found = [record.get("world_size") for record in (run.header, *run.resumes)]
    sizes = [size for size in found if type(size) is int]
    return " to ".join(map(str, sorted({min(sizes), max(sizes)}))) if sizes else None


def trained_for(run: LoggedRun) -> str | None:
    """Return `1:02:05 on 8 processes`; None if the time is not known."""
    time, on = training_time(run), processes(run)
    if time is None or on is None:
        return time
    return f"{time} on {on} process{'es' * (on != '1')}"
