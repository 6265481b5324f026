"""Read, write, compare and show the values of a JSON by dotted key paths, such as `optimizer.params.lr`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from lbsgd.errors import ConfigError

LARGEST = 10**12  # the largest count or factor of a run
BATCH, MICRO, PASSES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
LR, BUCKET = "optimizer.params.lr", "zero_optimization.reduce_bucket_size"
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's, in elements
OWN_AUTO = frozenset(  # keys that DeepSpeed itself takes as "auto"
    "data_types.keep_in_fp32_modules pipeline.stages zero_optimization.zenflow.select_strategy "
    "zero_optimization.zenflow.select_interval zero_optimization.zenflow.update_interval".split()
)


def get(config: Any, key: str, default: Any = None) -> Any:
    """Return the value at a key path, or the default if the path breaks off."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def block_of(config: Any, name: str) -> Mapping[str, Any]:
    """Return the block at a key path, or an empty block if there is none."""
    block = get(config, name)
    return block if isinstance(block, dict) else {}


def enabled(config: Any, block: str) -> bool:
    """Whether a precision block such as fp16 is switched on."""
    return get(config, f"{block}.enabled", False) is True


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a key path, and create the blocks on the way; None deletes the key.

    Raises ConfigError if the path runs through a value that is not a block.
    """
    *blocks, last = key.split(".")
    for depth, name in enumerate(blocks):
        if value is None and name not in config:
            return
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise ConfigError(f"{key}: {'.'.join(blocks[: depth + 1])} is no block of keys; see the JSON for its place")
    if value is None:
        config.pop(last, None)
    else:
        config[last] = value


def is_same(one: Any, other: Any) -> bool:
    """Whether two JSON values have the same text, unlike 5 and 5.0, or 1 and true, which Python calls equal."""
    return json.dumps(one) == json.dumps(other)


class MISSING:
    """Stands for the value of a missing key, as opposed to null."""


def differences(before: Any, after: Any, path: str = "", written: Callable[[Any], str] = json.dumps) -> tuple[str, ...]:
    """Return a line `key: old -> new` for every leaf that differs between two JSON values, formatted by `written`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return tuple(
            line
            for key in before | after
            for line in differences(
                before.get(key, MISSING), after.get(key, MISSING), f"{path}.{key}" if path else key, written
            )
        )
    if MISSING not in (before, after) and is_same(before, after):
        return ()
    old, new = ("(none)" if value is MISSING else written(value) for value in (before, after))
    return (f"{path}: {old} -> {new}",)


def paths_to_auto(config: Any, path: str = "") -> Iterator[str]:
    """Yield the key paths of all values "auto" that are not inside a list."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from paths_to_auto(value, f"{path}.{key}" if path else key)
    elif config == "auto":
        yield path


def automatic_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the key paths of all values "auto", except in the lbsgd block and those that DeepSpeed itself knows."""
    return [path for path in paths_to_auto(config) if path.partition(".")[0] != "lbsgd" and path not in OWN_AUTO]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number to calculate with: not a boolean, not NaN, within the range of floats."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number from 1 to 10^12."""
    return type(value) is int and 1 <= value <= LARGEST


def stated(value: Any) -> str:
    """Return a key's value in the words of a message; None stands for a missing key."""
    return "is not set" if value is None else f"is {shown(value)}"


def shown(value: Any) -> str:
    """Return a JSON value as a message shows it: as JSON, at most 40 characters long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) < 40 else text[:36] + " ..."
