"""Copies the logs behind the published numbers to results/, with thinned iteration records and else unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbsgd.disk import alone_in, exists, replace_file
from lbsgd.errors import DataError
from lbsgd.report.run_log import DIVERGED, LOG_NAME

MOST_BYTES = 50_000


def collect(folder: Path, destination: Path) -> None:
    """Copy a run's log with thinned iteration records. Raises DataError if it cannot be read or written."""
    try:
        kept = thinned((folder / LOG_NAME).read_bytes().splitlines(keepends=True))
        destination.mkdir(parents=True, exist_ok=True)
        with alone_in(destination):  # another grid may publish the same run
            if exists(folder / DIVERGED):  # the log comes last, because a kill must leave no log without its end
                replace_file(destination / DIVERGED, (folder / DIVERGED).read_bytes())
            replace_file(destination / LOG_NAME, b"".join(kept))
    except OSError as error:
        raise DataError(f"{folder} cannot be published in {destination}: {error.strerror}") from None


def bring_back(published: Path, folder: Path) -> None:
    """Copy a run's published log to the grid's folder, so that a run that ended elsewhere counts as done here."""
    if exists(folder / LOG_NAME):
        return  # keep this machine's log, which is not thinned
    for name in (DIVERGED, LOG_NAME):  # in the order of `collect`
        if exists(published / name):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, (published / name).read_bytes())


def thinned(lines: list[bytes]) -> list[bytes]:
    """Return the lines of a log, but of the iterations only the first of each epoch, or of fewer epochs, or none.

    The lines have at most MOST_BYTES in total, unless the other records alone have more. A `resume` keeps only what
    differs from the first line. A last line that a kill cut short is left out.
    """
    lines = [line for line in lines if line.endswith(b"\n")]
    kinds = [json.loads(line) for line in lines]
    lines = [short_resume(line, record, kinds[0]) for line, record in zip(lines, kinds, strict=True)]
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
    return [line for line, record in zip(lines, kinds, strict=True) if record["kind"] != "iteration"]


def short_resume(line: bytes, record: dict[str, Any], header: dict[str, Any]) -> bytes:
    if record["kind"] != "resume":
        return line
    new = {key: value for key, value in record.items() if header.get(key) != value}
    return json.dumps(new).encode() + b"\n"
