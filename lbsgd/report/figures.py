"""The paper's figures from groups of runs: curves with bands over seeds, and error over the global batch (Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.curves import COLOURS, add_legend, learning_rates
from lbsgd.report.families import Family
from lbsgd.report.group_page import band_of, curve_keys
from lbsgd.report.groups import Group
from lbsgd.report.page import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", "-.", ":")  # a second way to tell rows apart, for print and for the colour-blind
SALT = "lbsgd"  # of the names inside an SVG, which else are random


def band_figure(labels: Sequence[str], rows: Sequence[Group]) -> Figure:
    """Draw rows over each other, mean and ± 2 std over seeds: what they are judged by, and the learning rate.

    Of a classifier these are its validation and training error.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 8), layout="constrained")
    shown = curve_keys(rows[0].runs[0])
    *panels, lr = picture.subplots(len(shown) + 1, 1, sharex=True, height_ratios=[3] * len(shown) + [1])
    for name, row, colour, style in zip(labels, rows, cycle(COLOURS), cycle(STYLES), strict=False):
        runs = row.finished or row.runs
        number = f": {row.spread} {row.measure.unit}".rstrip() if row.spread else ""
        label = f"{name}, kn {row.global_batch:,}{number}"
        for axes, (_, key, _) in zip(panels, shown, strict=True):
            draw_band(axes, band_of(label, runs, key), colour, style, label if axes is panels[0] else None)
        lrs = learning_rates(runs[0])
        per_epoch = row.header["iterations_per_epoch"]
        lr.plot([t / per_epoch for t in range(len(lrs))], lrs, style, color=colour, drawstyle="steps-post")
    for axes, (curve, _, unit) in zip(panels, shown, strict=True):
        axes.set(ylabel=f"{curve} ({unit.strip()})" if unit else curve)
        begin_at_zero(axes, unit)
    lr.set(xlabel="epochs", ylabel="learning rate", yscale="log")
    lr.yaxis.set_major_formatter("{x:g}")
    for axes in (*panels, lr):
        axes.grid(alpha=0.3)
    add_legend(picture, title="mean, band: ± 2 std over seeds", loc="outside upper center", ncols=2)
    return picture


def begin_at_zero(axes: Axes, unit: str) -> None:
    """Cut the axis to what can be: a band of ± 2 std may reach below 0 % and beyond 100 %."""
    top = axes.get_ylim()[1]
    axes.set_ylim(0, min(top, 100) if unit.strip() == "%" else top)


def draw_band(axes: Axes, band: Series, colour: str, style: str, label: str | None) -> None:
    y = [math.nan if value is None else value for value in band.y]
    axes.fill_between(band.x, band.low or y, band.high or y, color=colour, alpha=0.2, linewidth=0)
    axes.plot(band.x, y, ("." if len(band.x) == 1 else "") + style, color=colour, linewidth=1.5, label=label)


def batch_figure(family: Family, rows: Sequence[Group]) -> Figure:
    """Draw the error over the global batch, with ± 2 std, as in Fig. 1: a plateau, then an elbow."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    spreads = [(row.global_batch, row.spread) for row in rows if row.spread]
    batches, means = [kn for kn, _ in spreads], [spread.mean for _, spread in spreads]
    errors = [2 * (spread.std or 0) for _, spread in spreads]
    axes.errorbar(batches, means, yerr=errors, fmt="o-", color=COLOURS[0], capsize=4)
    if family.baseline and family.baseline.spread:
        axes.axhline(family.baseline.spread.mean, color="grey", linestyle=":", linewidth=1, label="baseline")
        axes.legend()
    measure = rows[0].measure
    name = f"validation {measure.short} ({measure.unit})"
    axes.set(xlabel="global batch kn (images per update)", ylabel=name, xscale="log")
    begin_at_zero(axes, measure.unit)
    axes.set_xticks(batches, [f"{kn:,}" for kn in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return picture


def save(picture: Figure, stem: Path) -> list[Path]:
    """Write a picture as PNG and as SVG, the same bytes each time. Raises ConfigError where it cannot be written."""
    import matplotlib

    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        data, path = BytesIO(), stem.with_name(f"{stem.name}.{kind}")
        with matplotlib.rc_context({"svg.hashsalt": SALT}):
            picture.savefig(data, format=kind, dpi=110, metadata=metadata)
        try:
            replace_file(path, data.getvalue())
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        paths.append(path)
    return paths
