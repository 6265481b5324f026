"""The page that a run writes while it trains, and the warning when it leaves the baseline's curve."""

import math
from types import SimpleNamespace

import pytest
from grid_logs import DIGITS, write_log

from lbsgd.errors import ConfigError, DataError, DivergedError, TrainingError
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report import picture
from lbsgd.report.measure import CLASSIFIER, TOP1
from lbsgd.report.run_log import DIVERGED, RunLog, read_run
from lbsgd.train.live_page import LivePage, baseline_band
from lbsgd.train.reporter import Reporter

BASELINE, NO_WARMUP, _, GRADUAL = STUDIES["table1"].rows(DIGITS)
CURVE = [90.0, 50.0, 20.0, 10.0, 8.0, 6.0]


@pytest.fixture
def baseline(tmp_path):
    """Three seeds whose training errors are CURVE and 1 point around it: a band of ± 2 points."""
    errors = [[error + by for error in CURVE] for by in (-1, 0, 1)]
    return [write_log(tmp_path / "runs", BASELINE, seed, CURVE, train) for seed, train in enumerate(errors)]


def epochs(errors):
    rest = {"train_loss": 1.0, "val_top1_error_pct": 5.0, "seconds": 1.0}
    return [{"epoch": number, "train_top1_error_pct": error, **rest} for number, error in enumerate(errors, 1)]


def warnings_of(folder, row, errors, band):
    header = read_run(write_log(folder / "header", row, 0, [5.0])).header
    page = LivePage(folder, header, band)
    done = epochs(errors)
    return [page.write(done[: number + 1]) for number in range(len(done))], page


def test_leaving_the_baseline_s_curve_is_told_once_until_it_has_come_back(tmp_path, baseline):
    errors = [70.0, 53.0, 20.5, 13.0, 10.5, 5.0]  # outside at epochs 1, 2, 4 and 5
    said, page = warnings_of(tmp_path, NO_WARMUP, errors, baseline_band(baseline))
    assert [len(warnings) for warnings in said] == [1, 0, 0, 1, 0, 0]
    assert said[3][0].startswith("epoch 4: training error 13.00 % is outside the baseline's 8.00 to 12.00 %")
    assert "usual causes: no warmup, a global batch beyond the elbow" in said[3][0]
    assert (tmp_path / "index.html").read_text().count("warning: epoch") == 2


def test_the_warmup_may_leave_it(tmp_path, baseline):
    said, _ = warnings_of(tmp_path, GRADUAL, [95.0, 80.0, 50.0, 30.0, 8.0, 6.0], baseline_band(baseline))
    assert not any(said)  # two epochs of warmup, and as many to come back


def test_a_baseline_is_three_finished_seeds_of_one_recipe(tmp_path, baseline):
    assert len(baseline_band(baseline)) == 6
    two_recipes = [*baseline[:2], write_log(tmp_path / "other", GRADUAL, 2, CURVE)]
    for runs, found in ((baseline[:1], "1 finished run of 1 recipe;"), (two_recipes, "3 finished runs of 2 recipes;")):
        with pytest.raises(ConfigError, match=f"{found} give at least 3 finished runs of one recipe"):
            baseline_band(runs)


def test_a_baseline_of_which_a_seed_diverged_is_none(tmp_path, baseline):
    (write_log(tmp_path / "runs", BASELINE, 3, CURVE[:2], planned=6) / "diverged.txt").write_text("error: no number\n")
    with pytest.raises(ConfigError, match="1 of 4 seeds diverged"):
        baseline_band([tmp_path / "runs"])


def test_an_infinite_noise_scale_is_a_gap_and_no_error(tmp_path):
    """|G|² may be estimated at 0 or below; the log has null then."""
    said, page = warnings_of(tmp_path, BASELINE, [50.0], ())
    page.measured += [{"iteration": t, "epoch": t / 4, "noise_scale": scale} for t, scale in enumerate([9.0, math.inf])]
    assert page.write(epochs([50.0])) == [] and "[9.0,null]" in (tmp_path / "index.html").read_text()


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    said, page = warnings_of(tmp_path, BASELINE, [50.0], ())
    page.folder = tmp_path / "missing"
    assert "cannot write" in page.write(epochs([50.0]))[0] and page.write(epochs([50.0, 40.0])) == []


def test_a_resumed_run_s_page_keeps_what_was_measured_and_said_before(tmp_path, baseline):
    folder = write_log(tmp_path, NO_WARMUP, 0, [5.0] * 2, [70.0, 50.0], planned=6)  # epoch 1 is outside
    log = folder / "log.jsonl"
    log.write_text(log.read_text().replace('{"kind": "iteration",', '{"kind": "iteration", "noise_scale": 9.0,'))
    run = read_run(folder)
    page = LivePage(folder, run.header, baseline_band(baseline))
    page.take_up(run)
    assert page.write(run.epochs) == []  # nothing is said twice
    html = (folder / "index.html").read_text()
    assert html.count("warning: epoch 1") == 1 and "Gradient noise" in html


def reporting(folder):
    """A reporter of a run of six epochs, and what it says on the screen."""
    header = read_run(write_log(folder / "header", BASELINE, 0, [5.0], planned=6)).header
    said = []
    ends = {"first": 0, "done": 60, "per_epoch": header["iterations_per_epoch"]}
    progress = SimpleNamespace(say=said.append, **ends, __enter__=lambda: None, __exit__=lambda *error: None)
    reporter = Reporter(RunLog(folder, header), progress, None, page=LivePage(folder, header))
    return reporter, said


def test_the_page_of_a_run_that_an_error_ends_says_why_and_reloads_itself_no_more(tmp_path):
    reporter, _ = reporting(tmp_path)
    reporter.log.epoch(epochs([50.0])[0])
    with pytest.raises(DivergedError), reporter:
        raise DivergedError("the loss of iteration 60 is not a number")
    html = (tmp_path / "index.html").read_text()
    assert 'data-reload-seconds=""' in html and "ended after 1 of 6 epochs: top-1 error 5.00 %" in html
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
    """A reporter of a run with two epochs, and what it says on the screen."""
    reporter, said = reporting(folder)
    for record in epochs([50.0, 40.0]):
        reporter.log.epoch(record)
    return reporter, said


def test_the_end_says_the_number_that_the_run_is_judged_by_and_where_all_files_are(tmp_path):
    reporter, said = ended(tmp_path)
    reporter.conclude(CLASSIFIER, {"weights": tmp_path / "weights.pt"})
    assert said[0].startswith("trained        iterations 1 to 60; ")
    assert said[1:] == [
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
    reporter.page.baseline = baseline_band(baseline)
    speed = {"lr": 0.1, "train_loss": 1.0, "images_per_second": 9.0, "data_wait_pct": 1.0}
    reporter.report("iteration", {"iteration": 0, "epoch": 0.0, "noise_scale": 9.0, **speed})
    reporter.report("epoch", epochs([70.0])[0])
    assert "Gradient noise" in (tmp_path / "index.html").read_text()
    [line] = said
    assert line.startswith("warning: epoch 1: training error 70.00 % is outside the baseline's")
