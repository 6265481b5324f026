"""The rule about ZeRO's master weights and optimizer states in half precision."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.deepspeed_beside import copies_weights_itself, offloading
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document

FP16_MASTERS = "fp16.fp16_master_weights_and_grads"


@rule(
    "D36",
    "master weights or optimizer states in half precision",
    lbsgd="error",
    plain="error",
    why="DeepSpeed keeps master weights in half precision only under ZeRO: for its own Adam on the CPU under offload, "
    "and in bfloat16 also together with bf16_optimizer_states, which in turn needs them. Otherwise an assertion fails "
    "at the start. Beside an lbsgd block all of these are refused, because small updates are rounded away.",
    fix="delete it",
    example={"fp16": {"fp16_master_weights_and_grads": True}},
)
def half_master_weights(json: Document) -> Iterator[Hit]:
    masters, states = bf16_keys(json)
    for key in (FP16_MASTERS, masters, states):
        if json.plain:
            why = fp16_refusal(json, masters) if key == FP16_MASTERS else bf16_refusal(json, key, masters, states)
        else:
            why = "works with Adam on the CPU under offload only" if json.is_on(key) else None
        if why:
            yield Hit(key, why, correction=json.beside_intent({key: DELETE}))


def bf16_keys(json: Document) -> tuple[str, str]:
    """Return the two keys of the block that DeepSpeed reads: bf16, or if that is missing, its old name."""
    block = "bfloat16" if json.get("bf16") is None else "bf16"
    return f"{block}.bf16_master_weights_and_grads", f"{block}.bf16_optimizer_states"


def fp16_refusal(json: Document, bf16_masters: str) -> str | None:
    """Return why DeepSpeed refuses master weights in float16; None if it takes them or never reads the key."""
    if not json.is_on(FP16_MASTERS) or not (json.since("0.17") or json.enabled("fp16")):
        return None
    stages = (1, 2, 3) if json.since("0.18") else (2,)
    if json.stage is not None and json.stage not in stages:
        return f"is true at ZeRO stage {json.stage}"
    if copies_weights_itself(json):
        return None
    if json.since("0.18") and json.is_on(bf16_masters):
        return f"is true together with {bf16_masters}"
    return None if offloads_adam(json) else "is true, and works with Adam on the CPU under offload only"


def bf16_refusal(json: Document, key: str, masters: str, states: str) -> str | None:
    """Return why DeepSpeed refuses one of the two keys of bfloat16, or None."""
    if not json.is_on(key) or not json.since("0.18"):
        return None
    if json.stage == 0:
        return "is true at ZeRO stage 0"
    if key == states:
        return None if json.is_on(masters) else f"is true, and needs {masters}"
    alone = not (json.is_on(states) or offloads_adam(json) or copies_weights_itself(json))
    return f"is true, and needs {states}, or Adam on the CPU under offload" if alone else None


def offloads_adam(json: Document) -> bool:
    """Whether DeepSpeed's own Adam runs on the CPU, or may run there because the program may bring it."""
    own = json.optimizer in ("adam", "adamw") or not json.names_optimizer
    return own and bool(offloading(json, "offload_optimizer"))
