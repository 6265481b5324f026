"""A written run log can be read, whatever happens to the run."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from lbsgd.disk import replace_file, to_disk
from lbsgd.errors import ConfigError, DataError, DivergedError
from lbsgd.report import log_lines, run_log
from lbsgd.report.measure import CLASSIFIER, TOP1, Measure, as_data
from lbsgd.report.run_log import DIVERGED, RunLog, read_run

RUN = {
    "model": "resnet50",
    "recipe": {"epochs": 4, "seed": 0},
    "schedule": {"reference_lr": 0.2},
    "config": {},
    "precision": "fp32",
    "global_batch": 128,
    "num_workers": 4,
    "iterations_per_epoch": 2,
}


def iteration(t, **more):
    return {
        "iteration": t,
        "epoch": t / 2,
        "lr": 0.2,
        "train_loss": 2.3,
        "images_per_second": 160.0,
        "data_wait_pct": 0.4,
        **more,
    }


def epoch(number, error=10.0):
    return {
        "epoch": number,
        "train_loss": 1.0,
        "train_top1_error_pct": 12.0,
        "val_top1_error_pct": error,
        "seconds": 8.0,
    }


def write(folder, *, epochs):
    """Write a log of whole epochs with 2 iterations each. The error after epoch e is 10 · e."""
    with RunLog(folder, RUN) as log:
        for e in range(epochs):
            log.iteration(iteration(2 * e))
            log.iteration(iteration(2 * e + 1))
            log.epoch(epoch(e + 1, error=10.0 * (e + 1)))
    return folder / "log.jsonl"


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_a_log_reads_back_as_it_was_written(tmp_path):
    with RunLog(tmp_path / "run", RUN) as log:
        log.iteration(iteration(0))
        log.epoch(epoch(1, error=7.5))
        assert log.result() == {"val_top1_error_pct": 7.5}
    for path in (tmp_path / "run", tmp_path / "run" / "log.jsonl"):
        run = read_run(path)
        assert run.header == {"kind": "run", **RUN}
        assert run.iterations == [{"kind": "iteration", **iteration(0)}]
        assert run.epochs == [{"kind": "epoch", **epoch(1, error=7.5)}]
        assert run.result == {"kind": "result", "val_top1_error_pct": 7.5}


def test_the_records_of_a_long_log_share_their_keys(tmp_path):
    """A log may have 450,000 lines, and keys take half of their memory."""
    with RunLog(tmp_path / "run", RUN) as log:
        for number in range(2):
            log.iteration(iteration(number))
    first, second = read_run(tmp_path / "run").iterations
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_every_line_begins_with_its_kind_and_the_first_is_the_run(tmp_path):
    lines = write(tmp_path, epochs=1).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        '{"kind": "run"',
        '{"kind": "iteration"',
        '{"kind": "iteration"',
        '{"kind": "epoch"',
    ]


def test_the_error_of_a_run_is_the_median_of_its_last_5_epochs():
    errors = [1.0, 2.0, 30.0, 26.0, 24.0, 90.0, 25.0]  # the last five in order: 24 25 26 30 90
    assert TOP1.of([epoch(e, error) for e, error in enumerate(errors, start=1)]) == 26.0
    assert TOP1.of([epoch(1, 8.0), epoch(2, 6.0)]) == 7.0
    assert replace(TOP1, key="train_top1_error_pct").of([epoch(1)]) == 12.0
    assert TOP1.of([]) is None


def test_a_run_evaluated_every_10_epochs_is_not_judged_by_epochs_long_past():
    epochs = [{"epoch": number} if number % 10 else epoch(number, 100.0 - number) for number in range(1, 48)]
    assert TOP1.of(epochs[:42]) == 60.0 and TOP1.how_of(epochs[:42]) == "last evaluation"  # the only one in the last 5
    assert TOP1.how_of([epoch(1, 8.0), epoch(2, 6.0)]) == "median of 2 evaluations in the last 5 epochs"
    assert TOP1.how_of([epoch(number, 8.0) for number in range(5)]) == "median of last 5 epochs"
    assert TOP1.of(epochs) == 60.0 and TOP1.how_of(epochs) == "last evaluation"
    assert TOP1.of(epochs[:9]) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_written_as_null(tmp_path, value):
    with RunLog(tmp_path, {**RUN, "environment": {"list": (value,)}}) as log:
        log.iteration(iteration(0, train_loss=value))
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    run = read_run(tmp_path)
    assert run.iterations[0]["train_loss"] is None
    assert run.header["environment"] == {"list": [None]}


def test_a_record_that_lacks_a_key_of_its_readers_is_a_bug(tmp_path):
    with RunLog(tmp_path, RUN) as log, pytest.raises(AssertionError, match="train_top1_error_pct"):
        log.epoch({"epoch": 1, "train_loss": 1.0, "val_top1_error_pct": 12.0, "seconds": 8.0})


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_the_incomplete_last_line_of_a_killed_run_is_left_out(tmp_path):
    path = write(tmp_path, epochs=2)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in (last + 1, last + 20, len(whole) - 2):  # one byte of the line, a part, all but `}`
        path.write_bytes(whole[:end])
        assert [e["epoch"] for e in read_run(path).epochs] == [1]
    path.write_bytes(whole[:-1])  # only the newline is missing, as some editors leave it, so the line is whole
    assert [e["epoch"] for e in read_run(path).epochs] == [1, 2]


def test_a_run_killed_at_any_moment_has_logged_all_it_had_done(tmp_path):
    code = (
        "import itertools, test_runlog as t\n"
        f"log = t.RunLog({str(tmp_path)!r}, t.RUN)\n"
        "for i in itertools.count():\n"
        "    log.iteration(t.iteration(i))\n"  # 50 of them are shorter than a buffer of 8 KiB
        "    print(i, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    for done in child.stdout:
        if int(done) == 50:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    logged = [record["iteration"] for record in read_run(tmp_path).iterations]
    assert len(logged) > 50 and logged == list(range(len(logged)))


def test_a_resumed_run_drops_what_is_done_again_and_reads_as_one_run(tmp_path):
    path = write(tmp_path, epochs=3)
    path.write_bytes(path.read_bytes() + b'{"kind": "iterat')
    with RunLog(tmp_path, {**RUN, "world_size": 4}, resume_iteration=4) as log:  # the checkpoint of epoch 2
        assert [e["epoch"] for e in log.epochs] == [1]
        log.epoch(epoch(2, error=20.0))  # evaluated again, because the log cannot tell whether that had ended
        log.iteration(iteration(4))
        log.iteration(iteration(5))
        log.epoch(epoch(3, error=60.0))
        assert log.result()["val_top1_error_pct"] == 20.0  # the median of 10, 20 and 60: earlier epochs count
    run = read_run(tmp_path)
    assert [i["iteration"] for i in run.iterations] == [0, 1, 2, 3, 4, 5]
    assert [e["val_top1_error_pct"] for e in run.epochs] == [10.0, 20.0, 60.0]
    assert "world_size" not in run.header
    resume = json.loads(path.read_text().splitlines()[6])
    assert resume == {"kind": "resume", **RUN, "world_size": 4, "iteration": 4}


def test_an_evaluation_that_is_not_due_any_more_stays(tmp_path):
    """As of the last epoch of a run that goes on to a later end with --evaluate_every."""
    write(tmp_path, epochs=2)
    for seconds in (9.0, 10.0):
        again = {key: value for key, value in epoch(2).items() if not key.startswith("val")} | {"seconds": seconds}
        with RunLog(tmp_path, RUN, resume_iteration=4) as log:
            log.epoch(again)
            log.epoch({**again, "epoch": 3})
        first, second, third = read_run(tmp_path).epochs
        assert (second["val_top1_error_pct"], second["seconds"]) == (20.0, seconds)
        assert "val_top1_error_pct" in first and "val_top1_error_pct" not in third


def test_epochs_that_a_log_has_lost_are_named(tmp_path):
    path = write(tmp_path, epochs=4)
    lines = path.read_bytes().splitlines(keepends=True)
    for kept, iteration, lost in ((2, 8, [1, 2, 3]), (4, 8, [2, 3]), (12, 8, []), (4, 3, []), (4, 4, []), (12, 7, [])):
        path.write_bytes(b"".join(lines[:kept]))
        with RunLog(tmp_path, RUN, iteration) as log:
            assert log.lost_epochs == lost
    path.unlink()
    RunLog(tmp_path, RUN, 4).close()  # begins there, as the log was lost
    with RunLog(tmp_path, RUN, 6) as log:
        assert log.lost_epochs == []


def test_resuming_in_the_middle_of_an_epoch_keeps_its_first_iterations(tmp_path):
    path = write(tmp_path, epochs=2)
    RunLog(tmp_path, RUN, resume_iteration=3).close()
    assert kinds(path) == ["run", "iteration", "iteration", "epoch", "iteration", "resume"]
    assert read_run(path).iterations[-1]["iteration"] == 2


def test_resuming_twice_keeps_the_resumes_that_still_hold(tmp_path):
    path = write(tmp_path, epochs=3)
    RunLog(tmp_path, RUN, resume_iteration=2).close()
    RunLog(tmp_path, RUN, resume_iteration=4).close()
    RunLog(tmp_path, RUN, resume_iteration=2).close()  # the checkpoint at 4 was lost
    assert kinds(path) == ["run", "iteration", "iteration", "resume", "resume"]


def test_a_finished_run_that_goes_on_has_no_result_until_it_ends_again(tmp_path):
    write(tmp_path, epochs=1)
    with RunLog(tmp_path, RUN, resume_iteration=2) as log:
        log.epoch(epoch(1, error=10.0))
        log.result()
    assert read_run(tmp_path).result["val_top1_error_pct"] == 10.0
    RunLog(tmp_path, RUN, resume_iteration=2).close()
    assert read_run(tmp_path).result is None


def test_a_resumed_run_that_is_judged_by_other_numbers_leaves_its_log_as_it_is(tmp_path):
    """Else its later lines would lack the numbers that the first line names, and nobody could read the log."""
    path, top1 = write(tmp_path, epochs=2), as_data([TOP1])
    before = path.read_bytes()
    f1 = as_data([Measure("val_f1", "macro F1", "F1")])
    numbers = "val_top1_error_pct, train_top1_error_pct"
    words = f"^{path} judges the run by {numbers}, and the recipe's task by val_f1 alone; keep these in its"
    with pytest.raises(ConfigError, match=words):
        RunLog(tmp_path, {**RUN, "judged_by": f1}, 4)
    assert path.read_bytes() == before
    with RunLog(tmp_path, {**RUN, "judged_by": [*f1, *top1]}, 4) as log:  # more numbers may come
        log.epoch({**epoch(2), "val_f1": 0.5})
    assert [each["epoch"] for each in read_run(path).epochs] == [1, 2]


def test_a_resumed_run_whose_log_was_lost_begins_a_new_one(tmp_path):
    with RunLog(tmp_path, RUN, resume_iteration=4) as log:
        log.iteration(iteration(4))
    assert kinds(tmp_path / "log.jsonl") == ["run", "resume", "iteration"]


def test_a_run_that_starts_anew_without_a_checkpoint_has_a_header_of_its_own(tmp_path):
    """For example if it was killed before its first checkpoint, and started again with other flags."""
    write(tmp_path, epochs=1)
    with RunLog(tmp_path, {**RUN, "global_batch": 256}, resume_iteration=0) as log:
        log.iteration(iteration(0))
    assert kinds(tmp_path / "log.jsonl") == ["run", "resume", "iteration"]
    assert read_run(tmp_path).header["global_batch"] == 256


def test_a_rewrite_that_fails_leaves_the_old_log(tmp_path, monkeypatch):
    path = write(tmp_path, epochs=2)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        RunLog(tmp_path, RUN, resume_iteration=2)
    assert path.read_bytes() == before


@contextmanager
def disk_with_room_for(num_bytes, path):
    """Let this process write only so many more bytes of a file, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_was_full_for_long_lacks_no_line(tmp_path):
    with RunLog(tmp_path, RUN) as log:
        with disk_with_room_for(1000, log.path):  # not a multiple of a line's length
            for t in range(200):  # 24 KiB, more than Python's buffer keeps
                with suppress(OSError):
                    log.iteration(iteration(t))
        assert len(read_run(tmp_path).iterations) < 10
        log.iteration(iteration(200))
    assert [record["iteration"] for record in read_run(tmp_path).iterations] == [*range(201)]


