"""The screen of `lbsgd plan`: the run, the schedule, memory and predicted time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lbsgd.commands import plan_figure
from lbsgd.commands.plan_network import FLAT_RING, HALVING
from lbsgd.commands.plan_outlook import Outlook
from lbsgd.commands.plan_time import (
    BACKWARD_SHARE,
    PAPER_IMAGES_PER_SECOND,
    Machines,
    Prediction,
    Reduction,
    bytes_per_iteration,
    overlaps,
)
from lbsgd.config.memory import Memory, bytes_per_activation
from lbsgd.units import counted, duration


class Screen:
    """Print an outlook in the terminal, section by section."""

    def __init__(self, outlook: Outlook):
        self.outlook, self.plan, self.console = outlook, outlook.plan, Console(highlight=False)

    def show(self) -> None:
        self.run()
        self.schedule()
        if not self.outlook.is_estimated:
            self.title("memory and time", "are estimated for classifiers only")
            return
        self.memory()
        self.prediction()

    # --- sections ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        plan = self.plan
        self.console.print(f"[bold]{escape(plan.name)}.json on {plan.world_size:,} GPU{'s' * (plan.world_size > 1)}[/]")
        for name, value in plan.summary().items():
            self.fact(name, value, "dim")
        for change in plan.changes:
            self.fact("changed", change, "cyan")
        for warning in plan.warnings:
            self.fact("warning", warning, "yellow")

    def schedule(self) -> None:
        self.title("learning rate", "(Sec. 2.2, 5.1)")
        for line in plan_figure.in_terminal(self.plan):
            self.console.print(f"[blue]{line}[/]" if "┤" in line else line, soft_wrap=True)
        self.columns(["epochs", "iterations", "learning rate"], plan_figure.stretches(self.plan), num_words=3)

    def memory(self) -> None:
        plan, resolution = self.plan, self.plan.recipe.augmentation.resolution
        self.title(
            "memory of a GPU in MB",
            f"({self.outlook.model}, {plan.micro_batch} images of {resolution} pixels per pass; estimated, "
            f"activations of {bytes_per_activation(plan.precision)} bytes counted; "
            "momentum+: with float32 masters where DeepSpeed keeps them)",
        )
        # fp16 does not train at stage 0.
        memories = self.outlook.memories[1:] if plan.precision == "fp16" else self.outlook.memories
        heads = ["", "weights", "gradients", "momentum+", "buckets", "activations", "total"]
        self.columns(heads, [memory_row(each, each.stage == plan.zero_stage) for each in memories])

    def prediction(self) -> None:
        plan, machines, reduction = self.plan, self.outlook.machines, self.outlook.reduction
        compute = self.outlook.predictions[0].compute_seconds  # the same for every algorithm
        backward = compute / plan.accumulation_steps * BACKWARD_SHARE
        sent = bytes_per_iteration(reduction, plan.world_size)
        self.title("iteration, predicted", f"({described(machines, plan.world_size)})")
        if machines.source:
            self.say(f"machines: {machines.source}")
        self.say(f"reduced: {moved(reduction)}; {sent / 1e6:.0f} MB leave each GPU")
        self.say(f"compute: {milliseconds(compute)}, of which the last back-propagation takes {milliseconds(backward)}")
        if machines.servers(plan.world_size) > 1:
            heads = ["", "aggregation", "without overlap", "with overlap", "efficiency"]
            algorithm, reason = self.outlook.running
            rows = [prediction_row(each, each.algorithm == algorithm) for each in self.outlook.predictions]
            self.columns(heads, rows)
            self.say(f"> runs: {reason}")
        self.say(f"overlap in this JSON: {overlaps(plan, reduction)}")
        self.say(f"the run: {self.run_time()} for {plan.num_iterations:,} iterations, without data and evaluation")

    def run_time(self) -> str:
        """Return the least and the most: all hidden that can be, or nothing. NCCL may take its tree, not a ring."""
        by_name = {each.algorithm: each for each in self.outlook.predictions}
        most = by_name[self.outlook.running[0]]
        least = by_name[HALVING] if most.algorithm == FLAT_RING else most
        shortest, longest = (
            duration(seconds * self.plan.num_iterations, more_digits=1)
            for seconds in (least.with_overlap, most.without_overlap)
        )
        return shortest if shortest == longest else f"{shortest} to {longest}"

    # --- lines ------------------------------------------------------------------------------------------------------

    def title(self, text: str, remark: str) -> None:
        self.console.print(f"\n[bold]{text}[/] [dim]{remark}[/]", soft_wrap=True)

    def fact(self, name: str, value: str, style: str) -> None:
        self.console.print(f"  [{style}]{name:15}[/]{escape(value)}", soft_wrap=True)

    def say(self, line: str) -> None:
        self.console.print(f"  {line}", soft_wrap=True)

    def columns(self, heads: list[str], rows: Iterable[Iterable[str]], num_words: int = 1) -> None:
        """Print rows in columns: words in the first num_words, numbers in the others."""
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for place, head in enumerate(heads):
            table.add_column(head, justify="left" if place < num_words else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def memory_row(memory: Memory, is_chosen: bool) -> list[str]:
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.buckets, memory.activations)
    name = f"ZeRO-{memory.stage}" if memory.stage else "stage 0"
    total = f"[bold]{memory.total / 1e6:,.0f}[/]"
    return [f"{'>' if is_chosen else ' '} {name}", *(f"{part / 1e6:,.0f}" for part in parts), total]


def prediction_row(prediction: Prediction, is_running: bool) -> list[str]:
    return [
        f"{'>' if is_running else ' '} {prediction.algorithm}",
        milliseconds(prediction.gradient_seconds + prediction.weight_seconds),
        milliseconds(prediction.without_overlap),
        milliseconds(prediction.with_overlap),
        f"{prediction.efficiency(False):.1%} to {prediction.efficiency(True):.1%}",
    ]


def described(machines: Machines, gpus: int) -> str:
    """Tell the machines of a prediction in words."""
    source = "as the paper's P100" if machines.images_per_second == PAPER_IMAGES_PER_SECOND else "as given"
    return (
        f"a GPU makes {machines.images_per_second:.0f} images/s, {source}; "
        f"{counted(machines.servers(gpus), 'server')} of {min(machines.gpus_per_server, gpus)} GPUs, "
        f"{machines.link_gbit:g} Gbit/s and {machines.latency_seconds * 1e6:g} µs per message between them"
    )


def moved(reduction: Reduction) -> str:
    """Tell in words what an iteration aggregates."""
    times = f", {reduction.times} times" if reduction.times > 1 else ""
    weights = f", then {reduction.weight_bytes / 1e6:.0f} MB of weights gathered" if reduction.weight_bytes else ""
    return f"{reduction.gradient_bytes / 1e6:.0f} MB of gradients in {reduction.num_buckets} buckets{times}{weights}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
