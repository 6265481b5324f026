"""Rules about DeepSpeed's warmups: their actual ramps and learning rates (Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import takes
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import LR, is_count, is_number, shown

SCHEDULER_TYPE, PARAMS = "scheduler.type", "scheduler.params"
ENDING_AT_A_RATE = ("WarmupLR", "WarmupDecayLR")  # their own; WarmupCosineLR ends at the optimizer's
HIGHEST = {"OneCycle": "cycle_max_lr", "OneCycleLR": "max_lr", "CyclicLR": "max_lr"} | dict.fromkeys(
    ENDING_AT_A_RATE, "warmup_max_lr"
)
DEFAULT_HIGHEST = 0.001  # WarmupDecayLR's, and WarmupLR's before 0.17
A_FEW = 10  # updates
WARMUPS = frozenset("WarmupLR WarmupDecayLR WarmupCosineLR".split())


def warmup_of(json: Document) -> str | None:
    """Return the scheduler's type if it is one of DeepSpeed's warmups, else None."""
    kind = json.get(SCHEDULER_TYPE)
    return kind if isinstance(kind, str) and kind in WARMUPS else None


def highest_rate(json: Document) -> tuple[str, Any]:
    """Return the key and the value of a run's highest learning rate: the scheduler's, or the optimizer's."""
    kind = json.get(SCHEDULER_TYPE)
    key = f"{PARAMS}.{HIGHEST[kind]}" if isinstance(kind, str) and kind in HIGHEST else LR
    if json.get(key) == "auto":  # Hugging Face's libraries fill in the optimizer's rate
        return LR, json.get(LR)
    if json.get(key) is None and kind in ENDING_AT_A_RATE:
        return (LR, json.get(LR)) if kind == "WarmupLR" and json.since("0.17") else (key, DEFAULT_HIGHEST)
    return key, json.get(key)


@rule(
    "D10",
    "a warmup that is not linear",
    lbsgd="error",
    plain="warning",
    why="Gradual warmup raises the learning rate by the same amount in every iteration (Sec. 2.2). DeepSpeed's "
    "default is logarithmic: it reaches half of the rise after the square root of the steps, 32 of 1000.",
    fix='set it to "linear" (Sec. 2.2)',
    example={"scheduler": {"params": {"warmup_type": None}}},
)
def other_ramp(json: Document) -> Iterator[Hit]:
    params = json.block(PARAMS)
    ramp, steps = params.get("warmup_type"), params.get("warmup_num_steps", 1000)
    if not warmup_of(json) or ramp == "linear" or (json.plain and ramp in ("log", "auto")):
        return
    if json.plain and ramp is not None:
        said = f"is {shown(ramp)}, and DeepSpeed takes log"
    else:
        said = "is not set, and DeepSpeed's default is logarithmic" if ramp is None else f"is {shown(ramp)}"
    said += f": half of the ramp after {halfway(steps)} steps"
    yield Hit(f"{PARAMS}.warmup_type", said, correction={f"{PARAMS}.warmup_type": "linear"})


def halfway(steps: Any) -> str:
    """Return the number of steps after which log(t+1)/log(W) is a half: √W, such as 32 of 1000."""
    return f"{round(steps**0.5)} of {steps}" if is_count(steps) else "a few"


@rule(
    "D43",
    "a warmup that starts at 0",
    plain="warning",
    why="DeepSpeed's warmups use their first value twice. Where it is 0, which is the default, the first two "
    "updates move nothing. The very first update of WarmupCosineLR has the learning rate 0 in any case.",
    fix="give the learning rate of a small batch (Sec. 2.2), for WarmupCosineLR as a ratio to the optimizer's",
    example={"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_max_lr": 0.1}}},
)
def warmup_from_zero(json: Document) -> Iterator[Hit]:
    kind = warmup_of(json)
    name = "warmup_min_ratio" if kind == "WarmupCosineLR" else "warmup_min_lr"
    if kind and json.block(PARAMS).get(name, 0) == 0:
        said = "is 0, and DeepSpeed takes the first value twice: the first two updates move nothing"
        yield Hit(f"{PARAMS}.{name}", said)


