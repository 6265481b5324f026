"""A run: one DeepSpeed JSON resolved for a number of processes and a data set (Sec. 2, 3 and 5.1).

`Plan.read` is where configuration is validated, once. A `Plan` that exists is right: kn = k·n = world_size ·
micro_batch · accumulation_steps, and DeepSpeed's own numbers are those of the linear scaling rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from lbsgd.algorithm.schedule import Schedule
from lbsgd.config.aggregation import DecidesReduction
from lbsgd.config.checks import fit
from lbsgd.config.checks.block import parse_recipe, require_block
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import CONSISTENCY, DEVIATIONS, deepspeed_findings
from lbsgd.config.checks.rule import findings_by
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import (
    decay_in_iterations,
    iterations_per_epoch,
    length_in_iterations,
    start_lr,
    warmup_in_iterations,
)
from lbsgd.config.json_file import read_json
from lbsgd.config.keypath import BUCKET, DEFAULT_BUCKET, PASSES, differences, get
from lbsgd.config.overrides import Overrides, override, require_passes
from lbsgd.config.precision import precision_of
from lbsgd.config.schema import NO_NUMBER, PROSE, Recipe
from lbsgd.errors import ConfigError, require_type
from lbsgd.units import counted


@dataclass(frozen=True)
class Plan(DecidesReduction):
    """A resolved run of k = num_workers workers with n = per_worker_batch images each: kn = global_batch.

    `config` is DeepSpeed's own JSON, `recipe` its `lbsgd` block. changes are lines `key: old -> new`; warnings, too.
    """

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
        source: str | Path | Mapping[str, Any],
        world_size: int,
        num_images: int | None = None,
        overrides: Overrides | None = None,
    ) -> Plan:
        """Read, check and resolve a DeepSpeed JSON (its path, or the parsed object).

        num_images is the size of the training data at hand, by default the `lbsgd` block's own. For other data and
        with overrides, the dependent numbers are derived again and the differences kept in `changes`.

        Raises ConfigError, one line per finding, if the JSON, the processes and the data do not fit together.
        """
        overrides = Overrides() if overrides is None else overrides
        require_type(source, (str, PathLike, Mapping), "the JSON", "give its path, or the parsed object")
        require_type(world_size, Integral, "world_size", "give the number of processes as an int")
        require_type(overrides, Overrides, "overrides", "give lbsgd.Overrides(...)")
        world_size = int(world_size)  # because JSON has no numpy integers
        if isinstance(num_images, Integral) and not isinstance(num_images, bool):
            num_images = int(num_images)
        if world_size < 1:
            raise ConfigError(f"world_size is {world_size}; give the number of processes, 1 or more")
        if isinstance(source, Mapping):
            name, where, written = "config", "the configuration", dict(source)
        else:
            name, where, written = Path(source).stem, str(source), read_json(source)
        require_sound(where, written, None if overrides.divide_otherwise() else world_size)
        config, recipe = override(written, overrides, num_images)
        require_passes(config, overrides.values(), world_size)
        planned = Planned(config, recipe, world_size)
        findings = deepspeed_findings(config) + findings_by(CONSISTENCY + DEVIATIONS, planned)
        refuse(where, findings)
        misfits = findings_by(fit.RULES, planned)
        refuse(where, misfits)
        return resolve(
            planned,
            name=name,
            changes=differences(without_prose(written), without_prose(config)),
            warnings=tuple(str(finding) for finding in findings + misfits if finding.severity == "warning"),
        )

    @property
    def num_epochs(self) -> float:
        """The epochs of the run; a run that is counted in iterations may end inside an epoch."""
        return self.recipe.epochs or self.num_iterations / self.iterations_per_epoch

    @property
    def epochs(self) -> int:
        """The number of epochs to loop over. Raises ConfigError for a run that is counted in iterations."""
        if self.recipe.epochs is None:
            raise ConfigError(f"{self.name} is counted in iterations; end your loop after plan.num_iterations updates")
        return self.recipe.epochs

    @property
    def steps_per_print(self) -> int:
        """Iterations between two lines of the log; only for these are numbers copied to the host."""
        return int(self.config.get("steps_per_print") or 10)

    @property
    def bucket_elements(self) -> int:
        """The number of gradient elements that are reduced at a time."""
        return int(get(self.config, BUCKET, DEFAULT_BUCKET))

    @property
    def overlaps(self) -> bool:
        """Whether the JSON wants gradients reduced during back-propagation."""
        return get(self.config, "zero_optimization.overlap_comm") is True

    def summary(self, training: bool = True) -> dict[str, str]:
        """Return the numbers that a reader of the paper looks for first, as printed at the start.

        training: whether to include the updates and their schedule, which an evaluation does not have.
        """
        schedule, recipe = self.schedule, self.recipe
        described = {} if recipe.purpose is None else {"purpose": recipe.purpose}
        if recipe.paper_error_pct:
            described["in the paper"] = "top-1 error {:.2f} ± {:.2f} %".format(*recipe.paper_error_pct)
        processes = f"world size {self.world_size} x micro batch {self.micro_batch}"
        precision = {"precision": f"{self.precision}, ZeRO stage {self.zero_stage}"}
        if not training:
            return {**described, "on": processes, **precision}
        passes = counted(self.accumulation_steps, "pass")
        W = schedule.warmup_iterations
        return {
            **described,
            "global batch": f"kn = {self.global_batch:,} images = k {self.num_workers} workers x n "
            f"{self.per_worker_batch}",
            "on": f"{processes} x {passes}",
            "learning rate": f"η = {schedule.reference_lr:g} ({recipe.linear_scaling.rule} rule)"
            + (f", from η0 = {schedule.base_lr:g}" if W else ""),
            "warmup": f"{schedule.warmup_kind}, W = {W:,} iterations" if W else "none",
            "iterations": f"{self.iterations_per_epoch:,} per epoch of {self.num_images:,} images, "
            f"{self.num_iterations:,} in {self.num_epochs:.4g} epochs",
            **precision,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the full plan as plain data, for the log and the checkpoint."""
        plan = asdict(self)
        plan["recipe"] = self.recipe.model_dump()
        return plan

    def identity(self) -> dict[str, Any]:
        """Return the part of the plan that a resumed run must keep: everything but the division among processes."""
        params = ("lr", "momentum", "nesterov", "weight_decay")
        return {
            "recipe": self.recipe.model_dump(exclude=set(NO_NUMBER)),
            "global_batch": self.global_batch,
            "optimizer": {key: get(self.config, f"optimizer.params.{key}") for key in params},
        }


