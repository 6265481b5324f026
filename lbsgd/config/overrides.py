"""Apply flags to a JSON and derive each number that depends on them again."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lbsgd.config.checks.block import parse_recipe
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import deepspeed_findings
from lbsgd.config.derive import derive, is_close
from lbsgd.config.json_file import NumberError, finite, refuse_constant
from lbsgd.config.keypath import BATCH, MICRO, PASSES, get, is_number, put
from lbsgd.config.precision import PRECISIONS, precision_of, set_precision
from lbsgd.config.schema import NO_NUMBER, PROSE, Recipe
from lbsgd.disk import MOST_LEVELS, require_shallow
from lbsgd.errors import ConfigError, require_type

WHERE = "the flags"
KEYS = {  # the key that each flag sets
    "global_batch": BATCH,
    "micro_batch": MICRO,
    "resolution": "lbsgd.augmentation.resolution",
    "seed": "lbsgd.seed",
    "zero_stage": "zero_optimization.stage",
    "epochs": "lbsgd.epochs",
    "num_images": "lbsgd.num_images",
}


class Given(NamedTuple):
    """A value for a key path, and the flag that gave it, as a user types it; the value None deletes the key."""

    flag: str
    key: str
    value: Any


SETTINGS = "give a tuple of texts such as lbsgd.warmup.epochs=2"


@dataclass(frozen=True)
class Overrides:
    """Flags that replace numbers of the JSON; every number that depends on them is derived again.

    precision is fp32, bf16 or fp16. settings are the texts of --set, such as "lbsgd.warmup.epochs=2". num_images
    replaces the JSON's; the size of the data at hand is an argument of `Plan.read` and `initialize`.
    """

    global_batch: int | None = None
    micro_batch: int | None = None
    resolution: int | None = None
    precision: str | None = None
    seed: int | None = None
    settings: tuple[str, ...] = ()
    zero_stage: int | None = None
    epochs: int | None = None
    num_images: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise ConfigError(f"precision is {self.precision!r}; give one of {', '.join(PRECISIONS)}")
        require_type(self.settings, (tuple, list), "settings", SETTINGS)
        for each in self.settings:
            require_type(each, str, f"{each!r} in settings", SETTINGS)

    def given(self) -> list[Given]:
        """Return the values that the flags give, --set last."""
        flags = {name: getattr(self, name) for name in KEYS}
        named = [Given(f"--{name} {value}", KEYS[name], value) for name, value in flags.items() if value is not None]
        return [*named, *(Given(f"--set {text}", *setting(text)) for text in self.settings)]

    def values(self) -> dict[str, Any]:
        """Return the JSON's new values by key path; None deletes. Raises ConfigError if two flags disagree."""
        given = self.given()
        require_agreement(given)
        return {key: value for _, key, value in given}

    def divide_otherwise(self) -> bool:
        """Whether the flags set batch sizes or the number of passes, so that the JSON's number of passes is void."""
        return any(key.startswith("train_") or key == PASSES for key in self.values())


