"""A log with unusable values is refused in one line, whatever the value. Later versions may add keys."""

import json

import pytest
from grid_logs import DIGITS, write_log

from lbsgd.commands.main import main
from lbsgd.errors import DataError
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report.curves import learning_rates
from lbsgd.report.groups import find_runs, read_runs
from lbsgd.report.log_lines import FIRST_LINE, FURTHER

ROW = STUDIES["table1"].rows(DIGITS)[3]
ODD = [None, "x", -1, 0, 1e300, float("nan"), [], {}, True, [None], {"a": 1}]
FIRST = [*FIRST_LINE, *FURTHER, "judged_by", "config.optimizer.params.momentum", "recipe.decay.epochs"]
EPOCH = ["epoch", "seconds", "train_loss", "val_top1_error_pct", "train_top1_error_pct"]
ITERATION = ["iteration", "epoch", "lr", "images_per_second"]


def rewritten(log, number, key, value):
    """Replace a value in line `number` of a log by its key path; Ellipsis deletes it."""
    lines = log.read_text().splitlines(keepends=True)
    record = json.loads(lines[number])
    *outer, last = key.split(".")
    block = record
    for name in outer:
        block = block.setdefault(name, {})
    if value is ...:
        block.pop(last, None)
    else:
        block[last] = value
    lines[number] = json.dumps(record) + "\n"
    log.write_text("".join(lines))


@pytest.mark.parametrize(
    ("number", "key"), [*((0, key) for key in FIRST), *((1, key) for key in ITERATION), *((2, key) for key in EPOCH)]
)
def test_no_value_is_a_traceback(tmp_path, capsys, number, key):
    write_log(tmp_path / "other", ROW, 1, [50.0, 40.0])
    log = write_log(tmp_path, ROW, 0, [50.0, 40.0]) / "log.jsonl"
    whole = log.read_text()
    for value in [..., *ODD]:
        log.write_text(whole)
        rewritten(log, number, key, value)
        code = main(["report", str(tmp_path)])
        errors = capsys.readouterr().err.splitlines()
        assert (code, len(errors)) in ((0, 0), (2, 1)), (value, errors)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recipe.seed", ..., "run without recipe.seed"),
        ("recipe.linear_scaling.rule", "cubic", "recipe.linear_scaling.rule, which is none of linear, sqrt, fixed"),
        ("schedule.decay_iterations", None, "schedule.decay_iterations, which is no list of numbers"),
        ("iterations_per_epoch", 0, "iterations_per_epoch, which is no number above 0"),
        ("environment", None, "environment, which is no object"),
        ("environment.command", {}, "environment.command, which is no list"),
        ("classes", ["cat", 1], "classes, which is no list of texts"),
        ("judged_by", ["a"], "judged_by, which is no list of measures"),
        ("judged_by", [], "judged_by, which is no list of measures"),
        ("judged_by", [{"key": "", "name": "a", "short": "a"}], "judged_by, which is no list of measures"),
        (
            "judged_by",
            [{"key": "a", "name": "a", "short": "a", "training": [1]}],
            "judged_by, which is no list of measures",
        ),
    ],
)
def test_the_key_is_named(tmp_path, key, value, words):
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    rewritten(log, 0, key, value)
    [error] = read_runs([tmp_path])[1]
    assert f"{log}, line 1: not a run log: run with" in error and words in error


@pytest.mark.parametrize("key", ["environment.code", "started_from", "recipe.epochs"])
def test_what_a_run_does_not_have_is_null(tmp_path, key):
    """A folder without git has no code, a run without pre-training starts from nothing, one may count iterations."""
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    rewritten(log, 0, key, None)
    assert len(find_runs([tmp_path])) == 1


@pytest.mark.parametrize(("key", "value"), [("of_a_later_version", 1), ("decay_iterations", ...)])
def test_a_schedule_may_say_more_in_a_later_version_or_name_no_decays(tmp_path, key, value):
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    [before] = find_runs([tmp_path])  # of one epoch, which no decay is in
    rewritten(log, 0, f"schedule.{key}", value)
    [after] = find_runs([tmp_path])
    assert learning_rates(before) == learning_rates(after)


def test_a_schedule_that_cannot_be_is_told_with_its_log(tmp_path):
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    rewritten(log, 0, "schedule.decay_factor", -1)
    [run] = find_runs([tmp_path])
    with pytest.raises(DataError, match=f"^{log}, line 1: decay_factor is -1, and must be"):
        learning_rates(run)


@pytest.mark.parametrize(("number", "key"), [(1, "iteration"), (1, "epoch"), (2, "epoch")])
def test_a_record_beyond_the_plan_is_refused_before_anybody_counts_up_to_it(tmp_path, number, key):
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    for place in (1e9, -1):
        rewritten(log, number, key, place)
        [error] = read_runs([tmp_path])[1]
        assert "a record at epoch" in error and "of 1 that were planned" in error


def test_nan_is_no_strict_json(tmp_path):
    log = write_log(tmp_path, ROW, 0, [50.0]) / "log.jsonl"
    rewritten(log, 2, "train_loss", float("nan"))
    [error] = read_runs([tmp_path])[1]
    assert f"{log}, line 3: not a run log: not JSON" in error


@pytest.mark.parametrize(("order", "after"), [((0, 1, 1, 2), 2), ((0, 2, 1), 3)])
def test_a_log_whose_epochs_do_not_rise_is_refused(tmp_path, order, after):
    """For example two pieces joined by hand, whose last 5 epochs would be wrong."""
    log = write_log(tmp_path, ROW, 0, [50.0, 40.0, 30.0]) / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    epochs = [line for line in lines if '"kind": "epoch"' in line]
    log.write_text("".join([lines[0], *(epochs[at] for at in order), lines[-1]]))
    said = f"{log}: not a run log: epoch 2 comes after epoch {after}; mend it, or leave it out"
    assert read_runs([tmp_path])[1] == [said]
