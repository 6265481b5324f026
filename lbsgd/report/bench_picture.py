"""The picture of a bench on a GPU, from the figures that its JSON holds: values, 95 % intervals and goals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lbsgd.report.bench_tables import interval_words
from lbsgd.report.picture import COLOURS, empty_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
ROW, AROUND = 0.21, 0.75  # inches of a row, and of a panel's title and axis
KEY = "bars: 95 % intervals; black: the goals, each with an arrow to what reaches it"
RATIO = "ratio (dotted: equal)"
# A verdict's colour, and whether its mark is filled: a second way to tell verdicts apart. Their words stand beside.
LOOKS = {"reached": (COLOURS[0], True), "missed": (COLOURS[1], True), "undecided": (COLOURS[0], False)}
WITHOUT_GOAL = ("dimgrey", True)
# Ticks of an axis of ratios, by the highest number of times that it reaches above its lowest ratio.
TICKS = {
    2.5: (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2),
    12: (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10),
    math.inf: (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
}


class Panel(NamedTuple):
    """Figures of one unit below each other. In a panel of ratios all figures are ratios."""

    title: str
    unit: str
    figures: Sequence[Mapping[str, Any]]

    @property
    def of_ratios(self) -> bool:
        return not self.unit and all(" / " in each["name"] for each in self.figures)


def bench_picture(title: str, parts: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return a Matplotlib figure with the parts' figures, or None without figures. Those of a unit share an axis."""
    panels = [
        Panel(part["title"], unit, [each for each in part["figures"] if each["unit"] == unit])
        for part in parts
        for unit in dict.fromkeys(each["unit"] for each in part["figures"])
    ]
    if not panels:
        return None
    heights = [AROUND + ROW * len(panel.figures) for panel in panels]
    picture = empty_picture(figsize=(11, sum(heights) + 0.6), layout="constrained")
    picture.suptitle(f"{title}\n{KEY}", x=0.01, ha="left", fontsize=11)
    all_axes = picture.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        draw_panel(axes, panel)
    return picture


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw figures below each other, between their names and their numbers."""
    for place, each in enumerate(panel.figures):
        draw_figure(axes, each, place)
    places = range(len(panel.figures))
    axes.set_yticks(places, [each["name"] for each in panel.figures], fontsize=8, parse_math=False)
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(places, [f"{interval_words(each)}  {each['verdict']}" for each in panel.figures], fontsize=8)
    for side in (axes, numbers):
        side.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel.figures) - 0.4, -0.6)
    axes.set_title(panel.title, loc="left", fontsize=10)
    if panel.of_ratios:
        axes.axvline(1, color="grey", linestyle=":", linewidth=1, zorder=0)
        label_ratios(axes)
    else:
        show_zero(axes, panel)
    axes.set_xlabel(RATIO if panel.of_ratios else panel.unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def show_zero(axes: Axes, panel: Panel) -> None:
    """Show zero, so that lengths compare, and no ticks between whole numbers if all values are whole."""
    if axes.dataLim.x0 > 0:  # a difference may lie below, and the goal of no failed test lies at 0
        axes.set_xlim(left=0)
    if all(each["value"] == int(each["value"]) for each in panel.figures):
        axes.locator_params(axis="x", integer=True)


def label_ratios(axes: Axes) -> None:
    """Take a logarithmic axis, on which half and twice lie equally far from equal, with round numbers."""
    axes.set_xscale("log")
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    low, high = axes.get_xlim()
    chosen = next(ticks for times, ticks in TICKS.items() if high <= times * low)
    ticks = [tick for tick in chosen if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def draw_figure(axes: Axes, each: Mapping[str, Any], place: int) -> None:
    from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE

    arrows = {"at least": CARETRIGHTBASE, "at most": CARETLEFTBASE}
    colour, filled = LOOKS.get(each["verdict"], WITHOUT_GOAL)
    if each["low"] is not None:
        axes.plot([each["low"], each["high"]], [place, place], color=colour, linewidth=1.5, solid_capstyle="butt")
    inside = colour if filled else "white"
    axes.plot([each["value"]], [place], "o", color=colour, markerfacecolor=inside, markersize=5)
    for kind, bound in bounds_of(each["goal"]):
        axes.plot([bound], [place], "|", color="black", markersize=9)
        axes.plot([bound], [place], marker=arrows[kind], color="black", markersize=5, markeredgewidth=0)


def bounds_of(goal: str | None) -> list[tuple[str, float]]:
    """Return the bounds of a goal as its words state it: `at least 1.1`, `at most 2`, or `0.97 to 1.03`."""
    if not goal:
        return []
    if " to " in goal:
        low, high = goal.split(" to ")
        return [("at least", float(low)), ("at most", float(high))]
    kind, bound = goal.rsplit(" ", 1)
    return [(kind, float(bound))]
