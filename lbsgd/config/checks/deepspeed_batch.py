"""Rules about the batch and the gradients: how many images make an update, and how their gradients are combined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from lbsgd.config.checks.deepspeed_keys import similar
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import BATCH, LARGEST, MICRO, PASSES, is_count, shown, stated

NAMES_OF_TYPES = {
    "fp16": ("fp16", "float16", "torch.float16", "half"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
    "fp32": ("fp32", "float32", "torch.float32", "float"),
}
FACTOR = "gradient_predivide_factor"


@rule(
    "D04",
    "a batch size that is not a whole number",
    lbsgd="error",
    plain="error",
    why="DeepSpeed divides with these numbers and fails on anything but positive whole ones. Beside an lbsgd "
    "block both the global batch and the micro batch must be there, because the learning rate follows from "
    "the first and batch norm from the second.",
    fix="give it as a whole number from 1 to 10^12",
    example={"train_batch_size": "many"},
)
def batch_size(json: Document) -> Iterator[Hit]:
    for key in (BATCH, MICRO, PASSES) if json.plain else (BATCH, MICRO):
        value = json.get(key)
        if not is_count(value) and not (json.plain and (value in (None, "auto") or is_divisor(value))):
            yield Hit(key, stated(value))


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
        said = f"is {kn}, no multiple of {' x '.join(map(str, factors))}, so no number of GPUs fits"
        yield Hit(BATCH, said, f"use {max(1, round(kn / product)) * product}")


def is_divisor(value: object) -> TypeGuard[int | float]:
    """Whether DeepSpeed can divide by a value and get whole numbers: 8, but also 8.0 and true."""
    return isinstance(value, (int, float)) and 1 <= value <= LARGEST and value == int(value)


def misspelt_batch(json: Document) -> dict[str, Any] | None:
    """Return the correction of the only unknown key that resembles a batch size and holds one."""
    known = frozenset({BATCH, MICRO})
    found = {key: similar(key, known) for key in json.config if key not in json.accepted.top_level}
    named = [(key, right) for key, right in found.items() if right and is_count(json.config[key]) and "." not in key]
    return {named[0][0]: DELETE, named[0][1]: json.config[named[0][0]]} if len(named) == 1 else None


@rule(
    "D24",
    "steps_per_print that is not a whole number",
    lbsgd="error",
    why="lbsgd writes a line of its log, and reads numbers from the GPU, every so many iterations.",
    fix="give it as a whole number of iterations from 1 to 10^12",
    example={"steps_per_print": 0},
)
def report_interval(json: Document) -> Iterator[Hit]:
    steps = json.get("steps_per_print")
    if steps is not None and not is_count(steps):
        yield Hit("steps_per_print", f"is {shown(steps)}")


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
    key = "gradient_allreduce_op"
    if sums(json):
        said = "a sum multiplies the learning rate by the number of processes (Remark 3)"
        yield Hit(key, f"is {shown(json.get(key))}, not mean: {said}", correction={key: DELETE})


def sums(json: Document) -> bool:
    """Whether DeepSpeed sums gradients over the processes instead of averaging them, as it can since 0.19."""
    return str(json.get("gradient_allreduce_op")).lower() == "sum" and json.since("0.19")


@rule(
    "D89",
    "gradients summed where DeepSpeed cannot sum",
    plain="error",
    why="DeepSpeed sums gradients at ZeRO stages 0 to 2 only. It refuses gradient_allreduce_op sum at stage 3, beside "
    "ZenFlow and beside DeepCompile.",
    fix="delete it, and multiply the learning rate by the number of processes",
    example={"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
)
def sum_that_is_refused(json: Document) -> Iterator[Hit]:
    key = "gradient_allreduce_op"
    beside = {
        "at ZeRO stage 3": json.stage == 3,
        "beside ZenFlow": json.get("zero_optimization.zenflow") is not None,
        "beside DeepCompile": json.is_on("compile.deepcompile"),
    }
    where = [words for words, stands in beside.items() if stands]
    if sums(json) and where:
        yield Hit(key, f"is {shown(json.get(key))} {where[0]}")


@rule(
    "D88",
    "gradients that ZeRO rounds under autocast",
    lbsgd="warning",
    plain="note",
    why="Under torch_autocast ZeRO reduces the gradients of convolutions and linear layers in the autocast's 16 bits, "
    "which rounds every one before it is added to the others. At stage 0 they are reduced in float32. Beside "
    "lbsgd.aggregation DeepSpeed reduces at stage 1 by itself, and lbsgd's algorithms do not run.",
    fix="set it to 0, as `--precision bf16` does",
    example={"fp16": None, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 1}},
)
def rounded_by_zero(json: Document) -> Iterator[Hit]:
    alone = json.enabled("torch_autocast") and json.weights == "fp32"  # D15 judges the rest
    rounds = json.get("torch_autocast.lower_precision_safe_modules") != [] and json.since("0.17")
    dtype = json.get("torch_autocast.dtype", "bfloat16")
    if alone and rounds and json.stage and dtype not in NAMES_OF_TYPES["fp16"]:  # D14 refuses float16
        yield Hit("zero_optimization.stage", f"is {json.stage} under torch_autocast: ZeRO reduces gradients in {dtype}")


@rule(
    "D22",
    "gradients rounded for communication",
    lbsgd="error",
    plain="warning",
    why="A 16-bit type for communication rounds every gradient. Without fp16 the loss is not scaled, so small "
    "gradients are rounded to zero: in float16 all below 3e-8.",
    fix="delete it",
    example={"communication_data_type": "fp16", "fp16": None, "lbsgd": {"aggregation": None}},
)
def rounded_communication(json: Document) -> Iterator[Hit]:
    rounding = ("fp16",) if json.plain else ("fp16", "bf16")
    is_scaled = json.enabled("fp16") or (json.plain and json.get("fp16.enabled") == "auto")
    if str(json.get("communication_data_type")).lower() in rounding and not is_scaled:
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
    if not json.get("managed_gradient_accumulation", True):
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
    if json.stage not in (2, 3) or not json.is_on("zero_optimization.reduce_scatter", True) or sums(json):
        return
    scaled = {"prescale_gradients": bool(json.get("prescale_gradients")), FACTOR: json.get(FACTOR, 1.0) != 1.0}
    for key, is_scaled in scaled.items():
        if is_scaled:
            said = f"is {shown(json.get(key))}, which ZeRO-{json.stage} refuses with reduce_scatter"
            yield Hit(key, said, correction=json.beside_intent({key: DELETE}))


@rule(
    "D35",
    "a type for gradients that DeepSpeed cannot use",
    lbsgd="error",
    plain="error",
    why="Without ZeRO the gradients have the type of the weights; DeepSpeed refuses any other type at the start, apart "
    "from float32 beside bf16 before 0.18. ZeRO adds gradients up in any type that DeepSpeed knows; one of 16 bits "
    "rounds those of float32 weights.",
    fix="delete it, or use ZeRO stage 1 and fp32, bf16 or fp16",
    example={
        "fp16": None,
        "zero_optimization": {"stage": 0},
        "data_types": {"grad_accum_dtype": "bf16"},
        "lbsgd": {"aggregation": None},
    },
)
def gradient_type(json: Document) -> Iterator[Hit]:
    key = "data_types.grad_accum_dtype"
    weights, given, correction = json.weights, json.get(key), json.beside_intent({key: DELETE})
    copied = NAMES_OF_TYPES["fp32"] if weights == "bf16" and not json.since("0.18") else ()
    if json.stage == 0 and given is not None and given not in (*NAMES_OF_TYPES[weights], *copied):
        yield Hit(key, f"is not {weights}, and stage 0 knows one type for both", correction=correction)
    if json.stage and given not in (None, "auto", *types_of_sums(json)):
        yield Hit(key, f"is {shown(given)}, in which DeepSpeed adds no gradients up", correction=correction)
    elif json.stage and not json.plain and weights == "fp32" and given not in (None, *NAMES_OF_TYPES["fp32"]):
        yield Hit(key, f"is {shown(given)}, which rounds the gradients of float32 weights", "delete it", correction)


def types_of_sums(json: Document) -> tuple[str, ...]:
    """Return the names of the types in which ZeRO sums gradients; at stage 1, 0.19 no longer accepts int8."""
    int8 = () if json.stage == 1 and json.since("0.19") else ("int8", "torch.int8")
    return (*itertools.chain(*NAMES_OF_TYPES.values()), *int8)
