"""Rules about the scheduler block: which scheduler it names, and what its warmup really does (Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import takes
from lbsgd.config.checks.deepspeed_keys import in_another_case, nearest
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_count, is_number, shown

TYPE, PARAMS = "scheduler.type", "scheduler.params"
WARMUPS = frozenset("WarmupLR WarmupDecayLR WarmupCosineLR".split())


def warmup_of(json: Document) -> str | None:
    """Return the scheduler's type where it is one of DeepSpeed's warmups."""
    kind = json.get(TYPE)
    return kind if isinstance(kind, str) and kind in WARMUPS else None


@rule(
    "D09",
    "a scheduler other than WarmupLR",
    lbsgd="error",
    why="WarmupLR is the one scheduler of DeepSpeed that can say gradual warmup (Sec. 2.2). lbsgd extends it by "
    "the decay of Sec. 5.1; plain DeepSpeed still warms up with the same file.",
    fix='use "WarmupLR", which lbsgd extends',
    example={"scheduler": {"type": "WarmupDecayLR"}},
)
def other_scheduler(json: Document) -> Iterator[Hit]:
    if json.get(TYPE) != "WarmupLR":
        yield Hit(TYPE, f"is {shown(json.get(TYPE))}")


@rule(
    "D48",
    "a scheduler that DeepSpeed does not know",
    plain="error",
    why="DeepSpeed looks the type up among its own five schedulers, then in torch.optim.lr_scheduler, letter for "
    "letter. Anything else fails at the start.",
    fix="name one that DeepSpeed knows",
    example={"scheduler": {"type": "WarmupLr", "params": {}}},
)
def unknown_scheduler(json: Document) -> Iterator[Hit]:
    kind = json.get(TYPE)
    if kind is not None and kind != "auto" and json.accepted.scheduler(kind) is None:
        known = [*json.accepted.schedulers, *json.accepted.torch_schedulers]
        meant = in_another_case(kind, known)
        fix = f"did you mean {meant}?" if meant else nearest(str(kind), frozenset(known))
        yield Hit(TYPE, f"is {shown(kind)}, which DeepSpeed does not know", fix, {TYPE: meant} if meant else None)


@rule(
    "D47",
    "torch's scheduler on a wrapped optimizer",
    plain="error",
    why="ZeRO, fp16 and bf16 wrap the optimizer in a class that torch's schedulers do not accept: they raise a "
    "TypeError.",
    fix="build it in your program from a callable, such as lr_scheduler=lambda optimizer: StepLR(optimizer, 30)",
    example={"bf16": {"enabled": True}, "scheduler": {"type": "StepLR", "params": {"step_size": 30}}},
)
def torch_scheduler_on_wrapped_optimizer(json: Document) -> Iterator[Hit]:
    kind, wrapped = json.get(TYPE), json.stage or json.enabled("fp16") or json.enabled("bf16")
    known = isinstance(kind, str) and kind not in json.accepted.schedulers and kind in json.accepted.torch_schedulers
    if wrapped and known:
        yield Hit(TYPE, f"is torch's {kind}, which fails on the optimizer that ZeRO, fp16 and bf16 wrap")


@rule(
    "D45",
    "a scheduler without its parameters",
    plain="error",
    why="DeepSpeed passes scheduler.params to the scheduler's constructor. Without the block, or without "
    "total_num_steps for a warmup that decays, or the length of a OneCycleLR, the start ends in an error.",
    fix="give the parameters that the scheduler needs",
    example={"scheduler": {"type": "OneCycle"}},
)
def missing_parameters(json: Document) -> Iterator[Hit]:
    kind = json.get(TYPE)
    entry = json.accepted.scheduler(kind)
    needed = sorted(set(entry["required"]) - set(json.block(PARAMS))) if entry else []
    ways = entry.get("either", ()) if entry else ()
    if kind is not None and not isinstance(json.get(PARAMS), dict):
        correction: dict[str, Any] = {PARAMS: {}}
        missing = not needed and json.get(PARAMS) is None
        said = "is no block, which ends in a TypeError"
        yield Hit(PARAMS, said, "give {} at least", correction if missing else None)
    elif needed:
        yield Hit(f"{PARAMS}.{needed[0]}", f"is missing, and {kind} needs {' and '.join(needed)}")
    elif ways and not any(all(json.get(f"{PARAMS}.{name}") is not None for name in way) for way in ways):
        wanted = ", or ".join(" and ".join(way) for way in ways)
        yield Hit(f"{PARAMS}.{ways[0][0]}", f"is missing, and {kind} needs {wanted}")


@rule(
    "D26",
    "a parameter that the scheduler does not have",
    lbsgd="error",
    plain="error",
    why="DeepSpeed passes scheduler.params to the scheduler's constructor, which raises a TypeError for an "
    "unknown name.",
    fix="correct its spelling, or delete it",
    example={"scheduler": {"params": {"warmup_typ": "linear"}}},
)
def unknown_parameter(json: Document) -> Iterator[Hit]:
    kind, params = json.get(TYPE), json.block(PARAMS)
    entry = json.accepted.scheduler(kind)
    if entry is None:
        return
    known = frozenset(entry["params"])
    if unknown := sorted(set(params) - known):
        fix = nearest(unknown[0], known) if len(unknown) == 1 else f"known are {', '.join(sorted(known))}"
        yield Hit(PARAMS, f"has {', '.join(map(shown, unknown))}, unknown to {kind}", fix)


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
    """Return after how many steps log(t+1)/log(W) is a half: √W, as 32 of 1000."""
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
    "a warmup of no whole number of steps",
    plain="error",
    why="DeepSpeed 0.19 raises a ValueError for anything but a positive whole number, 5.0 included; it takes true for "
    "1. Earlier versions take any number.",
    fix="give a whole number, or delete the scheduler",
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
        yield Hit(key, f"is {shown(steps)}, and DeepSpeed wants a whole number", correction=whole)


@rule(
    "D44",
    "a learning rate that the scheduler replaces",
    plain="warning",
    why="A warmup of DeepSpeed sets the learning rate in every iteration and ends at warmup_max_lr. The "
    "optimizer's own lr is read by people only.",
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
    key, kind = "optimizer.params.lr", warmup_of(json)
    lr, most = json.get(key), json.get(f"{PARAMS}.warmup_max_lr")
    if kind and kind != "WarmupCosineLR" and is_number(most) and is_number(lr) and most != lr:
        yield Hit(key, f"is {lr:g}, a dead number: the scheduler goes to {most:g}", correction={key: most})


RULES = (
    other_scheduler,
    unknown_scheduler,
    torch_scheduler_on_wrapped_optimizer,
    missing_parameters,
    unknown_parameter,
    other_ramp,
    warmup_from_zero,
    warmup_steps,
    replaced_learning_rate,
)
