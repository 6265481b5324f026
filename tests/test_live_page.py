"""The page that a run writes while it trains, and the warning when it stays above the baseline's curve."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from grid_logs import DIGITS, write_log

from lbsgd.errors import ConfigError, DataError, DivergedError, TrainingError
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.experiments.checkout import ROOT
from lbsgd.report import picture
from lbsgd.report.groups import find_runs
from lbsgd.report.lines import fact
from lbsgd.report.match import limit, limits
from lbsgd.report.measure import CLASSIFIER, TOP1
from lbsgd.report.run_log import DIVERGED, RunLog, read_run
from lbsgd.train.live_page import LivePage, baseline_limits
from lbsgd.train.reporter import Reporter

BASELINE, NO_WARMUP, _, GRADUAL = STUDIES["table1"].rows(DIGITS)
CURVE = [90.0, 50.0, 20.0, 10.0, 8.0, 6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0]
RESULTS = ROOT / "results"


@pytest.fixture
def baseline(tmp_path):
    """Three seeds whose training errors are CURVE and 1 point around it. A fourth may be 4.97 points above CURVE."""
    errors = [[error + by for error in CURVE] for by in (-1, 0, 1)]
    return [write_log(tmp_path / "runs", BASELINE, seed, CURVE, train) for seed, train in enumerate(errors)]


def above(*numbers):
    """Training errors that exceed the limits in these epochs, and follow the baseline in all others."""
    return [error + (5.5 if number in numbers else 4.5) for number, error in enumerate(CURVE, 1)]


def epochs(errors):
    rest = {"train_loss": 1.0, "val_top1_error_pct": 5.0, "seconds": 1.0}
    return [{"epoch": number, "train_top1_error_pct": error, **rest} for number, error in enumerate(errors, 1)]


def warnings_of(folder, row, errors, limits=None):
    header = read_run(write_log(folder / "header", row, 0, [5.0])).header
    page = LivePage(folder, header, limits)
    done = epochs(errors)
    return [page.write(done[: number + 1]) for number in range(len(done))], page


def test_the_limit_is_the_prediction_interval_of_one_more_seed(baseline):
    assert baseline_limits(baseline)[12] == pytest.approx(3 + 4.302653 * math.sqrt(1 + 1 / 3), abs=1e-6)
    assert limit([3.0, 3.1, 3.2, 3.1]) == pytest.approx(3.1 + 0.5)  # never narrower than half a point


def test_an_epoch_has_a_limit_where_two_seeds_have_a_number(tmp_path):
    errors = [[9.0, math.nan, 3.0], [math.nan, math.nan, 3.0], [11.0, 5.0, 3.0]]
    runs = [write_log(tmp_path, BASELINE, seed, [5.0] * 3, train) for seed, train in enumerate(errors)]
    assert baseline_limits(runs) == {1: limit([9.0, 11.0]), 3: 3.5}


def test_staying_above_the_baseline_is_told_once_until_the_curve_has_come_back(tmp_path, baseline):
    said, page = warnings_of(tmp_path, NO_WARMUP, above(4, 5, 6, 7, 9, 10, 11), baseline_limits(baseline))
    assert [number for number, warnings in enumerate(said, 1) if warnings] == [6, 11]
    [warning] = said[5]
    assert warning.startswith(
        "epoch 6: the training error, now 11.50 %, has been above the baseline's (at most 10.97 %)"
    )
    assert " for 3 epochs; " in warning and "usual causes: no warmup, a global batch beyond the elbow" in warning
    assert (tmp_path / "index.html").read_text().count("warning: epoch") == 2


@pytest.mark.parametrize(
    "errors",
    [
        above(4, 5, 7, 8, 10, 12),  # never three in a row
        above(1, 2, 3, 4, 5),  # the first three epochs are a quarter
        [error - 10 for error in CURVE],  # a lower error is no worse
        [*above(4, 5)[:5], None, math.nan],  # the log has no number for them
    ],
)
def test_a_run_that_follows_the_baseline_gets_no_warning(tmp_path, baseline, errors):
    said, _ = warnings_of(tmp_path, NO_WARMUP, errors, baseline_limits(baseline))
    assert not any(said)


def test_the_warmup_may_lie_above_it(tmp_path, baseline):
    said, _ = warnings_of(tmp_path, GRADUAL, above(1, 2, 3, 4, 5, 6), baseline_limits(baseline))
    assert not any(said)  # two epochs of warmup, and two to return to the baseline


def test_a_run_that_ends_before_any_warning_is_told_so(tmp_path, baseline):
    header = read_run(write_log(tmp_path / "header", NO_WARMUP, 0, [5.0])).header
    page = LivePage(tmp_path, header, baseline_limits(baseline))
    line = "--baseline warns from epoch 6 on at the earliest, and epoch {} is the last that it compares"
    assert page.too_short(5.5) == line.format("5.5") and page.too_short(6) is None
    assert LivePage(tmp_path, header).too_short(1) is None  # without a baseline
    page.header = header | {"schedule": header["schedule"] | {"warmup_iterations": 5 * header["iterations_per_epoch"]}}
    assert page.too_short(90) == line.format("12").replace("6", "13", 1)  # the baseline's last


def test_in_a_long_run_a_tenth_of_the_epochs_must_lie_above_it(tmp_path):
    header = read_run(write_log(tmp_path, NO_WARMUP, 0, [5.0])).header
    errors = [10.0] * 10 + [10.1] * 3 + [10.0] * 5 + [10.1] * 4 + [10.0] * 9  # 4 of 31 are a tenth
    [warning] = LivePage(tmp_path, header, dict.fromkeys(range(1, 32), 10.0)).compare(epochs(errors))
    assert warning.startswith("epoch 22:") and " for 4 epochs; " in warning


@pytest.mark.parametrize(
    "place, row, warned",
    [
        ("digits/longer", "x8", 0),
        ("digits/longer", "x16", 0),
        ("cifar10/longer", "x8", 0),
        ("digits", "x1", 0),
        ("digits/longer", "x1", 0),
        ("cifar10/longer", "x1", 0),
        ("digits", "x8", 4),  # half a point above, to the end
        ("digits", "x8_no_warmup", 5),
        ("digits", "x8_constant_warmup", 5),
        ("cifar10", "x8_no_warmup", 5),
        ("cifar10", "x8_constant_warmup", 5),
        ("cifar10", "x32", 3),
    ],
)
def test_of_the_published_runs_those_that_end_higher_get_a_warning(place, row, warned):
    seeds = find_runs([RESULTS / place / "runs" / "x1"])
    found = []
    for run in find_runs([RESULTS / place / "runs" / row]):
        others = [seed for seed in seeds if seed.path != run.path]
        found.append(LivePage(run.path.parent, run.header, limits(others)).compare(run.epochs))
    assert sum(map(bool, found)) == warned


def test_a_baseline_is_three_finished_seeds_of_one_recipe(tmp_path, baseline):
    assert list(baseline_limits(baseline)) == list(range(1, 13))
    two_recipes = [*baseline, write_log(tmp_path / "other", GRADUAL, 2, CURVE)]
    for runs, found in ((baseline[:2], "2 finished runs of 1 recipe;"), (two_recipes, "4 finished runs of 2 recipes;")):
        with pytest.raises(ConfigError, match=f"{found} give at least 3 finished runs of one recipe"):
            baseline_limits(runs)


def test_a_baseline_of_which_a_seed_diverged_is_none(tmp_path, baseline):
    (write_log(tmp_path / "runs", BASELINE, 3, CURVE[:2], planned=12) / "diverged.txt").write_text("error: no number\n")
    with pytest.raises(ConfigError, match="1 of 4 seeds diverged"):
        baseline_limits([tmp_path / "runs"])


def test_an_infinite_noise_scale_is_a_gap_and_no_error(tmp_path):
    """|G|² may be estimated as 0 or below. The log then has null."""
    said, page = warnings_of(tmp_path, BASELINE, [50.0])
    page.measured += [{"iteration": t, "epoch": t / 4, "noise_scale": scale} for t, scale in enumerate([9.0, math.inf])]
    assert page.write(epochs([50.0])) == [] and "[9.0,null]" in (tmp_path / "index.html").read_text()


def test_the_page_of_a_long_run_shows_some_of_its_measurements(tmp_path):
    """Training waits for the page, and browsers load it again and again."""
    run, all_of_them = read_run(write_log(tmp_path, BASELINE, 0, [5.0], planned=12)), range(0, 450_360, 10)
    measured = [{"kind": "iteration", "iteration": t, "epoch": t / 40_000, "noise_scale": 9.0} for t in all_of_them]
    page = LivePage(tmp_path, run.header)
    page.take_up(replace(run, iterations=measured))
    assert [record["iteration"] for record in page.measured] == [*all_of_them[::128]]
    assert page.write(run.epochs) == [] and (tmp_path / "index.html").stat().st_size < 100_000


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    said, page = warnings_of(tmp_path, BASELINE, [50.0])
    page.folder = tmp_path / "missing"
    assert "cannot write" in page.write(epochs([50.0]))[0] and page.write(epochs([50.0, 40.0])) == []


@pytest.mark.parametrize("done", range(1, 13))
def test_a_resumed_run_gets_the_warnings_of_a_run_without_a_stop(tmp_path, baseline, done):
    errors = above(4, 5, 6, 7, 9, 10, 11)
    run = read_run(write_log(tmp_path, NO_WARMUP, 0, [5.0] * done, errors[:done], planned=13))
    page = LivePage(run.path.parent, run.header, baseline_limits(baseline))
    page.take_up(run)
    told = len(page.warnings)
    said = [page.write(epochs(errors)[:number]) for number in range(done, 13)]  # the page is written before the run
    assert said[0] == [] and len(page.warnings) == told + sum(map(len, said)) == 2
    assert [warning.split(":")[0] for warning in page.warnings] == ["epoch 6", "epoch 11"]


def test_a_resumed_run_s_page_keeps_what_was_measured_and_said_before(tmp_path, baseline):
    folder = write_log(tmp_path, NO_WARMUP, 0, [5.0] * 6, above(4, 5, 6)[:6], planned=12)
    log = folder / "log.jsonl"
    log.write_text(log.read_text().replace('{"kind": "iteration",', '{"kind": "iteration", "noise_scale": 9.0,'))
    run = read_run(folder)
    page = LivePage(folder, run.header, baseline_limits(baseline))
    page.take_up(run)
    assert page.write(run.epochs) == []  # nothing is printed twice
    html = (folder / "index.html").read_text()
    assert html.count("warning: epoch 6") == 1 and "Gradient noise" in html


def reporting(folder):
    """A reporter of a run of six epochs, and what it prints."""
    header = read_run(write_log(folder / "header", BASELINE, 0, [5.0], planned=6)).header
    said = []
    ends = {"first": 0, "done": 60, "per_epoch": header["iterations_per_epoch"]}
    said_as = {"say": said.append, "say_fact": lambda name, value: said.append(fact(name, value))}
    progress = SimpleNamespace(**said_as, **ends, __enter__=lambda: None, __exit__=lambda *error: None)
    reporter = Reporter(RunLog(folder, header), progress, None, page=LivePage(folder, header))
    return reporter, said


def test_the_page_of_a_run_that_an_error_ends_says_why_and_reloads_itself_no_more(tmp_path):
    reporter, _ = reporting(tmp_path)
    reporter.log.epoch(epochs([50.0])[0])
    with pytest.raises(DivergedError), reporter:
        raise DivergedError("the loss of iteration 60 is not a number")
    html = (tmp_path / "index.html").read_text()
    assert (
        'data-reload-seconds=""' in html
        and "ended after 1 of 6 epochs, trained in 0:00:01 on 1 process: top-1 error 5.00 %" in html
    )
    assert "; the loss of iteration 60 is not a number<" in html


@pytest.mark.parametrize("error, diverged", [(DivergedError("the loss is not a number"), True), (TrainingError, False)])
def test_a_run_that_diverges_leaves_a_word_for_reports_until_it_goes_on(tmp_path, error, diverged):
    reporter, _ = reporting(tmp_path)
    with pytest.raises(TrainingError), reporter:
        raise error
    assert (tmp_path / DIVERGED).exists() == diverged
    RunLog(tmp_path, reporter.log.header, resume_iteration=0).close()
    assert not (tmp_path / DIVERGED).exists()


def test_the_page_of_a_run_that_was_to_end_inside_its_first_epoch_reloads_itself_no_more(tmp_path):
    reporter, said = reporting(tmp_path)
    reporter.conclude([TOP1], {})
    html = (tmp_path / "index.html").read_text()
    assert 'data-reload-seconds=""' in html and "ended after 0 of 6 epochs: no epoch is finished yet; it was to" in html
    assert said[1].startswith("page ") and read_run(tmp_path).result is None


def ended(folder):
    """A reporter of a run with two epochs, and what it prints."""
    reporter, said = reporting(folder)
    for record in epochs([50.0, 40.0]):
        reporter.log.epoch(record)
    return reporter, said


def test_the_end_says_the_number_that_the_run_is_judged_by_and_where_all_files_are(tmp_path):
    reporter, said = ended(tmp_path)
    reporter.conclude(CLASSIFIER, {"weights": tmp_path / "weights.pt"})
    assert said[0].startswith("trained        iterations 1 to 60; ")
    assert said[1:] == [
        "training time  0:00:02 on 1 process, without evaluations",
        f"page           {tmp_path}/index.html",
        "top-1 error    5.00 %, median of 2 evaluations in the last 5 epochs",
        f"curves         {tmp_path}/curves.png",
        f"log            {tmp_path}/log.jsonl",
        f"weights        {tmp_path}/weights.pt",
    ]
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and read_run(tmp_path).result


@pytest.mark.parametrize("blocked", ["log.jsonl", "curves.png"])
def test_results_for_which_there_is_no_room_are_one_line_with_the_way_out(tmp_path, monkeypatch, blocked):
    def full(*_):
        raise OSError(28, "No space left on device")

    reporter, _ = ended(tmp_path)
    monkeypatch.setattr(
        *{"log.jsonl": (reporter.log, "result"), "curves.png": (picture, "rewrite_file")}[blocked], full
    )
    words = r"cannot write the results in .* \(.*No space left on device\); make room, .* same command with --resume, "
    with pytest.raises(DataError, match=words) as refused:
        reporter.conclude([TOP1], {})
    assert "\n" not in str(refused.value) and "another place" not in str(refused.value)


def test_the_page_of_a_run_has_what_it_measured_and_the_screen_the_page_s_warnings(tmp_path, baseline):
    reporter, said = reporting(tmp_path)
    reporter.engine = SimpleNamespace(device="cpu", monitor=SimpleNamespace(enabled=False))
    reporter.progress.iteration = reporter.progress.epoch = lambda record: None
    reporter.page.baseline = baseline_limits(baseline)
    speed = {"lr": 0.1, "train_loss": 1.0, "images_per_second": 9.0, "data_wait_pct": 1.0}
    reporter.report("iteration", {"iteration": 0, "epoch": 0.0, "noise_scale": 9.0, **speed})
    for record in epochs(above(4, 5, 6)[:6]):
        reporter.report("epoch", record)
    assert "Gradient noise" in (tmp_path / "index.html").read_text()
    [line] = said
    assert line.startswith("warning: epoch 6: the training error, now 11.50 %, has been above the baseline's")
