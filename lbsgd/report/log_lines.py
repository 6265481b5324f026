"""Reads the lines of a run log, and checks the keys that readers need and the types of their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

from lbsgd.algorithm.schedule import ScalingRule
from lbsgd.config.keypath import get, is_number
from lbsgd.errors import DataError
from lbsgd.report.measure import Measure, measures_of

Record = dict[str, Any]
LOG_NAME = "log.jsonl"
LINES_AT_ONCE = 1000  # are parsed together

# The keys that readers of a log rely on: the report, the progress display and a resumed run.
KEYS = {
    "run": set("model precision global_batch num_workers iterations_per_epoch recipe schedule config".split()),
    "iteration": {"iteration", "epoch", "lr", "train_loss", "images_per_second", "data_wait_pct"},
    "epoch": {"epoch", "train_loss", "seconds"},
    "resume": {"iteration"},
    "result": set(),
}


class Kind(NamedTuple):
    """A type of values. words: how an error names a value of another type. holds: whether a value is of this type."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*names: str) -> Kind:
    return Kind(f"none of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def or_null(kind: Kind) -> Kind:
    return Kind(kind.words, lambda value: value is None or kind.holds(value))


NUMBER = Kind("no number", is_number)
POSITIVE = Kind("no number above 0", lambda value: is_number(value) and value > 0)
WHOLE = Kind("no whole number", lambda value: type(value) is int)
TEXT = Kind("no text", lambda value: isinstance(value, str))
SWITCH = Kind("neither true nor false", lambda value: isinstance(value, bool))
OBJECT = Kind("no object", lambda value: isinstance(value, dict))
LIST = Kind("no list", lambda value: isinstance(value, list))
TEXTS = Kind("no list of texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value))
NUMBERS = Kind("no list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value)))

# The values of the first line, by key path. A report needs all of them; a resumed run does not.
FIRST_LINE = {
    "model": TEXT,
    "precision": TEXT,
    "global_batch": POSITIVE,
    "num_workers": NUMBER,
    "iterations_per_epoch": POSITIVE,
    "recipe": OBJECT,
    "recipe.seed": WHOLE,
    "recipe.num_images": POSITIVE,
    "recipe.linear_scaling.rule": one_of(*get_args(ScalingRule)),
    "recipe.linear_scaling.base_lr": POSITIVE,
    "recipe.linear_scaling.base_batch": POSITIVE,
    "recipe.warmup.kind": one_of("none", "constant", "gradual"),
    "recipe.momentum.correction": SWITCH,
    "recipe.weight_decay.scaling": TEXT,
    "recipe.weight_decay.on_batch_norm": SWITCH,
    "recipe.batch_norm.per_worker_batch": POSITIVE,
    "recipe.batch_norm.scope": TEXT,
    "recipe.batch_norm.statistics": TEXT,
    "recipe.batch_norm.zero_last_gamma": SWITCH,
    "schedule": OBJECT,
    "schedule.base_lr": NUMBER,
    "schedule.reference_lr": NUMBER,
    "config": OBJECT,
    "config.optimizer": OBJECT,
}
# Optional values of the first line.
FURTHER = {
    "num_iterations": POSITIVE,
    "data": or_null(TEXT),
    "started_from": or_null(TEXT),
    "recipe.epochs": or_null(POSITIVE),
    "schedule.warmup_kind": one_of("none", "constant", "gradual"),
    "schedule.warmup_iterations": NUMBER,
    "schedule.decay_iterations": NUMBERS,
    "schedule.decay_factor": NUMBER,
    "config.optimizer.params": OBJECT,
    "classes": TEXTS,
    "environment": OBJECT,
    "environment.code": or_null(TEXT),
    "environment.script": or_null(TEXT),
    "environment.data": TEXT,
    "environment.packages": OBJECT,
    "environment.command": LIST,
}
TYPES = {**FIRST_LINE, **FURTHER}
# Numbers of the other lines, which are null where the value was NaN or infinite.
NUMBER_OR_NULL = or_null(NUMBER)
NUMBERS_OF_LINES = {
    **dict.fromkeys(("iteration", "epoch", "seconds"), NUMBER),
    **dict.fromkeys(("lr", "train_loss", "val_loss", "images_per_second", "data_wait_pct"), NUMBER_OR_NULL),
}
ABSENT = object()


class Expected:
    """Tells what each line of a log must have. measures: those that its first line names, read once for all lines."""

    def __init__(self, measures: Sequence[Measure] = ()):
        self.judged = {measure.key for measure in measures}
        self.trained = {measure.training for measure in measures if measure.training}
        self.numbers = NUMBERS_OF_LINES | dict.fromkeys(self.judged | self.trained, NUMBER_OR_NULL)

    def missing(self, record: Record) -> list[str]:
        """Return the keys that a record lacks. An epoch need not have an evaluation."""
        kind = record["kind"]
        keys = KEYS[kind]
        if kind == "run" and get(record, "recipe.epochs") is None:
            keys = keys | {"num_iterations"}
        elif kind == "epoch":
            keys = keys | self.trained
        if kind == "result" or (kind == "epoch" and self.judged & record.keys()):
            keys = keys | self.judged
        return sorted(keys - record.keys())

    def mistyped(self, record: Record) -> list[str]:
        """Return in words what is wrong with the values of a line after the first one."""
        numbers = self.numbers
        found = [(key, kind.words) for key in record if (kind := numbers.get(key)) and not kind.holds(record[key])]
        return _in_words(found)


def missing_leaves(header: Record) -> list[str]:
    """Return the key paths that a report needs and that a first line lacks."""
    return [path for path in FIRST_LINE if get(header, path, ABSENT) is ABSENT]


def mistyped_leaves(header: Record) -> list[str]:
    """Return in words what is wrong with the values of a first line."""
    values = {path: get(header, path, ABSENT) for path in TYPES}
    wrong = [path for path, value in values.items() if value is not ABSENT and not TYPES[path].holds(value)]
    found = [(path, TYPES[path].words) for path in wrong]
    try:
        measures = measures_of(header)
    except (TypeError, AttributeError):
        measures = ()
    named = all(measure.key and isinstance(measure.key, str) for measure in measures)
    if not measures or not named or not all(isinstance(measure.training, str | None) for measure in measures):
        found.append(("judged_by", "no list of measures"))
    return _in_words(found)


def _in_words(found: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{path}, which is {words}" for path, words in sorted(found)]


def read_records(path: Path) -> list[Record]:
    """Return the records of a log. Raises DataError with the number of a wrong line, or caused by an OSError."""
    try:
        with open(path, "rb") as file:
            records = records_of(file, path)
    except FileNotFoundError:
        raise DataError(f"no run log at {path}: give the folder of a run, which holds {LOG_NAME}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not records:
        raise DataError(f"{path}, line 1: not a run log: no complete line")
    return records


def records_of(file: BinaryIO, path: Path) -> list[Record]:
    """Return the records of an open log. Raises DataError with the number of a wrong line."""
    records: list[Record] = []
    expected: Expected | None = None
    while lines := list(islice(file, LINES_AT_ONCE)):
        values = values_of(lines)
        for line in lines:
            try:
                records.append(record_of(next(values), expected))
            except ValueError as error:
                if not line.endswith(b"\n"):  # the last line, cut short by a kill
                    return records
                raise DataError(f"{path}, line {len(records) + 1}: not a run log: {error}") from error
            expected = expected or Expected(measures_of(records[0]))
    return records


def values_of(lines: Sequence[bytes]) -> Iterator[Any]:
    """Yield the value of each line. Raises ValueError at the first line that is not strict JSON.

    Lines are parsed together if possible. Records then share their keys, which halves their memory.
    """
    together: list[Any] = []
    with suppress(ValueError, RecursionError):
        together = json.loads(b"[" + b",".join(lines) + b"]", parse_constant=not_strict)
    if len(together) == len(lines):
        yield from together
        return
    for line in lines:
        try:
            value = json.loads(line, parse_constant=not_strict)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        yield value


def record_of(record: Any, expected: Expected | None) -> Record:
    """Return a line's value if it is a record; expected is None for the first line. Raises ValueError otherwise."""
    if not isinstance(record, dict) or record.get("kind") not in list(KEYS):
        raise ValueError(f"not an object of kind {', '.join(KEYS)}")
    if (expected is None) != (record["kind"] == "run"):
        raise ValueError("the first line, and only it, is of kind run")
    if wrong := expected.mistyped(record) if expected else mistyped_leaves(record):
        raise ValueError(f"{record['kind']} with {', '.join(wrong)}")
    if missing := (expected or Expected()).missing(record):
        raise ValueError(f"{record['kind']} without {', '.join(missing)}")
    return record


def not_strict(constant: str) -> None:
    """Refuse NaN and infinity, which Python's json accepts."""
    raise ValueError(constant)
