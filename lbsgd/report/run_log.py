"""The run log: its writer and its reader. `log.jsonl` in the run's folder is data; tables and curves are made from it.

Strict JSON, one object a line, told apart by `kind`; the keys named in `KEYS` are always there, others may be:

    {"kind": "run", "model": "resnet50", "global_batch": 8192, ..., "environment": {...}}    the first line, only it
    {"kind": "iteration", "iteration": 0, "epoch": 0.0, "lr": 0.1, "train_loss": 6.91, ...}
    {"kind": "epoch", "epoch": 1, "train_top1_error_pct": 97.1, "val_top1_error_pct": 93.5, ...}
    {"kind": "resume", "iteration": 156, ...}    the run went on from a checkpoint; later lines were written after it
    {"kind": "result", "val_top1_error_pct": 23.74, ...}    the last line of a run that reached its end
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError, DataError

LOG_NAME = "log.jsonl"

# What the readers of a log rely on: the report, the progress display and a resumed run.
KEYS = {
    "run": {
        "model",
        "precision",
        "global_batch",
        "num_workers",
        "iterations_per_epoch",
        "recipe",
        "schedule",
        "config",
    },
    "iteration": {"iteration", "epoch", "lr", "train_loss", "images_per_second", "data_wait_pct"},
    "epoch": {"epoch", "train_loss", "train_top1_error_pct", "val_top1_error_pct", "seconds"},
    "resume": {"iteration"},
    "result": {"val_top1_error_pct"},
}


def final_error(epochs: list[dict], key: str = "val_top1_error_pct") -> float | None:
    """A run's error in %: the median of its last 5 epochs (Sec. 5.1), of all while they are fewer; None without any."""
    return median(epoch[key] for epoch in epochs[-5:]) if epochs else None


class RunLog:
    """Writes the log of one run; only rank 0 makes one.

    run                 {"model": its name, **plan.as_dict(), "environment": {...}}
    resume_iteration    iterations already done in the checkpoint; None begins a new log

    A resumed log keeps what happened before that iteration and drops what is done again, so an interrupted run reads as
    one run. `epochs` holds the epoch records so far, those before the interruption included.
    Raises ConfigError for a folder that cannot be written or already holds a run, DataError for a broken log.
    """

    def __init__(self, folder: str | Path, run: dict, resume_iteration: int | None = None):
        self.path = Path(folder) / LOG_NAME
        self.epochs: list[dict] = []
        if resume_iteration is None and self.path.exists():
            raise ConfigError(f"{folder} already holds a run: continue it with --resume or choose another --output_dir")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._begin(run, resume_iteration)
            self._file = open(self.path, "ab")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error

    def iteration(self, record: dict) -> None:
        self._write("iteration", record)

    def epoch(self, record: dict) -> None:
        self.epochs.append(record)
        self._write("epoch", record)

    def result(self, record: dict | None = None) -> dict:
        """Write the last line, the run's final error and what `record` adds to it, and return it."""
        result = {"val_top1_error_pct": final_error(self.epochs), **(record or {})}
        self._write("result", result)
        return result

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _begin(self, run: dict, resume_iteration: int | None) -> None:
        """Put the lines that stand before the first new record in place, all at once."""
        records = [{"kind": "run", **run}]
        if resume_iteration is not None:
            # Without a log (lost, or another folder than before) a checkpoint is still good: the log begins there.
            if self.path.exists():
                records = _happened_before(resume_iteration, _read(self.path))
            self.epochs = [record for record in records if record["kind"] == "epoch"]
            records.append({"kind": "resume", **run, "iteration": resume_iteration})
        replace_file(self.path, b"".join(map(_line, records)))

    def _write(self, kind: str, record: dict) -> None:
        # A whole line, then flush: one write(), so that a killed run leaves at most its last line incomplete.
        self._file.write(_line({"kind": kind, **record}))
        self._file.flush()


@dataclass(frozen=True)
class Run:
    """A run as its log tells it; `result` is None until the run has reached its end."""

    path: Path
    run: dict
    iterations: list[dict]
    epochs: list[dict]
    result: dict | None


def read_run(path: str | Path) -> Run:
    """Read a log, given as its file or as the run's folder; a last line cut short by a kill is left out.

    Raises DataError when nothing is there, or, with the line's number, when a line is not a run log's.
    """
    path = Path(path)
    path = path / LOG_NAME if path.is_dir() else path
    records = _read(path)
    by_kind = {kind: [record for record in records if record["kind"] == kind] for kind in KEYS}
    result = by_kind["result"][-1] if by_kind["result"] else None
    return Run(path, records[0], by_kind["iteration"], by_kind["epoch"], result)


def _line(record: dict) -> bytes:
    missing = KEYS[record["kind"]] - record.keys()
    assert not missing, f"{record['kind']} record without {sorted(missing)}"
    return json.dumps(_strict(record), allow_nan=False).encode() + b"\n"


def _strict(value):
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _happened_before(iteration: int, records: list[dict]) -> list[dict]:
    """The records of what was over once `iteration` updates were done; a result never is, for the run now goes on."""
    per_epoch = records[0]["iterations_per_epoch"]
    over_at = {
        "run": lambda record: 0,
        "iteration": lambda record: record["iteration"] + 1,
        "epoch": lambda record: record["epoch"] * per_epoch + 1,  # a run that goes on from there evaluates again
        "resume": lambda record: record["iteration"],
        "result": lambda record: math.inf,
    }
    return [record for record in records if over_at[record["kind"]](record) <= iteration]


def _read(path: Path) -> list[dict]:
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except FileNotFoundError:
        raise DataError(f"no run log at {path}: give the folder of a run, which holds {LOG_NAME}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line, is_first=number == 1))
        except ValueError as error:
            if not line.endswith(b"\n"):  # the last line, cut short when the run was killed
                break
            raise DataError(f"{path}, line {number}: not a run log: {error}") from error
    if not records:
        raise DataError(f"{path}, line 1: not a run log: no complete line")
    return records


def _record(line: bytes, is_first: bool) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or record.get("kind") not in list(KEYS):
        raise ValueError(f"not an object of kind {', '.join(KEYS)}")
    if is_first != (record["kind"] == "run"):
        raise ValueError("the first line, and only it, is of kind run")
    if missing := KEYS[record["kind"]] - record.keys():
        raise ValueError(f"{record['kind']} without {', '.join(sorted(missing))}")
    return record
