"""The keys and values that one version of DeepSpeed accepts, as tools/deepspeed_schema.py wrote them from DeepSpeed.

This module imports neither torch nor DeepSpeed, so that `lbsgd check` starts at once and judges files for any version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lbsgd import units
from lbsgd.config.accepted.values import field_names
from lbsgd.errors import ConfigError

VERSIONS = ("0.16", "0.17", "0.18", "0.19")  # the newest patch of each
NEWEST = VERSIONS[-1]
PROGRAM_KEYS = frozenset({"lbsgd"})  # read by lbsgd, by no version of DeepSpeed

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Accepted:
    """The keys, optimizers and schedulers of one version of DeepSpeed, and the values that they take."""

    version: str  # with the patch number
    keys: Mapping[str, Entry]  # by path, with the description of their values
    removed: frozenset[str]
    removed_zero: frozenset[str]
    blocks: Mapping[str, str]  # the pydantic model that parses a top-level block
    models: Mapping[str, Entry]
    optimizers: Mapping[str, Entry]  # DeepSpeed's own, in lower case
    schedulers: Mapping[str, Entry]
    torch_optimizers: Mapping[str, Entry]
    torch_schedulers: Mapping[str, Entry]
    zero_tested: frozenset[str]  # optimizers that ZeRO takes without zero_allow_untested_optimizer
    default_clipping: float
    refuses: frozenset[str]  # codes of rules about several keys whose violation this version refuses

    @cached_property
    def top_level(self) -> frozenset[str]:
        """The keys that DeepSpeed or lbsgd reads at the top level."""
        return frozenset(path for path in (*self.keys, *self.blocks) if "." not in path) | PROGRAM_KEYS

    def inside(self, block: str) -> frozenset[str]:
        """The keys that DeepSpeed reads one by one inside a block; it ignores all others there."""
        return self.keys_of_blocks.get(block, frozenset())

    @cached_property
    def keys_of_blocks(self) -> Mapping[str, frozenset[str]]:
        """The keys of `inside` for each top-level block that has some."""
        found: dict[str, set[str]] = {}
        for block, _, inner in (path.partition(".") for path in self.keys):
            if inner:
                found.setdefault(block, set()).add(inner)
        return {block: frozenset(inner) for block, inner in found.items()}

    def reads(self, key: str) -> bool:
        """Whether a key at the top level, or directly inside a block there, is read."""
        block, _, inner = key.partition(".")
        if not inner:
            return key in self.top_level
        if block in self.blocks:
            return inner in self.field_names(self.blocks[block])
        return inner in {path.partition(".")[0] for path in self.inside(block)}

    def optimizer(self, kind: Any, params: Any = None) -> Entry | None:
        """Return an optimizer: DeepSpeed's in any case, torch's by its exact name or in place of DeepSpeed's."""
        if not isinstance(kind, str):
            return None
        if kind.lower() in ("adam", "adamw") and isinstance(params, dict) and params.get("torch_adam"):
            decoupled = kind.lower() == "adamw" or params.get("adam_w_mode", True)
            entry = self.torch_optimizers["AdamW" if decoupled else "Adam"]
            return {**entry, "params": {**entry["params"], "torch_adam": {}, "adam_w_mode": {}}}
        return self.optimizers.get(kind.lower()) or self.torch_optimizers.get(kind)

    def scheduler(self, kind: Any) -> Entry | None:
        """Return a scheduler: DeepSpeed's own first, then torch's."""
        return (self.schedulers.get(kind) or self.torch_schedulers.get(kind)) if isinstance(kind, str) else None

    def field_names(self, model: str) -> frozenset[str]:
        """The keys that a pydantic model takes, aliases included."""
        return field_names(self.models[model])


@lru_cache
def accepted(version: str | None = None) -> Accepted:
    """Return the schema of a version such as 0.18; None stands for the installed version, or the newest known one."""
    version = version or installed()
    if version not in VERSIONS:
        raise ConfigError(f"DeepSpeed {version} is not known here; known are {', '.join(VERSIONS)}")
    own, torch = (read(name) for name in (f"deepspeed_{version}", "torch"))
    return Accepted(
        version=own["version"],
        keys=own["keys"],
        removed=frozenset(own["removed"]),
        removed_zero=frozenset(own["removed_zero"]),
        blocks=own["blocks"],
        models=own["models"],
        optimizers=own["optimizers"],
        schedulers=own["schedulers"],
        torch_optimizers=torch["optimizers"],
        torch_schedulers=torch["schedulers"],
        zero_tested=frozenset(own["zero_tested"]),
        default_clipping=own["default_clipping"],
        refuses=frozenset(own["refuses"]),
    )


def read(name: str) -> dict[str, Any]:
    """Return a file of the schema."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return content


@lru_cache
def installed() -> str:
    """Return the installed version of DeepSpeed, such as 0.19; the newest known one if it is missing or unknown."""
    version = short(units.installed("deepspeed") or NEWEST)
    return version if version in VERSIONS else NEWEST


@lru_cache(maxsize=1024)
def first_to_read(key: str, version: str) -> str | None:
    """Return the first version after `version` (such as 0.16.9) that reads a key; None if no later one does."""
    later = VERSIONS[VERSIONS.index(short(version)) + 1 :]
    return next((each for each in later if accepted(each).reads(key)), None)


def short(version: str) -> str:
    """Return 0.16 for 0.16.9."""
    return ".".join(version.split(".")[:2])
