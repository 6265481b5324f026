"""Flags laid over a JSON: each number that depends on them is derived again."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.checks.block import parse_recipe
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import deepspeed_findings
from lbsgd.config.derive import derive, is_close
from lbsgd.config.keypath import get, is_number, put
from lbsgd.config.precision import precision_of, set_precision
from lbsgd.config.schema import PROSE, Recipe
from lbsgd.errors import ConfigError

WHERE = "the flags"


@dataclass(frozen=True)
class Overrides:
    """Flags that replace numbers of the JSON; every number that depends on them is derived again.

    precision is fp32, bf16 or fp16. settings are those of --set, such as "lbsgd.warmup.epochs=2".
    """

    global_batch: int | None = None
    micro_batch: int | None = None
    resolution: int | None = None
    precision: str | None = None
    seed: int | None = None
    settings: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return the values to put into the JSON, by key path; None deletes."""
        flags = {
            "train_batch_size": self.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "lbsgd.augmentation.resolution": self.resolution,
            "lbsgd.seed": self.seed,
        }
        given = {key: value for key, value in flags.items() if value is not None}
        return given | dict(map(setting, self.settings))

    def divide_otherwise(self) -> bool:
        """Whether they change the batch sizes, so that the JSON's number of passes no longer holds."""
        return any(key.startswith("train_") for key in self.values())


def setting(text: str) -> tuple[str, Any]:
    """Return the key path and the value of one --set: JSON, else the text itself; null deletes the key.

    Raises ConfigError where the text is no KEY=VALUE, or the value is NaN or infinite.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text!r}: give a key path and a value, such as lbsgd.warmup.epochs=2")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return key, value
    if not is_strict(parsed):
        raise ConfigError(f"--set {text!r}: {value} is not strict JSON; write a number")
    return key, parsed


def is_strict(value: Any) -> bool:
    """Whether a parsed value is free of NaN and infinity, which JSON does not have."""
    if isinstance(value, (dict, list)):
        return all(map(is_strict, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def override(
    config: Mapping[str, Any], overrides: Overrides, num_images: int | None = None
) -> tuple[dict[str, Any], Recipe]:
    """Return the JSON with the overrides in it and everything that depends on them derived again, and its recipe.

    num_images is the size of the data at hand, by default the `lbsgd` block's own. A file's purpose and the paper's
    error are dropped where the run is no longer the file's.
    Raises ConfigError where an override cannot be right, or sets a number that follows from others.
    """
    values = overrides.values()
    changed = copy.deepcopy(dict(config))
    if overrides.precision:
        set_precision(changed, overrides.precision)
    apply(values, num_images, changed)
    refuse(WHERE, deepspeed_findings(changed))
    recipe = parse_recipe(WHERE, changed)
    require_precision(changed, overrides.precision)
    recipe = derive(changed, recipe)
    require_kept(changed, values)
    if meaning(changed) != meaning(config):
        recipe = drop_prose(changed, recipe, kept=values)
    return changed, recipe


def apply(values: Mapping[str, Any], num_images: int | None, config: dict[str, Any]) -> None:
    """Put the values into a JSON, and take out the number of passes, which follows from the processes."""
    for key, value in values.items():
        put(config, key, value)
    if num_images:
        put(config, "lbsgd.num_images", num_images)
    config.pop("gradient_accumulation_steps", None)


def require_precision(config: Mapping[str, Any], asked: str | None) -> None:
    """Raise ConfigError where --set chose another precision than --precision did."""
    found = precision_of(config)
    if asked and found != asked:
        raise ConfigError(f"--precision {asked} and --set disagree, which gives {found}; leave one of them out")


def require_kept(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for an override that did not survive the derivation of numbers."""
    for key, value in values.items():
        found = get(config, key)
        if found != value and not (is_number(value) and is_close(found, value)):
            raise ConfigError(
                f"--set {key}={json.dumps(value)}: this number follows from the others, which make it "
                f"{json.dumps(found)}; set those instead, such as lbsgd.linear_scaling.base_lr"
            )


def meaning(config: Mapping[str, Any]) -> Any:
    """Return the part of a JSON that its purpose describes: update and schedule, not data order or hardware."""
    silent = (*PROSE, "seed", "aggregation", "diagnostics")
    block = {key: value for key, value in config["lbsgd"].items() if key not in silent}
    return block, config["train_batch_size"], config["optimizer"]


def drop_prose(config: dict[str, Any], recipe: Recipe, kept: Mapping[str, Any]) -> Recipe:
    """Take purpose and paper's error out of a JSON, unless an override gave them; return the recipe without them."""
    dropped = [name for name in PROSE if f"lbsgd.{name}" not in kept]
    for name in dropped:
        config["lbsgd"].pop(name, None)
    return recipe.model_copy(update=dict.fromkeys(dropped))
