"""The curves of a run from its log, as in the paper's figures, and the learning rates behind them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.errors import DataError
from lbsgd.report.measure import TOP1
from lbsgd.report.names import names_of
from lbsgd.report.picture import COLOURS, empty_picture, replace_picture
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def curves(run: LoggedRun, path: str | Path) -> None:
    """Draw a run into a file, whole or not at all. Raises ConfigError if the file cannot be written."""
    replace_picture(Path(path), figure(run))


def figure(run: LoggedRun) -> Figure:
    """Return a Matplotlib figure: the run's first measure over epochs, and the learning rate below it."""
    picture = empty_picture(figsize=(10, 6), layout="constrained")
    error, lr = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    line = draw_errors(error, run)
    draw_learning_rate(lr, run)
    label_learning_rate(lr)
    begin_epochs_at_zero(lr)
    picture.align_ylabels()
    for axes in (error, lr):
        axes.grid(alpha=0.3)
    title = "final validation error (%)" if run.measures[0].key == TOP1.key else "final number on validation images"
    [name] = names_of([run])
    add_legend(picture, title, handles=[line], labels=[f"{name}  {percent(run.value)}"], loc="outside upper center")
    return picture


def add_legend(picture: Figure, title: str, **layout: Any) -> None:
    """Name the picture and its curves outside the axes, so that the legend hides no curve.

    Matplotlib must not parse the names as formulas, because a folder's name may hold dollars. Names come in `labels`,
    because Matplotlib takes a curve's own label that begins with _ for no label.
    """
    legend = picture.legend(**layout)
    legend.set_title("\n".join(fill(line, 90) for line in title.split("\n")))
    legend.get_title().set_multialignment("center")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


def draw_errors(axes: Axes, run: LoggedRun) -> Line2D:
    """Draw the run's first measure.

    The title explains solid and dashed lines, because samples in the legend would look like more runs.
    """
    measure = run.measures[0]
    if measure.training:
        training = run.curve(measure.training)
        style = marker(training) + "--"
        axes.plot([*training], [*training.values()], style, color=COLOURS[0], linewidth=1, markersize=3)
    validation = run.curve(measure.key)
    style = marker(validation) + "-"
    [line] = axes.plot([*validation], [*validation.values()], style, color=COLOURS[0], linewidth=2)
    axes.set_ylabel(f"{measure.name} ({measure.unit})" if measure.unit else measure.name)
    if measure.unit == "%":
        axes.set_ylim(0, 100)
    elif axes.dataLim.y0 >= 0:
        begin_at_zero(axes, measure.unit)
    lines = "solid: validation" + ("   dashed: training" if measure.training else "")
    axes.set_title(lines, loc="left", fontsize="medium", color="dimgrey")
    return line


def draw_learning_rate(axes: Axes, run: LoggedRun) -> None:
    """Draw the learning rate of every iteration as steps."""
    epochs, lrs = lr_steps(run)
    axes.plot(epochs, lrs, marker(epochs) + "-", color=COLOURS[0], drawstyle="steps-post")


def label_learning_rate(axes: Axes) -> None:
    """Label both axes of a plot of learning rates, with two to four plain numbers on the logarithmic one.

    The numbers are round, or the lowest and the highest learning rate if these lie close together.
    """
    axes.set(xlabel="epochs", ylabel="learning rate")
    axes.set_yscale("log")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [tick for power in decades for digit in digits if low <= (tick := float(f"{digit}e{power}")) <= high]
        if len(ticks) > 1:
            break
    else:
        ticks = [axes.dataLim.y0, axes.dataLim.y1]
    shown = {f"{tick:.3g}": tick for tick in ticks[:: math.ceil(len(ticks) / 4)]}
    axes.set_yticks([*shown.values()], [*shown])


def begin_at_zero(axes: Axes, unit: str) -> None:
    """Cut the axis to possible values, because a band of ± 2 std may reach below 0 % and above 100 %."""
    highest = axes.dataLim.y1
    top = 1.05 * highest if 0 < highest < math.inf else axes.get_ylim()[1]  # infinite if nothing is drawn
    axes.set_ylim(0, min(top, 100) if unit == "%" else top)


def begin_epochs_at_zero(axes: Axes) -> None:
    """Begin the axis where training begins, and label whole epochs only."""
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)


def marker(points: Collection[Any]) -> str:
    # Mark few points, because a single one makes no line. Do not mark many, because marks would hide the dashes.
    return "." if len(points) < 30 else ""


def lr_steps(run: LoggedRun) -> tuple[list[float], list[float]]:
    """Return the epoch at which each iteration begins, and its learning rate. A last point ends the last iteration."""
    lrs = learning_rates(run)
    lrs += lrs[-1:]
    return [t / run.header["iterations_per_epoch"] for t in range(len(lrs))], lrs


def learning_rates(run: LoggedRun) -> list[float]:
    """Compute the learning rate of every iteration up to the last one logged.

    The log itself holds only about every tenth iteration, so its decays would be up to ten iterations off.
    """
    schedule = schedule_of(run)
    ends = [record["iteration"] + 1 for record in run.iterations]
    ends.append(round(run.epochs_done * run.header["iterations_per_epoch"]))
    return [learning_rate(t, schedule) for t in range(max(ends))]


def schedule_of(run: LoggedRun) -> Schedule:
    """Return the schedule of a run, without keys that a later version added.

    Raises DataError if the values make no valid schedule.
    """
    known = {field.name for field in fields(Schedule)}
    numbers = {key: value for key, value in run.header["schedule"].items() if key in known}
    try:
        return Schedule(**{**numbers, "decay_iterations": tuple(numbers.get("decay_iterations", ()))})
    except ValueError as error:
        raise DataError(f"{run.path}, line 1: {error}") from None
