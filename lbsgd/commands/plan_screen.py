"""The screen of `lbsgd plan`: the run, the schedule, memory and predicted time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from lbsgd.commands import plan_figure
from lbsgd.commands.plan_outlook import Outlook
from lbsgd.commands.plan_table import table_lines
from lbsgd.config.aggregation import power_of_two
from lbsgd.config.memory import Memory, bytes_per_activation
from lbsgd.config.prediction import (
    BACKWARD_SHARE,
    Prediction,
    Reduction,
    bytes_per_iteration,
    overlap_in_words,
)
from lbsgd.config.traffic import FLAT_RING, HALVING, MIXED
from lbsgd.report.lines import NAME_WIDTH, fact
from lbsgd.report.printer import Printer
from lbsgd.units import counted, printable

WIDE = 1000  # letters, more than any row has
UNITS = (("h", 3600, 2), ("min", 60, 1), ("s", 1, 1))  # of times, in seconds, with their digits after the point
NOT_ITS_SPEED = "the speed is ResNet-50's at 224 pixels; give --images_per_second"


class Screen:
    """Prints an outlook in the terminal, section by section."""

    def __init__(self, outlook: Outlook):
        self.outlook, self.plan = outlook, outlook.plan
        self.printer = Printer(WIDE)

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
        self.line(f"{printable(plan.name)}.json on {counted(plan.world_size, 'GPU')}", "bold")
        for name, value in plan.summary().items():
            self.fact(name, value, "dim")
        for change in plan.changes:
            self.fact("changed", change, "cyan")
        for warning in plan.warnings:
            self.fact("warning", warning, "yellow")

    def schedule(self) -> None:
        self.title("learning rate", "(Sec. 2.2, 5.1)")
        for line in plan_figure.in_terminal(self.plan, self.printer.width):
            self.line(line, "blue" if "┤" in line else "")
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
        heads = ["", "weights", "gradients", "momentum+", "buckets", "activa|tions", "total"]
        self.columns(heads, [memory_row(each, each.stage == plan.zero_stage) for each in memories])

    def prediction(self) -> None:
        plan, machines, reduction = self.plan, self.outlook.machines, self.outlook.reduction
        self.title("iteration, predicted", f"({basis_of(self.outlook)})")
        self.say(f"machines: {machines.source}")
        self.say(f"reduced: {moved(reduction, plan.world_size)}")
        self.compute()
        if machines.servers(plan.world_size) > 1:
            self.algorithms()
        self.say(f"overlap in this JSON: {overlap_in_words(plan, reduction)}")
        if self.outlook.has_speed:
            self.say(f"the run: {self.run_time()} for {plan.num_iterations:,} iterations, without data and evaluation")

    def compute(self) -> None:
        """Print the time of computing, and say if the speed is that of another network or precision."""
        plan, speed_of = self.plan, self.outlook.machines.precision
        if not self.outlook.has_speed:
            self.say(NOT_ITS_SPEED)
            return
        compute = self.outlook.predictions[0].compute_seconds  # the same for every algorithm
        backward = compute / plan.accumulation_steps * BACKWARD_SHARE
        self.say(f"compute: {milliseconds(compute)}, of which the last back-propagation takes {milliseconds(backward)}")
        if speed_of and (speed_of == MIXED) == (plan.precision == "fp32"):
            self.say(f"but the speed is in {speed_of}, and this JSON is {plan.precision}; give --images_per_second")

    def algorithms(self) -> None:
        """Print the time of each algorithm, and which one runs."""
        heads = ["", "aggregation", "without overlap", "with overlap", "efficiency"]
        algorithm, reason = self.outlook.running
        rows = [
            prediction_row(each, each.algorithm == algorithm, self.outlook.overlaps)
            for each in self.outlook.predictions
        ]
        known = len(heads) if self.outlook.has_speed else 2
        self.columns(heads[:known], [row[:known] for row in rows])
        self.say(f"> runs: {reason}")
        servers = self.outlook.machines.servers(self.plan.world_size)
        if not power_of_two(servers) and algorithm != HALVING:
            self.say(f"halving/doubling needs 2, 4, 8, ... servers, not {servers}: its row is for NCCL's tree, at best")

    def run_time(self) -> str:
        """Return the shortest and the longest time: with all the overlap that the JSON allows, and without any.

        NCCL may use its tree in place of a ring.
        """
        by_name = {each.algorithm: each for each in self.outlook.predictions}
        most = by_name[self.outlook.running[0]]
        least = by_name[HALVING] if most.algorithm == FLAT_RING else most
        hidden = least.with_overlap if self.outlook.overlaps else least.without_overlap
        iterations = self.plan.num_iterations
        return span(hidden * iterations, most.without_overlap * iterations)

    # --- lines ------------------------------------------------------------------------------------------------------

    def title(self, text: str, remark: str) -> None:
        self.printer.print()
        self.line(f"{text} {remark}", "bold", len(text), rest="dim")

    def fact(self, name: str, value: str, style: str) -> None:
        self.line(f"  {fact(name, value)}", style, 2 + NAME_WIDTH, indent=2 + NAME_WIDTH)

    def say(self, text: str) -> None:
        self.line(f"  {text}", indent=4)

    def line(self, text: str, style: str = "", letters: int = WIDE, rest: str = "", indent: int = 2) -> None:
        """Print a line, its first `letters` in a style. On a narrow terminal it wraps, with further lines indented."""
        shown = Text(self.printer.wrapped(self.printer.written(text), indent))
        shown.stylize(style, 0, letters)
        shown.stylize(rest, letters)
        self.printer.print(shown, soft_wrap=True)

    def columns(self, heads: list[str], rows: Iterable[Iterable[str]], num_words: int = 1) -> None:
        """Print rows in columns: words in the first num_words, numbers in the others."""
        written = [[self.printer.written(cell) for cell in row] for row in (heads, *rows)]
        for number, lines in enumerate(table_lines(written[0], written[1:], num_words, self.printer.width)):
            style = "dim" if number == 0 else "bold" if lines[0].startswith(" >") else ""
            for line in lines:
                self.printer.print(Text(line, style), soft_wrap=True)


def memory_row(memory: Memory, is_chosen: bool) -> list[str]:
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.buckets, memory.activations)
    name = f"ZeRO-{memory.stage}" if memory.stage else "stage 0"
    return [f"{'>' if is_chosen else ' '} {name}", *(f"{part / 1e6:,.0f}" for part in (*parts, memory.total))]


def prediction_row(prediction: Prediction, is_running: bool, overlaps: bool) -> list[str]:
    """Return an algorithm's row. If the JSON allows no overlap, its efficiency is the one without overlap."""
    least, most = (f"{prediction.efficiency(overlap):.1%}" for overlap in (False, True))
    return [
        f"{'>' if is_running else ' '} {prediction.algorithm}",
        milliseconds(prediction.gradient_seconds + prediction.weight_seconds),
        milliseconds(prediction.without_overlap),
        milliseconds(prediction.with_overlap),
        f"{least} to {most}" if overlaps else least,
    ]


