"""A reporter passes DeepSpeed's monitors what they can draw, and gives useful advice."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from grid_logs import DIGITS, write_log
from trainers import Records

from lbsgd.commands import convert, detect, recipe_flags
from lbsgd.data.coco_annotations import CocoSplit
from lbsgd.data.folder import ValData
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.report.measure import TOP1
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train import session
from lbsgd.train.coco_source import coco_files
from lbsgd.train.images import fake_images, ffcv_files
from lbsgd.train.reporter import Reporter

DIGITS_WITHOUT_WARMUP = STUDIES["table1"].rows(DIGITS)[1]


def test_a_monitor_gets_numbers_alone():
    """TensorBoard raises at None, the value of an average precision if there is nothing to find."""
    events = []
    monitor = SimpleNamespace(enabled=True, write_events=events.extend)
    engine = SimpleNamespace(device="cpu", monitor=monitor, global_samples=64)
    record = {"epoch": 1, "val_box_ap": 3.5, "val_box_ap_small": None, "weight_to_gradient": {"fc": 2.0}}
    record |= {"iteration": 16, "num_iterations": 8}  # used for its axis
    record |= {"note": "text", "of_classes": [1.0, 2.0], "seen": np.float32(2)}  # a recipe's evaluation may return them
    Reporter(Records(), Records(), engine).report("epoch", record)
    assert events == [("lbsgd/val_box_ap", 3.5, 64), ("lbsgd/seen", 2, 64)]


def test_a_monitor_that_cannot_write_ends_no_training():
    def full(events):
        raise OSError(28, "No space left on device")

    progress = Records()
    progress.say = (said := []).append
    engine = SimpleNamespace(device="cpu", monitor=SimpleNamespace(enabled=True, write_events=full), global_samples=64)
    Reporter(Records(), progress, engine).report("epoch", {"epoch": 1, "val_loss": 2.0})
    assert said == [
        "warning: a monitor's file could not be written ([Errno 28] No space left on device); training goes on"
    ]


def test_a_log_that_vanishes_is_told_once(tmp_path):
    progress = Records()
    progress.say = (said := []).append
    engine = SimpleNamespace(device="cpu", monitor=SimpleNamespace(enabled=False))
    record = {"lr": 0.1, "train_loss": 1.0, "images_per_second": 100.0, "data_wait_pct": 1.0}
    header = read_run(write_log(tmp_path, DIGITS_WITHOUT_WARMUP, 0, [50.0])).header
    with RunLog(tmp_path / "run", header) as log:
        log.path.unlink()
        for number in range(2):
            Reporter(log, progress, engine).report("iteration", {"iteration": number, "epoch": 0.0, **record})
    assert said == [f"warning: {log.path} was removed or replaced; all of it is written there again"]
    assert len(read_run(log.path).iterations) == 2


def test_a_record_is_kept_if_the_log_cannot_be_put_back(tmp_path, monkeypatch):
    progress = Records()
    progress.say = (said := []).append
    engine = SimpleNamespace(device="cpu", monitor=SimpleNamespace(enabled=False))
    earlier = read_run(write_log(tmp_path, DIGITS_WITHOUT_WARMUP, 0, [50.0]))
    header, [record] = earlier.header, earlier.epochs
    with RunLog(tmp_path / "run", header) as log:
        reporter = Reporter(log, progress, engine)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(log, "put_back", Mock(side_effect=OSError(5, "Input/output error")))
            reporter.report("epoch", record)
        log.path.unlink()
        reporter.report("epoch", record | {"epoch": 2})
    assert [each["epoch"] for each in read_run(log.path).epochs] == [1, 2] == [each["epoch"] for each in log.epochs]
    assert "could not be written ([Errno 5] Input/output error); training goes on" in said[0] and len(said) == 2


@pytest.mark.parametrize("loss, num_warnings", [(0.7, 0), (math.nan, 1), (math.inf, 1)])
def test_a_validation_loss_that_is_not_a_number_is_a_warning(loss, num_warnings):
    progress = Records()
    progress.say = (said := []).append
    engine = SimpleNamespace(device="cpu", monitor=SimpleNamespace(enabled=False))
    reporter = Reporter(Records(), progress, engine)
    reporter.report("epoch", {"epoch": 1, "val_loss": loss})
    reporter.report("epoch", {"epoch": 2})  # not evaluated
    assert len(said) == num_warnings and all("warning: val_loss is not a number" in line for line in said)


@pytest.mark.parametrize(
    "first, done, evaluated, said",
    [
        (0, 24, [1, 2], "iterations 1 to 24"),
        (15, 17, [1], "iterations 16 to 17; no evaluation has seen the last 5: --evaluate_only makes one"),
        (0, 7, [], "iterations 1 to 7; no evaluation has seen the last 7: --evaluate_only makes one"),
        (24, 24, [1, 2], "nothing; 24 iterations were done before"),
        (0, 24, [1], "iterations 1 to 24; no evaluation has seen the last 12: --evaluate_only makes one"),
    ],
)
def test_the_end_says_what_was_trained_and_what_no_evaluation_has_seen(first, done, evaluated, said):
    """An epoch's record without an evaluation (--evaluate_every) does not count as one."""
    epochs = [{"epoch": e, **({"val_top1_error_pct": 5.0} if e in evaluated else {})} for e in range(1, done // 12 + 1)]
    progress = SimpleNamespace(first=first, done=done, per_epoch=12)
    assert Reporter(SimpleNamespace(epochs=epochs), progress, None).trained([TOP1]) == said


@pytest.mark.parametrize("epochs, told", [(5, ["warning: --baseline warns from epoch 6 on"]), (6, [])])
def test_a_run_too_short_for_a_warning_says_so_when_it_starts(epochs, told, tmp_path, monkeypatch):
    header = read_run(write_log(tmp_path / "other", DIGITS_WITHOUT_WARMUP, 0, [5.0])).header
    monkeypatch.setattr(session, "begin_output", lambda run: None)
    monkeypatch.setattr(session, "header_of", lambda *arguments: header)
    monkeypatch.setattr(session, "say_what_runs", lambda *arguments: None)
    per_epoch, said = header["iterations_per_epoch"], []
    run = SimpleNamespace(output_dir=tmp_path / "run", resume=False, baseline=dict.fromkeys(range(1, 13), 5.0))
    run.plan, run.last_iteration = SimpleNamespace(iterations_per_epoch=per_epoch), epochs * per_epoch
    run.images = SimpleNamespace(waiting_advice="")
    progress, engine = SimpleNamespace(begin=lambda done: None, say=said.append), SimpleNamespace(global_steps=0)
    session.reporter_of(run, engine, progress, None, None)
    assert [line.split(" at the earliest")[0] for line in said] == told


def flags_of(*parsers):
    return {flag for parser in parsers for flag in parser._option_string_actions}


OF_DETECTORS = flags_of(recipe_flags.with_flags("", detect.add_data))
OF_CLASSIFIERS = flags_of(recipe_flags.parser(""), convert.parser())
DATA = ValData(SimpleNamespace(path=Path("val.beton")), 1, None, "", None, None)
SPLIT = CocoSplit("", [], {}, 0, "", {})


@pytest.mark.parametrize(
    "source, known, named",
    [
        (coco_files(Path(), SPLIT, SPLIT, 4), OF_DETECTORS, {"--loader_workers"}),
        (coco_files(Path(), SPLIT, SPLIT, 0), OF_DETECTORS, {"--loader_workers"}),
        (ffcv_files(DATA, 4), OF_CLASSIFIERS, {"--loader_threads", "--in_memory", "--max_side"}),
        (fake_images(), OF_CLASSIFIERS, set()),
    ],
    ids=["COCO", "COCO, no workers", "FFCV", "fake"],
)
def test_an_epoch_that_waited_names_flags_that_its_recipe_has(source, known, named):
    said = Records()
    Reporter(Records(), said, None, source.waiting_advice).advise_on_waiting(31.2)
    [line] = said.said
    assert line.startswith("warning: 31 % of the epoch's time was spent waiting for data") and "\n" not in line
    assert {*re.findall(r"--\w+", line)} == named <= known


def test_a_decoder_that_is_ffcvs_is_told_and_named_first_where_training_waits(monkeypatch):
    monkeypatch.setattr("lbsgd.train.images.library", lambda: None)
    source = ffcv_files(DATA, 4)
    assert source.decoder.startswith("FFCV's, because") and source.waiting_advice.startswith("the decoder is FFCV's")
    monkeypatch.setattr("lbsgd.train.images.library", lambda: "kernels")
    source = ffcv_files(DATA, 4)
    assert source.decoder == "lbsgd's own" and "decoder" not in source.waiting_advice


def launcher(create_time):
    return SimpleNamespace(create_time=create_time)


@pytest.mark.parametrize("seconds, told", [(15.0, False), (16.0, True)])
def test_a_start_of_more_than_20_seconds_is_told_once_with_what_its_parts_took(monkeypatch, seconds, told):
    stopwatch, records, facts = Stopwatch(), Records(), []
    records.say_fact = lambda *fact: facts.append(fact)
    assert [name for name, _ in stopwatch.parts] == ["Python"]
    monkeypatch.setattr("lbsgd.processes.stopwatch.time", SimpleNamespace(time=lambda: 1000.0))
    stopwatch.parts, stopwatch.last = [("launcher", 2.0), ("Python", 3.0)], 1000.0 - seconds
    reporter = Reporter(records, records, None, stopwatch=stopwatch)
    reporter.advance(), reporter.advance()
    assert facts == [("start", "21 s to the first update: launcher 2.0, Python 3.0, first update 16.0")] * told


def test_a_start_begins_with_that_of_the_outermost_launcher():
    own = psutil.Process().create_time()
    stopwatch = Stopwatch([launcher(lambda: own - 2.0), launcher(lambda: own - 6.0)])
    assert stopwatch.parts[0] == ("launcher", pytest.approx(6.0)) and len(stopwatch.parts) == 2


def test_a_launcher_that_has_ended_has_no_part_in_the_start():
    def gone():
        raise psutil.NoSuchProcess(1)

    assert [name for name, _ in Stopwatch([launcher(gone)]).parts] == ["Python"]
