"""Table, page and last lines of a run tell how long it has trained, interrupted or not."""

import json

import pytest
from grid_logs import DIGITS, write_log

from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.report.run_page import run_page
from lbsgd.report.training_time import processes, trained_for, training_time
from lbsgd.train.live_page import LivePage

BASELINE = STUDIES["table1"].rows(DIGITS)[0]


def resumed(folder, epochs_done, seconds, world_size=1):
    """A run of four epochs of 60 s, of which the last were repeated in this many seconds each."""
    log = write_log(folder, BASELINE, 0, [50.0, 40.0, 30.0, 20.0])
    header = {**read_run(log).header, "world_size": world_size}
    del header["kind"]
    with RunLog(log, header, resume_iteration=epochs_done * header["iterations_per_epoch"]) as again:
        for epoch in range(epochs_done, 5):  # the report of an epoch in the checkpoint is written again
            took = {"seconds": 60.0 if epoch == epochs_done else seconds}
            again.epoch({"epoch": epoch, "train_loss": 1.0, "train_top1_error_pct": 9.0, **took})
    return read_run(log)


def without(log, *words):
    """Remove the lines with any of these words from a log."""
    lines = (log / "log.jsonl").read_text().splitlines(keepends=True)
    (log / "log.jsonl").write_text("".join(line for line in lines if not any(word in line for word in words)))
    return read_run(log)


def test_the_time_is_that_of_all_epochs(tmp_path):
    run = read_run(write_log(tmp_path, BASELINE, 0, [50.0] * 62))
    assert training_time(run) == "1:02:00" and trained_for(run) == "1:02:00 on 1 process"
    assert "finished after 62 epochs, trained in 1:02:00 on 1 process: top-1 error" in run_page(run).html()


def test_an_epoch_that_was_made_again_counts_once(tmp_path):
    run = resumed(tmp_path, 2, 100.0)
    assert [record["epoch"] for record in run.epochs] == [1, 2, 3, 4]
    assert trained_for(run) == "0:05:20 on 1 process"  # 60 + 60 + 100 + 100


def test_a_run_that_went_on_on_another_number_of_processes_says_so(tmp_path):
    run = resumed(tmp_path, 2, 100.0, world_size=4)
    assert processes(run) == "1 to 4" and trained_for(run) == "0:05:20 on 1 to 4 processes"
    page = LivePage(run.path.parent, {**run.header, "world_size": 4})
    page.take_up(run)
    page.write(run.epochs, ended="it was told to stop")
    assert "trained in 0:05:20 on 1 to 4 processes: " in (run.path.parent / "index.html").read_text()


def test_a_log_that_does_not_hold_all_epochs_has_no_time(tmp_path):
    """The log was lost, and begins where a checkpoint was resumed."""
    run = without(write_log(tmp_path, BASELINE, 0, [50.0] * 3), '"epoch", "epoch": 1,')
    assert len(run.epochs) == 2 and training_time(run) is None and trained_for(run) is None
    assert "finished after 3 epochs: top-1" in run_page(run).html()
    assert training_time(read_run(write_log(tmp_path / "begun", BASELINE, 0, [], planned=3))) is None


def test_an_earlier_log_without_the_number_of_processes_has_the_time_alone(tmp_path):
    log = write_log(tmp_path, BASELINE, 0, [50.0] * 3) / "log.jsonl"
    first, *rest = log.read_text().splitlines()
    header = json.loads(first)
    del header["world_size"]
    log.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    assert trained_for(read_run(log)) == "0:03:00"


def test_simulated_seconds_are_none(tmp_path):
    run = read_run(write_log(tmp_path, BASELINE, 0, [50.0] * 3))
    for record in run.epochs:
        record["simulated_time"] = 60.0 * record["epoch"]
    assert training_time(run) is None


@pytest.mark.parametrize("seconds, words", [(59.6, "0:01:00"), (3599.7, "1:00:00"), (90_000.0, "25:00:00")])
def test_it_is_told_in_hours_minutes_and_seconds(tmp_path, seconds, words):
    run = read_run(write_log(tmp_path, BASELINE, 0, [50.0]))
    run.epochs[0]["seconds"] = seconds
    assert training_time(run) == words
