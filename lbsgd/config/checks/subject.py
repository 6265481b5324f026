"""The subjects of the rules: an unparsed JSON, and a JSON whose `lbsgd` block has been parsed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.accepted.schema import VERSIONS, Accepted, Entry, accepted, first_to_read, short
from lbsgd.config.accepted.values import as_bool, as_whole_number
from lbsgd.config.aggregation import DecidesReduction
from lbsgd.config.keypath import block_of, enabled, get
from lbsgd.config.schema import Recipe


@dataclass(frozen=True)
class Document:
    """A DeepSpeed JSON of which nothing is known yet: any key may have any value."""

    config: Mapping[str, Any]
    version: str | None = None  # DeepSpeed's, such as 0.18; None is the installed one

    @property
    def accepted(self) -> Accepted:
        """The schema of this version of DeepSpeed."""
        return accepted(self.version)

    def refused(self, code: str) -> bool:
        """Whether this version of DeepSpeed refuses a rule's violation; a file with an lbsgd block is judged anyway."""
        return not self.plain or code in self.accepted.refuses

    def since(self, version: str) -> bool:
        """Whether it is for this version of DeepSpeed or a later one; a file with an lbsgd block is judged anyway."""
        return not self.plain or VERSIONS.index(short(self.accepted.version)) >= VERSIONS.index(version)

    def reader_to_come(self, key: str) -> str | None:
        """Return the first later version that reads a top-level key or a key directly inside a top-level block."""
        return first_to_read(key, self.accepted.version)

    def beside_intent(self, correction: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return a correction that only an lbsgd block allows, because it changes what a plain JSON may mean."""
        return None if self.plain else correction

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at a key path, or the default."""
        return get(self.config, key, default)

    def block(self, name: str) -> Mapping[str, Any]:
        """Return the block at a key path, or an empty block if there is none."""
        return block_of(self.config, name)

    def is_on(self, key: str, default: bool = False) -> bool:
        """Whether DeepSpeed's models take the value at a key path, or the default, as true."""
        return as_bool(self.get(key, default))

    def enabled(self, block: str) -> bool:
        """Whether a precision block is switched on: by true, in a plain JSON by anything DeepSpeed takes for it."""
        if not self.plain:
            return enabled(self.config, block)
        switch = self.get(f"{block}.enabled", False)
        if block == "bf16" and "bf16" not in self.config:
            switch = self.get("bfloat16.enabled", False)
        return bool(switch) if block == "torch_autocast" else switch != "auto" and as_bool(switch)

    @property
    def plain(self) -> bool:
        """Whether the JSON has no lbsgd block."""
        return "lbsgd" not in self.config

    @property
    def stage(self) -> int | None:
        """The ZeRO stage: 0 if none is given, None if it is "auto" or not a stage."""
        if self.plain and self.get("zero_optimization") is True:
            return 1  # the first versions of ZeRO were switched on by true
        stage = self.get("zero_optimization.stage", 0)
        if self.plain and type(stage) is not int:
            stage = as_whole_number(stage)
        return stage if type(stage) is int and 0 <= stage <= 3 else None

    @property
    def weights(self) -> str:
        """The type of the weights: fp16 or bf16 if that block is switched on, else fp32."""
        return next((block for block in ("fp16", "bf16") if self.enabled(block)), "fp32")

    @property
    def optimizer(self) -> str:
        """The optimizer's type in lower case, as DeepSpeed looks up its own optimizers."""
        return str(self.get("optimizer.type")).lower()

    @property
    def names_optimizer(self) -> bool:
        """Whether the file names an optimizer, known or not, instead of leaving it to the program."""
        return self.get("optimizer.type") not in (None, "auto")

    @property
    def optimizer_entry(self) -> Entry | None:
        """The optimizer's entry in the schema; None if DeepSpeed knows no optimizer of this name (D06)."""
        return self.accepted.optimizer(self.get("optimizer.type"), self.get("optimizer.params"))

    @property
    def scheduler_entry(self) -> Entry | None:
        """The scheduler's entry in the schema; None if DeepSpeed knows no scheduler of this name (D48)."""
        return self.accepted.scheduler(self.get("scheduler.type"))

    @property
    def is_sgd(self) -> bool:
        """Whether the optimizer block names SGD, in any case."""
        return self.optimizer == "sgd"

    def has_own_optimizer(self, kinds: Container[str]) -> bool:
        """Whether DeepSpeed builds its own optimizer of one of these types, not torch's Adam instead."""
        return self.optimizer in kinds and not self.get("optimizer.params.torch_adam")


@dataclass(frozen=True)
class Planned(DecidesReduction):
    """A JSON with valid batch sizes, the recipe in its `lbsgd` block, and the number of processes."""

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
        """Images that one process takes in one pass."""
        return int(self.config["train_micro_batch_size_per_gpu"])

    @property
    def per_worker_batch(self) -> int:
        """The paper's n."""
        return self.recipe.batch_norm.per_worker_batch

    @property
    def has_whole_workers(self) -> bool:
        """Whether kn is a multiple of n; nothing can be derived from any other batch (R02)."""
        return self.global_batch % self.per_worker_batch == 0
