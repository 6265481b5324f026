"""Refuse in one line what a task's `loss` or `evaluate` returns in place of what `train.task` asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch

from lbsgd.errors import ConfigError
from lbsgd.train.task import Task

# What the trainer itself writes beside an evaluation's numbers, in the same line of the log.
OF_THE_TRAINER = frozenset(
    "kind epoch iteration lr train_loss seconds images_per_second skipped_iterations peak_memory_bytes"
    " peak_reserved_bytes".split()
)


def require_loss(returned: Any, task: Task) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return the loss and the counts of one pass. Raises ConfigError if they are not what `Task.loss` returns."""
    if complaint := about_pass(returned, task.counts):
        counts = f"a tuple of {len(task.counts)}: {', '.join(task.counts)}" if task.counts else "(), as it counts none"
        raise ConfigError(
            f"loss of the recipe's task {type(task).__name__} {complaint}; return two values: the mean loss of the "
            f"pass's images, and {counts}"
        )
    return returned


def about_pass(returned: Any, names: Sequence[str]) -> str | None:
    """Say what is wrong with a pass's loss and counts. No number is read from the device."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        return f"returned {described(returned)}"
    loss, counts = returned
    if not isinstance(loss, torch.Tensor) or loss.dim():
        return f"returned {described(loss)} as its loss, and not a tensor without dimensions"
    if not loss.requires_grad:
        return "returned a loss that does not depend on the weights, or was detached from them"
    if isinstance(counts, torch.Tensor) and counts.dim() == 1:
        counts = counts.unbind()
    if not isinstance(counts, (tuple, list)) or len(counts) != len(names):
        return f"returned {described(counts)} as its counts"
    for name, count in zip(names, counts, strict=True):
        if not isinstance(count, torch.Tensor) or count.dim():
            return f"counts {name} by {described(count)}, and not by a tensor without dimensions"
        if count.device != loss.device:
            return f"counts {name} on {count.device}, and its loss is on {loss.device}"
    return None


def require_evaluation(found: Any, task: Task) -> dict[str, Any]:
    """Return an evaluation's numbers. Raises ConfigError if they are not what `Task.evaluate` returns."""
    taken = OF_THE_TRAINER | {f"train_{name}_pct" for name in task.counts}
    if complaint := about_evaluation(found, [measure.key for measure in task.judged_by], taken):
        raise ConfigError(f"evaluate of the recipe's task {type(task).__name__} {complaint}")
    return dict(found)


def about_evaluation(found: Any, judged_by: Sequence[str], taken: Set[str]) -> str | None:
    """Say what is wrong with an evaluation that is judged by these keys. taken: keys of the trainer's own numbers."""
    if not isinstance(found, Mapping):
        return f"returned {described(found)}; return a dict of numbers, with the keys {', '.join(judged_by)}"
    if missing := [key for key in judged_by if key not in found]:
        return f"returned no {', '.join(missing)}, by which the run is judged; return it, or name others in judged_by"
    for key, value in found.items():
        if not isinstance(key, str):
            return f"returned the key {key!r}; give each number a name"
        if key in taken:
            return f"returned the key {key}, which the log has from the trainer; give that number another name"
        if key in (*judged_by, "val_loss") and not isinstance(value, (Real, type(None))) or not is_json(value):
            return f"returned {described(value)} as {key}; return a number, as with float() or tolist()"
    return None


def is_json(value: Any) -> bool:
    """Whether the log can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def described(value: Any) -> str:
    """Return the type of a value in words, with its shape or its number of values."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list, dict)):
        return f"a {kind} of {len(value)} values"
    return "None" if value is None else f"a value of type {kind}"
