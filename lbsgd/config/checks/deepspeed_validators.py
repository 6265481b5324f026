"""Rules about keys that are right alone but not together: one for each validator of DeepSpeed and torch.

Tried with the sources of 0.16.9, 0.17.6, 0.18.9 and 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lbsgd.config.accepted.values import as_bool, as_number, as_whole_number, converts
from lbsgd.config.checks.deepspeed_batch import NAMES_OF_TYPES
from lbsgd.config.checks.deepspeed_beside import copies_weights_itself
from lbsgd.config.checks.deepspeed_features import ZENFLOW
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_number, shown
from lbsgd.units import installed, numbers

PARAM_DTYPE, BUFFER_DTYPE = "data_types.param_dtype", "data_types.buffer_dtype"
GRAD_NORM, RATIO = "zero_optimization.compute_grad_norm", "zero_optimization.offload_optimizer.ratio"
BOUNDED_STEPS = ("Rprop", "Adafactor")  # their steps do not grow with the learning rate
FLOAT32_DIGITS = math.log10(3.4028235e38)


@rule(
    "D84",
    "torch's Adagrad in half precision without ZeRO",
    plain="error",
    why="torch's Adagrad makes its sums of squares when it is built; torch 2.12 and later make them in the first "
    "update, and train. DeepSpeed's fp16 and bf16 optimizers then give it other weights, float32 copies, and the first "
    "update ends in KeyError: 'sum'. ZeRO builds Adagrad anew.",
    fix="set it to 1 (with bf16, and gradients in bf16), or use another optimizer",
    example={"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}, "bf16": {"enabled": True}},
)
def half_adagrad(json: Document) -> Iterator[Hit]:
    if json.optimizer == "adagrad" and copies_weights_itself(json) and numbers(installed("torch")) < (2, 12):
        said = f"is {json.stage}, where half precision copies the weights after {json.get('optimizer.type')} was built"
        yield Hit("zero_optimization.stage", said)


@rule(
    "D85",
    "a number that soon makes the weights infinite",
    plain="error",
    why="RMSprop takes the square root of an average of squares: with alpha above 1 it is that of a negative number. "
    "ExponentialLR multiplies the learning rate by gamma in every update, and SGD, RMSprop and Muon multiply their "
    "running sum of gradients by the momentum: after 50 updates they must still be numbers that float32 can hold.",
    fix="give a number below 1",
    example={"optimizer": {"type": "RMSprop", "params": {"lr": 0.01, "alpha": 99}}},
)
def infinite_weights(json: Document) -> Iterator[Hit]:
    kind, alpha = json.get("optimizer.type"), json.get("optimizer.params.alpha")
    if kind == "RMSprop" and is_number(alpha) and alpha > 1:
        yield Hit("optimizer.params.alpha", f"is {shown(alpha)}: the square root of a negative number is none")
    lr, gamma = json.get("optimizer.params.lr"), json.get("scheduler.params.gamma")
    grows = json.get("scheduler.type") == "ExponentialLR" and kind not in BOUNDED_STEPS and is_number(gamma)
    if grows and is_number(lr) and lr and math.log10(abs(lr)) + digits_after_50(gamma) > FLOAT32_DIGITS:
        yield Hit("scheduler.params.gamma", f"is {shown(gamma)}: after 50 updates no float32 holds the learning rate")
    momentum = json.get("optimizer.params.momentum")
    sums = kind in ("SGD", "RMSprop") or json.optimizer == "muon"
    if sums and is_number(momentum) and digits_after_50(momentum) > FLOAT32_DIGITS:
        yield Hit("optimizer.params.momentum", f"is {shown(momentum)}: after 50 updates no float32 holds the sum")


def digits_after_50(factor: float) -> float:
    """Return by how many decimal digits a number that every update multiplies has grown in the 50th update."""
    return 49 * math.log10(max(1, abs(factor)))


@rule(
    "D77",
    "a type of the weights that is not the enabled precision",
    lbsgd="error",
    plain="error",
    why="DeepSpeed 0.19 takes data_types.param_dtype only where it repeats the precision that fp16 or bf16 switches "
    "on, float32 without either. It refuses any other type at the start.",
    fix="delete it, or switch the fp16 or bf16 block on",
    example={"data_types": {"param_dtype": "fp32"}},
)
def weights_of_another_type(json: Document) -> Iterator[Hit]:
    enabled, given = json.weights, json.get(PARAM_DTYPE)
    if PARAM_DTYPE in json.accepted.keys and given not in (None, "auto", *NAMES_OF_TYPES[enabled]):
        said = f"is {shown(given)}, and the precision that is switched on is {enabled}"
        yield Hit(PARAM_DTYPE, said, correction=json.beside_intent({PARAM_DTYPE: DELETE}))


@rule(
    "D83",
    "a type of the buffers that DeepSpeed does not know",
    plain="error",
    why="Where fp16 or bf16 is on, DeepSpeed 0.19 casts the buffers to data_types.buffer_dtype. It raises a ValueError "
    "for a name that it does not know, and without fp16 and bf16 never looks.",
    fix="use fp16, bf16 or fp32, or delete it",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "bf16": {"enabled": True},
        "data_types": {"buffer_dtype": "double"},
    },
)
def unknown_buffer_type(json: Document) -> Iterator[Hit]:
    known = {"int8", "torch.int8"}.union(*NAMES_OF_TYPES.values())
    given = json.get(BUFFER_DTYPE)
    taken = given in (None, "auto", *known) or BUFFER_DTYPE not in json.accepted.keys
    if not taken and json.weights != "fp32":
        yield Hit(BUFFER_DTYPE, f"is {shown(given)}")


@rule(
    "D79",
    "a gradient norm that is switched off but needed",
    lbsgd="error",
    plain="error",
    why="DeepSpeed can leave the norm of the gradients out at ZeRO stages 1 and 2 only, and needs it for clipping. It "
    "refuses compute_grad_norm false at any other stage, and beside gradient_clipping, which is 1.0 by default.",
    fix="delete it, or use ZeRO stage 1 or 2 with gradient_clipping 0",
    example={
        "fp16": None,
        "zero_optimization": {"stage": 0, "compute_grad_norm": False},
        "lbsgd": {"aggregation": None},
    },
)
def missing_norm(json: Document) -> Iterator[Hit]:
    value, clipping = json.get(GRAD_NORM, True), json.get("gradient_clipping", json.accepted.default_clipping)
    if not json.since("0.19") or not converts("bool", value) or as_bool(value):
        return
    if json.stage in (0, 3):
        said = f"is {shown(value)} at ZeRO stage {json.stage}"
        yield Hit(GRAD_NORM, said, correction=json.beside_intent({GRAD_NORM: DELETE}))
    elif json.stage and is_number(clipping) and clipping:
        yield Hit(GRAD_NORM, f"is {shown(value)} beside a gradient_clipping of {shown(clipping)}, which needs the norm")


@rule(
    "D80",
    "a part of the optimizer offloaded below ZeRO stage 3",
    lbsgd="error",
    plain="error",
    why="DeepSpeed can offload a part of the optimizer's state at ZeRO stage 3 only. An assertion fails at the start.",
    fix="delete it, or use ZeRO stage 3",
    example={"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
)
def partial_offload(json: Document) -> Iterator[Hit]:
    ratio = as_number(json.get(RATIO))
    if json.stage in (0, 1, 2) and ratio is not None and ratio < 1:
        said = f"is {ratio:g} at ZeRO stage {json.stage}, which offloads all or nothing"
        yield Hit(RATIO, said)


@rule(
    "D81",
    "a strategy or an interval that ZenFlow does not know",
    plain="error",
    why='ZenFlow\'s strategies are "auto", "step" and "epoch", and its intervals are whole numbers or "auto". '
    "DeepSpeed refuses anything else at the start, and 0.19 an update_interval below 1 as well.",
    fix='use "auto"',
    example={
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": "cpu"},
            "zenflow": {"select_strategy": "x"},
        }
    },
)
def unknown_zenflow(json: Document) -> Iterator[Hit]:
    zenflow = json.block(ZENFLOW)
    if isinstance(strategy := zenflow.get("select_strategy"), str) and strategy not in ("auto", "step", "epoch"):
        yield Hit(f"{ZENFLOW}.select_strategy", f"is {shown(strategy)}")
    for name in ("select_interval", "update_interval"):
        value = zenflow.get(name, "auto")
        number = None if isinstance(value, str) else as_whole_number(value)
        too_small = name == "update_interval" and number is not None and number < 1 and json.since("0.19")
        if (isinstance(value, str) and value != "auto") or too_small:
            yield Hit(f"{ZENFLOW}.{name}", f"is {shown(value)}")


@rule(
    "D82",
    "an optimizer that is fused and foreach",
    lbsgd="error",
    plain="error",
    why="fused and foreach are two implementations of one update. torch's optimizers raise a RuntimeError where both "
    "are true.",
    fix="delete one of them",
    example={"optimizer": {"params": {"fused": True, "foreach": True}}},
)
def two_implementations(json: Document) -> Iterator[Hit]:
    params = json.block("optimizer.params")
    entry = json.optimizer_entry
    has_both = entry is not None and {"fused", "foreach"} <= set(entry.get("params", ()))
    if has_both and params.get("fused") and params.get("foreach"):
        yield Hit("optimizer.params.fused", f"is {shown(params['fused'])} together with foreach")
