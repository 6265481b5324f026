"""The rule about features that DeepSpeed dropped: what replaces their keys, and when nothing is lost without them."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.accepted.schema import VERSIONS, accepted, short
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document

ALTERS_PRECISION = "amp"  # without it a file trains in float32, even with an lbsgd block
SUCCESSORS = {  # as DeepSpeed's own error messages name them
    "amp": "switch on fp16, bf16 or torch_autocast in its place",
    "curriculum_learning": "use data_efficiency.data_sampling.curriculum_learning in its place",
    "elasticity": "set train_batch_size and train_micro_batch_size_per_gpu in its place",
}


@rule(
    "D01",
    "a key that was removed from DeepSpeed",
    lbsgd="error",
    plain="error",
    why="DeepSpeed 0.19 dropped whole features, such as elasticity, curriculum learning and MiCS. It refuses the keys "
    "of a dropped feature when it starts, even if they switch it off. In a plain JSON --fix deletes a feature only "
    "where all of it is switched off.",
    fix="delete it",
    example={"elasticity": {}},
)
def removed_key(document: Document) -> Iterator[Hit]:
    removed = [key for key in document.config if key in document.accepted.removed]
    zero_keys = sorted(document.accepted.removed_zero & set(document.block("zero_optimization")))
    for key in (*removed, *(f"zero_optimization.{name}" for name in zero_keys)):
        off = is_off(document.get(key))
        beside = document.beside_intent({key: DELETE}) if key != ALTERS_PRECISION else None
        fix = None if off else SUCCESSORS.get(key, without(document, key))
        yield Hit(key, "was removed from DeepSpeed, which refuses it", fix, {key: DELETE} if off else beside)


def is_off(value: object) -> bool:
    """Whether a removed feature is switched off in all its blocks, so that nothing is lost with its key.

    Some features, such as sparse attention, are on if their block exists. The techniques of compression have their
    switch in shared_parameters.
    """
    if not isinstance(value, dict):
        return not value
    if "enabled" in value:
        return value["enabled"] is False
    return all(isinstance(inner, dict) and is_off(inner.get("shared_parameters", inner)) for inner in value.values())


def without(document: Document, key: str) -> str:
    """Return the fix for a feature that is on and has no successor: train without it, or with a version that has it."""
    last = short(document.accepted.version)
    having = [version for version in VERSIONS[: VERSIONS.index(last)] if accepted(version).reads(key)]
    return f"delete it and train without it{f', or use DeepSpeed {having[-1]}' if having else ''}"