def replaced(path):
    path.with_name("other").write_text("of somebody else\n")
    path.with_name("other").replace(path)


@pytest.mark.parametrize(
    "lose",
    [
        lambda path: path.unlink(),
        lambda path: shutil.rmtree(path.parent),
        lambda path: path.parent.rename(path.parent.with_name("moved")),
        replaced,
    ],
    ids=["removed", "with its folder", "moved", "replaced"],
)
def test_a_log_that_vanishes_is_written_again_whole(tmp_path, lose):
    with RunLog(tmp_path / "run", RUN) as log:
        log.iteration(iteration(0))
        assert not log.put_back()
        lose(log.path)
        assert log.put_back()
        log.iteration(iteration(1))
        assert not log.put_back()
    assert kinds(log.path) == ["run", "iteration", "iteration"]


def test_a_log_that_cannot_be_written_again_yet_is_written_again_later(tmp_path, monkeypatch):
    with RunLog(tmp_path / "run", RUN) as log:
        log.path.unlink()
        with monkeypatch.context() as full:
            full.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError):
                log.put_back()
        assert log.put_back()
    assert kinds(log.path) == ["run"]


def test_a_disk_that_has_room_again_at_the_end_gets_the_last_lines(tmp_path):
    with RunLog(tmp_path, RUN) as log:
        with disk_with_room_for(0, log.path), pytest.raises(OSError):
            log.iteration(iteration(0))
    assert len(read_run(tmp_path).iterations) == 1