def basis_of(outlook: Outlook) -> str:
    """Return the machines of a prediction in words."""
    machines, gpus = outlook.machines, outlook.plan.world_size
    source = f" with ResNet-50 in {machines.precision}" if machines.precision else ", as given"
    speed = f"a GPU makes {machines.images_per_second:.0f} images/s{source}; " if outlook.has_speed else ""
    return (
        f"{speed}{counted(machines.servers(gpus), 'server')} of {counted(min(machines.gpus_per_server, gpus), 'GPU')}, "
        f"{machines.link_gbit:g} Gbit/s and {machines.latency_seconds * 1e6:g} µs per message between them"
    )


def moved(reduction: Reduction, gpus: int) -> str:
    """Return in words what an iteration aggregates."""
    if not reduction.num_buckets:
        return "nothing, on one GPU"
    times = f", {reduction.times} times" if reduction.times > 1 else ""
    weights = f", then {reduction.weight_bytes / 1e6:.0f} MB of weights gathered" if reduction.weight_bytes else ""
    buckets = counted(reduction.num_buckets, "bucket")
    sent = f"{bytes_per_iteration(reduction, gpus) / 1e6:.0f} MB leave each GPU"
    return f"{reduction.gradient_bytes / 1e6:.0f} MB of gradients in {buckets}{times}{weights}; {sent}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def span(shortest: float, longest: float) -> str:
    """Return `0.97 to 1.22 h`, both in the unit of the longest; `1.22 h` if both are rounded to the same."""
    unit, seconds, digits = next((each for each in UNITS if longest >= each[1]), UNITS[-1])
    ends = dict.fromkeys(f"{each / seconds:,.{digits}f}" for each in (shortest, longest))
    return f"{' to '.join(ends)} {unit}"
