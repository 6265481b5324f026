"""Keys that send DeepSpeed's gradients another way than through lbsgd's aggregation; refused by name where it runs.

prescale_gradients and gradient_predivide_factor are honoured instead (train/aggregation.py), gradient_allreduce_op and
managed_gradient_accumulation are refused with or without it (D05, D23).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.aggregation import own_reduction
from lbsgd.config.checks.consistency import DELETE, Finding, get, is_number
from lbsgd.config.checks.deepspeed_keys import shown
from lbsgd.config.schema import Recipe

WAY_OUT = "delete it, or delete lbsgd.aggregation, and DeepSpeed reduces by itself"
OWN_TYPES = {"fp16": ("fp16", "float16", "torch.float16"), "fp32": ("fp32", "float32", "torch.float32")}
ONE_EACH = ("sequence_parallel_size", "tensor_parallel.autotp_size")


def rerouted_findings(config: dict[str, Any], recipe: Recipe) -> Iterator[Finding]:
    """Yield an error for each key past which, or for which, lbsgd cannot aggregate."""
    yield from contradictions(config, recipe)
    if own_reduction(config, recipe) is not None:
        return
    own = OWN_TYPES["fp16" if get(config, "fp16.enabled", False) is True else "fp32"]
    yield from of_another_type(config, "data_types.grad_accum_dtype", own, "D60", "adds gradients up in another place")
    yield from of_another_type(config, "communication_data_type", own, "D61", "sends gradients in another precision")
    if (
        get(config, "zero_optimization.stage", 0) == 1
        and get(config, "zero_optimization.contiguous_gradients") is False
    ):
        yield finding("D62", "zero_optimization.contiguous_gradients", "is false, and ZeRO-1 then reduces by itself")
    factor = config.get("gradient_predivide_factor", 1.0)
    if not is_number(factor) or factor <= 0:
        yield finding("D63", "gradient_predivide_factor", f"is {shown(factor)}, not a number above 0")
    for key in ONE_EACH:
        if get(config, key, 1) not in (0, 1):
            yield finding("D64", key, f"is {shown(get(config, key))}, and lbsgd aggregates over all processes alike")


def contradictions(config: dict[str, Any], recipe: Recipe) -> Iterator[Finding]:
    """Yield an error where the block demands an algorithm and DeepSpeed's own reduction runs."""
    wanted, reason = recipe.aggregation, own_reduction(config, recipe)
    if wanted is None or reason is None:
        return
    for key, value in wanted.model_dump().items():
        if value != "auto":
            yield Finding(
                "D65",
                f"lbsgd.aggregation.{key}",
                f"is {value}, but {reason}",
                'use "auto", ZeRO stage 1 in fp16, or stage 0',
            )


def of_another_type(
    config: dict[str, Any], key: str, own: tuple[str, ...], code: str, consequence: str
) -> Iterator[Finding]:
    value = get(config, key)
    if value is not None and value not in own:
        yield finding(code, key, f"is {shown(value)}, which {consequence}")


def finding(code: str, key: str, message: str) -> Finding:
    return Finding(code, key, message, WAY_OUT, correction={key: DELETE})
