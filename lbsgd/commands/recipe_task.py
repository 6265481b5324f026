"""Refuse in one line what a recipe gives main in place of a task, before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lbsgd.errors import ConfigError
from lbsgd.report.measure import Measure

METHODS = "network", "loss", "evaluate"


def require_task(task: Any) -> None:
    """Raise ConfigError if this is no task (`train.task`) but, for example, the network or the task's class."""
    kind = type(task).__name__
    if isinstance(task, type):
        raise ConfigError(f"the recipe's task is the class {task.__name__}; give main an object, {task.__name__}()")
    for name in METHODS:
        if not callable(getattr(task, name, None)):
            raise ConfigError(
                f"the recipe's task is of type {kind}, which has no method {name}; give main an object with the methods"
                f" {', '.join(METHODS)}, such as ResNet50() in recipes/resnet50.py, whose network() returns the network"
            )
    counts, judged_by = getattr(task, "counts", None), getattr(task, "judged_by", None)
    if not is_sequence(counts, str):
        raise ConfigError(
            f'counts of the recipe\'s task {kind} is {counts!r}; give a tuple, as ("top1_error",), or () to count none'
        )
    if not judged_by or not is_sequence(judged_by, Measure):
        raise ConfigError(
            f"judged_by of the recipe's task {kind} is {judged_by!r}; give a tuple of Measure, such as CLASSIFIER of "
            "lbsgd.report.measure"
        )
    if not isinstance(getattr(task, "name", None), str):
        raise ConfigError(f'the recipe\'s task {kind} has no name for the log; give it one, as name = "resnet50"')


def require_maker(task_of: Any) -> None:
    """Raise ConfigError if this makes no task, because it is one itself or a network."""
    if not callable(task_of) or hasattr(task_of, "forward"):
        raise ConfigError(
            f"the recipe gives main a {type(task_of).__name__}; give the task's class, as recipes/mask_rcnn.py does"
        )


def is_sequence(value: object, of: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, of) for each in value)
