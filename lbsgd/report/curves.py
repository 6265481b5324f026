"""Curves from run logs, several runs over each other, as in the paper's figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.disk import replace_picture
from lbsgd.errors import ConfigError
from lbsgd.report.measure import TOP1, Measure
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.tables import names_of, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow, too light for a thin line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def curves(runs: Sequence[LoggedRun], path: str | Path) -> None:
    """Draw the runs into a file, whole or not at all. Raises ConfigError when it cannot be written."""
    picture = figure(runs)
    try:
        replace_picture(Path(path), picture)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def figure(runs: Sequence[LoggedRun]) -> Figure:
    """Return a Matplotlib figure: what the runs are judged by over epochs, and the learning rate below it."""
    from matplotlib.figure import Figure  # late: it takes half a second, and tables alone do not need it

    picture = Figure(figsize=(10, 6), layout="constrained")
    error, lr = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, run, colour in zip(names_of(runs), runs, cycle(COLOURS), strict=False):  # the colours never end
        draw_errors(error, run, name, colour)
        draw_learning_rate(lr, run, colour)
    measures = dict.fromkeys(run.measures[0] for run in runs)
    error.set(ylabel=" and ".join(map(axis_name, measures)), ylim=(0, 100))
    lr.set(xlabel="epochs", ylabel="learning rate")
    lr.set_xlim(left=0)
    if any(run.iterations for run in runs):  # matplotlib refuses a logarithmic axis of nothing
        lr.set_yscale("log")
        lr.yaxis.set_major_formatter("{x:g}")
    for axes in (error, lr):
        axes.grid(alpha=0.3)
    explain(picture, error, list(measures))
    return picture


def axis_name(measure: Measure) -> str:
    return f"{measure.name} ({measure.unit})" if measure.unit else measure.name


def draw_errors(axes: Axes, run: LoggedRun, name: str, colour: str) -> None:
    measure = run.measures[0]
    label = f"{name}  {percent(run.value)}"
    if measure.training:
        training = run.curve(measure.training)
        axes.plot([*training], [*training.values()], marker(training) + "--", color=colour, linewidth=1, markersize=3)
    validation = run.curve(measure.key)
    axes.plot([*validation], [*validation.values()], marker(validation) + "-", color=colour, linewidth=2, label=label)


def draw_learning_rate(axes: Axes, run: LoggedRun, colour: str) -> None:
    """Draw the learning rate of every iteration, held while the iteration lasts."""
    lrs = learning_rates(run)
    lrs += lrs[-1:]  # where the last iteration ends
    epochs = [t / run.header["iterations_per_epoch"] for t in range(len(lrs))]
    axes.plot(epochs, lrs, marker(epochs) + "-", color=colour, drawstyle="steps-post")


def marker(points: Collection[Any]) -> str:
    # Few points are marked, because one alone makes no line. Many are not, because marks would hide the dashes.
    return "." if len(points) < 30 else ""


def learning_rates(run: LoggedRun) -> list[float]:
    """Compute the learning rate of every iteration up to the last one logged.

    The log itself holds about every tenth iteration, which would put a decay up to ten iterations off.
    """
    schedule = schedule_of(run)
    ends = [record["iteration"] + 1 for record in run.iterations]
    ends.append(round(run.epochs_done * run.header["iterations_per_epoch"]))
    return [learning_rate(t, schedule) for t in range(max(ends))]


def schedule_of(run: LoggedRun) -> Schedule:
    numbers = run.header["schedule"]
    return Schedule(**{**numbers, "decay_iterations": tuple(numbers["decay_iterations"])})


def explain(picture: Figure, error: Axes, measures: Sequence[Measure]) -> None:
    """Name the runs beside the axes, where the legend hides no curve, and the two kinds of line above them.

    Samples of the lines in the legend would look like two more runs.
    """
    lines = "solid: validation" + ("   dashed: training" if any(measure.training for measure in measures) else "")
    error.set_title(lines, loc="left", fontsize="medium", color="dimgrey")
    runs, _ = error.get_legend_handles_labels()
    is_error = len(measures) == 1 and measures[0].key == TOP1.key
    title = "final validation error (%)" if is_error else "final number on validation images"
    picture.legend(handles=runs, title=title, loc="outside right upper")
