"""A DeepSpeed JSON as a file: read strictly, its `lbsgd` block parsed, flags laid over it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from pydantic import ValidationError

from lbsgd import check
from lbsgd.errors import ConfigError
from lbsgd.recipe import Recipe


def read_json(path: Union[str, Path]) -> dict:
    """A strict JSON object from a file; ConfigError names the line of what is not one, and repeated keys."""
    def unique(pairs):
        repeated = {key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1}
        if repeated:
            raise ConfigError(f"{path}: the key {sorted(repeated)[0]!r} stands there twice; keep one")
        return dict(pairs)

    def constant(name):
        raise ConfigError(f"{path}: {name} is not strict JSON; write a number")

    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a DeepSpeed JSON such as "
                          "ds_configs/8k.json") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; give a DeepSpeed JSON such as ds_configs/8k.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not strict JSON ({error.msg}); "
                          "comments and trailing commas are not allowed") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object; give a DeepSpeed JSON such as ds_configs/8k.json")
    return config


def parse_recipe(where: str, config: dict) -> Recipe:
    """The `lbsgd` block; ConfigError names each key that cannot be right."""
    if "lbsgd" not in config:
        raise ConfigError(f"{where}: has no lbsgd block, which says epochs, num_images and warmup; take one from "
                          "ds_configs/8k.json")
    try:
        return Recipe.model_validate(config["lbsgd"])
    except ValidationError as error:
        findings = [recipe_finding(details) for details in error.errors(include_url=False)]
    refuse(where, findings)


def recipe_finding(details: dict) -> check.Finding:
    """One of pydantic's errors as a finding."""
    key = ".".join(["lbsgd", *map(str, details["loc"])])
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return check.Finding("R10", key, "unknown key", "see the README for the keys of the lbsgd block")
    if details["type"] == "missing":
        return check.Finding("R11", key, "is missing", "give it")
    return check.Finding("R12", key, f"{message} (is {details['input']!r})", "correct it")


def refuse(where: str, findings: Iterable[check.Finding]) -> None:
    """Raises ConfigError with a line for each error among the findings."""
    errors = [f"{where}: {finding}" for finding in findings if finding.severity == "error"]
    if errors:
        raise ConfigError("\n".join(errors))


# --- overrides ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overrides:
    """Flags that replace numbers of the JSON; every number that depends on them is derived again."""

    global_batch: Optional[int] = None
    micro_batch: Optional[int] = None
    resolution: Optional[int] = None
    precision: Optional[str] = None  # fp32, bf16 or fp16
    seed: Optional[int] = None


def override(config: dict, recipe: Recipe, overrides: Overrides, num_images: int) -> tuple[dict, Recipe]:
    """Config and recipe with the overrides in them and every dependent number derived again."""
    config = copy.deepcopy(config)
    config["train_batch_size"] = kn = overrides.global_batch or config["train_batch_size"]
    config["train_micro_batch_size_per_gpu"] = overrides.micro_batch or config["train_micro_batch_size_per_gpu"]
    config.pop("gradient_accumulation_steps", None)  # follows from these two and the number of processes
    block = config["lbsgd"]
    block["num_images"] = num_images
    if overrides.resolution:
        block.setdefault("augmentation", {})["resolution"] = overrides.resolution
    if overrides.seed is not None:
        block["seed"] = overrides.seed
    if kn <= recipe.linear_scaling.base_batch:
        block["warmup"] = {"kind": "none", "epochs": 0}
    recipe = parse_recipe("the flags", config)
    for key, number in check.explicit_numbers(recipe, kn, num_images).items():
        *path, last = key.split(".")
        params = check.get(config, ".".join(path))
        if not math.isclose(params[last], number, rel_tol=1e-6):  # a right number keeps the digits its author wrote
            params[last] = number
    if overrides.precision:
        set_precision(config, overrides.precision)
    return config, recipe


def set_precision(config: dict, precision: str) -> None:
    """--precision: fp32 switches the precision blocks off; bf16 is autocast; fp16 needs ZeRO stage 1 at least."""
    if precision_of(config) == precision:
        return
    for block in ("fp16", "bf16", "torch_autocast"):
        config.pop(block, None)
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "auto_cast": True}
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = max(1, zero.get("stage", 0))
        config["zero_allow_untested_optimizer"] = True


def precision_of(config: dict) -> str:
    """fp32, bf16 or fp16, as the JSON's blocks have it."""
    if check.enabled(config, "fp16"):
        return "fp16"
    return "bf16" if check.enabled(config, "torch_autocast") else "fp32"


def differences(before: Any, after: Any, path: str = "") -> tuple[str, ...]:
    """Lines `key: old -> new` for every leaf in which two JSON values differ, for printing."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return tuple(line for key in keys for line in differences(
            before.get(key), after.get(key), f"{path}.{key}" if path else key))
    if before == after:
        return ()
    said = ["(none)" if value is None else json.dumps(value) for value in (before, after)]
    return (f"{path}: {said[0]} -> {said[1]}",)
