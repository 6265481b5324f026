"""Rules about keys that DeepSpeed refuses at the start or silently ignores."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from functools import lru_cache

from lbsgd.config.accepted.values import as_number, takes, unknown_fields
from lbsgd.config.checks.elsewhere import FIXES, moved_into_params
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.recognise import misspelt_blocks
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import automatic_keys, shown

OPTIMIZER_BLOCKS = ("optimizer", "scheduler")  # of whose keys only type and params are read
NOT_JUDGED = ("torch_autocast", "elasticity")  # D28 judges the first; the second's keys were not tried one by one


@lru_cache(maxsize=1024)
def similar(key: str, known: frozenset[str]) -> str | None:
    """Return the known word that is most similar to a key, or None."""
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None)


def nearest(key: str, known: frozenset[str]) -> str:
    """Return the fix for an unknown word."""
    near = similar(key, known)
    return f"did you mean {near}?" if near else "delete it"


def in_another_case(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that differs from this one only in case, or None."""
    return next((each for each in known if each.lower() == str(word).lower()), None)


def unread_at_the_top(json: Document) -> list[str]:
    """Return the keys at the top level that DeepSpeed neither reads nor refuses."""
    return [key for key in json.config if key not in json.accepted.top_level | json.accepted.removed]


def unknown_at_the_top(json: Document) -> list[str]:
    """Return the unread keys at the top level, except those of later versions (D87) and misspelt lbsgd blocks (R21)."""
    unread, ours = unread_at_the_top(json), misspelt_blocks(json.config)
    unread = [key for key in unread if not is_comment(key)]
    return [key for key in unread if key not in ours and ("." in key or not json.reader_to_come(key))]


def is_comment(key: str) -> bool:
    """Whether a key looks like a comment, which people write as a key because strict JSON has no comments."""
    return key.startswith(("_", "//", "#", "$")) or key in ("comment", "comments")


def lax_blocks(json: Document) -> Iterator[tuple[str, list[str]]]:
    """Yield each block whose keys DeepSpeed looks up one by one, and the block's keys that DeepSpeed never reads."""
    for name in block_names(json):
        known = known_inside(json, name)
        if known and name not in json.accepted.blocks and name not in NOT_JUDGED:
            yield name, sorted(set(json.block(name)) - known)


def known_inside(json: Document, name: str) -> frozenset[str]:
    """Return the keys that DeepSpeed looks up directly inside a block."""
    known = frozenset(key.partition(".")[0] for key in json.accepted.inside(name))
    return known | {"type", "params"} if name in OPTIMIZER_BLOCKS else known


def fits(json: Document, key: str, value: object) -> bool:
    """Whether DeepSpeed takes a value for a top-level key."""
    return isinstance(value, dict) if is_block(json, key) else takes(json.accepted.keys.get(key, {}), value)


def is_block(json: Document, key: str) -> bool:
    return key in json.accepted.blocks or key in OPTIMIZER_BLOCKS


def meant(json: Document, key: str) -> str | None:
    """Return the similar known key that takes an unknown key's value or the number in its text, or None."""
    near, value = similar(key, json.accepted.top_level), json.config[key]
    if near is None or key in FIXES or isinstance(value, dict) != is_block(json, near):
        return None
    number = as_number(value) if isinstance(value, str) else None
    return near if value == "auto" or fits(json, near, value) or (number and fits(json, near, number)) else None


@rule(
    "D02",
    "a misspelt key",
    lbsgd="error",
    plain="warning",
    why="DeepSpeed ignores an unknown key at the top level without a word, so a typing error means that the "
    "default is used. This key resembles a known one that takes such a value.",
    fix="correct its spelling",
    example={"train_batchsize": 8192},
)
def misspelt_key(json: Document) -> Iterator[Hit]:
    meanings = {key: near for key in unknown_at_the_top(json) if (near := meant(json, key))}
    for key, near in meanings.items():
        rivals = near in json.config or list(meanings.values()).count(near) > 1
        taken = rivals or "." in key or not fits(json, near, json.config[key])
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
    "it is not, what it asks for does not happen. Keys of comments, such as _comment and //, are passed over.",
    fix="delete it unless you read it",
    example={"my_project": {"name": "a"}},
)
def unknown_key(json: Document) -> Iterator[Hit]:
    for key in unknown_at_the_top(json):
        if not meant(json, key):
            yield Hit(key, "is an unknown key, which DeepSpeed ignores", FIXES.get(key))


