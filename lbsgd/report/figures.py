"""The paper's figures from groups of runs: curves with bands over seeds, and error over the global batch (Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lbsgd.report.curves import add_legend, begin_at_zero, begin_epochs_at_zero, label_learning_rate, lr_steps
from lbsgd.report.families import Family
from lbsgd.report.group_page import band_of, by_outcome, curve_keys, means_of
from lbsgd.report.groups import Group
from lbsgd.report.page import Series
from lbsgd.report.paper_table import error_cell
from lbsgd.report.picture import COLOURS, empty_picture, replace_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# A second way to tell rows apart, for print and for the colour-blind, with widths that make them equally heavy.
STYLES: tuple[Any, ...] = (("-", 1.5), ("--", 1.6), ("-.", 1.7), ((0, (1, 0.8)), 2.2))
LABEL_WIDTHS = {1: 85, 2: 44}  # letters of a curve's name, by the number of columns that then fit into the picture
LEGEND_LINES = 8  # a picture 8 inches high has room for these; more lines make it higher
SALT = "lbsgd"  # makes the names inside an SVG deterministic


def band_figure(title: str, names: Sequence[str], rows: Sequence[Group]) -> Figure:
    """Draw rows over each other: the curves that they are judged by, with ± 2 std over seeds, and the learning rate.

    A classifier's curves are its validation and training error.
    """
    picture = empty_picture(figsize=(10, 8), layout="constrained")
    shown = curve_keys(rows[0].runs[0])
    *panels, lr = picture.subplots(len(shown) + 1, 1, sharex=True, height_ratios=[3] * len(shown) + [1])
    names, lines = [legend_name(*each) for each in zip(names, rows, strict=True)], []
    for name, row, colour, (dashes, width) in zip(names, rows, cycle(COLOURS), cycle(STYLES), strict=False):
        runs, look = row.shown, {"color": colour, "linestyle": dashes, "linewidth": width}
        bands = [band_of(name, runs, key) for _, key, _ in shown]
        [line, *_] = [draw_band(axes, band, look) for axes, band in zip(panels, bands, strict=True)]
        lines.append(line)
        lr.plot(*lr_steps(runs[0]), **look, drawstyle="steps-post")
    for axes, (curve, _, unit) in zip(panels, shown, strict=True):
        axes.set(ylabel=f"{curve} ({unit})" if unit else curve)
        begin_at_zero(axes, unit)
    label_learning_rate(lr)
    begin_epochs_at_zero(lr)
    picture.align_ylabels()
    for axes in (*panels, lr):
        axes.grid(alpha=0.3)
    columns = 2 if max(map(len, names)) <= LABEL_WIDTHS[2] else 1
    names = [fill(name, LABEL_WIDTHS[columns]) for name in names]
    title = f"{title}\nmean, band: ± 2 std over seeds"
    in_legend = title.count("\n") + 1 + math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    picture.set_figheight(8 + 0.25 * max(0, in_legend - LEGEND_LINES))
    add_legend(picture, title, handles=lines, labels=names, loc="outside upper center", ncols=columns)
    return picture


def legend_name(name: str, row: Group) -> str:
    number = error_cell(row, row.measure.unit)
    return name + (f": {number}" if number else "")


def draw_band(axes: Axes, band: Series, look: Mapping[str, Any]) -> Line2D:
    """Draw a mean and its band. A single point, which no line joins, is marked."""
    y, low, high = map(gaps, (band.y, band.low or band.y, band.high or band.y))
    axes.fill_between(band.x, low, high, color=look["color"], alpha=0.2, linewidth=0)
    [line] = axes.plot(band.x, y, marker="." if len(band.x) == 1 else "", **look)
    return line


def gaps(values: Sequence[float | None]) -> list[float]:
    """Return the values for matplotlib, which leaves a gap at NaN: unknown values become NaN."""
    return [math.nan if value is None else value for value in values]


def batch_figure(title: str, family: Family, rows: Sequence[Group]) -> Figure:
    """Draw the error over the global batch, with ± 2 std, as in Fig. 1: a plateau, then an elbow.

    Rows with diverged seeds stand out: hollow, or a cross at the top if all seeds diverged.
    """
    picture = empty_picture(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    whole, partly, lost = by_outcome(rows)
    draw_means(axes, whole, "o-", "mean ± 2 std over seeds")
    draw_means(axes, partly, "o", "without seeds that diverged")
    if family.baseline and family.baseline.spread:
        axes.axhline(family.baseline.spread.mean, color="grey", linestyle=":", linewidth=1, label="baseline")
    measure = rows[0].measure
    name = f"validation {measure.short} ({measure.unit})"
    axes.set(xlabel="global batch kn (images per update)", ylabel=name, xscale="log")
    begin_at_zero(axes, measure.unit)
    if lost:
        at = [row.global_batch for row in lost]
        top = axes.get_xaxis_transform()  # x in images, y as a fraction of the axis
        axes.plot(at, [0.96] * len(at), "x", color=COLOURS[1], transform=top, label="all seeds diverged")
    batches = sorted(row.global_batch for row in (*whole, *partly, *lost))
    axes.set_xticks(batches, [f"{kn:,}" for kn in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    add_legend(picture, title, loc="outside upper center", ncols=4, fontsize="small")
    return picture


def draw_means(axes: Axes, rows: Sequence[Group], style: str, label: str) -> None:
    """Draw the means of rows over their batch, hollow if no line joins them. A single seed has no bar."""
    if not rows:
        return
    means = means_of(label, rows)
    y, high = gaps(means.y), gaps(means.high or means.y)
    bars = [top - mean for mean, top in zip(y, high, strict=True)]
    inside = COLOURS[0] if "-" in style else "white"
    axes.errorbar(means.x, y, yerr=bars, fmt=style, color=COLOURS[0], mfc=inside, capsize=4, label=label)


def save(picture: Figure, stem: Path) -> list[Path]:
    """Write a picture as PNG and SVG, the same bytes each time. Raises ConfigError if it cannot be written."""
    import matplotlib

    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        with matplotlib.rc_context({"svg.hashsalt": SALT}):
            replace_picture(path, picture, dpi=110, metadata=metadata)
        paths.append(path)
    return paths
