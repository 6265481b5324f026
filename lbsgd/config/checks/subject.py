"""The subjects of the rules: a JSON by itself, and one whose `lbsgd` block has been parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.checks.rule import Kind
from lbsgd.config.keypath import block_of, enabled, get
from lbsgd.config.schema import Recipe


@dataclass(frozen=True)
class Document:
    """A DeepSpeed JSON, of which nothing is known yet: any value may stand anywhere."""

    config: Mapping[str, Any]
    kind: Kind = "lbsgd"

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at a key path, or the default."""
        return get(self.config, key, default)

    def block(self, name: str) -> Mapping[str, Any]:
        """Return the block at a key path, empty where there is none."""
        return block_of(self.config, name)

    def enabled(self, block: str) -> bool:
        """Whether a precision block is switched on."""
        return enabled(self.config, block)

    @property
    def plain(self) -> bool:
        """Whether no lbsgd block stands beside DeepSpeed's own."""
        return self.kind == "plain"

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; 0 where none is given, None where it is "auto" or no stage at all."""
        stage = self.get("zero_optimization.stage", 0)
        return stage if type(stage) is int and 0 <= stage <= 3 else None

    @property
    def is_sgd(self) -> bool:
        """Whether the optimizer block names SGD, in whatever case."""
        return str(self.get("optimizer.type")).lower() == "sgd"


@dataclass(frozen=True)
class Planned:
    """A JSON with valid batch sizes, and the recipe in its `lbsgd` block, on so many processes."""

    config: Mapping[str, Any]
    recipe: Recipe
    world_size: int = 1

    def get(self, key: str) -> Any:
        """Return the value at a key path, or None."""
        return get(self.config, key)

    @property
    def global_batch(self) -> int:
        """The paper's kn."""
        return int(self.config["train_batch_size"])

    @property
    def micro_batch(self) -> int:
        """Images of one process in one pass."""
        return int(self.config["train_micro_batch_size_per_gpu"])

    @property
    def per_worker_batch(self) -> int:
        """The paper's n."""
        return self.recipe.batch_norm.per_worker_batch
