"""Rules about fp16's loss scale: forgotten at ZeRO stage 0, required by Lamb, or unable to train."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.accepted.values import as_number, as_whole_number
from lbsgd.config.checks.deepspeed_beside import wraps_fused_adam
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_count, is_number, shown
from lbsgd.config.precision import FP16

TYPE = "optimizer.type"
DYNAMIC = ("initial_scale_power", "loss_scale_window", "min_loss_scale", "hysteresis")
LEAST_POWER, LARGEST_POWER = -24, 63  # of two: float16's smallest number, torch's largest integer
LARGEST_STATIC = 2**32
MOST_SKIPPED = 1000
SCALE_FREE = frozenset(
    "adam adamw adamax nadam radam adagrad adadelta rmsprop rprop adafactor lamb lion muon muadam muadamw "
    "onebitadam zerooneadam onebitlamb".split()
)


@rule(
    "D11",
    "fp16 at ZeRO stage 0",
    lbsgd="error",
    plain="error",
    why="At stage 0 DeepSpeed 0.19 does not scale the loss but still divides the gradients by the loss scale, 65536 "
    "at the start. With SGD every update is too small by this factor, and the loss looks as if the network did not "
    "learn. D73 is about optimizers that divide by the gradients' size. Version 0.17.6 never reaches the update of its "
    "own Adam there, and 0.16 fails in it with a static loss scale.",
    fix="set it to 1, or use torch_autocast with bfloat16",
    example={"zero_optimization": {"stage": 0}},
)
def fp16_at_stage_0(json: Document) -> Iterator[Hit]:
    if is_unscaled(json) and not (json.plain and (is_scale_free(json) or not json.names_optimizer)):
        yield Hit(
            "zero_optimization.stage",
            f"is 0 with fp16, where DeepSpeed does not scale the loss, yet divides the gradients by its scale: "
            f"{json.get(TYPE, 'an optimizer such as SGD')} makes every update {scale_of(json):g} times too small",
            correction=json.beside_intent({"zero_optimization.stage": 1}),
        )
    if why := failing_adam(json):
        yield Hit("zero_optimization.stage", f"is 0 with fp16, where DeepSpeed {json.accepted.version} {why}")


def failing_adam(json: Document) -> str | None:
    """Return how an earlier version's fp16 optimizer fails with DeepSpeed's own Adam, or None."""
    if not (json.plain and json.enabled("fp16") and wraps_fused_adam(json)) or json.since("0.18"):
        return None
    if json.since("0.17"):
        return "never moves the weights of its Adam"
    return "fails in the first update of its Adam, if the scale is static" if static_scale(json) else None


@rule(
    "D73",
    "fp16 at ZeRO stage 0 with gradients that were never scaled",
    plain="warning",
    why="At stage 0 DeepSpeed 0.19 does not scale the loss but still divides the gradients by the loss scale. "
    "Optimizers such as Adam divide by the gradients' size, so the weights move all the same; but small gradients are "
    "rounded to zero, which the scale is there to prevent, and eps and gradient_clipping meet gradients 65536 times "
    "smaller. A file that names no optimizer leaves it to the program; D11 is about one that names SGD.",
    fix="set it to 1, or use torch_autocast with bfloat16",
    example={"optimizer": {"type": "Adam", "params": {"lr": 0.001}}, "fp16": {"enabled": True}},
)
def unscaled_gradients(json: Document) -> Iterator[Hit]:
    if is_unscaled(json) and (is_scale_free(json) or not json.names_optimizer):
        scale = scale_of(json)
        if json.names_optimizer:
            then = f"{json.get(TYPE)} moves the weights, and small gradients are lost"
        else:
            then = "Adam moves the weights but loses small gradients, "
            then += f"and SGD makes every update {scale:g} times too small"
        said = f"is 0 with fp16, where DeepSpeed divides gradients by {scale:g} but never multiplied the loss by it"
        yield Hit("zero_optimization.stage", f"{said}: {then}")


@rule(
    "D86",
    "Lamb without a dynamic loss scale",
    plain="error",
    why="DeepSpeed builds its Lamb only if the loss scale is dynamic or not given. A static one is refused, from 0.17 "
    "on even in an fp16 block that is off; 0.16 refuses bf16 as well, which has no scale.",
    fix="set it to 0, which makes it dynamic",
    example={"optimizer": {"type": "Lamb", "params": {"lr": 0.001}}, "fp16": {"enabled": False, "loss_scale": 128}},
)
def lamb_without_dynamic_scale(json: Document) -> Iterator[Hit]:
    kind = json.get(TYPE)
    if not json.optimizer.endswith("lamb") or json.optimizer not in json.accepted.optimizers:
        return
    static = json.get("fp16.loss_scale", 0) not in (0, "0", "0.0", "auto")
    if static and (json.enabled("fp16") or json.refused("D86 off")):
        scale = shown(json.get("fp16.loss_scale"))
        yield Hit("fp16.loss_scale", f"is {scale}, and DeepSpeed builds {kind} with a dynamic one only")
    if json.enabled("bf16") and json.refused("D86 bf16"):
        said = f"is true, and DeepSpeed {json.accepted.version} builds {kind} with a dynamic loss scale only"
        yield Hit("bf16.enabled", said, "use fp16, or DeepSpeed 0.17 or newer")


@rule(
    "D78",
    "a loss scale that cannot train",
    lbsgd="error",
    plain="error",
    why="If fp16.loss_scale is 0, the scale starts at 2 to the power of initial_scale_power, a number that torch must "
    "hold. DeepSpeed divides by loss_scale_window, lowers the scale once hysteresis has counted down to 1, and never "
    "goes below min_loss_scale. Version 0.19 refuses a window and a minimum below 1 at the start; earlier ones fail "
    "only with a window of 0. Any other loss_scale stays as it is, and float16 must hold the scaled gradients. "
    "Hysteresis, and a minimum above the start, are judged only beside an lbsgd block: plain DeepSpeed may meet no "
    "overflow.",
    fix="give a number that can be used, or delete it",
    example={"fp16": {"min_loss_scale": 0}},
)
def unusable_loss_scale(json: Document) -> Iterator[Hit]:
    static = static_scale(json)
    if not json.enabled("fp16") or static is None:
        return
    if static and not (static < 0 or 2.0**LEAST_POWER <= static <= LARGEST_STATIC):  # D70 judges those below 0
        said = f"is {shown(json.get('fp16.loss_scale'))}, and float16 holds no gradients that are multiplied by it"
        yield Hit("fp16.loss_scale", said)
    if static == 0:
        yield from stuck(json)


def stuck(json: Document) -> Iterator[Hit]:
    """Yield a hit for each value that keeps a dynamic loss scale from starting or from changing."""
    scale = {name: as_whole_number(json.get(f"fp16.{name}", FP16[name])) for name in DYNAMIC}
    power, least, hysteresis = scale["initial_scale_power"], scale["min_loss_scale"], scale["hysteresis"]
    can_start = power is not None and LEAST_POWER <= power <= LARGEST_POWER
    if power is not None and not can_start:
        said = f"is {shown(power)}, and must be {LEAST_POWER} to {LARGEST_POWER}: the scale starts at 2 to this power"
        yield Hit("fp16.initial_scale_power", said)
    for name in ("loss_scale_window", "min_loss_scale"):
        value = scale[name]
        fails_early = name == "loss_scale_window" and value == 0
        if value is not None and value <= 0 and (fails_early or json.since("0.19")):
            yield Hit(f"fp16.{name}", f"is {shown(value)}, and the loss scale is dynamic")
    if json.plain:
        return
    if hysteresis is not None and not 1 <= hysteresis <= MOST_SKIPPED:
        said = f"is {shown(hysteresis)}, and must be 1 to {MOST_SKIPPED}: the scale falls after so many skipped updates"
        yield Hit("fp16.hysteresis", said)
    if can_start and least is not None and least > 2 ** (power or 0):
        yield Hit("fp16.min_loss_scale", f"is {shown(least)}, above the scale at the start, 2 to the power of {power}")


def is_unscaled(json: Document) -> bool:
    """Whether fp16 runs at stage 0, where this version of DeepSpeed forgets to scale the loss."""
    judged = not json.plain or (scale_of(json) != 1 and not is_refused(json))
    return json.enabled("fp16") and json.stage == 0 and json.refused("D11") and judged


def is_scale_free(json: Document) -> bool:
    """Whether the optimizer's updates do not change if all gradients are multiplied by a factor."""
    return json.optimizer in SCALE_FREE


def is_refused(json: Document) -> bool:
    """Whether DeepSpeed knows no optimizer of this name (D06), so that nothing is known about its updates."""
    return json.names_optimizer and not json.is_sgd and json.optimizer_entry is None


def static_scale(json: Document) -> float | None:
    """Return the static scale, 0 if it is dynamic, or None if the value is not a number."""
    return as_number(json.get("fp16.loss_scale", 0))


def scale_of(json: Document) -> float:
    """Return the loss scale at the start."""
    scale, power = json.get("fp16.loss_scale", 0), json.get("fp16.initial_scale_power", 16)
    if is_number(scale) and scale > 0:
        return scale
    return 2.0**power if is_count(power) and power < 100 else 65536.0
