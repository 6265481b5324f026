"""Rules about the batch and the gradients: how many images make an update, and how their gradients become one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from lbsgd.config.checks.deepspeed_keys import similar
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_count, shown

NAMES_OF_TYPES = {
    "fp16": ("fp16", "float16", "torch.float16", "half"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
    "fp32": ("fp32", "float32", "torch.float32", "float"),
}
BATCH, MICRO, PASSES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@rule(
    "D04",
    "a batch size that is no number of images",
    lbsgd="error",
    plain="error",
    why="DeepSpeed divides with these numbers and fails on anything but positive whole ones. Beside an lbsgd "
    "block both the global batch and the micro batch must be there, because the learning rate follows from "
    "the first and batch norm from the second.",
    fix="give it as a positive whole number",
    example={"train_batch_size": "many"},
)
def batch_size(json: Document) -> Iterator[Hit]:
    for key in (BATCH, MICRO, PASSES) if json.plain else (BATCH, MICRO):
        value = json.get(key)
        if not is_count(value) and not (json.plain and (value in (None, "auto") or is_divisor(value))):
            yield Hit(key, f"is {shown(value)}")


@rule(
    "D49",
    "batch sizes that DeepSpeed cannot resolve",
    plain="error",
    why="DeepSpeed needs the global batch or the micro batch, and the global batch must be micro batch x passes x "
    "GPUs in whole numbers. Otherwise an assertion fails at the start.",
    fix="give train_batch_size as a multiple of micro batch x passes",
    example={"train_batch_size": 100, "train_micro_batch_size_per_gpu": 32},
)
def unresolvable_batch(json: Document) -> Iterator[Hit]:
    kn, factors = json.get(BATCH), [value for value in map(json.get, (MICRO, PASSES)) if is_divisor(value)]
    product = math.prod(factors)
    if kn is None and json.get(MICRO) is None:
        renamed = misspelt_batch(json)
        yield Hit(BATCH, "is not given, nor the micro batch: DeepSpeed asserts", f"give {BATCH}", renamed)
    if is_divisor(kn) and kn % product:
        said = f"{kn} is no multiple of {' x '.join(map(str, factors))}, so no number of GPUs fits"
        yield Hit(BATCH, said, f"use {max(1, round(kn / product)) * product}")


def is_divisor(value: object) -> TypeGuard[int | float]:
    """Whether DeepSpeed can divide by a value and get whole numbers: 8, and 8.0 and true as well."""
    return isinstance(value, (int, float)) and 1 <= value <= 10**12 and value == int(value)


def misspelt_batch(json: Document) -> dict[str, Any] | None:
    """Return the correction of the one unknown key that resembles a batch size and holds one."""
    known = frozenset({BATCH, MICRO})
    found = {key: similar(key, known) for key in json.config if key not in json.accepted.top_level}
    named = [(key, right) for key, right in found.items() if right and is_count(json.config[key]) and "." not in key]
    return {named[0][0]: DELETE, named[0][1]: json.config[named[0][0]]} if len(named) == 1 else None


@rule(
    "D24",
    "steps_per_print that is no number of iterations",
    lbsgd="error",
    why="lbsgd writes a line of its log, and reads numbers from the GPU, every so many iterations.",
    fix="give it as a positive whole number of iterations",
    example={"steps_per_print": 0},
)
def report_interval(json: Document) -> Iterator[Hit]:
    steps = json.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        yield Hit("steps_per_print", f"is {steps!r}")


@rule(
    "D05",
    "gradients summed over processes",
    lbsgd="error",
    why="The paper averages gradients over all kn images. A sum over processes multiplies the learning rate by "
    "their number (Remark 3).",
    fix="delete it",
    example={"gradient_allreduce_op": "sum"},
)
def summed_gradients(json: Document) -> Iterator[Hit]:
    if json.get("gradient_allreduce_op", "mean") != "mean":
        said = "summed gradients multiply the learning rate by the number of processes (Remark 3)"
        yield Hit("gradient_allreduce_op", said, correction={"gradient_allreduce_op": DELETE})


@rule(
    "D22",
    "gradients rounded for communication",
    lbsgd="error",
    why="A 16-bit type for communication rounds every gradient. Without fp16 the loss is not scaled, so small "
    "gradients are rounded to zero.",
    fix="delete it",
    example={"communication_data_type": "fp16", "fp16": None, "lbsgd": {"aggregation": None}},
)
def rounded_communication(json: Document) -> Iterator[Hit]:
    if json.get("communication_data_type") is not None and not json.enabled("fp16"):
        said = "rounds gradients whose loss was not scaled"
        yield Hit("communication_data_type", said, correction={"communication_data_type": DELETE})


@rule(
    "D23",
    "an update after every pass",
    lbsgd="error",
    why="DeepSpeed then leaves accumulation to the program, so every pass moves the weights and kn is the images "
    "of a single pass.",
    fix="delete it",
    example={"managed_gradient_accumulation": False},
)
def update_after_every_pass(json: Document) -> Iterator[Hit]:
    if json.get("managed_gradient_accumulation", True) is not True:
        said = "is not true, so every pass would move the weights"
        yield Hit("managed_gradient_accumulation", said, correction={"managed_gradient_accumulation": DELETE})


@rule(
    "D34",
    "a gradient scale that ZeRO refuses",
    lbsgd="error",
    plain="error",
    why="ZeRO stages 2 and 3 reduce and scatter gradients in one step and have no place for a scale before it. "
    "DeepSpeed refuses the pair at the start.",
    fix="delete it",
    example={"zero_optimization": {"stage": 2}, "prescale_gradients": True},
)
def scaled_before_reduction(json: Document) -> Iterator[Hit]:
    if json.stage not in (2, 3) or json.get("zero_optimization.reduce_scatter", True) is not True:
        return
    for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if json.get(key, neutral) != neutral:
            said = f"is {shown(json.get(key))}, which ZeRO-{json.stage} refuses with reduce_scatter"
            yield Hit(key, said, correction=json.beside_intent({key: DELETE}))


@rule(
    "D35",
    "another type for gradients at stage 0",
    lbsgd="error",
    plain="error",
    why="Without ZeRO the gradients have the type of the weights; DeepSpeed refuses any other type at the start.",
    fix="delete it, or use ZeRO stage 1",
    example={
        "fp16": None,
        "zero_optimization": {"stage": 0},
        "data_types": {"grad_accum_dtype": "bf16"},
        "lbsgd": {"aggregation": None},
    },
)
def gradient_type(json: Document) -> Iterator[Hit]:
    weights = "fp16" if json.enabled("fp16") else "bf16" if json.enabled("bf16") else "fp32"
    given = json.get("data_types.grad_accum_dtype")
    if json.stage == 0 and given is not None and given not in NAMES_OF_TYPES[weights]:
        said = f"is not {weights}, and stage 0 knows one type for both"
        correction = json.beside_intent({"data_types.grad_accum_dtype": DELETE})
        yield Hit("data_types.grad_accum_dtype", said, correction=correction)


RULES = (
    batch_size,
    unresolvable_batch,
    report_interval,
    summed_gradients,
    rounded_communication,
    update_after_every_pass,
    scaled_before_reduction,
    gradient_type,
)
