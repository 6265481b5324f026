"""Rules about the scheduler block: which scheduler it names, and with which parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.checks.deepspeed_keys import in_another_case, nearest, similar
from lbsgd.config.checks.elsewhere import SCHEDULERS
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown, stated

TYPE, PARAMS = "scheduler.type", "scheduler.params"


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
        yield Hit(TYPE, stated(json.get(TYPE)), correction=None if json.get(TYPE) else {TYPE: "WarmupLR"})


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
    if kind is not None and kind != "auto" and json.scheduler_entry is None:
        known = [*json.accepted.schedulers, *json.accepted.torch_schedulers]
        meant = in_another_case(kind, known)
        near, named = meant or similar(str(kind), frozenset(known)), SCHEDULERS.get(str(kind))
        fix = f"use {named}" if named else f"did you mean {near}?" if near else None
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
    kind, wrapped = json.get(TYPE), json.stage or json.weights != "fp32"
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
    kind, entry = json.get(TYPE), json.scheduler_entry
    needed = sorted(set(entry["required"]) - set(json.block(PARAMS))) if entry else []
    ways = entry.get("either", ()) if entry else ()
    if kind is not None and not isinstance(json.get(PARAMS), dict):
        correction: dict[str, Any] | None = {PARAMS: {}} if json.get(PARAMS) is None and not needed else None
        yield Hit(PARAMS, "is no block, which ends in a TypeError", "give {} at least", correction)
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
    entry = json.scheduler_entry
    if entry is None:
        return
    known = frozenset(entry["params"])
    if unknown := sorted(set(json.block(PARAMS)) - known):
        fix = nearest(unknown[0], known) if len(unknown) == 1 else f"known are {', '.join(sorted(known))}"
        yield Hit(PARAMS, f"has {', '.join(map(shown, unknown))}, unknown to {json.get(TYPE)}", fix)
