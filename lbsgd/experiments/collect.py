"""The logs behind the published numbers: copied to results/ with their iteration records thinned, else unchanged."""

from __future__ import annotations

import json
from pathlib import Path

from lbsgd.disk import replace_file
from lbsgd.errors import DataError
from lbsgd.experiments.launch import DIVERGED
from lbsgd.report.run_log import LOG_NAME

MOST_BYTES = 50_000


def collect(folder: Path, destination: Path) -> None:
    """Copy a run's log, its iteration records thinned to one an epoch and to at most MOST_BYTES in all.

    Raises DataError where even the other records are larger.
    """
    lines = (folder / LOG_NAME).read_bytes().splitlines(keepends=True)
    kept = thinned(lines)
    destination.mkdir(parents=True, exist_ok=True)
    replace_file(destination / LOG_NAME, b"".join(kept))
    if (folder / DIVERGED).exists():
        replace_file(destination / DIVERGED, (folder / DIVERGED).read_bytes())


def bring_back(published: Path, folder: Path) -> None:
    """Copy a run's published log to where the grid looks for it, so that what ended on another machine is done here."""
    if (folder / LOG_NAME).exists():
        return  # the whole log of this machine
    for name in (LOG_NAME, DIVERGED):
        if (published / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, (published / name).read_bytes())


def thinned(lines: list[bytes]) -> list[bytes]:
    """Return the lines of a log, of the iterations the first of each epoch, or of fewer epochs where they are many."""
    kinds = [json.loads(line) for line in lines]
    others = sum(len(line) for line, record in zip(lines, kinds, strict=True) if record["kind"] != "iteration")
    if others > MOST_BYTES:
        raise DataError(
            f"a log of {others} bytes without its iterations is more than {MOST_BYTES}; publish it elsewhere"
        )
    for every in (1, 2, 5, 10, 20, 50, 100, 10**9):
        kept, seen = [], set()
        for line, record in zip(lines, kinds, strict=True):
            if record["kind"] == "iteration":
                epoch = int(record["epoch"])
                if epoch in seen or epoch % every:
                    continue
                seen.add(epoch)
            kept.append(line)
        if sum(map(len, kept)) <= MOST_BYTES:
            return kept
    return kept