def setting(text: str) -> tuple[str, Any]:
    """Return the key path and the value of one --set: JSON, else the text itself; null deletes the key.

    Raises ConfigError if the text is not KEY=VALUE, if the key is one of the lbsgd block's without `lbsgd.`, or if the
    value is NaN or infinite.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text!r}: give a key path and a value, such as lbsgd.warmup.epochs=2")
    if key.partition(".")[0] in Recipe.model_fields and value != "null":  # DeepSpeed has no such key
        raise ConfigError(f"--set {text!r}: DeepSpeed has no key {key} and ignores it; did you mean lbsgd.{key}?")
    try:
        require_shallow([], levels=max(0, MOST_LEVELS - key.count(".")))  # the blocks of the key path
        found = json.loads(value, parse_constant=refuse_constant, parse_float=finite)
        require_shallow(found)
        return key, found
    except NumberError:
        raise ConfigError(f"--set {text!r}: {value} is not strict JSON; write a number") from None
    except RecursionError:
        raise ConfigError(f"--set {text[:36]!r} ...: nested in more than {MOST_LEVELS} levels; no JSON is") from None
    except ValueError:
        return key, value


def require_agreement(given: Iterable[Given]) -> None:
    """Raise ConfigError if two flags give different values to one key, or to a block and a key inside it."""
    for one, other in itertools.combinations(given, 2):
        block, inner = sorted((one, other), key=lambda each: len(each.key))
        if f"{inner.key}.".startswith(f"{block.key}.") and value_inside(block, inner.key) != inner.value:
            raise ConfigError(f"{one.flag} and {other.flag} disagree about {inner.key}; leave one of them out")


def value_inside(given: Given, key: str) -> Any:
    """Return the value that a flag gives to its own key path or to one inside its block."""
    rest = key.removeprefix(given.key).removeprefix(".")
    return get(given.value, rest) if rest else given.value


def override(
    config: Mapping[str, Any], overrides: Overrides, num_images: int | None = None
) -> tuple[dict[str, Any], Recipe]:
    """Return the JSON with the overrides applied and everything that depends on them derived again, and its recipe.

    num_images is the size of the data at hand, by default the `lbsgd` block's own. The file's purpose and the paper's
    error are dropped if the run is no longer the file's.
    Raises ConfigError if overrides disagree, cannot be right, or set a number that follows from others.
    """
    values = overrides.values()
    require_images(values, num_images)
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
    """Put the values into a JSON, and remove the number of passes, which follows from the processes."""
    for key, value in values.items():
        put(config, key, value)
    if num_images is not None:
        put(config, "lbsgd.num_images", num_images)
    config.pop(PASSES, None)


def require_images(values: Mapping[str, Any], num_images: int | None) -> None:
    """Raise ConfigError if an override gives another number of images than the data has."""
    key = KEYS["num_images"]
    if num_images is not None and key in values and values[key] != num_images:
        raise ConfigError(
            f"--set {key}={json.dumps(values[key])} disagrees with the {num_images} images of the data; leave it out"
        )


def require_precision(config: Mapping[str, Any], asked: str | None) -> None:
    """Raise ConfigError if --set chose another precision than --precision."""
    found = precision_of(config)
    if asked and found != asked:
        raise ConfigError(f"--precision {asked} and --set disagree, which gives {found}; leave one of them out")


def require_passes(config: Mapping[str, Any], values: Mapping[str, Any], world_size: int) -> None:
    """Raise ConfigError if an override of the number of passes is not the number that follows from the batches."""
    passes = config["train_batch_size"] / (world_size * config["train_micro_batch_size_per_gpu"])
    if values.get(PASSES) not in (None, passes):
        raise ConfigError(
            f"--set {PASSES}={json.dumps(values[PASSES])}: the batches and {world_size} processes make it {passes:g}; "
            "leave it out, or set train_micro_batch_size_per_gpu"
        )


def require_kept(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError if the derivation of numbers has changed an override."""
    for key, value in values.items():
        found = get(config, key)
        if key != PASSES and found != value and not (is_number(value) and is_close(found, value)):
            raise ConfigError(
                f"--set {key}={json.dumps(value)}: this number follows from the others, which make it "
                f"{json.dumps(found)}; set those instead, such as {source_of(key, config)}"
            )


def source_of(key: str, config: Mapping[str, Any]) -> str:
    """Return the key to set in place of a number that follows from others."""
    if key == "scheduler.params.warmup_num_steps":
        return "lbsgd.warmup.epochs" if get(config, "lbsgd.iterations") is None else "lbsgd.warmup.iterations"
    if key == "optimizer.params.weight_decay":
        return "lbsgd.weight_decay.base"
    return "train_batch_size" if key.startswith("lbsgd.warmup") else "lbsgd.linear_scaling.base_lr"


def meaning(config: Mapping[str, Any]) -> Any:
    """Return the part of a JSON that its purpose describes: update and schedule, not data order or hardware."""
    block = {key: value for key, value in config["lbsgd"].items() if key not in (*NO_NUMBER, "seed")}
    return block, config["train_batch_size"], config["optimizer"]


def drop_prose(config: dict[str, Any], recipe: Recipe, kept: Mapping[str, Any]) -> Recipe:
    """Remove purpose and paper's error from a JSON, unless an override gave them; return the recipe without them."""
    dropped = [name for name in PROSE if f"lbsgd.{name}" not in kept]
    for name in dropped:
        config["lbsgd"].pop(name, None)
    return recipe.model_copy(update=dict.fromkeys(dropped))
