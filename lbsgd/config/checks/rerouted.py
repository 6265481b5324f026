"""Rules about keys that send DeepSpeed's gradients past lbsgd's aggregation (Sec. 4).

prescale_gradients and gradient_predivide_factor are not among them, because lbsgd honours them (train/aggregation/).
gradient_allreduce_op and managed_gradient_accumulation are refused with or without lbsgd's aggregation (D05, D23).
"""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.deepspeed_batch import FACTOR, NAMES_OF_TYPES
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.keypath import LARGEST, enabled, is_number, shown

WAY_OUT = "delete it, or delete lbsgd.aggregation, and DeepSpeed reduces by itself"
GRAD_ACCUM, COMMUNICATION = "data_types.grad_accum_dtype", "communication_data_type"
ONE_EACH = ("sequence_parallel_size", "tensor_parallel.autotp_size")


def hit(key: str, message: str) -> Hit:
    return Hit(key, message, correction={key: DELETE})


def has_another_type(planned: Planned, key: str) -> bool:
    """Whether lbsgd aggregates, and a key holds a type other than the gradients' own."""
    value, own = planned.get(key), "fp16" if enabled(planned.config, "fp16") else "fp32"
    return planned.aggregates and value is not None and str(value).lower() not in NAMES_OF_TYPES[own]


@rule(
    "D60",
    "gradients added up in another precision",
    lbsgd="error",
    why="DeepSpeed then keeps gradients in a second place, grad_accum, and reduces those. lbsgd aggregates the "
    "gradients themselves.",
    fix="delete it",
    example={"data_types": {"grad_accum_dtype": "fp32"}},
)
def another_accumulation(planned: Planned) -> Iterator[Hit]:
    if has_another_type(planned, GRAD_ACCUM):
        yield hit(GRAD_ACCUM, f"is {shown(planned.get(GRAD_ACCUM))}, which adds gradients up in another place")


@rule(
    "D61",
    "gradients sent in another precision",
    lbsgd="error",
    why="lbsgd sends gradients in their own precision: fp16 with fp16 weights, float32 otherwise.",
    fix=WAY_OUT,
    example={"communication_data_type": "fp32"},
)
def another_precision(planned: Planned) -> Iterator[Hit]:
    if has_another_type(planned, COMMUNICATION):
        yield hit(COMMUNICATION, f"is {shown(planned.get(COMMUNICATION))}, and lbsgd sends gradients in their own")


@rule(
    "D63",
    "a divisor that cannot divide",
    lbsgd="error",
    why="Gradients are divided by it before they are summed, and by the rest of the world size afterwards, by lbsgd as "
    "by DeepSpeed.",
    fix="give a number above 0 and below 10^12, or delete it",
    example={"gradient_predivide_factor": 0},
)
def bad_divisor(planned: Planned) -> Iterator[Hit]:
    factor = planned.config.get(FACTOR, 1.0)
    if not is_number(factor) or not 0 < factor < LARGEST:
        yield hit(FACTOR, f"is {shown(factor)}")


@rule(
    "D64",
    "a network divided among processes",
    lbsgd="error",
    why="If several processes share one network or one sequence, DeepSpeed divides the global batch among fewer of "
    "them. It then waits for more passes than planned before it moves the weights, and a mean over all processes is "
    "no longer the mean over kn images.",
    fix="delete it: a ResNet fits on every GPU whole",
    example={"sequence_parallel_size": 2},
)
def divided_network(planned: Planned) -> Iterator[Hit]:
    for key in ONE_EACH:
        if planned.get(key) not in (None, 0, 1):
            yield hit(key, f"is {shown(planned.get(key))}, and lbsgd plans for processes that are all alike")


@rule(
    "D65",
    "an algorithm for gradients that DeepSpeed reduces",
    lbsgd="error",
    why='At ZeRO stage 2, and under torch_autocast with ZeRO-1, DeepSpeed reduces by itself. "auto" lets it; an '
    "algorithm asked for by name would not run.",
    fix='use "auto", ZeRO stage 1 in fp16, or stage 0',
    example={"zero_optimization": {"stage": 2}, "lbsgd": {"aggregation": {"between": "halving_doubling"}}},
)
def idle_algorithm(planned: Planned) -> Iterator[Hit]:
    wanted, reason = planned.recipe.aggregation, planned.own_reduction
    if wanted is None or reason is None:
        return
    for key, value in wanted.model_dump().items():
        if value != "auto":
            yield Hit(f"lbsgd.aggregation.{key}", f"is {value}, but {reason}")
