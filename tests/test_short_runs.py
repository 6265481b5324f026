"""A schedule that reaches beyond its run: said by `lbsgd check` and at the start of the run."""

import pytest

from lbsgd.algorithm.schedule import learning_rate
from lbsgd.commands.plan_figure import stretches
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan


def warnings(**lbsgd):
    config = generate(Overrides(8192, epochs=lbsgd.pop("epochs")))
    for block, values in lbsgd.items():
        config["lbsgd"][block] |= values
    return [line for line in Plan.read(config, 8).warnings if "F06" in line]


@pytest.mark.parametrize("epochs, missed", [(4, "30, 60, 80"), (30, "30, 60, 80"), (31, "60, 80"), (80, "80")])
def test_decays_that_never_come_are_named(epochs, missed):
    said = f"lbsgd.decay.epochs has {missed}, but the run of {epochs} epochs ends before"
    assert sum(said in line for line in warnings(epochs=epochs)) == 1


@pytest.mark.parametrize("epochs, outlasts", [(4, True), (5, True), (6, False)])
def test_a_warmup_that_outlasts_the_run_is_told(epochs, outlasts):
    said = f"lbsgd.warmup.epochs is 5, 780 iterations of 8192 images, but the run has {156 * epochs}: no update has"
    assert any(said in line for line in warnings(epochs=epochs)) is outlasts


def test_the_papers_schedule_fits_its_90_epochs_and_decays_may_be_moved_into_a_shorter_run():
    assert warnings(epochs=90) == [] == warnings(epochs=30, decay={"epochs": [10, 20, 26]})


def test_the_plan_shows_the_learning_rate_that_such_a_run_really_comes_to():
    plan = Plan.read(generate(Overrides(8192, epochs=4)), 8)
    assert stretches(plan) == [("0 to 4", "0 to 624", "0.1 -> 2.58, by 0.00397 per iteration")]
    assert learning_rate(plan.num_iterations, plan.schedule) == pytest.approx(2.58)
