"""A DeepSpeed JSON as a file: read strictly, its `lbsgd` block parsed, flags laid over it, written for people to read."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lbsgd.config.checks import consistency as check
from lbsgd.config.checks.deepspeed_keys import shown
from lbsgd.config.checks.lbsgd_json import deepspeed_findings
from lbsgd.config.schema import Recipe
from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError


def read_json(path: str | Path) -> dict:
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
    except RecursionError:
        raise ConfigError(
            f"{path}: is nested too deeply to be a DeepSpeed JSON; give one such as ds_configs/8k.json"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a DeepSpeed JSON such as ds_configs/8k.json"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; give a DeepSpeed JSON such as ds_configs/8k.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not strict JSON ({error.msg}); "
            "comments and trailing commas are not allowed"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object; give a DeepSpeed JSON such as ds_configs/8k.json")
    return config


def parse_recipe(where: str, config: dict) -> Recipe:
    """The `lbsgd` block; ConfigError names each key that cannot be right."""
    if "lbsgd" not in config:
        raise ConfigError(
            f"{where}: has no lbsgd block, which says epochs, num_images and warmup; take one from ds_configs/8k.json"
        )
    recipe, findings = recipe_or_findings(config)
    refuse(where, findings)
    return recipe


def recipe_or_findings(config: dict) -> tuple[Recipe | None, list[check.Finding]]:
    """The `lbsgd` block, or what is wrong in it."""
    try:
        return Recipe.model_validate(config["lbsgd"]), []
    except ValidationError as error:
        return None, [recipe_finding(details) for details in error.errors(include_url=False)]


def recipe_finding(details: dict) -> check.Finding:
    """One of pydantic's errors as a finding."""
    key = ".".join(["lbsgd", *map(str, details["loc"])])
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return check.Finding("R10", key, "unknown key", "see the README for the keys of the lbsgd block")
    if details["type"] == "missing":
        return check.Finding("R11", key, "is missing", "give it")
    return check.Finding("R12", key, f"{message} (is {shown(details['input'])})", "correct it")


def refuse(where: str, findings: Iterable[check.Finding]) -> None:
    """Raises ConfigError with a line for each error among the findings."""
    errors = [f"{where}: {finding}" for finding in findings if finding.severity == "error"]
    if errors:
        raise ConfigError("\n".join(errors))


WIDTH = 127  # of the shipped files' lines


def format_json(value: Any, indent: str = "", used: int = 0) -> str:
    """JSON as in ds_configs: a block of plain values on one line where it fits, else a line for each key."""
    inline = json.dumps(value)
    flat = isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values())
    if not isinstance(value, dict) or not value or (flat and indent and used + len(inline) < WIDTH):
        return inline
    inner = indent + "  "
    lines = []
    for key, item in value.items():
        name = f"{inner}{json.dumps(key)}: "
        lines.append(name + format_json(item, inner, len(name)))
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def write_json(path: str | Path, config: dict) -> None:
    """A JSON as a file that is whole or as it was; ConfigError where it cannot be written."""
    try:
        replace_file(Path(path), (format_json(config) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def put(config: dict, key: str, value: Any) -> None:
    """Puts a value at a dotted key path, making the blocks on the way; None deletes what stands there."""
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


# --- overrides ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overrides:
    """Flags that replace numbers of the JSON; every number that depends on them is derived again."""

    global_batch: int | None = None
    micro_batch: int | None = None
    resolution: int | None = None
    precision: str | None = None  # fp32, bf16 or fp16
    seed: int | None = None
    settings: tuple[str, ...] = ()  # of --set: "lbsgd.warmup.epochs=2"

    def values(self) -> dict[str, Any]:
        """What they put where, by key path; None deletes."""
        flags = {
            "train_batch_size": self.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "lbsgd.augmentation.resolution": self.resolution,
            "lbsgd.seed": self.seed,
        }
        return {
            **{key: value for key, value in flags.items() if value is not None},
            **dict(map(setting, self.settings)),
        }

    def divide_otherwise(self) -> bool:
        """Whether the number of passes in the JSON does not hold any more."""
        return any(key.startswith("train_") for key in self.values())


def setting(text: str) -> tuple[str, Any]:
    """Key path and value of one --set; the value is JSON, or a string as it stands; null deletes the key."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text!r}: give a key path and a value, such as lbsgd.warmup.epochs=2")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return key, value
    if not strict(parsed):
        raise ConfigError(f"--set {text!r}: {value} is not strict JSON; write a number")
    return key, parsed


def strict(value: Any) -> bool:
    """Whether a parsed value is free of NaN and infinity, which JSON does not know."""
    if isinstance(value, (dict, list)):
        return all(map(strict, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


PROSE = ("purpose", "paper_error_pct")


def override(config: dict, overrides: Overrides, num_images: int | None = None) -> tuple[dict, Recipe]:
    """Config and recipe with the overrides in them and every dependent number derived again.

    A file's purpose and the paper's error are left out where the run is not the file's any more.
    Raises ConfigError where an override cannot be, or is itself one of the numbers that follow from others.
    """
    before, config, values = config, copy.deepcopy(config), overrides.values()
    for key, value in values.items():
        put(config, key, value)
    if num_images:
        put(config, "lbsgd.num_images", num_images)
    config.pop("gradient_accumulation_steps", None)  # follows from the batches and the number of processes
    refuse("the flags", deepspeed_findings(config))
    if overrides.precision:
        set_precision(config, overrides.precision)
    recipe = parse_recipe("the flags", config)
    if config["train_batch_size"] <= recipe.linear_scaling.base_batch and recipe.warmup.kind != "none":
        config["lbsgd"]["warmup"] = {"kind": "none", "epochs": 0}
        recipe = parse_recipe("the flags", config)
    derive(config, recipe)
    require_kept(config, values)
    if meaning(config) != meaning(before):
        for key in set(PROSE) - {key.removeprefix("lbsgd.") for key in values}:
            config["lbsgd"].pop(key, None)
    return config, parse_recipe("the flags", config)


def derive(config: dict, recipe: Recipe) -> None:
    """Puts the explicit numbers of the recipe into DeepSpeed's blocks."""
    for key, number in check.explicit_numbers(recipe, config["train_batch_size"], recipe.num_images).items():
        value = check.get(config, key)
        if not check.is_number(value) or not math.isclose(value, number, rel_tol=1e-6):  # a right one keeps its digits
            put(config, key, check.tidy(number))


def require_kept(config: dict, values: dict[str, Any]) -> None:
    """Raises ConfigError for an override that did not survive the derivation of numbers."""
    for key, value in values.items():
        found = check.get(config, key)
        same = check.is_number(value) and check.is_number(found) and math.isclose(value, found, rel_tol=1e-6)
        if found != value and not same:
            raise ConfigError(
                f"--set {key}={json.dumps(value)}: this number follows from the others, which make it "
                f"{json.dumps(found)}; set those instead, such as lbsgd.linear_scaling.base_lr"
            )


def meaning(config: dict) -> Any:
    """What a file's purpose speaks of: the update and its schedule, not the data's order nor the hardware."""
    block = {key: value for key, value in config["lbsgd"].items() if key not in (*PROSE, "seed", "aggregation")}
    return block, config["train_batch_size"], config["optimizer"]


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
        return tuple(
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        )
    said = ["(none)" if value is None else json.dumps(value) for value in (before, after)]  # 5 is not 5.0, nor true 1
    if said[0] == said[1] or path.removeprefix("lbsgd.") in PROSE:
        return ()
    return (f"{path}: {said[0]} -> {said[1]}",)