@rule(
    "D46",
    "a warmup that is not a whole number of steps",
    plain="error",
    why="DeepSpeed 0.19 raises a ValueError for anything but a positive whole number, 5.0 included; it takes true for "
    "1. Earlier versions take any number.",
    fix="give a positive whole number, or delete the scheduler",
    example={
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.01, "warmup_num_steps": 5.0, "warmup_type": "linear"},
        }
    },
)
def warmup_steps(json: Document) -> Iterator[Hit]:
    key, entry = f"{PARAMS}.warmup_num_steps", json.accepted.scheduler(warmup_of(json))
    steps = json.get(key, 1000)
    if entry and steps != "auto" and not takes(entry["params"]["warmup_num_steps"], steps):
        whole = {key: int(steps)} if is_number(steps) and steps >= 1 and steps == int(steps) else None
        yield Hit(key, f"is {shown(steps)}, and DeepSpeed wants a positive whole number", correction=whole)


@rule(
    "D38",
    "a warmup of a few updates",
    plain="note",
    why="DeepSpeed counts a warmup in updates. The paper's takes 5 epochs (Sec. 2.2), which are 780 updates of 8192 "
    "images on ImageNet.",
    fix="if epochs are meant, give warmup epochs * images / train_batch_size",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 5, "warmup_type": "linear"},
        },
    },
)
def short_warmup(json: Document) -> Iterator[Hit]:
    steps = json.get(f"{PARAMS}.warmup_num_steps")
    if warmup_of(json) and is_count(steps) and 1 < steps <= A_FEW:
        yield Hit(f"{PARAMS}.warmup_num_steps", f"is {steps}, and a step is one update, not an epoch")


@rule(
    "D68",
    "a warmup that goes down",
    plain="warning",
    why="Warmup starts with a smaller learning rate than it ends with, because the weights change fastest at the start "
    "(Sec. 2.2). From warmup_min_lr above warmup_max_lr DeepSpeed goes down without a word.",
    fix="exchange the two",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 0.01, "warmup_type": "linear"},
        },
    },
)
def falling_warmup(json: Document) -> Iterator[Hit]:
    key, least, (where, most) = f"{PARAMS}.warmup_min_lr", json.get(f"{PARAMS}.warmup_min_lr"), highest_rate(json)
    if json.get(SCHEDULER_TYPE) in ENDING_AT_A_RATE and is_number(least) and is_number(most) and least > most:
        yield Hit(key, f"is {least:g}, above {where}, which is {most:g}: the learning rate falls during warmup")


@rule(
    "D44",
    "a learning rate that the scheduler replaces",
    plain="warning",
    why="A warmup of DeepSpeed sets the learning rate in every iteration and ends at warmup_max_lr. If that is left "
    "out, WarmupDecayLR ends at 0.001. So does WarmupLR before 0.17; since then it ends at the optimizer's lr. In all "
    "other cases the optimizer's own lr has no effect.",
    fix="make the two the same",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.4, "warmup_type": "linear"},
        },
    },
)
def replaced_learning_rate(json: Document) -> Iterator[Hit]:
    lr, (where, most) = json.get(LR), highest_rate(json)
    if json.get(SCHEDULER_TYPE) in ENDING_AT_A_RATE and is_number(most) and is_number(lr) and most != lr:
        left_out = ", its default" if json.get(where) is None else ""
        fix = f"give scheduler.params.warmup_max_lr: {lr:g}" if left_out else None
        yield Hit(LR, f"is {lr:g}, a dead number: the scheduler goes to {most:g}{left_out}", fix)


@rule(
    "D58",
    "a warmup that outlasts its schedule",
    plain="warning",
    why="WarmupDecayLR and WarmupCosineLR count the warmup (1000 steps if warmup_num_steps is left out) into "
    "total_num_steps. If the warmup takes all of these steps, a run of that length ends within its warmup. After that "
    "there is no decay: the learning rate drops at once to its last value, 0 or the smallest of the cosine.",
    fix="give the number of updates of the whole run",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 500, "warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_type": "linear"},
        },
    },
)
def endless_warmup(json: Document) -> Iterator[Hit]:
    key = f"{PARAMS}.total_num_steps"
    total, steps = json.get(key), json.get(f"{PARAMS}.warmup_num_steps", 1000)
    if json.get(SCHEDULER_TYPE) in ("WarmupDecayLR", "WarmupCosineLR") and is_number(total) and is_number(steps):
        if total <= steps:
            yield Hit(key, f"is {total:g}, and the warmup alone takes {steps:g} steps")
