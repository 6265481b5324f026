"""How a grid watches its runs: a log is read only if it has changed, and without a terminal none is."""

import os
from pathlib import Path

from grid_logs import DIGITS, write_log

from lbsgd.experiments.catalogue import STUDIES
from lbsgd.experiments.grid import Job
from lbsgd.experiments.overview import Overview
from lbsgd.experiments.watch import Seen, Watch
from lbsgd.report.run_log import RunLog, read_run

ROW = STUDIES["table1"].rows(DIGITS)[0]


def test_epochs_are_counted_while_the_log_grows_and_an_unchanged_one_is_not_read(tmp_path, monkeypatch):
    log = write_log(tmp_path, ROW, 0, [3.0, 2.0, 1.0]) / "log.jsonl"
    lines, watch = log.read_bytes().splitlines(keepends=True), Watch()
    assert watch.look(tmp_path) == Seen()
    for end in range(len(lines) + 1):
        log.write_bytes(b"".join(lines[:end]))
        seen = watch.look(log.parent)
        assert seen.epochs == sum(b'"kind": "epoch"' in line for line in lines[:end])
        assert seen.has_result == (end == len(lines))
    monkeypatch.setattr(Path, "read_bytes", None)
    assert watch.look(log.parent) == seen


def test_a_run_that_goes_on_in_a_new_file_is_counted_anew(tmp_path):
    folder, watch = write_log(tmp_path, ROW, 0, [3.0, 2.0, 1.0]), Watch()
    assert watch.look(folder).epochs == 3 and watch.look(folder).has_result
    header = read_run(folder).header
    RunLog(folder, header, resume_iteration=header["iterations_per_epoch"] + 1).close()
    assert watch.look(folder).epochs == 1 and not watch.look(folder).has_result
    log = folder / "log.jsonl"
    os.truncate(log, log.read_bytes().index(b"\n") + 1)  # as a new file that got the inode number of an old one
    assert watch.look(folder).epochs == 0


def test_into_a_pipe_no_log_is_looked_at_until_a_run_ends(tmp_path, monkeypatch, capsys):
    jobs = [Job(ROW, seed) for seed in (0, 1)]
    overview = Overview(jobs, tmp_path, lambda job: 4)
    write_log(tmp_path, ROW, 0, [3.0] * 4)
    write_log(tmp_path, ROW, 1, [3.0, 2.0], planned=4)
    looks = []
    monkeypatch.setattr(
        Watch, "look", lambda self, folder, look=Watch.look: (looks.append(folder), look(self, folder))[1]
    )
    overview.update(jobs)
    assert looks == []
    overview.update(jobs[1:])
    overview.ended(jobs[0])
    assert "1 of 2 runs, 75 %" in capsys.readouterr().out  # 4 + 2 of 8 epochs
