"""Rules about keys: those that DeepSpeed 0.19.8 refuses at the start, and those that it ignores in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import lru_cache

from lbsgd.config.checks.deepspeed_tables import (
    LAX_BLOCKS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    STRICT_BLOCKS,
    TOP_LEVEL_KEYS,
)
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown

BLOCKS = (*STRICT_BLOCKS, *LAX_BLOCKS, "torch_autocast", "lbsgd")


@lru_cache(maxsize=1024)
def similar(key: str, known: frozenset[str]) -> str | None:
    """Return the known word that resembles a key most, if any does."""
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None)


def nearest(key: str, known: frozenset[str]) -> str:
    """Return the fix for an unknown word."""
    near = similar(key, known)
    return f"did you mean {near}?" if near else "delete it"


@rule(
    "D01",
    "a key that was removed from DeepSpeed",
    lbsgd="error",
    plain="error",
    why="DeepSpeed 0.19 dropped whole features, such as elasticity, curriculum learning and MiCS. It refuses the "
    "keys of a dropped feature when it starts, even where they switch it off.",
    fix="delete it",
    example={"elasticity": {}},
)
def removed_key(json: Document) -> Iterator[Hit]:
    removed = [key for key in json.config if key in REMOVED_KEYS]
    removed += [f"zero_optimization.{key}" for key in sorted(REMOVED_ZERO_KEYS & set(json.block("zero_optimization")))]
    for key in removed:
        yield Hit(key, "was removed from DeepSpeed, which refuses it", correction={key: DELETE})


@rule(
    "D02",
    "a misspelt key",
    lbsgd="error",
    plain="error",
    why="DeepSpeed ignores an unknown key at the top level without a word, so a typing error means that the "
    "default is used. This key is one or two letters away from a known one.",
    fix="correct its spelling",
    example={"train_batchsize": 8192},
)
def misspelt_key(json: Document) -> Iterator[Hit]:
    for key in json.config:
        near = similar(key, TOP_LEVEL_KEYS) if key not in TOP_LEVEL_KEYS | REMOVED_KEYS else None
        if near:
            taken = near in json.config or "." in key
            yield Hit(
                key,
                "is an unknown key, which DeepSpeed ignores in silence",
                f"did you mean {near}?",
                None if taken else {key: DELETE, near: json.config[key]},
            )


@rule(
    "D03",
    "an unknown key",
    lbsgd="warning",
    plain="warning",
    why="DeepSpeed ignores an unknown key at the top level without a word. It may be read by your own program; if "
    "it is not, what it asks for does not happen.",
    fix="delete it unless you read it",
    example={"my_project": {"name": "a"}},
)
def unknown_key(json: Document) -> Iterator[Hit]:
    for key in json.config:
        if key not in TOP_LEVEL_KEYS | REMOVED_KEYS and not similar(key, TOP_LEVEL_KEYS):
            yield Hit(key, "is an unknown key, which DeepSpeed ignores")


@rule(
    "D29",
    "a block that is no block",
    lbsgd="error",
    plain="error",
    why="DeepSpeed reads keys inside this block. A plain value in its place ends in a traceback, or is taken for "
    "an empty block.",
    fix="give it as a block of keys: {...}",
    example={"csv_monitor": "yes"},
)
def no_block(json: Document) -> Iterator[Hit]:
    for name in BLOCKS:
        if name in json.config and not isinstance(json.config[name], dict):
            yield Hit(name, f"is {shown(json.config[name])}")


@rule(
    "D31",
    "an unknown key in a block that refuses it",
    lbsgd="error",
    plain="error",
    why="DeepSpeed parses these blocks strictly (pydantic, extra=forbid): it raises a ValidationError when it starts.",
    fix="correct its spelling, or delete it",
    example={"fp16": {"dtype": "float16"}},
)
def unknown_key_in_strict_block(json: Document) -> Iterator[Hit]:
    for name, known in STRICT_BLOCKS.items():
        for key in sorted(set(json.block(name)) - known - REMOVED_ZERO_KEYS):
            correction = {f"{name}.{key}": DELETE} if "." not in key else None
            message = "is an unknown key, which DeepSpeed refuses when it starts"
            yield Hit(f"{name}.{key}", message, nearest(key, known), correction)


@rule(
    "D32",
    "an unknown key in a block that ignores it",
    lbsgd="warning",
    plain="warning",
    why="DeepSpeed looks up single keys of these blocks and never looks at the others, so a typing error means "
    "that the default is used.",
    fix="correct its spelling, or delete it",
    example={"checkpoint": {"async_save": True}},
)
def unknown_key_in_lax_block(json: Document) -> Iterator[Hit]:
    for name, known in LAX_BLOCKS.items():
        for key in sorted(set(json.block(name)) - known):
            message = "is an unknown key, which DeepSpeed ignores in silence"
            yield Hit(f"{name}.{key}", message, nearest(key, known))


@rule(
    "D21",
    'a value "auto"',
    lbsgd="error",
    plain="note",
    why='Hugging Face\'s Trainer and Accelerate fill in a value "auto" before DeepSpeed sees the file. For DeepSpeed '
    "itself it is a string in the place of a number; only data_types.keep_in_fp32_modules knows the word.",
    fix="write the number",
    example={"zero_optimization": {"allgather_bucket_size": "auto"}},
)
def automatic_value(json: Document) -> Iterator[Hit]:
    found = sorted(path for path in automatic_paths(json.config) if not path.endswith("keep_in_fp32_modules"))
    if found:
        others = [*found[1:4], "..."] if len(found) > 4 else found[1:]
        also = f" (as {'are' if len(found) > 2 else 'is'} {', '.join(others)})" if others else ""
        yield Hit(found[0], f'is "auto"{also}, which only Hugging Face\'s Trainer and Accelerate fill in')


def automatic_paths(config: object, path: str = "") -> Iterator[str]:
    """Yield the key paths of all values "auto"."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from automatic_paths(value, f"{path}.{key}" if path else key)
    elif config == "auto" and not path.startswith("lbsgd.aggregation."):
        yield path


RULES = (
    removed_key,
    misspelt_key,
    unknown_key,
    no_block,
    unknown_key_in_strict_block,
    unknown_key_in_lax_block,
    automatic_value,
)
