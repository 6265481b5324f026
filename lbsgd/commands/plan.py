"""`lbsgd plan`: what a JSON means on so many GPUs. Needs no data, no GPU, no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from lbsgd.commands import plan_figure as picture
from lbsgd.commands.plan_memory import bytes_an_activation, memory, network
from lbsgd.commands.plan_time import (
    ALGORITHMS,
    BACKWARD_SHARE,
    PAPER_IMAGES_PER_SECOND,
    Machines,
    Prediction,
    Reduction,
    bytes_an_iteration,
    overlaps,
    predict,
    reduction_of,
)
from lbsgd.config.checks.block import parse_recipe
from lbsgd.config.checks.finding import refuse
from lbsgd.config.checks.registry import deepspeed_findings
from lbsgd.config.json_file import read_json
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan


def show(given: argparse.Namespace) -> int:
    """The command: prints the plan, or its JSON, and draws the picture that was asked for."""
    plan = read_plan(given)
    size = network(given.model)
    machines = Machines(
        given.images_per_second or PAPER_IMAGES_PER_SECOND,
        given.gpus_per_server,
        given.link_gbit,
        given.latency_us * 1e-6,
    )
    reduction = reduction_of(plan, size)
    images_a_gpu = plan.global_batch // plan.world_size
    predictions = [
        predict(images_a_gpu, plan.accumulation_steps, plan.world_size, reduction, machines, algorithm)
        for algorithm in ALGORITHMS
    ]
    memories = [memory(plan, size, stage) for stage in (0, 1, 2)]
    if given.png:
        picture.draw(plan, given.png)
    if given.json:
        print(json.dumps(as_dict(plan, memories, reduction, predictions), indent=2))
    else:
        Screen(plan, given.model).show(memories, reduction, machines, predictions)
        if given.png:
            print(f"\npicture: {given.png}")
    return 0


def read_plan(given: argparse.Namespace) -> Plan:
    """The plan on the GPUs asked for, by default as many as take the global batch in one pass."""
    overrides = Overrides(given.global_batch, given.micro_batch, settings=tuple(given.settings))
    gpus = given.gpus
    if gpus is None:
        config = read_json(given.file)
        refuse(given.file, deepspeed_findings(config))
        values = overrides.values()
        kn = values.get("train_batch_size", config["train_batch_size"])
        micro_batch = values.get("train_micro_batch_size_per_gpu", config["train_micro_batch_size_per_gpu"])
        n = parse_recipe(given.file, config).batch_norm.per_worker_batch
        gpus = kn // max(n, micro_batch) if type(kn) is int and type(micro_batch) is int and micro_batch else 1
    return Plan.read(given.file, max(1, gpus), given.images, overrides)


def as_dict(plan: Plan, memories, reduction: Reduction, predictions: list[Prediction]) -> dict[str, Any]:
    """Everything on the screen, for machines; seconds and bytes."""
    return {
        **plan.as_dict(),
        "learning_rates": [dict(zip(("epochs", "iterations", "lr"), row)) for row in picture.stretches(plan)],
        "memory_bytes": {f"stage_{each.stage}": {**asdict(each), "total": each.total} for each in memories},
        "bytes_an_iteration": bytes_an_iteration(reduction, plan.world_size),
        "prediction": {
            each.algorithm: {
                **asdict(each),
                "without_overlap_seconds": each.without_overlap,
                "with_overlap_seconds": each.with_overlap,
                "efficiency_without_overlap": each.efficiency(False),
                "efficiency_with_overlap": each.efficiency(True),
            }
            for each in predictions
        },
    }


class Screen:
    """The plan in the terminal: the run, the schedule, memory, and the prediction."""

    def __init__(self, plan: Plan, model: str):
        from rich.console import Console

        self.plan, self.model, self.console = plan, model, Console(highlight=False)

    def show(self, memories, reduction: Reduction, machines: Machines, predictions: list[Prediction]) -> None:
        self.run()
        self.schedule()
        self.memory(memories)
        self.prediction(reduction, machines, predictions)

    def title(self, text: str, remark: str = "") -> None:
        self.console.print(f"\n[bold]{text}[/] [dim]{remark}[/]", soft_wrap=True)

    def table(self, heads: list[str], rows: list[list[str]], left: int = 1) -> None:
        """Columns of numbers; the first ones are words."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 1), header_style="dim")
        for place, head in enumerate(heads):
            table.add_column(head, justify="left" if place < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def run(self) -> None:
        from rich.markup import escape

        plan = self.plan
        self.console.print(f"[bold]{escape(plan.name)}.json on {plan.world_size:,} GPU{'s' * (plan.world_size > 1)}[/]")
        for name, value in plan.summary().items():
            self.console.print(f"  [dim]{name:15}[/]{escape(value)}", soft_wrap=True)
        for change in plan.changes:
            self.console.print(f"  [cyan]{'changed':15}[/]{escape(change)}", soft_wrap=True)
        for warning in plan.warnings:
            self.console.print(f"  [yellow]{'warning':15}[/]{escape(warning)}", soft_wrap=True)

    def schedule(self) -> None:
        self.title("learning rate", "(Sec. 2.2, 5.1)")
        for line in picture.in_terminal(self.plan):
            self.console.print(f"[blue]{line}[/]" if "┤" in line else line, soft_wrap=True)
        self.table(
            ["epochs", "iterations", "learning rate"], [list(row) for row in picture.stretches(self.plan)], left=3
        )

    def memory(self, memories) -> None:
        plan = self.plan
        self.title(
            "memory of a GPU in MB",
            f"({self.model}, {plan.micro_batch} images of {plan.recipe.augmentation.resolution} pixels "
            f"a pass; estimated, activations of {bytes_an_activation(plan.precision)} bytes counted; "
            "momentum+: with float32 masters where DeepSpeed keeps them)",
        )
        rows = []
        for each in memories[1:] if plan.precision == "fp16" else memories:  # fp16 does not train at stage 0
            parts = (each.weights, each.gradients, each.optimizer, each.buckets, each.activations)
            name = f"ZeRO-{each.stage}" if each.stage else "stage 0"
            rows.append(
                [
                    f"{'>' if each.stage == plan.zero_stage else ' '} {name}",
                    *(f"{part / 1e6:,.0f}" for part in parts),
                    f"[bold]{each.total / 1e6:,.0f}[/]",
                ]
            )
        self.table(["", "weights", "gradients", "momentum+", "buckets", "activations", "total"], rows)

    def prediction(self, reduction: Reduction, machines: Machines, predictions: list[Prediction]) -> None:
        plan, [ring, halving] = self.plan, predictions
        self.title("iteration, predicted", f"({described(machines, plan.world_size)})")
        backward = ring.compute_seconds / plan.accumulation_steps * BACKWARD_SHARE
        self.say(
            f"reduced: {moved(reduction)}; {bytes_an_iteration(reduction, plan.world_size) / 1e6:.0f} MB leave each GPU"
        )
        self.say(
            f"compute: {milliseconds(ring.compute_seconds)}, of which {milliseconds(backward)} are the last back-propagation"
        )
        if machines.servers(plan.world_size) > 1:
            self.table(
                ["", "aggregation", "without overlap", "with overlap", "efficiency"],
                [
                    [
                        f"  {each.algorithm}",
                        milliseconds(each.gradient_seconds + each.weight_seconds),
                        milliseconds(each.without_overlap),
                        milliseconds(each.with_overlap),
                        f"{each.efficiency(False):.1%} to {each.efficiency(True):.1%}",
                    ]
                    for each in predictions
                ],
            )
        self.say(f"overlap in this JSON: {overlaps(plan, reduction)}")
        least, most = (hours(seconds * plan.num_iterations) for seconds in (halving.with_overlap, ring.without_overlap))
        run = least if least == most else f"{least} to {most}"
        self.say(f"the run: {run} for {plan.num_iterations:,} iterations, without data and evaluation")

    def say(self, line: str) -> None:
        self.console.print(f"  {line}", soft_wrap=True)


def described(machines: Machines, gpus: int) -> str:
    """The machines of a prediction, in words."""
    servers = machines.servers(gpus)
    source = "as the paper's P100" if machines.images_per_second == PAPER_IMAGES_PER_SECOND else "as given"
    return (
        f"a GPU makes {machines.images_per_second:.0f} images/s, {source}; {servers} server{'s' * (servers > 1)} of "
        f"{min(machines.gpus_per_server, gpus)} GPUs, {machines.link_gbit:g} Gbit/s and "
        f"{machines.latency_seconds * 1e6:g} µs a message between them"
    )


def moved(reduction: Reduction) -> str:
    """What is aggregated in an iteration, in words."""
    times = f", {reduction.times} times" if reduction.times > 1 else ""
    weights = f", then {reduction.weight_bytes / 1e6:.0f} MB of weights gathered" if reduction.weight_bytes else ""
    return f"{reduction.gradient_bytes / 1e6:.0f} MB of gradients in {reduction.num_buckets} buckets{times}{weights}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
