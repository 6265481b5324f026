"""The folder of a run: only one run writes there at a time, and none overwrites what another has left."""

import errno
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from grid_logs import write_log

from lbsgd.errors import CheckpointError, ConfigError, DataError
from lbsgd.experiments.grid import BASELINE
from lbsgd.train.identity import comparable
from lbsgd.train.run import Run, only_writer, prepare_output
from lbsgd.train.saver import Saver
from lbsgd.train.session import open_output, windows_of


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("lbsgd.train.run.WRITER_SECONDS", 0.1)
    with only_writer(tmp_path):
        with pytest.raises(ConfigError, match=f"another run writes into {tmp_path}; end it, or choose another"):
            with only_writer(tmp_path):
                pass
    with only_writer(tmp_path):  # the first has ended
        pass


def test_a_run_waits_for_the_one_before_it_which_still_saves(tmp_path):
    saves = threading.Event()

    def save():
        with only_writer(tmp_path):
            saves.set()
            time.sleep(0.3)
            (tmp_path / "saved").touch()

    thread = threading.Thread(target=save)
    thread.start()
    saves.wait()
    with only_writer(tmp_path):
        assert (tmp_path / "saved").exists()
    thread.join()


def test_rank_0_waits_for_the_folder_no_longer_than_the_others_wait_for_rank_0(tmp_path):
    began = time.monotonic()

    def alive(position):
        assert time.monotonic() - began < 5, "the others have taken rank 0 for lost"

    guard = SimpleNamespace(hang_timeout=1, alive=alive)
    with only_writer(tmp_path), ExitStack() as stack, pytest.raises(ConfigError, match="another run writes into"):
        open_output(Run(None, None, None, tmp_path, 1, resume=True), guard, stack)


def test_without_locks_of_the_file_system_a_run_begins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with only_writer(tmp_path):
        pass


def begins_anew(folder):
    prepare_output(Run(None, None, None, folder, 1, resume=True), newest=None)


@pytest.mark.parametrize("planned", [None, 4], ids=["ended", "not ended"])
def test_a_run_whose_checkpoints_are_gone_is_not_written_over(tmp_path, planned):
    folder = write_log(tmp_path, BASELINE, 0, [50.0, 40.0, 30.0], planned=planned)
    with pytest.raises(CheckpointError, match=f"{folder} holds a run without its checkpoints, .*delete log.jsonl and"):
        begins_anew(folder)
    (folder / "log.jsonl").unlink()  # as the line says
    begins_anew(folder)
    (folder / "weights.pt").write_bytes(b"of the end")
    with pytest.raises(CheckpointError, match=f"{folder} holds a run without its checkpoints"):
        begins_anew(folder)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, capsys):
    log = write_log(tmp_path, BASELINE, 0, [50.0, 40.0, 30.0]) / "log.jsonl"
    first_epoch = log.read_bytes().splitlines(keepends=True)[:2]
    for content in (b"".join(first_epoch), first_epoch[0] + first_epoch[1][:20]):
        log.write_bytes(content)
        begins_anew(log.parent)
        assert "starting anew" in capsys.readouterr().out


def test_a_damaged_log_without_checkpoints_is_not_written_over(tmp_path):
    log = write_log(tmp_path, BASELINE, 0, [50.0, 40.0, 30.0]) / "log.jsonl"
    log.write_bytes(b"no JSON\n" + log.read_bytes())
    with pytest.raises(DataError, match=f"^{log}, line 1: not a run log: not JSON; put it back from a copy, or delete"):
        begins_anew(log.parent)


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / ".writer").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}/.writer"), only_writer(tmp_path):
        pass


def test_a_folder_of_checkpoints_that_fails_for_a_moment_costs_one_checkpoint(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, "Input/output error")

    said = []
    saver = SimpleNamespace(folder=tmp_path, say=said.append, gone_on=None)
    monkeypatch.setattr("os.listdir", fails)
    assert Saver.write(saver, 3, {}, {}) is False
    assert "iteration 3 could not be written ([Errno 5] Input/output error)" in said[0]


def test_a_network_of_the_same_weights_and_other_strides_is_another_one():
    def network(stride):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride), torch.nn.MaxPool2d(2))

    assert windows_of(network(1)) != windows_of(network(2)) and windows_of(network(2)) == windows_of(network(2))
    identity = {"network": {}, "windows": windows_of(network(2))}
    assert comparable({"identity": {"network": {}}}, identity) == identity  # from a checkpoint that does not have them
