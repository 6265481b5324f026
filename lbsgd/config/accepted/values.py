"""Decide whether DeepSpeed takes a JSON value, by a description from trials or by the type of a pydantic field.

A description says which values of each kind of JSON DeepSpeed takes (tools/deepspeed_probe.py). A type is that of a
field in one of DeepSpeed's pydantic models; pydantic itself converts the value, here as in DeepSpeed.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from lbsgd.config.keypath import shown

Refusal = tuple[str, str]  # the key path inside the value, and what is wrong there
NUMERALS = frozenset({"0.5", "1", "1e-3"})  # that trials of texts include (tools/deepspeed_probe.py)
LENIENT = frozenset({"DeepSpeedZeroLeafModuleConfig"})  # models that take null as a block, and a text as a list


def takes(description: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is among those that trials accepted; an empty description takes anything."""
    if not description:
        return True
    if value is None:
        return bool(description["null"])
    if isinstance(value, bool):
        return value in description["bool"]
    if isinstance(value, int):
        return inside(description["int"], value)
    if isinstance(value, float):
        return inside(description["float"], value)
    if isinstance(value, str):
        return takes_text(description, value)
    if isinstance(value, dict):
        return bool(description["block"])
    return takes_list(description.get("list", False), value)


def is_untried(description: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is a non-empty block and trials, which tried only an empty one, found nothing accepted."""
    kinds = ("bool", "int", "float", "list", "block")
    accepts = any(description.get(kind) for kind in kinds) or any(description.get("text", {}).values())
    return isinstance(value, dict) and bool(value) and not accepts


def takes_text(description: Mapping[str, Any], value: str) -> bool:
    """Whether a text is taken: as a word, or as a number if trials took all numbers as texts."""
    text = description["text"]
    if not text["any"] and set(text["but"]) >= NUMERALS:
        with contextlib.suppress(ValueError):
            return math.isfinite(number := float(value)) and inside(description["float"], number)
    excepted = value in text["but"] or {value.lower(), value.upper()} <= set(text["but"])  # in any case
    return bool(text["any"] != excepted)


def inside(intervals: list[list[Any]], value: float) -> bool:
    """Whether a number lies in one of the intervals, ends included."""
    return any((least is None or value >= least) and (most is None or value <= most) for least, most in intervals)


def takes_as(kind: Any, description: Mapping[str, Any], value: Any) -> bool:
    """Whether a field takes a value. A text is converted to a number first, because trials tried only a few texts."""
    if kind not in ("int", "float") or not description or value is None or isinstance(value, bool):
        return takes(description, value)
    try:
        number = PYTHON_TYPES[kind](value)
    except (TypeError, ValueError, OverflowError):
        return False
    return (kind == "int" or math.isfinite(number)) and inside(description["int"], number)


def takes_list(description: Any, value: list[Any]) -> bool:
    """Whether a list has an accepted length and accepted items."""
    if not description:
        return False
    lengths, items = description["lengths"], description["items"]
    if lengths is not None and len(value) not in lengths:
        return False
    return not items or all(takes(items[min(at, len(items) - 1)], each) for at, each in enumerate(value))


def model_refusals(models: Mapping[str, Any], model: str, value: Mapping[str, Any]) -> Iterator[Refusal]:
    """Yield the values of a block that one of DeepSpeed's models refuses (`unknown_fields` yields unknown keys)."""
    fields = models[model]["fields"]
    for name, field in fields.items():
        alias = field.get("alias", name)
        key = alias if alias in value else name
        if key not in value:
            if field.get("required"):
                yield key, "is missing"
            continue
        given = [value[key]] if model in LENIENT and isinstance(value[key], str) else value[key]
        if value[key] == "auto":  # Hugging Face's word: DeepSpeed's models drop it
            continue
        wrong = list(type_refusals(models, field["type"], given))
        if not wrong and not takes_as(field["type"], field.get("values", {}), given):
            wrong = [("", f"is {shown(value[key])}, which DeepSpeed does not take")]
        yield from ((f"{key}.{path}".rstrip("."), why) for path, why in wrong)
        successor = field.get("replaced_by")
        names = {successor, fields.get(successor, {}).get("alias", successor)} & set(value)
        yield from ((key, f"stands beside {name}, which replaced it") for name in names)


def unknown_fields(models: Mapping[str, Any], model: str, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of a block, or of a block inside it, that its model refuses as unknown, with the model's name."""
    fields = models[model]["fields"]
    known = field_names(models[model])
    if models[model]["extra"] == "forbid":
        yield from ((key, model) for key in value if key not in known and value[key] != "auto")
    for name, field in fields.items():
        inner = model_within(field["type"])
        for key in {name, field.get("alias", name)} & set(value):
            if inner and isinstance(value[key], dict):
                yield from ((f"{key}.{path}", which) for path, which in unknown_fields(models, inner, value[key]))


def field_names(model: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that a model takes, aliases included."""
    return frozenset(each for name, field in model["fields"].items() for each in (name, field.get("alias", name)))


def model_within(kind: Any) -> str | None:
    """Return the model that a type is or may be, or None."""
    if isinstance(kind, dict):
        for inner in (kind, kind.get("of"), *kind.get("any_of", ())):
            if isinstance(inner, dict) and "model" in inner:
                return str(inner["model"])
    return None


def type_refusals(models: Mapping[str, Any], kind: Any, value: Any) -> Iterator[Refusal]:
    """Yield what a type refuses in a value: one thing at most, or several inside a block or a list."""
    if kind == "any":
        return
    if isinstance(kind, str):
        fits = value is None if kind == "null" else converts(kind, value)
        if not fits:
            yield "", f"is {shown(value)}, and DeepSpeed wants {NAMES[kind]}"
    elif "of" in kind:
        yield from bounded(models, kind, value)
    elif "any_of" in kind:
        if all(any(True for _ in type_refusals(models, each, value)) for each in kind["any_of"]):
            wanted = next(each for each in kind["any_of"] if each != "null")
            yield from type_refusals(models, wanted, value)
    elif "model" in kind:
        if isinstance(value, dict):
            yield from model_refusals(models, kind["model"], value)
        elif value is not None or kind["model"] not in LENIENT:
            yield "", f"is {shown(value)}, and DeepSpeed wants a block of keys"
    elif "list" in kind:
        yield from each_refusals(models, kind["list"], value, list, "a list")
    elif "dict" in kind:
        yield from each_refusals(models, kind["dict"], value, dict, "a block of keys")
    elif "enum" in kind and converted(enum_adapter(tuple(kind["enum"])), value) is None:
        yield "", f"is {shown(value)}, and DeepSpeed wants one of {', '.join(map(str, kind['enum']))}"


def bounded(models: Mapping[str, Any], kind: Mapping[str, Any], value: Any) -> Iterator[Refusal]:
    """Yield what a type with bounds refuses."""
    wrong = list(type_refusals(models, kind["of"], value))
    yield from wrong
    if wrong or value is None:
        return
    number = value if isinstance(value, int) else float(value)  # an integer may be too large for a float
    for name, words, holds in BOUNDS:
        if name in kind and not holds(number, kind[name]):
            yield "", f"is {shown(value)}, and DeepSpeed wants {words} {kind[name]:g}"


def each_refusals(models: Mapping[str, Any], kind: Any, value: Any, wanted: Any, name: str) -> Iterator[Refusal]:
    """Yield what is refused in the items of a list or of a block."""
    if not isinstance(value, wanted):
        yield "", f"is {shown(value)}, and DeepSpeed wants {name}"
        return
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from ((f"{key}.{path}".rstrip("."), why) for path, why in type_refusals(models, kind, item))


BOUNDS: tuple[tuple[str, str, Any], ...] = (
    ("gt", "more than", lambda a, b: a > b),
    ("ge", "at least", lambda a, b: a >= b),
    ("lt", "less than", lambda a, b: a < b),
    ("le", "at most", lambda a, b: a <= b),
)
NAMES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "null": "null"}
PYTHON_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


@lru_cache
def adapter(kind: str) -> Any:
    """Return pydantic's conversion to a plain type."""
    from pydantic import TypeAdapter

    return TypeAdapter(PYTHON_TYPES[kind])


@lru_cache
def enum_adapter(values: tuple[Any, ...]) -> Any:
    """Return pydantic's conversion to an enumeration of these values."""
    from pydantic import TypeAdapter

    names = [(f"value_{at}", value) for at, value in enumerate(values)]
    base: Any = enum.IntEnum if all(isinstance(value, int) for value in values) else enum.Enum
    return TypeAdapter(base("Values", names))


def converted(adapter: Any, value: Any) -> Any:
    """Return a value as one of pydantic's conversions converts it; None if it refuses the value."""
    from pydantic import ValidationError

    with contextlib.suppress(ValidationError):
        return adapter.validate_python(value)
    return None


def converts(kind: str, value: Any) -> bool:
    """Whether pydantic converts a value to a plain type."""
    return converted(adapter(kind), value) is not None


def as_bool(value: Any) -> bool:
    """Return a switch, such as "yes" or 1, as pydantic converts it; False if it refuses the value."""
    return bool(converted(adapter("bool"), value))


def as_whole_number(value: Any) -> int | None:
    """Return a whole number, such as "2" or 1.0, as pydantic converts it; None if it refuses the value."""
    number: int | None = converted(adapter("int"), value)
    return number


def as_number(value: Any) -> float | None:
    """Return a number, such as "0.5" or 1, as pydantic converts it; None if it refuses the value."""
    number: float | None = converted(adapter("float"), value)
    return number