def broken_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"no JSON\n", *lines[2:]]))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.write_bytes(b""), "line 1: not a run log: no complete line"),
        (broken_line, "line 2: not a run log: not JSON"),
    ],
    ids=["empty", "a broken line"],
)
def test_a_broken_log_refuses_to_go_on_before_anything_is_changed_and_says_what_to_do(tmp_path, damage, words):
    path = write(tmp_path, epochs=2)
    damage(path)
    path.with_name(DIVERGED).write_text("error: then")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    told = f"^{path}, {words}; put it back from a copy, or delete it: a new log then begins at iteration 2$"
    with pytest.raises(DataError, match=told):
        RunLog(tmp_path, RUN, 2, begin=lambda: pytest.fail("the output has begun"))
    assert before == {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    path.unlink()
    RunLog(tmp_path, RUN, 2).close()  # as the line says
    assert kinds(path) == ["run", "resume"]


def test_a_log_that_the_disk_does_not_give_is_not_to_be_deleted(tmp_path, monkeypatch):
    path = write(tmp_path, epochs=2)

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(log_lines, "records_of", failing)
    with pytest.raises(DataError, match=f"^cannot read {path}: Input/output error$"):
        RunLog(tmp_path, RUN, 2)


def test_the_output_begins_before_the_log_of_a_run_that_goes_on_changes(tmp_path):
    """So a kill between the two never leaves weights of an earlier end next to a log without its result."""
    path, seen = write(tmp_path, epochs=2), []
    path.with_name(DIVERGED).write_text("error: then")
    before = path.read_bytes(), "error: then"
    RunLog(
        tmp_path, RUN, 2, begin=lambda: seen.append((path.read_bytes(), path.with_name(DIVERGED).read_text()))
    ).close()
    assert seen == [before] and kinds(path)[-1] == "resume" and not path.with_name(DIVERGED).exists()


def test_a_log_goes_on_with_the_numbers_of_a_later_version(tmp_path):
    """The lines from before the resume lack them."""
    path = write(tmp_path, epochs=2)
    with RunLog(tmp_path, {**RUN, "judged_by": as_data(CLASSIFIER)}, resume_iteration=3) as log:
        log.epoch({**epoch(2), "val_top5_error_pct": 1.0})
    assert kinds(path) == ["run", "iteration", "iteration", "epoch", "iteration", "resume", "epoch"]


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_diverges_says_so_next_to_its_log_if_the_disk_takes_it(tmp_path, monkeypatch, full):
    def replace(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DivergedError, match="the loss is not a number"), RunLog(tmp_path, RUN):
        if full:
            monkeypatch.setattr(run_log, "replace_file", replace)
        raise DivergedError("the loss is not a number")
    told = tmp_path / DIVERGED
    assert not told.exists() if full else told.read_text() == "error: the loss is not a number\n"


def test_a_run_that_another_error_ends_has_not_diverged(tmp_path):
    with pytest.raises(DataError), RunLog(tmp_path, RUN):
        raise DataError("an image cannot be decoded")
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_overwrite_another_runs_log(tmp_path):
    path = write(tmp_path, epochs=1)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        RunLog(tmp_path, RUN)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*file/run/log.jsonl"):
        RunLog(tmp_path / "file" / "run", RUN)
    with pytest.raises(DataError, match="cannot read .*File name too long"):
        RunLog(tmp_path / ("a" * 300), RUN)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot write .*log.jsonl: Is a directory"):
        RunLog(tmp_path, RUN, resume_iteration=2)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(DataError, match="no run log at .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no run log at .*log.jsonl"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="cannot read .*File name too long"):
        read_run(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "number, line, reason",
    [
        (1, "hello", "not JSON"),
        (1, 10_000 * "[", "not JSON"),
        (1, "[1, 2]", "not an object of kind run, iteration"),
        (1, '{"kind": "epoch", "epoch": 1}', "the first line, and only it, is of kind run"),
        (1, '{"kind": "run", "model": "resnet50"}', "run without config, global_batch"),
        (1, json.dumps({"kind": "run", **RUN, "recipe": "goyal"}), "run with recipe, which is no object"),
        (1, json.dumps({"kind": "run", **RUN, "recipe": None, "global_batch": "8k"}), "run with global_batch, which"),
        (3, json.dumps({"kind": "iteration", **iteration(1), "epoch": [0.5]}), "iteration with epoch, which is no num"),
        (
            3,
            json.dumps({"kind": "iteration", **iteration(1), "data_wait_pct": "x"}),
            "iteration with data_wait_pct, wh",
        ),
        (3, '{"kind": "iteration", "iteration": 1}', "iteration without data_wait_pct, epoch, images_per_second, lr, "),
        (3, '{"kind": "resume"}', "resume without iteration"),
        (3, '{"kind": "iterat', "not JSON"),
        (3, '{"kind": ["epoch"]}', "not an object of kind"),
        (3, ", ".join(2 * [json.dumps({"kind": "iteration", **iteration(1)})]), "not JSON"),
        (3, json.dumps({"kind": "run", **RUN}), "the first line, and only it, is of kind run"),
        (4, '{"kind": "epoch", "epoch": 1}', "epoch without seconds, train_loss"),
        (4, json.dumps({"kind": "epoch", **epoch(1), "val_loss": "x"}), "epoch with val_loss, which is no number"),
        (7, '{"kind": "epoch", "epo', "not JSON"),  # the last line, but with its newline: no kill cut it short
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_a_file_that_is_no_log_is_refused_with_file_and_line(monkeypatch, tmp_path, number, line, reason, at_once):
    monkeypatch.setattr(log_lines, "LINES_AT_ONCE", at_once)
    path = write(tmp_path, epochs=2)
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        read_run(path)
    assert str(error.value).startswith(f"{path}, line {number}: not a run log: {reason}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00\xff", b'{"kind": "run", "mod'])
def test_a_file_without_one_whole_line_is_refused(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="log.jsonl, line 1: not a run log"):
        read_run(tmp_path)


def test_a_replaced_file_leaves_nothing_beside_it(tmp_path):
    replace_file(tmp_path / "a", b"old")
    replace_file(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    replace_file(tmp_path / "a", b"old")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lbsgd.disk.to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_file_system_that_flushes_no_names_of_files_holds_a_run(tmp_path, monkeypatch):
    """VirtualBox's shared folders give EINVAL."""
    (tmp_path / "a").touch()

    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fsync)
    number = errno.EINVAL
    to_disk(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        to_disk(tmp_path / "a")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        to_disk(tmp_path)


def test_a_log_that_tells_no_length_is_refused(tmp_path):
    """A run counted in iterations gives their number. Without it, the report ended in a KeyError."""
    path = write(tmp_path, epochs=1)
    first, *rest = path.read_text().splitlines(keepends=True)
    header = json.loads(first)
    header["recipe"]["epochs"] = None
    header.pop("num_iterations", None)
    path.write_text(json.dumps(header) + "\n" + "".join(rest))
    with pytest.raises(DataError, match="line 1: not a run log: run without num_iterations"):
        read_run(path)


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    """So a run that is killed a moment later leaves it."""
    log = RunLog(tmp_path, RUN)
    log.iteration(iteration(0))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["kind"] == "iteration"
    log.close()
