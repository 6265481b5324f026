"""Everything that `lbsgd plan` knows: the plan on N GPUs, the memory it takes and the time it is predicted to take."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from lbsgd.commands.plan_figure import stretches
from lbsgd.commands.plan_network import PRESETS, running
from lbsgd.commands.plan_time import (
    ALGORITHMS,
    Machines,
    Prediction,
    Reduction,
    bytes_per_iteration,
    predict,
    reduction_of,
)
from lbsgd.config.checks.block import parse_recipe
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import deepspeed_findings
from lbsgd.config.json_file import read_json
from lbsgd.config.keypath import is_count
from lbsgd.config.memory import Memory, memory, network
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan


@dataclass(frozen=True)
class Outlook:
    """A plan for one network, with its memory at each ZeRO stage and a prediction for each all-reduce algorithm."""

    plan: Plan
    model: str
    machines: Machines
    reduction: Reduction
    memories: tuple[Memory, ...]
    predictions: tuple[Prediction, ...]

    @classmethod
    def of(cls, given: argparse.Namespace) -> Outlook:
        """Compute it from the flags of `lbsgd plan`. Raises ConfigError where JSON and flags cannot go together."""
        plan, size, machines = read_plan(given), network(given.model), machines_of(given)
        reduction, images = reduction_of(plan, size), plan.global_batch // plan.world_size

        def prediction(algorithm: str) -> Prediction:
            return predict(images, plan.accumulation_steps, plan.world_size, reduction, machines, algorithm)

        memories = tuple(memory(plan, size, stage) for stage in (0, 1, 2))
        return cls(plan, given.model, machines, reduction, memories, tuple(map(prediction, ALGORITHMS)))

    @property
    def running(self) -> tuple[str, str]:
        """The algorithm that runs on such machines with NCCL, and why."""
        return running(self.plan, self.machines.gpus_per_server)

    @property
    def is_estimated(self) -> bool:
        """Whether memory and time are known: of classifiers, whose layers and speeds the estimates are made of."""
        return self.plan.recipe.detection is None

    def as_dict(self) -> dict[str, Any]:
        """Return everything on the screen for machines, in seconds and bytes."""
        keys = ("epochs", "iterations", "lr")
        rates = [dict(zip(keys, row, strict=True)) for row in stretches(self.plan)]
        if not self.is_estimated:
            return {**self.plan.as_dict(), "learning_rates": rates}
        return {
            **self.plan.as_dict(),
            "learning_rates": rates,
            "memory_bytes": {f"stage_{each.stage}": {**asdict(each), "total": each.total} for each in self.memories},
            "algorithm": self.running[0],
            "bytes_an_iteration": bytes_per_iteration(self.reduction, self.plan.world_size),
            "prediction": {each.algorithm: prediction_as_dict(each) for each in self.predictions},
        }


def prediction_as_dict(prediction: Prediction) -> dict[str, Any]:
    return {
        **asdict(prediction),
        "without_overlap_seconds": prediction.without_overlap,
        "with_overlap_seconds": prediction.with_overlap,
        "efficiency_without_overlap": prediction.efficiency(False),
        "efficiency_with_overlap": prediction.efficiency(True),
    }


def machines_of(given: argparse.Namespace) -> Machines:
    preset = PRESETS[given.machine]
    return Machines(
        given.images_per_second or preset.images_per_second,
        given.gpus_per_server or preset.gpus_per_server,
        given.link_gbit or preset.link_gbit,
        given.latency_us * 1e-6,
        preset.source,
    )


def read_plan(given: argparse.Namespace) -> Plan:
    """Read the plan for the GPUs asked for, by default as many as take the global batch in one pass."""
    overrides = Overrides(given.global_batch, given.micro_batch, settings=tuple(given.settings))
    gpus = default_gpus(given.file, overrides) if given.gpus is None else given.gpus
    return Plan.read(given.file, gpus, given.images, overrides)


def default_gpus(file: str, overrides: Overrides) -> int:
    """Return kn / max(n, micro batch), and by the passes that a file says, at least 1.

    Plan.read refuses numbers of a wrong type and names their keys.
    """
    config = read_json(file)
    refuse(file, deepspeed_findings(config))
    values = {**config, **overrides.values()}
    kn, micro_batch = values["train_batch_size"], values["train_micro_batch_size_per_gpu"]
    n = parse_recipe(file, config).batch_norm.per_worker_batch
    written = config.get("gradient_accumulation_steps")
    passes = written if is_count(written) and not overrides.divide_otherwise() else 1
    return (
        max(1, kn // (max(n, micro_batch) * passes))
        if type(kn) is int and type(micro_batch) is int and micro_batch
        else 1
    )
