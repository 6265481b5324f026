"""Rules about the loss scale of fp16: forgotten at ZeRO stage 0, and asked for by Lamb."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_count, is_number, shown

TYPE = "optimizer.type"
SCALE_FREE = frozenset("adam adamw adamax nadam radam adagrad adadelta rmsprop rprop adafactor lamb lion muon".split())


@rule(
    "D11",
    "fp16 at ZeRO stage 0",
    lbsgd="error",
    plain="error",
    why="At stage 0 DeepSpeed 0.19 does not scale the loss but still divides the gradients by the loss scale, 65536 "
    "at the start. With SGD every update is so many times too small, and the loss looks like that of a network that "
    "does not learn. D73 is about optimizers that divide by the gradients' size.",
    fix="set it to 1, or use torch_autocast with bfloat16",
    example={"zero_optimization": {"stage": 0}},
)
def fp16_at_stage_0(json: Document) -> Iterator[Hit]:
    if is_unscaled(json) and not (json.plain and is_scale_free(json)):
        yield Hit(
            "zero_optimization.stage",
            f"is 0 with fp16, where DeepSpeed does not scale the loss, yet divides the gradients by its scale: "
            f"{json.get(TYPE, 'an optimizer')} makes every update {scale_of(json):g} times too small",
            correction=json.beside_intent({"zero_optimization.stage": 1}),
        )


@rule(
    "D73",
    "fp16 at ZeRO stage 0 with gradients that were never scaled",
    plain="warning",
    why="At stage 0 DeepSpeed 0.19 does not scale the loss but still divides the gradients by the loss scale. "
    "Optimizers such as Adam divide by the gradients' size, so the weights move all the same; but small gradients are "
    "rounded to zero, which the scale is there to prevent, and eps and gradient_clipping meet gradients 65536 times "
    "smaller.",
    fix="set it to 1, or use torch_autocast with bfloat16",
    example={"optimizer": {"type": "Adam", "params": {"lr": 0.001}}, "fp16": {"enabled": True}, "steps_per_print": 10},
)
def unscaled_gradients(json: Document) -> Iterator[Hit]:
    if is_unscaled(json) and is_scale_free(json):
        yield Hit(
            "zero_optimization.stage",
            f"is 0 with fp16, where DeepSpeed divides gradients by {scale_of(json):g} but never multiplied the loss "
            f"by it: {json.get(TYPE)} moves the weights, and small gradients are lost",
        )


@rule(
    "D86",
    "Lamb without a dynamic loss scale",
    plain="error",
    why="DeepSpeed builds its Lamb only where the loss scale is dynamic or never named. A static one is refused, from "
    "0.17 on even in an fp16 block that is off; 0.16 refuses bf16 as well, which has no scale.",
    fix="set it to 0, which makes it dynamic",
    example={"optimizer": {"type": "Lamb", "params": {"lr": 0.001}}, "fp16": {"enabled": False, "loss_scale": 128}},
)
def lamb_without_dynamic_scale(json: Document) -> Iterator[Hit]:
    kind = str(json.get(TYPE))
    if not kind.lower().endswith("lamb") or kind.lower() not in json.accepted.optimizers:
        return
    static = json.get("fp16.loss_scale", 0) not in (0, "0", "0.0", "auto")
    if static and (json.enabled("fp16") or json.refused("D86 off")):
        scale = shown(json.get("fp16.loss_scale"))
        yield Hit("fp16.loss_scale", f"is {scale}, and DeepSpeed builds {kind} with a dynamic one only")
    if json.enabled("bf16") and json.refused("D86 bf16"):
        said = f"is true, and DeepSpeed {json.accepted.version} builds {kind} with a dynamic loss scale only"
        yield Hit("bf16.enabled", said, "use fp16, or DeepSpeed 0.17 or newer")


def is_unscaled(json: Document) -> bool:
    """Whether fp16 runs at stage 0, where this version of DeepSpeed forgets to scale the loss."""
    return json.enabled("fp16") and json.stage == 0 and json.refused("D11") and not (json.plain and scale_of(json) == 1)


def is_scale_free(json: Document) -> bool:
    """Whether the optimizer's updates are the same for gradients that are a multiple."""
    return str(json.get(TYPE)).lower() in SCALE_FREE


def scale_of(json: Document) -> float:
    """Return the loss scale at the start."""
    scale, power = json.get("fp16.loss_scale", 0), json.get("fp16.initial_scale_power", 16)
    if is_number(scale) and scale > 0:
        return scale
    return 2.0**power if is_count(power) and power < 100 else 65536.0


RULES = (fp16_at_stage_0, unscaled_gradients, lamb_without_dynamic_scale)
