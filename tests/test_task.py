"""A task names the numbers that it is judged by. Log, screen, page, tables and curves follow it."""

import os

import pytest
from commands import script
from grid_logs import DIGITS, write_log
from rich.console import Console

from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report.curves import figure
from lbsgd.report.families import families_of
from lbsgd.report.group_page import group_page
from lbsgd.report.groups import group_runs
from lbsgd.report.measure import CLASSIFIER, TOP1, Measure, as_data, measures_of
from lbsgd.report.paper_tables import paper_tables
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.report.tables import error_table
from lbsgd.train.live_page import baseline_limits

SETTINGS = {"lbsgd.num_images": 256, "lbsgd.epochs": 2, "lbsgd.warmup": '{"kind":"none","epochs":0}'}


def run(folder, *flags):
    """Run the recipe without counts for two epochs of two iterations, as a command."""
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    batch = ("--global_batch", "128", "--micro_batch", "128", "--set", "lbsgd.decay.epochs=[1]")
    command = ["tests/uncounted_recipe.py", "--deepspeed_config", "tests/cluster/small.json", "--fake_data"]
    done = script(*command, *batch, *settings, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncounted") / "run"
    return folder, run(folder)


def test_a_run_that_counts_nothing_trains_and_reports_its_own_numbers(trained):
    folder, said = trained
    log = read_run(folder)
    assert [measure.key for measure in log.measures] == ["val_score", "val_other", "val_third"]
    assert not any("top1" in key for record in [*log.epochs, log.result] for key in record)
    last = log.epochs[-1]
    assert log.result == {"kind": "result", "val_score": last["val_score"], "val_other": last["val_other"]} | {
        "val_third": 1.0
    }
    score = f"{last['val_score']:.2f}"
    assert f"epoch 2/2  score {score:>5}  other {last['val_other']:5.2f} points  loss" in said
    assert f"score          {score}, last evaluation" in said and "third" not in said
    assert (folder / "curves.png").exists() and f"score {score}, last evaluation" in (folder / "index.html").read_text()


def test_its_checkpoint_is_evaluated_in_its_own_words(trained):
    folder, _ = trained
    last = read_run(folder).epochs[-1]
    score, other = f"{last['val_score']:.2f}", f"{last['val_other']:.2f}"
    said = run(folder, "--evaluate_only", "--micro_batch", "64")
    assert f"iteration 4: score {score}, other score {other} points, third score 1.00 on the images of seeded" in said
    assert "to the bit" not in said  # nothing is resumed


def printed(table):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(table)
    return console.export_text()


def test_tables_pages_and_curves_show_its_numbers(trained, tmp_path):
    run = read_run(trained[0])
    table = printed(error_table([run]))
    assert f"{run.value:.2f}" in table and "score; val: last evaluation" in table and "other" in table
    page = group_page("ours", families_of(group_runs([run]))).html()
    assert "validation score" in page and "validation other" in page and "training" not in page.split("Environment")[0]
    picture = figure(run)
    axes, _ = picture.axes
    assert axes.get_ylabel() == "score" and len(axes.get_lines()) == 1  # no dashed line of training
    assert axes.get_title("left") == "solid: validation"
    assert picture.legends[0].get_title().get_text() == "final number on validation images"
    assert paper_tables(families_of(group_runs([run]))[0]) == []  # the paper's tables all have top-1 errors


def test_nothing_counted_in_training_is_no_baseline(trained):
    with pytest.raises(ConfigError, match="has no training error to compare with"):
        baseline_limits([trained[0]])


def test_what_a_run_is_judged_by():
    epochs = [{"val_top1_error_pct": error, "score": error} for error in (9.0, 30.0, 10.0, 20.0, 40.0, 50.0)]
    assert TOP1.of(epochs) == 30.0 and TOP1.best(epochs) == 9.0 and TOP1.of([]) is None
    assert TOP1.of([*epochs[:2], {"val_top1_error_pct": None}]) == 19.5  # a missing number, as in a log
    last = Measure("score", "score", "score", of_run="last", higher=True)
    assert last.of(epochs) == 50.0 and last.best(epochs) == 50.0
    assert last.of([*epochs, {"epoch": 7}]) == 50.0  # an epoch without an evaluation


def test_an_earlier_log_is_a_classifiers_and_a_record_without_a_judged_number_is_refused(tmp_path):
    [row, *_] = STUDIES["figure1"].rows(DIGITS)
    run = read_run(write_log(tmp_path, row, 0, [5.0]))
    assert "judged_by" not in run.header and run.measures == (TOP1,)
    header = {**run.header, "judged_by": as_data(CLASSIFIER)}
    of_a_later_version = [{**each, "what nobody knows yet": 1} for each in header["judged_by"]]
    assert measures_of({"judged_by": of_a_later_version}) == CLASSIFIER
    with RunLog(tmp_path / "new", header) as log, pytest.raises(AssertionError, match="val_top5_error_pct"):
        log.epoch({key: value for key, value in run.epochs[0].items() if key != "kind"})
    text = (
        tmp_path / "new" / "log.jsonl"
    ).read_text() + '{"kind": "epoch", "epoch": 1, "train_loss": 1, "seconds": 1}\n'
    (tmp_path / "new" / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match="line 2.*without train_top1_error_pct"):
        read_run(tmp_path / "new")
