"""A schedule that ends after its run: `lbsgd check` and the start of the run warn, and `lbsgd config` fits it."""

import pytest
from commands import ROOT

from lbsgd.algorithm.schedule import learning_rate
from lbsgd.commands.plan_figure import figure, stretches
from lbsgd.config.checks.inspection import findings_of
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan


def warnings(**lbsgd):
    config = generate(Overrides(8192))
    config["lbsgd"]["epochs"] = lbsgd.pop("epochs")
    for block, values in lbsgd.items():
        config["lbsgd"][block] |= values
    return [line for line in Plan.read(config, 8).warnings if "F06" in line]


@pytest.mark.parametrize("epochs, missed", [(4, "30, 60, 80"), (30, "30, 60, 80"), (31, "60, 80"), (80, "80")])
def test_decays_that_never_come_are_named(epochs, missed):
    said = f"lbsgd.decay.epochs has {missed}, but the run of {epochs} epochs has no update from there on"
    assert sum(said in line for line in warnings(epochs=epochs)) == 1


@pytest.mark.parametrize(
    "settings, findings",
    [
        ("lbsgd.decay.epochs=[30,30.001,89.999]", {"has 89.999, but": "F06", "has 30, 30.001, which": "F10"}),
        ("lbsgd.decay.epochs=[30,30.01,89.99]", {}),
        (
            "lbsgd.epochs=1 lbsgd.num_images=16384 lbsgd.warmup.epochs=0.1 lbsgd.decay.epochs=[0.3,0.7,0.9]",
            {"has 0.9, but": "F06", "has 0.3, 0.7, which": "F10"},
        ),
    ],
)
def test_decays_are_compared_in_whole_iterations(settings, findings):
    plan = Plan.read(ROOT / "ds_configs/8k.json", 8, overrides=Overrides(settings=tuple(settings.split())))
    told = [line for line in plan.warnings if line.startswith("lbsgd.decay.epochs")]
    assert len(told) == len(findings)
    for said, code in findings.items():
        assert any(said in line and line.endswith(f"[{code}]") for line in told)


def test_decays_of_a_detector_are_compared_in_iterations_of_its_own_batch():
    settings = ("lbsgd.decay.iterations=[120000, 120001, 159999]",)  # 15,000 twice, and 20,000 of 20,000
    plan = Plan.read(ROOT / "ds_configs/detection/mask_rcnn_128.json", 8, overrides=Overrides(settings=settings))
    assert [line[-5:] for line in plan.warnings] == ["[F06]", "[F10]"]


@pytest.mark.parametrize("epochs, outlasts", [(4, True), (5, True), (6, False)])
def test_a_warmup_that_outlasts_the_run_is_told(epochs, outlasts):
    said = f"lbsgd.warmup.epochs is 5, 780 iterations of 8192 images, but the run has {156 * epochs}: no update has"
    assert any(said in line for line in warnings(epochs=epochs)) is outlasts


def test_a_decay_before_the_first_update_is_told_also_without_a_warmup():
    for file, unit in (("8k", "epochs"), ("detection/mask_rcnn_64", "iterations")):
        for point, told in ((1e-5 if unit == "epochs" else 1, True), (20, False)):
            settings = ('lbsgd.warmup={"kind": "none"}', f"lbsgd.decay.{unit}=[{point}]")
            plan = Plan.read(ROOT / f"ds_configs/{file}.json", 8, overrides=Overrides(settings=settings))
            said = f"lbsgd.decay.{unit} has a point before the first update: no update has the full learning rate"
            assert any(line.startswith(said) for line in plan.warnings) is told


def test_the_papers_schedule_fits_its_90_epochs_and_decays_may_be_moved_into_a_shorter_run():
    assert warnings(epochs=90) == [] == warnings(epochs=30, decay={"epochs": [10, 20, 26]})


@pytest.mark.parametrize(
    "given, warmup, decay",
    [
        (dict(epochs=18), 1, [6, 12, 16]),
        (dict(settings=("lbsgd.epochs=18",)), 1, [6, 12, 16]),
        (dict(epochs=50), 2.8, [16.7, 33.3, 44.4]),
        (dict(epochs=180), 10, [60, 120, 160]),
        (dict(epochs=90), 5, [30, 60, 80]),
        (dict(epochs=18, settings=("lbsgd.decay.epochs=[9]",)), 1, [9]),
        (dict(epochs=18, settings=("lbsgd.warmup.epochs=2", "lbsgd.decay.factor=0.2")), 2, [6, 12, 16]),
        (dict(epochs=18, settings=('lbsgd.warmup={"kind": "none", "epochs": 0}',)), 0, [6, 12, 16]),
    ],
)
def test_a_generated_schedule_has_the_papers_parts_where_no_flag_says_otherwise(given, warmup, decay):
    config = generate(Overrides(8192, **given))
    block = config["lbsgd"]
    assert repr((block["warmup"]["epochs"], block["decay"]["epochs"])) == repr((warmup, decay))  # 1 is no 1.0
    assert config["scheduler"]["params"]["warmup_num_steps"] == max(1, round(warmup * 156))
    assert Plan.read(config, 8).schedule.decay_iterations == tuple(round(epoch * 156) for epoch in decay)


def test_a_generated_schedule_fits_a_run_of_any_length():
    for epochs in range(1, 100):
        config = generate(Overrides(8192, epochs=epochs))
        assert [each for each in findings_of(config) if each.severity != "note"] == [], epochs
        assert sorted(set(config["lbsgd"]["decay"]["epochs"])) == config["lbsgd"]["decay"]["epochs"]


def test_the_plan_shows_the_learning_rate_that_such_a_run_really_comes_to():
    plan = Plan.read(generate(Overrides(8192)), 8, overrides=Overrides(epochs=4))
    assert stretches(plan) == [("0 to 4", "0 to 624", "0.1 -> 2.58, by 0.00397 per iteration")]
    assert learning_rate(plan.num_iterations, plan.schedule) == pytest.approx(2.58)


def test_the_picture_of_a_run_that_ends_in_its_warmup_marks_the_learning_rate_that_it_reaches():
    for epochs, end in ((3, (3, 0.1 + 3.1 * 3 / 5)), (10, (5, 3.2))):
        plan = Plan.read(ROOT / "ds_configs/8k.json", 8, overrides=Overrides(settings=(f"lbsgd.epochs={epochs}",)))
        _, warmup = figure(plan).axes
        assert warmup.lines[-1].get_xydata()[0] == pytest.approx(end)
