"""Everything that `lbsgd plan` knows: the plan on N GPUs, the memory that it takes, and its predicted time."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

from lbsgd.commands.plan_figure import stretches
from lbsgd.commands.recipe_flags import overrides_of
from lbsgd.config.json_file import read_json
from lbsgd.config.keypath import PASSES, is_count
from lbsgd.config.memory import Memory, memory, network
from lbsgd.config.overrides import KEYS, Given, Overrides, override, require_agreement
from lbsgd.config.plan import Plan, require_sound
from lbsgd.config.prediction import (
    ALGORITHMS,
    Prediction,
    Reduction,
    bytes_per_iteration,
    no_overlap,
    predict,
    reduction_of,
)
from lbsgd.config.traffic import PRESETS, Machines, running


@dataclass(frozen=True)
class Outlook:
    """A plan for one network, with its memory at each ZeRO stage and a prediction for each all-reduce algorithm.

    running: the algorithm that NCCL runs on these machines, and why.
    """

    plan: Plan
    model: str
    machines: Machines
    reduction: Reduction
    memories: tuple[Memory, ...]
    predictions: tuple[Prediction, ...]
    running: tuple[str, str]

    @classmethod
    def of(cls, given: argparse.Namespace) -> Outlook:
        """Return the outlook for the flags of `lbsgd plan`.

        Raises ConfigError if flags and JSON disagree, or if the JSON demands an aggregation that cannot run on these
        machines.
        """
        plan, size, machines = read_plan(given), network(given.model), machines_of(given)
        reduction, images = reduction_of(plan, size), plan.global_batch // plan.world_size

        def prediction(algorithm: str) -> Prediction:
            return predict(images, plan.accumulation_steps, plan.world_size, reduction, machines, algorithm)

        memories = tuple(memory(plan, size, stage) for stage in (0, 1, 2))
        predictions = tuple(map(prediction, ALGORITHMS))
        algorithm = running(plan, machines.gpus_per_server)
        return cls(plan, given.model, machines, reduction, memories, predictions, algorithm)

    @property
    def is_estimated(self) -> bool:
        """Whether memory and time can be estimated: only for classifiers, whose layers and speeds are known."""
        return self.plan.recipe.detection is None

    @property
    def overlaps(self) -> bool:
        """Whether the JSON lets aggregation overlap back-propagation."""
        return no_overlap(self.plan, self.reduction) is None

    @property
    def has_speed(self) -> bool:
        """Whether the speed is that of this network at this resolution: given by a flag, or ResNet-50's own."""
        its_own = self.model == "resnet50" and self.plan.recipe.augmentation.resolution == 224
        return self.machines.precision is None or its_own

    def as_dict(self) -> dict[str, Any]:
        """Return everything on the screen as plain data, in seconds and bytes."""
        keys = ("epochs", "iterations", "lr")
        rates = [dict(zip(keys, row, strict=True)) for row in stretches(self.plan)]
        known = {**self.plan.as_dict(), "learning_rates": rates}
        if not self.is_estimated:
            return known
        return {
            **known,
            "memory_bytes": {f"stage_{each.stage}": {**asdict(each), "total": each.total} for each in self.memories},
            "algorithm": self.running[0],
            "bytes_per_iteration": bytes_per_iteration(self.reduction, self.plan.world_size),
            "images_per_second": self.machines.images_per_second if self.has_speed else None,
            "overlaps": self.overlaps,
            "prediction": {each.algorithm: prediction_as_dict(each, self.has_speed) for each in self.predictions},
        }


def prediction_as_dict(prediction: Prediction, has_speed: bool) -> dict[str, Any]:
    """Return a prediction as plain data. Without a speed it has only the numbers that do not depend on one."""
    if not has_speed:
        kept = ("algorithm", "gradient_seconds", "weight_seconds")
        return {key: value for key, value in asdict(prediction).items() if key in kept}
    return {
        **asdict(prediction),
        "without_overlap_seconds": prediction.without_overlap,
        "with_overlap_seconds": prediction.with_overlap,
        "efficiency_without_overlap": prediction.efficiency(False),
        "efficiency_with_overlap": prediction.efficiency(True),
    }


def machines_of(given: argparse.Namespace) -> Machines:
    preset = PRESETS[given.machine]
    return replace(
        preset,
        images_per_second=given.images_per_second or preset.images_per_second,
        gpus_per_server=given.gpus_per_server or preset.gpus_per_server,
        link_gbit=given.link_gbit or preset.link_gbit,
        latency_seconds=given.latency_us * 1e-6,
        precision=None if given.images_per_second else preset.precision,
    )


def read_plan(given: argparse.Namespace) -> Plan:
    """Read the plan for the given number of GPUs, by default as many as take the global batch in one pass."""
    overrides = overrides_of(given)
    if given.num_images:
        images = Given(f"--num_images {given.num_images}", KEYS["num_images"], given.num_images)
        require_agreement([images, *overrides.given()])
    gpus = default_gpus(given.file, overrides) if given.gpus is None else given.gpus
    return Plan.read(given.file, gpus, given.num_images, overrides)


def default_gpus(file: str, overrides: Overrides) -> int:
    """Return kn / max(n, micro batch), divided by the passes in flags or file, and at least 1."""
    config = read_json(file)
    require_sound(file, config, None)  # reports mistakes in the file before flags change it
    changed, recipe = override(config, overrides)
    kn, micro_batch = changed["train_batch_size"], changed["train_micro_batch_size_per_gpu"]
    written = overrides.values().get(PASSES) if overrides.divide_otherwise() else config.get(PASSES)
    passes = written if is_count(written) else 1
    return max(1, kn // (max(recipe.batch_norm.per_worker_batch, micro_batch) * passes))
