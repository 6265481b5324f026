"""Draw the learning rate over the epochs: in the terminal, and into a file."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.algorithm.schedule import learning_rate
from lbsgd.config.plan import Plan
from lbsgd.report.picture import COLOURS, empty_picture, replace_picture
from lbsgd.units import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = " ▁▂▃▄▅▆▇█"
COLUMNS, LEAST_COLUMNS, HEIGHT = 72, 10, 9
LABELS = 10  # letters before the first column
WIDTH = 120  # letters, enough for all columns


def in_terminal(plan: Plan, width: int = WIDTH) -> list[str]:
    """Return the lines of a bar chart: a column per stretch of iterations, the learning rate on a logarithmic axis.

    The epoch axis, with the word `epochs` after the last column, has at most `width` letters.
    """
    room = width - LABELS - len(f"{int(plan.num_epochs)} epochs")
    columns = min(COLUMNS, max(room, LEAST_COLUMNS), plan.num_iterations)
    lrs = [learning_rate(plan.num_iterations * column // columns, plan.schedule) for column in range(columns)]
    low, high = math.log10(min(lrs)), math.log10(max(lrs))
    low -= 0.15 * (high - low) or 1.0  # keeps the lowest bar visible
    levels = [round((math.log10(lr) - low) / (high - low) * HEIGHT * 8) for lr in lrs]
    lines = []
    for row in reversed(range(HEIGHT)):
        label = f"{10 ** (low + (high - low) * (row + 1) / HEIGHT):.2g}"
        bars = "".join(BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        lines.append(f"{label:>8} ┤{bars}")
    return [*lines, " " * (LABELS - 1) + "└" + "─" * columns, " " * LABELS + axis(plan.num_epochs, columns)]


def axis(epochs: float, columns: int) -> str:
    """Return the axis: each epoch's number under the column where it begins."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    step = next((step for step in steps if columns * step / epochs >= 6), max(1, int(epochs)))
    line = [" "] * (columns + 16)
    for epoch in range(0, int(epochs) + 1, step):
        at = round(columns * epoch / epochs)
        line[at : at + len(str(epoch))] = str(epoch)
    return "".join(line).rstrip() + " epochs"


def stretches(plan: Plan) -> list[tuple[str, str, str]]:
    """Return epochs, iterations and learning rate of each stretch of the schedule, as text."""
    schedule, last = plan.schedule, plan.num_iterations
    W = min(schedule.warmup_iterations, last)
    points = [W, *(point for point in schedule.decay_iterations if W < point < last), last]
    rows = []
    if W and schedule.warmup_kind == "gradual":
        step = (schedule.reference_lr - schedule.base_lr) / schedule.warmup_iterations
        reached = schedule.base_lr + step * W  # less than η if the run ends during its warmup
        rows.append((0, W, f"{schedule.base_lr:.4g} -> {reached:.4g}, by {step:.3g} per iteration"))
    elif W:
        rows.append((0, W, f"{schedule.base_lr:.4g}"))
    rows += [(first, end, f"{learning_rate(first, schedule):.4g}") for first, end in pairwise(points) if first < end]
    per_epoch = plan.iterations_per_epoch
    return [
        (f"{epochs(first / per_epoch)} to {epochs(end / per_epoch)}", f"{first:,} to {end:,}", lr)
        for first, end, lr in rows
    ]


def epochs(number: float) -> str:
    """Return epochs with four digits, or all digits of the integer part if it has more."""
    return f"{number:.4g}" if number < 9999 else f"{number:,.0f}"


def draw(plan: Plan, path: str | Path) -> None:
    """Draw the schedule into a file, whole or not at all. Raises ConfigError if it cannot be written."""
    replace_picture(Path(path), figure(plan))


def figure(plan: Plan) -> Figure:
    """Return a Matplotlib figure: the learning rate of every iteration and, next to it, the warmup."""
    has_warmup = plan.schedule.warmup_iterations > 0
    picture = empty_picture(figsize=(10, 4.2), layout="constrained")
    panels = picture.subplots(1, 2, width_ratios=[2.2, 1]) if has_warmup else [picture.subplots()]
    draw_schedule(panels[0], plan)
    if has_warmup:
        draw_warmup(panels[1], plan)
    return picture


def draw_schedule(axes: Axes, plan: Plan) -> None:
    """Draw the whole run on a logarithmic axis, with the learning rate after each decay."""
    schedule = plan.schedule
    curve(axes, plan, plan.num_iterations)
    axes.set(yscale="log")
    title = f"{printable(plan.name)}.json: kn = {plan.global_batch:,}, η = {schedule.reference_lr:g}"
    axes.set_title(title, parse_math=False)  # a name may hold dollars
    axes.yaxis.set_major_formatter("{x:g}")
    for point in schedule.decay_iterations:
        if point < plan.num_iterations:
            lr = learning_rate(point, schedule)
            label(axes, f"{lr:.3g}", (point / plan.iterations_per_epoch, lr), (4, 5))


def draw_warmup(axes: Axes, plan: Plan) -> None:
    """Draw the warmup and some more iterations on a linear axis, with the learning rates at the warmup's ends."""
    schedule, W, eta = plan.schedule, plan.schedule.warmup_iterations, plan.schedule.reference_lr
    last = min(W, plan.num_iterations)  # earlier than W if the run ends during its warmup
    curve(axes, plan, min(plan.num_iterations, round(1.6 * W)))
    axes.set(ylim=(-0.07 * eta, 1.1 * eta), title=f"{schedule.warmup_kind} warmup, {W:,} iterations")
    ends = (0, schedule.base_lr), (last / plan.iterations_per_epoch, learning_rate(last, schedule))
    for (epoch, lr), offset, side in zip(ends, ((8, -11), (-7, 4)), ("left", "right"), strict=True):
        axes.plot([epoch], [lr], "o", color=COLOURS[1], markersize=5)
        label(axes, f"{lr:.4g}", (epoch, lr), offset, side)


def label(axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], side: str = "left") -> None:
    axes.annotate(text, point, textcoords="offset points", xytext=offset, ha=side, fontsize=9)


def curve(axes: Axes, plan: Plan, last: int) -> None:
    """Draw the learning rates up to iteration `last` as steps."""
    every = max(1, last // 20_000)
    iterations = range(0, last, every)
    axes.plot(
        [t / plan.iterations_per_epoch for t in iterations],
        [learning_rate(t, plan.schedule) for t in iterations],
        color=COLOURS[0],
        linewidth=2,
        drawstyle="steps-post",
    )
    axes.set(xlabel="epochs", ylabel="learning rate")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
