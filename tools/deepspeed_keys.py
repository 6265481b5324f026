"""Describe the keys that DeepSpeed reads: found by a dict that notes look-ups, their values by types or trials."""

from __future__ import annotations

import copy
import enum
import itertools
import types
import typing
from typing import Any

import deepspeed_oracle
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import constants
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import logging as levels
from deepspeed_probe import describe
from pydantic.fields import FieldInfo

BASE = {"train_batch_size": 1, "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}
NOT_TRIED = {"optimizer", "scheduler", "train_batch_size", "autotuning"}  # rules know their types and arguments
WORDS = "fp16 bf16 fp32 float16 bfloat16 float32 torch.float16 torch.bfloat16 half mean sum warn ignore fail"
LEVELS = list(getattr(levels, "log_levels", ()))  # the words of log_level
MODES = [word for name, word in vars(constants).items() if name.endswith("_MODE") and isinstance(word, str)]
SENTINEL = "a_key_that_nothing_knows"


class Noting(dict[str, Any]):
    """A dict that notes in `asked` which keys are looked up in it and in the dicts inside it."""

    def __init__(self, content: Any, asked: set[str], path: str = ""):
        inner = {
            key: Noting(value, asked, f"{path}{key}.") if isinstance(value, dict) else value
            for key, value in content.items()
        }
        super().__init__(inner)
        self.asked, self.path = asked, path

    def note(self, key: Any) -> None:
        self.asked.add(f"{self.path}{key}")

    def __getitem__(self, key: Any) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.note(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # so that `key in config.keys()` is noted like `key in config`

    def __copy__(self) -> Noting:
        return self

    def __deepcopy__(self, memo: Any) -> Noting:
        return self


def keys() -> dict[str, Any]:
    """Return all keys: those that were removed, blocks with types, and keys whose values were tried."""
    removed = getattr(ds_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    asked = asked_keys(removed)
    models: dict[str, Any] = {}
    blocks = {name: model for name in sorted(asked) if (model := model_of(name))}
    blocks = {name: model for name, model in blocks.items() if name.split(".")[0] not in blocks or "." not in name}
    for model in blocks.values():
        add_model(model, models)
    tried = [name for name in sorted(asked) if not {name, name.split(".")[0]} & {*blocks, *NOT_TRIED}]
    switched = keys_if_enabled({path.partition(".")[0] for path in asked} - {*blocks, *NOT_TRIED}) - asked
    return {
        "removed": sorted(removed),
        "removed_zero": sorted(getattr(ds_config, "_REMOVED_ZERO_CONFIG_KEYS", {})),
        "models": models,
        "blocks": {name: model.__name__ for name, model in blocks.items()},
        "keys": {name: describe(place(name), [*WORDS.split(), *MODES, *LEVELS]) for name in tried}
        | {name: describe(place(name)) for name in blocks}
        | {name: {} for name in asked if name.split(".")[0] in NOT_TRIED}
        | {name: {} for name in switched},
    }


def asked_keys(removed: Any) -> set[str]:
    """Return the paths of all keys that DeepSpeed looks up, including those in blocks that it reads key by key."""
    asked: set[str] = set()
    content: dict[str, Any] = copy.deepcopy(BASE)
    for _ in range(3):  # each round looks into the blocks that the last one found
        deepspeed_oracle.train_noting(Noting(content, asked))
        for path in sorted(asked):
            block, _, key = path.partition(".")
            if not key and block not in content and block not in removed and takes_block(block):
                content[block] = {}
            elif key and "." not in key and isinstance(content.get(block), dict) and block != "optimizer":
                if key not in content[block] and takes_block(path):
                    content[block][key] = {}
    for block, mode in itertools.product({path.partition(".")[0] for path in asked if path.endswith(".mode")}, MODES):
        deepspeed_oracle.train_noting(Noting({**BASE, block: {"mode": mode}}, asked))  # each mode reads different keys
    return {path for path in asked if not path.startswith("optimizer.params.") and path not in removed}


def keys_if_enabled(blocks: set[str]) -> set[str]:
    """Return the paths of the keys that DeepSpeed reads if a block is the only one, and enabled.

    Some keys are read only next to another key, which gets the value 1. No values are tried, because an enabled
    feature may need another network than this one. A block that DeepSpeed refuses with `enabled` alone is left out,
    because it needs more keys.
    """
    found: set[str] = set()
    for block in sorted(blocks):
        if why_not(block, {"enabled": True}):
            continue
        asked: set[str] = set()
        for inside in ({}, {"enabled": False}, {"enabled": True}):
            deepspeed_oracle.train_noting(Noting({**BASE, block: inside}, asked))
        for path in sorted(asked):
            name = path.removeprefix(f"{block}.")
            if name not in (path, "enabled") and "." not in name:
                deepspeed_oracle.train_noting(Noting({**BASE, block: {"enabled": True, name: 1}}, asked))
        found |= {path for path in asked if path.startswith(f"{block}.")}
    return found


def takes_block(path: str) -> bool:
    """Whether DeepSpeed reads a key as a block: it accepts an empty block and refuses a number."""
    return not why_not(path, {}) and bool(why_not(path, 1))


def why_not(path: str, value: Any) -> str:
    """Return why DeepSpeed refuses a value at a path of a small JSON."""
    config: dict[str, Any] = copy.deepcopy(BASE)
    *blocks, last = path.split(".")
    place = config
    for name in blocks:
        place = place.setdefault(name, {})
    place[last] = value
    return deepspeed_oracle.refusal(config, 2)


def place(path: str) -> Any:
    """Return the trial of values at a path."""

    def trial(value: Any) -> bool:
        why = why_not(path, value)
        return not why or why.startswith("the weights")

    return trial


def model_of(name: str) -> type[DeepSpeedConfigModel] | None:
    """Return the pydantic model that a top-level block is passed to, if there is one."""
    received: list[type] = []
    original = DeepSpeedConfigModel.__init__

    def noting(self: Any, *arguments: Any, **data: Any) -> None:
        if SENTINEL in data:
            received.append(type(self))
        original(self, *arguments, **data)

    DeepSpeedConfigModel.__init__ = noting
    try:
        why_not(name, {SENTINEL: 1})
    finally:
        DeepSpeedConfigModel.__init__ = original
    return received[0] if received else None


def add_model(model: type[DeepSpeedConfigModel], models: dict[str, Any]) -> str:
    """Add a model and those inside it to the table, and return its name."""
    if model.__name__ in models:
        return model.__name__
    models[model.__name__] = {}
    fields = {}
    checked = {name for each in model.__pydantic_decorators__.field_validators.values() for name in each.info.fields}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        new = extra.get("new_param", "") if extra.get("deprecated") and extra.get("set_new_param", True) else ""
        kind = type_of(field.annotation, models, field)
        described = describe(field_trial(model, name)) if name in checked or is_foreign(kind) else {}
        fields[name] = {
            "type": kind,
            **({"alias": field.alias} if field.alias and field.alias != name else {}),
            **({"required": True} if field.is_required() else {}),
            **({"replaced_by": new} if new else {}),
            **({"values": described} if described else {}),
        }
    models[model.__name__] = {"extra": model.model_config.get("extra", "ignore"), "fields": fields}
    return model.__name__


def is_foreign(kind: Any) -> bool:
    """Whether a field's type is not a JSON type, such as torch.dtype, or may be one, so that only trials can tell."""
    return kind == "any" or (isinstance(kind, dict) and "any" in kind.get("any_of", ()))


def field_trial(model: type[DeepSpeedConfigModel], name: str) -> Any:
    """Return the trial of a field that its model checks by code."""

    def trial(value: Any) -> bool:
        try:
            model(**{name: value})
        except Exception:  # noqa: BLE001  any error is its refusal
            return False
        return True

    return trial


def type_of(annotation: Any, models: dict[str, Any], field: FieldInfo | None = None) -> Any:
    """Return an annotation as JSON: a name, or {"any_of"/"list"/"dict"/"enum"/"model": ...}, with its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = {
        name: getattr(each, name)
        for each in (field.metadata if field else ())
        for name in ("gt", "ge", "lt", "le")
        if getattr(each, name, None) is not None
    }
    found: Any
    if origin in (typing.Union, types.UnionType):
        found = {"any_of": [type_of(each, models) for each in inner]}
    elif origin is typing.Literal:
        found = {"enum": list(inner)}
    elif origin in (list, tuple, set):
        found = {"list": type_of(inner[0], models) if inner else "any"}
    elif origin is dict:
        found = {"dict": type_of(inner[1], models) if inner else "any"}
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        number = issubclass(annotation, int)
        found = {"enum": [int(each.value) if number else each.value for each in annotation]}
        assert all(isinstance(each, (str, int)) for each in found["enum"]), f"JSON has no value of {annotation}"
    elif isinstance(annotation, type) and issubclass(annotation, DeepSpeedConfigModel):
        found = {"model": add_model(annotation, models)}
    elif annotation in (int, float, bool, str) or isinstance(annotation, type) and issubclass(annotation, int):
        found = next(each.__name__ for each in (bool, int, float, str) if issubclass(annotation, each))
    else:
        found = {type(None): "null", list: {"list": "any"}, dict: {"dict": "any"}}.get(annotation, "any")
    return {"of": found, **bounds} if bounds else found
