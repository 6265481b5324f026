"""Rules about single values: what one version of DeepSpeed takes for a key, by its own types or by trials."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lbsgd.config.accepted.schema import NEWEST, Entry
from lbsgd.config.accepted.schema import accepted as accepted_by
from lbsgd.config.accepted.values import is_untried, model_refusals, takes
from lbsgd.config.checks.deepspeed_beside import is_taken_beside, moves_without_rate, refused_beside
from lbsgd.config.checks.deepspeed_keys import block_names, nearest, similar
from lbsgd.config.checks.deepspeed_later import refused_later
from lbsgd.config.checks.deepspeed_warmup import ENDING_AT_A_RATE
from lbsgd.config.checks.elsewhere import ARGUMENTS
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_number, put, shown

WHOLE = "elasticity."  # its keys are right only together, so no key was tried alone
OTHER_RULES = frozenset(  # keys with their own rule
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps zero_optimization.stage "
    "scheduler.params.warmup_num_steps data_types.grad_accum_dtype data_types.param_dtype".split()
)
BESIDE_BLOCK = frozenset(  # keys with their own rule in a file with an lbsgd block
    "optimizer.params.lr optimizer.params.momentum optimizer.params.weight_decay optimizer.params.nesterov "
    "scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr gradient_predivide_factor".split()
)
OF_MUON = frozenset(
    "lr muon_lr adam_lr momentum weight_decay ns_method betas eps "
    "adam_w_mode torch_adam foreach fp32_optimizer_states".split()
)
MULTIPLYING = tuple(  # schedulers that multiply the optimizer's learning rate by a factor
    "WarmupCosineLR StepLR MultiStepLR ExponentialLR LinearLR ConstantLR PolynomialLR ReduceLROnPlateau".split()
)


@rule(
    "D70",
    "a value that DeepSpeed refuses",
    lbsgd="error",
    plain="error",
    why="DeepSpeed checks the type and the range of this value, or fails when it calculates with it: a text in the "
    "place of a number, for instance, ends in a TypeError, at the start or in the first update.",
    fix="give a value of the right type and range",
    example={"zero_optimization": {"allgather_bucket_size": "big"}},
)
def refused_value(json: Document) -> Iterator[Hit]:
    for key, why in refused_values(json):
        if key not in OTHER_RULES and (json.plain or key not in BESIDE_BLOCK):
            yield Hit(key, why, None, number_in_text(json, key))


def refused_values(json: Document) -> Iterator[tuple[str, str]]:
    """Yield the key path of each value that DeepSpeed refuses, and why."""
    yield from refused_by_models(json)
    yield from refused_in_trials(json)
    yield from refused_beside(json)
    yield from refused_later(json)
    yield from refused_arguments(json, "optimizer", json.optimizer_entry)
    yield from refused_arguments(json, "scheduler", json.scheduler_entry)


def refused_by_models(json: Document) -> Iterator[tuple[str, str]]:
    """Yield each value that DeepSpeed's own models of its blocks refuse, and why."""
    for name, model in json.accepted.blocks.items():
        for path, why in model_refusals(json.accepted.models, model, json.block(name)):
            yield f"{name}.{path}", why


def refused_in_trials(json: Document) -> Iterator[tuple[str, str]]:
    """Yield each value that DeepSpeed refused when its key was tried alone, and why."""
    keys = json.accepted.keys
    features = {key for key in accepted_by(NEWEST).removed if isinstance(json.get(key), dict)}  # not tried key by key
    for key in features & keys.keys():
        if not takes(keys[key], {}) and "enabled" not in json.block(key):
            yield key, f"is {shown(json.get(key))}, and DeepSpeed wants its enabled"
    untried = features.union(block_names(json))  # D29 judges blocks
    for key, description in keys.items():
        value = json.get(key, "auto")
        judged = value != "auto" and key not in untried and not key.startswith(WHOLE) and not is_taken_beside(json, key)
        if judged and not (takes(description, value) or is_untried(description, value)):
            yield key, f"is {shown(value)}, which DeepSpeed does not take"


def refused_arguments(json: Document, block: str, entry: Entry | None) -> Iterator[tuple[str, str]]:
    """Yield the arguments that the optimizer or the scheduler of a block refuses."""
    if entry is None:
        return
    params: Any = json.block(f"{block}.params")
    unset = {name for way in entry.get("either", ()) for name in way if params.get(name) is None}  # D45 wants one way
    for name, description in entry.get("params", {}).items():
        key, value = f"{block}.params.{name}", params.get(name, "auto")
        if name in unset or is_taken_beside(json, key) or value == "auto" or takes(description, value):
            continue
        said = "is not taken" if description else "needs a program: it is no value of a JSON"
        yield key, f"is {shown(value)}, which {said} by {json.get(f'{block}.type')}"


def number_in_text(json: Document, key: str) -> dict[str, Any] | None:
    """Return the correction of a text that stands for a number, or of a whole float, if DeepSpeed takes the number."""
    for number in numbers_meant(json.get(key)):
        config = copy.deepcopy(dict(json.config))
        put(config, key, number)
        if key not in dict(refused_values(replace(json, config=config))):
            return {key: number}
    return None


