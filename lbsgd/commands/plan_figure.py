"""The learning rate over the epochs as a picture: in the terminal, and as a file."""

from __future__ import annotations

import math
from pathlib import Path

from lbsgd.algorithm.schedule import learning_rate
from lbsgd.config.plan import Plan
from lbsgd.disk import replace_picture
from lbsgd.errors import ConfigError

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 72, 9


def in_terminal(plan: Plan, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of a bar chart, a column for each stretch of iterations, the learning rate on a logarithmic axis."""
    columns = min(width, plan.num_iterations)
    lrs = [learning_rate(plan.num_iterations * column // columns, plan.schedule) for column in range(columns)]
    low, high = math.log10(min(lrs)), math.log10(max(lrs))
    low -= 0.15 * (high - low) or 1.0  # the lowest still shows
    levels = [round((math.log10(lr) - low) / (high - low) * height * 8) for lr in lrs]
    lines = []
    for row in reversed(range(height)):
        label = f"{10 ** (low + (high - low) * (row + 1) / height):.2g}"
        bars = "".join(BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        lines.append(f"{label:>8} ┤{bars}")
    return [*lines, " " * 9 + "└" + "─" * columns, " " * 10 + axis(plan.recipe.epochs, columns)]


def axis(epochs: int, columns: int) -> str:
    """Epochs under the columns where they begin."""
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if columns * step / epochs >= 6), epochs)
    line = [" "] * (columns + 16)
    for epoch in range(0, epochs + 1, step):
        at = round(columns * epoch / epochs)
        line[at : at + len(str(epoch))] = str(epoch)
    return "".join(line).rstrip() + " epochs"


def stretches(plan: Plan) -> list[tuple[str, str, str]]:
    """The schedule as numbers: epochs, iterations, learning rate of each stretch."""
    schedule, last = plan.schedule, plan.num_iterations
    W = min(schedule.warmup_iterations, last)
    points = [W, *(point for point in schedule.decay_iterations if W < point < last), last]
    rows = []
    if W and schedule.warmup_kind == "gradual":
        step = (schedule.reference_lr - schedule.base_lr) / schedule.warmup_iterations
        rows.append((0, W, f"{schedule.base_lr:.4g} -> {schedule.reference_lr:.4g}, by {step:.3g} an iteration"))
    elif W:
        rows.append((0, W, f"{schedule.base_lr:.4g}"))
    rows += [(first, end, f"{learning_rate(first, schedule):.4g}") for first, end in zip(points, points[1:])]
    per_epoch = plan.iterations_per_epoch
    return [(f"{first / per_epoch:g} to {end / per_epoch:g}", f"{first:,} to {end:,}", lr) for first, end, lr in rows]


def draw(plan: Plan, path: str | Path) -> None:
    """Draws the schedule into a file, whole or not at all; ConfigError when it cannot be written."""
    picture = figure(plan)
    try:
        replace_picture(Path(path), picture)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def figure(plan: Plan):
    """Matplotlib figure: the learning rate of every iteration, and its warmup by itself."""
    from matplotlib.figure import Figure  # half a second: only when something is drawn

    schedule, per_epoch = plan.schedule, plan.iterations_per_epoch
    warm = schedule.warmup_iterations / per_epoch
    picture = Figure(figsize=(10, 4.2), layout="constrained")
    panels = picture.subplots(1, 2, width_ratios=[2.2, 1]) if warm else [picture.subplots()]
    curve(panels[0], plan, plan.num_iterations)
    panels[0].set(yscale="log", title=f"{plan.name}.json: kn = {plan.global_batch:,}, η = {schedule.reference_lr:g}")
    panels[0].yaxis.set_major_formatter("{x:g}")
    for point in schedule.decay_iterations:
        if point < plan.num_iterations:
            panels[0].annotate(
                f"{learning_rate(point, schedule):.3g}",
                (point / per_epoch, learning_rate(point, schedule)),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=9,
            )
    if warm:
        curve(panels[1], plan, min(plan.num_iterations, round(1.6 * schedule.warmup_iterations)))
        eta = schedule.reference_lr
        panels[1].set(
            ylim=(-0.07 * eta, 1.1 * eta),
            title=f"{schedule.warmup_kind} warmup, {schedule.warmup_iterations:,} iterations",
        )
        for x, y, place, side in ((0, schedule.base_lr, (8, -11), "left"), (warm, eta, (-7, 4), "right")):
            panels[1].plot([x], [y], "o", color="#D55E00", markersize=5)
            panels[1].annotate(f"{y:.4g}", (x, y), textcoords="offset points", xytext=place, ha=side, fontsize=9)
    return picture


def curve(axes, plan: Plan, last: int) -> None:
    """The learning rate of the iterations up to the last one, held while each lasts."""
    every = max(1, last // 20_000)
    iterations = range(0, last, every)
    axes.plot(
        [t / plan.iterations_per_epoch for t in iterations],
        [learning_rate(t, plan.schedule) for t in iterations],
        color="#0072B2",
        linewidth=2,
        drawstyle="steps-post",
    )
    axes.set(xlabel="epochs", ylabel="learning rate")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