@rule(
    "D29",
    "a plain value in the place of a block",
    lbsgd="error",
    plain="error",
    why="DeepSpeed reads keys inside this block. A plain value in its place ends in a traceback, or is taken for "
    "an empty block.",
    fix="give it as a block of keys: {...}",
    example={"csv_monitor": "yes"},
)
def no_block(json: Document) -> Iterator[Hit]:
    for name in block_names(json):
        value = json.get(name, {})
        if not isinstance(value, dict) and not (json.plain and passes_for_block(json, name, value)):
            yield Hit(name, f"is {shown(value)}", as_block(json, name, value))


def as_block(json: Document, name: str, value: object) -> str | None:
    """Return the fix for a switch or a stage that stands for a block: write it as the block."""
    if name == "zero_optimization" and type(value) is int and 0 <= value <= 3:
        return f'write {{"stage": {value}}}'
    return (
        f'write {{"enabled": {shown(value)}}}'
        if json.accepted.reads(f"{name}.enabled") and type(value) is bool
        else None
    )


def passes_for_block(json: Document, name: str, value: object) -> bool:
    """Whether DeepSpeed takes a value instead of a block, such as true for zero_optimization."""
    if name in OPTIMIZER_BLOCKS or name == "autotuning":
        return False
    if name == "zero_optimization" and isinstance(value, bool):
        return True
    places = (*json.accepted.keys, *json.accepted.blocks)
    inner = [place.partition(".")[2] for place in places if place.startswith(f"{name}.")]
    if isinstance(value, str) and any(key in value for key in inner):  # DeepSpeed finds the key in the text, then fails
        return False
    return takes(json.accepted.keys.get(name, NOTHING), value)


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
    accepted = json.accepted
    for name, model in accepted.blocks.items():
        for path, inner in unknown_fields(accepted.models, model, json.block(name)):
            if name == "zero_optimization" and path in accepted.removed_zero:
                continue
            key, known = path.rpartition(".")[2], accepted.field_names(inner)
            message = "is an unknown key, which DeepSpeed refuses when it starts"
            later = json.reader_to_come(f"{name}.{path}")
            fix = FIXES.get(f"{name}.{path}", nearest(key, known))
            fix = f"use DeepSpeed {later} or newer, or delete it" if later else fix
            only_deleted = path == key and not later and not similar(key, known)
            correction = json.beside_intent({f"{name}.{path}": DELETE}) if only_deleted else None
            yield Hit(f"{name}.{path}", message, fix, correction)


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
    message = "is an unknown key, which DeepSpeed ignores in silence"
    for name, unknown in lax_blocks(json):
        for key in unknown:
            if not json.reader_to_come(f"{name}.{key}"):
                fix = moved_into_params(json.accepted, name, key) or nearest(key, known_inside(json, name))
                yield Hit(f"{name}.{key}", message, fix)


@rule(
    "D21",
    'a value "auto"',
    lbsgd="error",
    plain="note",
    why='Hugging Face\'s Trainer and Accelerate fill in a value "auto" before DeepSpeed sees the file. In blocks '
    "that it parses strictly, DeepSpeed takes its default instead; in others it takes the text as the value.",
    fix="write the value",
    example={"zero_optimization": {"allgather_bucket_size": "auto"}},
)
def automatic_value(json: Document) -> Iterator[Hit]:
    unread = unread_at_the_top(json)
    found = sorted(key for key in automatic_keys(json.config) if key.partition(".")[0] not in unread)
    if found:
        others = [*found[1:4], "..."] if len(found) > 4 else found[1:]
        also = f" (as {'are' if len(found) > 2 else 'is'} {', '.join(others)})" if others else ""
        yield Hit(found[0], f'is "auto"{also}, which only Hugging Face\'s Trainer and Accelerate fill in')


NOTHING = {"null": False, "bool": [], "int": [], "float": [], "text": {"any": False, "but": []}, "block": True}


def block_names(json: Document) -> list[str]:
    """Return the top-level keys that hold blocks."""
    accepted = json.accepted
    return sorted({*accepted.blocks, *accepted.keys_of_blocks, *OPTIMIZER_BLOCKS, "lbsgd"})
