"""A folder that the user may not look into gives one line that names it, wherever it is given."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from locked import as_nobody
from test_checkpoint import saved
from test_runlog import RUN
from tool_modules import load_tool

from lbsgd import disk
from lbsgd.commands.detect import only_split, trained_as
from lbsgd.data.folder import Manifest, open_data
from lbsgd.errors import CheckpointError, ConfigError, DataError, LbsgdError
from lbsgd.report.run_log import DIVERGED, RunLog, read_run
from lbsgd.train.checkpoint import load_newest, newest
from lbsgd.train.run import Run, prepare_output

HEADER = {"model": "resnet50"}
DIGITS, SCENES, BENCH = map(load_tool, ("render_digits", "render_scenes", "bench_convert"))

TAKES_A_FOLDER = {
    "data of a classifier": open_data,
    "data of a detector": lambda folder: only_split(folder, "val"),
    "a backbone's run": lambda folder: trained_as(folder / "weights.pt"),
    "checkpoints": newest,
    "checkpoints to load": lambda folder: load_newest(folder, {}, print),
    "an output folder": lambda folder: prepare_output(Run(None, None, None, folder, 1), newest=None),
    "a log to write": lambda folder: RunLog(folder, HEADER),
    "a log to read": read_run,
    "digits": lambda folder: DIGITS.render(folder, 360),
    "scenes": lambda folder: SCENES.render(folder, 8, 2),
    "images to measure with": lambda folder: BENCH.jpegs_of(folder),
}


@pytest.fixture
def locked():
    """A folder inside one that may not be entered. It is not pytest's own, which only root may enter."""
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        outer = Path(name, "locked")
        (outer / "inner").mkdir(parents=True)
        outer.chmod(0)
        yield outer / "inner"
        outer.chmod(0o700)


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none():
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        folder = Path(name, "checkpoints")
        folder.mkdir(mode=0)
        with pytest.raises(CheckpointError, match=f"^cannot read {folder}: Permission denied$"):
            newest(folder)
        folder.chmod(0o700)


@pytest.mark.parametrize("name", [".", "manifest.json", "weights.safetensors", "state.json"])
def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(name):
    """The run must not use the checkpoint before it, because it would then delete the one that it may not read."""
    with tempfile.TemporaryDirectory() as outer, as_nobody(outer):
        folder = Path(outer, "checkpoints")
        saved(folder, 1)
        locked = saved(folder, 2) / name
        mode = locked.stat().st_mode
        locked.chmod(0)
        with pytest.raises(CheckpointError, match=f"^cannot read {locked}.*: Permission denied$"):
            load_newest(folder, {"seed": 0}, print)
        locked.chmod(mode)


def test_a_manifest_that_may_not_be_read_is_not_called_damaged():
    """Data that only lack a permission must not be made again."""
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        path = Path(name, "manifest.json")
        path.touch(mode=0)
        with pytest.raises(DataError, match=f"^cannot read {path}: Permission denied$"):
            Manifest.read(path)


def test_a_log_that_may_not_be_written_refuses_to_go_on_before_anything_is_changed():
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        folder = Path(name)
        with RunLog(folder, RUN) as log:
            pass
        log.path.chmod(0o400)
        log.path.with_name(DIVERGED).write_text("error: then")
        with pytest.raises(ConfigError, match=f"^cannot write {log.path}: Permission denied$"):
            RunLog(folder, RUN, 2, begin=lambda: pytest.fail("the output has begun"))
        assert log.path.with_name(DIVERGED).exists()


@pytest.mark.parametrize("takes", TAKES_A_FOLDER.values(), ids=TAKES_A_FOLDER)
def test_a_folder_that_may_not_be_looked_into_is_one_line(takes, locked):
    with pytest.raises(LbsgdError, match=f"^cannot read {locked}.*: Permission denied$"):
        takes(locked)


@pytest.mark.parametrize("number, free", [(errno.EACCES, False), (errno.EAGAIN, False), (errno.ENOLCK, True)])
def test_a_lock_of_a_network_file_system_is_held_whichever_error_tells_it(tmp_path, monkeypatch, number, free):
    """NFS emulates flock by fcntl, whose error for a lock that another process has may be EACCES."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        assert disk.locked(file, wait=False) is free
