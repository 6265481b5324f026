"""What a run is: one DeepSpeed JSON resolved for a number of processes and a data set (Sec. 2, 3 and 5.1).

`Plan.read` is where configuration is validated, once. A `Plan` that exists is right: kn = k·n = world_size ·
micro_batch · accumulation_steps, and DeepSpeed's own numbers are those of the linear scaling rule.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lbsgd.algorithm.schedule import Schedule
from lbsgd.config.checks import consistency as check
from lbsgd.config.checks.deviations import deviation_findings
from lbsgd.config.checks.lbsgd_json import deepspeed_findings
from lbsgd.config.checks.rerouted import rerouted_findings
from lbsgd.config.json_file import (
    PROSE,
    Overrides,
    differences,
    override,
    parse_recipe,
    precision_of,
    read_json,
    refuse,
)
from lbsgd.config.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """A resolved run. Names are the glossary's; `config` is what DeepSpeed is given, `recipe` the `lbsgd` block."""

    name: str
    config: dict[str, Any]
    recipe: Recipe
    schedule: Schedule
    world_size: int
    num_images: int
    global_batch: int
    num_workers: int
    per_worker_batch: int
    micro_batch: int
    accumulation_steps: int
    iterations_per_epoch: int
    num_iterations: int
    precision: str
    zero_stage: int
    changes: tuple[str, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def read(
        cls,
        source: str | Path | dict,
        world_size: int,
        num_images: int | None = None,
        overrides: Overrides = Overrides(),
    ) -> Plan:
        """Reads, checks and resolves a DeepSpeed JSON (its path, or the parsed object).

        num_images is the size of the training data at hand, by default the `lbsgd` block's own; on other data, and
        under overrides, the dependent numbers are derived again and the differences kept in `changes`.

        Raises ConfigError, one line a finding, where the JSON, the processes and the data cannot go together.
        """
        written = copy.deepcopy(source) if isinstance(source, dict) else read_json(source)
        where = "the configuration" if isinstance(source, dict) else str(source)
        refuse(where, deepspeed_findings(written))
        recipe = parse_recipe(where, written)
        refuse(where, check.recipe_findings(written, recipe))
        if not overrides.divide_otherwise():
            refuse(where, check.passes_findings(written, world_size))
        config, recipe = override(written, overrides, num_images)
        findings = [
            *deepspeed_findings(config),
            *check.recipe_findings(config, recipe),
            *deviation_findings(config, recipe),
            *rerouted_findings(config, recipe),
        ]
        refuse(where, findings)
        refuse(
            where,
            check.fit_findings(
                recipe, config["train_batch_size"], config["train_micro_batch_size_per_gpu"], world_size
            ),
        )
        return cls._resolve(
            config,
            recipe,
            world_size,
            name="config" if isinstance(source, dict) else Path(source).stem,
            changes=differences(written, config),
            warnings=tuple(str(finding) for finding in findings if finding.severity == "warning"),
        )

    @classmethod
    def _resolve(cls, config, recipe, world_size, **described) -> Plan:
        kn, micro = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
        n = recipe.batch_norm.per_worker_batch
        per_epoch = check.iterations_per_epoch(recipe.num_images, kn)
        return cls(
            config=config,
            recipe=recipe,
            world_size=world_size,
            num_images=recipe.num_images,
            schedule=Schedule(
                base_lr=recipe.linear_scaling.base_lr,
                reference_lr=config["optimizer"]["params"]["lr"],
                warmup_kind=recipe.warmup.kind,
                warmup_iterations=round(recipe.warmup.epochs * per_epoch),
                decay_iterations=tuple(round(epoch * per_epoch) for epoch in recipe.decay.epochs),
                decay_factor=recipe.decay.factor,
            ),
            global_batch=kn,
            num_workers=kn // n,
            per_worker_batch=n,
            micro_batch=micro,
            accumulation_steps=kn // (world_size * micro),
            iterations_per_epoch=per_epoch,
            num_iterations=recipe.epochs * per_epoch,
            precision=precision_of(config),
            zero_stage=check.get(config, "zero_optimization.stage", 0),
            **described,
        )

    @property
    def steps_per_print(self) -> int:
        """Iterations between two lines of the log; only then do numbers come to the host."""
        return self.config.get("steps_per_print") or 10

    def summary(self) -> dict[str, str]:
        """The numbers that a reader of the paper looks for first, as printed at start."""
        schedule = self.schedule
        warmup = f"{schedule.warmup_kind}, W = {schedule.warmup_iterations} iterations"
        described = {} if self.recipe.purpose is None else {"purpose": self.recipe.purpose}
        if self.recipe.paper_error_pct:
            described["in the paper"] = "top-1 error {:.2f} ± {:.2f} %".format(*self.recipe.paper_error_pct)
        return {
            **described,
            "global batch": f"kn = {self.global_batch:,} images = k {self.num_workers} workers x n {self.per_worker_batch}",
            "on": f"world size {self.world_size} x micro batch {self.micro_batch} x {self.accumulation_steps} "
            f"pass{'es' * (self.accumulation_steps != 1)}",
            "learning rate": f"η = {schedule.reference_lr:g} ({self.recipe.linear_scaling.rule} rule), "
            f"from η0 = {schedule.base_lr:g}",
            "warmup": "none" if schedule.warmup_kind == "none" else warmup,
            "iterations": f"{self.iterations_per_epoch:,} an epoch of {self.num_images:,} images, "
            f"{self.num_iterations:,} in {self.recipe.epochs} epochs",
            "precision": f"{self.precision}, ZeRO stage {self.zero_stage}",
        }

    def as_dict(self) -> dict[str, Any]:
        """The full plan as plain data, for the log and the checkpoint."""
        plan = asdict(self)
        plan["recipe"] = self.recipe.model_dump()
        return plan

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed: everything but how the work is divided among processes."""
        numbers = {
            key: check.get(self.config, f"optimizer.params.{key}")
            for key in ("lr", "momentum", "nesterov", "weight_decay")
        }
        return {
            "recipe": self.recipe.model_dump(exclude={*PROSE, "aggregation"}),
            "global_batch": self.global_batch,
            "optimizer": numbers,
        }