def plan_for(
    world_size: int, config: Plan | str | Path | dict[str, Any], num_images: int | None, overrides: Overrides | None
) -> Plan:
    """Return a JSON's plan for world_size processes, or the plan given. Raises ConfigError if that is for others."""
    if not isinstance(config, Plan):
        return Plan.read(config, world_size, num_images, overrides)
    if num_images is not None or overrides is not None:
        raise ConfigError(f"{config.name}: a plan has its num_images and overrides; give them to Plan.read")
    if config.world_size != world_size:
        raise ConfigError(
            f"the plan is for {counted(config.world_size, 'process')}, but {world_size} run; read it for {world_size}"
        )
    return config


def require_plan(plan: Plan) -> None:
    """Raise ConfigError for anything but a plan, such as the path of a JSON."""
    require_type(plan, Plan, "the plan", "make one by lbsgd.Plan.read(FILE, world_size, num_images)")


def require_sound(where: str, config: Mapping[str, Any], world_size: int | None) -> None:
    """Raise ConfigError for a JSON that contradicts itself or, if given, the number of processes."""
    require_block(where, config)  # first, because other errors may follow from a missing block
    refuse(where, deepspeed_findings(config))
    planned = Planned(config, parse_recipe(where, config), world_size or 1)
    refuse(where, findings_by(CONSISTENCY, planned))
    if world_size:
        refuse(where, findings_by(fit.PASSES_RULES, planned))


def without_prose(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON without the keys that explain it, and without the number of passes, which is derived."""
    block = {key: value for key, value in config["lbsgd"].items() if key not in PROSE}
    return {**{key: value for key, value in config.items() if key != PASSES}, "lbsgd": block}


def resolve(planned: Planned, *, name: str, changes: tuple[str, ...], warnings: tuple[str, ...]) -> Plan:
    """Return the plan of a JSON that has passed all rules."""
    config, recipe, world_size = dict(planned.config), planned.recipe, planned.world_size
    kn, n, micro_batch = planned.global_batch, planned.per_worker_batch, planned.micro_batch
    per_epoch = iterations_per_epoch(recipe.num_images, kn)
    return Plan(
        name=name,
        config=config,
        recipe=recipe,
        schedule=schedule_of(recipe, config["optimizer"]["params"]["lr"], kn),
        world_size=world_size,
        num_images=recipe.num_images,
        global_batch=kn,
        num_workers=kn // n,
        per_worker_batch=n,
        micro_batch=micro_batch,
        accumulation_steps=kn // (world_size * micro_batch),
        iterations_per_epoch=per_epoch,
        num_iterations=length_in_iterations(recipe, kn),
        precision=precision_of(config),
        zero_stage=get(config, "zero_optimization.stage", 0),
        changes=changes,
        warnings=warnings,
    )


def schedule_of(recipe: Recipe, reference_lr: float, global_batch: int) -> Schedule:
    """Return the schedule of a recipe, with its lengths in iterations and η from DeepSpeed's blocks."""
    return Schedule(
        base_lr=start_lr(recipe, reference_lr),
        reference_lr=reference_lr,
        warmup_kind=recipe.warmup.kind,
        warmup_iterations=warmup_in_iterations(recipe, global_batch),
        decay_iterations=decay_in_iterations(recipe, global_batch),
        decay_factor=recipe.decay.factor,
    )