def numbers_meant(value: Any) -> Iterator[int | float]:
    """Yield the finite numbers that a text may stand for, or the integer that equals a float."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            if is_number(number := kind(value)):
                yield number
    if isinstance(value, float) and value.is_integer():
        yield int(value)


@rule(
    "D71",
    "an argument that the optimizer does not have",
    plain="error",
    why="DeepSpeed passes optimizer.params to the optimizer's constructor, which raises a TypeError for an unknown "
    "name.",
    fix="correct its spelling, or delete it",
    example={"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "momentum": 0.9}}},
)
def unknown_argument(json: Document) -> Iterator[Hit]:
    kind, params, entry = json.get("optimizer.type"), json.get("optimizer.params", {}), json.optimizer_entry
    if entry is None or "params" not in entry or params is None:
        return
    if not isinstance(params, dict):
        if params or json.refused("D71 empty"):
            yield Hit("optimizer.params", f"is {shown(params)}, and {kind} wants a block of arguments")
        return
    unknown = set() if entry.get("any_argument") else set(params) - set(entry["params"]) - {"max_grad_norm"}
    for name in sorted(unknown):
        named, near = ARGUMENTS.get(name), similar(name, frozenset(entry["params"]))
        fix = f"use {named}" if named in entry["params"] else f"did you mean {near}?" if near else None
        yield Hit(f"optimizer.params.{name}", f"is unknown to {kind}, which raises a TypeError", fix)


@rule(
    "D67",
    "an argument that Muon ignores",
    plain="warning",
    why="DeepSpeed 0.19 takes from optimizer.params what Muon and its Adam know, and ignores everything else without "
    "a word, so a typing error means that the default is used.",
    fix="correct its spelling, or delete it",
    example={"optimizer": {"type": "Muon", "params": {"lr": 0.01, "weight_decy": 0.1}}},
)
def ignored_by_muon(json: Document) -> Iterator[Hit]:
    if json.optimizer == "muon" and json.since("0.19"):
        for name in sorted(set(json.block("optimizer.params")) - OF_MUON - {"max_grad_norm"}):  # D33 refuses it
            yield Hit(f"optimizer.params.{name}", "is unknown to Muon, and ignored in silence", nearest(name, OF_MUON))


@rule(
    "D72",
    "an optimizer or a scheduler that no JSON can run",
    plain="error",
    why="Some torch classes need what no JSON can hold, such as a function, a closure for every step, sparse "
    "gradients, or weights of two dimensions only. DeepSpeed builds them, if at all, and the first update fails.",
    fix="name another one, or build it in your program",
    example={"optimizer": {"type": "SparseAdam", "params": {"lr": 0.01}}},
)
def unusable_class(json: Document) -> Iterator[Hit]:
    for key, entry in (("optimizer.type", json.optimizer_entry), ("scheduler.type", json.scheduler_entry)):
        if entry and "refused" in entry:
            yield Hit(key, f"is {json.get(key)}: {entry['refused']}")


@rule(
    "D74",
    "a learning rate of 0",
    plain="error",
    why="With a learning rate of 0, and no scheduler that sets another one, no update moves the weights.",
    fix="give a learning rate",
    example={"optimizer": {"type": "SGD", "params": {"lr": 0}}},
)
def no_learning_rate(json: Document) -> Iterator[Hit]:
    said = "is 0: no update moves the weights"
    for key in () if moves_without_rate(json) else decisive_rates(json):
        value = json.get(key)
        if value == 0 or value == [0]:  # false too
            yield Hit(key, said)
    if json.get("optimizer.type") == "Adadelta" and json.get("optimizer.params.eps", 1) == 0:
        yield Hit("optimizer.params.eps", "is 0: Adadelta starts at it, and no update moves the weights")


def decisive_rates(json: Document) -> Iterator[str]:
    """Yield the keys of the learning rates that make all others 0 if they are 0."""
    kind = json.get("scheduler.type")
    if kind in (None, *MULTIPLYING) and json.optimizer_entry:
        yield "optimizer.params.lr"
    if kind == "OneCycleLR":
        yield "scheduler.params.max_lr"
    if kind in ENDING_AT_A_RATE and json.get("scheduler.params.warmup_min_lr", 0) == 0:
        yield "scheduler.params.warmup_max_lr"
    if kind == "LRRangeTest":
        yield "scheduler.params.lr_range_test_min_lr"


@rule(
    "D75",
    "a momentum to cycle that the optimizer does not have",
    plain="error",
    why="CyclicLR and OneCycleLR of torch move the momentum against the learning rate, unless they are told not to. "
    "With an optimizer that has neither momentum nor betas they raise a ValueError.",
    fix="set cycle_momentum to false",
    example={
        "optimizer": {"type": "Adadelta", "params": {"lr": 1.0}},
        "scheduler": {"type": "CyclicLR", "params": {"base_lr": 0.001, "max_lr": 0.1}},
    },
)
def missing_momentum(json: Document) -> Iterator[Hit]:
    key, entry = "scheduler.params.cycle_momentum", json.optimizer_entry
    cycles = json.get("scheduler.type") in ("CyclicLR", "OneCycleLR") and json.get(key, True)
    if cycles and entry and "params" in entry and not entry.get("cycles_momentum"):
        yield Hit(key, f"is true, and {json.get('optimizer.type')} has no momentum to cycle")


@rule(
    "D76",
    "Muon at ZeRO stage 3 with reduce_scatter",
    plain="error",
    why="At stage 3 Muon needs whole gradients, but reduce_scatter, which is on by default, leaves only parts of "
    "them. DeepSpeed refuses the pair at the start.",
    fix="set zero_optimization.reduce_scatter to false",
    example={
        "optimizer": {"type": "Muon", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 3, "reduce_scatter": True},
    },
)
def scattered_muon(json: Document) -> Iterator[Hit]:
    key = "zero_optimization.reduce_scatter"
    muon = json.optimizer == "muon" and json.optimizer_entry
    if muon and json.stage == 3 and json.is_on(key, True) and json.refused("D76"):
        yield Hit(key, "is not false, and Muon at stage 3 needs whole gradients")
