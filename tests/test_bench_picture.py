"""The picture of a bench on a GPU."""

import json

import pytest

from lbsgd.bench.figure import Figure, Goal
from lbsgd.experiments.checkout import ROOT
from lbsgd.report.bench_picture import DPI, bench_picture, bounds_of
from lbsgd.report.picture import replace_picture

RESULTS = sorted((ROOT / "results").glob("gpu_*/*.png"))


def drawn(*figures):
    """Return the panels of a picture: one part with these figures."""
    return bench_picture("speed", [{"title": "part", "figures": [each.as_dict() for each in figures]}]).axes


@pytest.mark.parametrize("picture", RESULTS, ids=lambda path: path.stem)
def test_the_published_pictures_are_those_of_the_json(picture, tmp_path):
    found = json.loads(picture.with_suffix(".json").read_text())
    again = bench_picture(f"{picture.stem} on {found['device']}", found["parts"])
    replace_picture(tmp_path / "again.png", again, dpi=DPI, metadata={"Software": None})
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_each_figure_stands_between_its_name_and_its_numbers(tmp_path):
    goal = Goal("at least", 1.1)
    [axes] = drawn(Figure("lbsgd / plain", 1.25, 1.2, 1.3, goal=goal), Figure("other / plain", 0.5))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lbsgd / plain", "other / plain"]
    [numbers] = axes.child_axes
    assert [label.get_text() for label in numbers.get_yticklabels()] == ["1.250 [1.200, 1.300]  reached", "0.5  "]


def test_ratios_lie_about_equal_and_other_figures_begin_at_zero():
    ratios, waits = drawn(Figure("a / b", 2.0, 1.5, 3.0), Figure("waiting", 3.0, 2.5, 3.5, unit="%"))
    assert ratios.get_xscale() == "log" and "1" in [label.get_text() for label in ratios.get_xticklabels()]
    assert waits.get_xlim()[0] == 0 and waits.get_xlabel() == "%"
    [apart] = drawn(Figure("difference", -0.2, -0.5, 0.1, unit="points"))
    assert apart.get_xlim()[0] < -0.5  # not cut


def test_no_figure_makes_no_picture():
    assert bench_picture("speed", [{"title": "part", "figures": []}]) is None


@pytest.mark.parametrize(
    ("goal", "bounds"),
    [
        (Goal("at least", 1.1), [("at least", 1.1)]),
        (Goal("at most", 0), [("at most", 0)]),
        (Goal("within", 0.25), [("at least", 0.75), ("at most", 1.25)]),
    ],
)
def test_the_words_of_a_goal_hold_its_bounds(goal, bounds):
    assert bounds_of(str(goal)) == bounds
