"""A data folder is complete or absent, wherever a kill falls while files are removed, replaced and renamed."""

import contextlib
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
from converter import SETTINGS as FOR_TWO
from converter import make_tree, names_in

from lbsgd.convert.convert import convert, look
from lbsgd.data.folder import open_data
from lbsgd.errors import DataError

SETTINGS = FOR_TWO | {"num_processes": 1}  # for a few tiny images; each process to start costs more than they do
OTHER = SETTINGS | {"reencode": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, and the folders that two settings make of it: (source, folder, other folder)."""
    folder = tmp_path_factory.mktemp("made")
    source = make_tree(folder / "source")
    convert(source, folder / "data", **SETTINGS)
    convert(source, folder / "other", **OTHER)
    return source, folder / "data", folder / "other"


def assert_same_files(data, expected):
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]
    for name in names_in(data):
        assert (data / name).read_bytes() == (expected / name).read_bytes()


def converted_until(step, source, data, **settings):
    """Convert, and be killed before the removal or renaming that follows `step` others. Return whether that happened.

    A separate process is killed, because one that raises would clean up.
    """
    steps = itertools.count()

    def deadly(function):
        def stepwise(*arguments, **options):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return stepwise

    if not (child := os.fork()):
        try:
            for place, name in ((Path, "unlink"), (Path, "rename"), (os, "replace")):
                setattr(place, name, deadly(getattr(place, name)))
            convert(source, data, **settings)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def fingerprint(data):
    """Return the fingerprint of what a training would accept, None if it would accept nothing."""
    with contextlib.suppress(DataError):
        return open_data(data).fingerprint
    return None


def test_a_folder_that_is_replaced_holds_the_old_pair_the_new_pair_or_none(made, tmp_path):
    source, old, new = made
    found = []
    for step in itertools.count():
        data = Path(shutil.copytree(old, tmp_path / f"data{step}"))
        died = converted_until(step, source, data, **OTHER | {"overwrite": True})
        found.append(fingerprint(data))
        convert(source, data, **OTHER | {"overwrite": found[-1] is not None})
        assert_same_files(data, new)
        if not died:
            break
    kinds = [kind for kind, _ in itertools.groupby(found)]
    assert kinds == [fingerprint(old), None, fingerprint(new)] and found.count(None) >= 4


def test_killed_while_the_files_get_their_names_it_is_absent_then_complete_and_ends_with_the_same_bytes(made, tmp_path):
    source, expected, _ = made
    for step in itertools.count():
        data = tmp_path / f"data{step}"
        died = converted_until(step, source, data, **SETTINGS)
        assert fingerprint(data) == (fingerprint(expected) if (data / "manifest.json").exists() else None)
        assert "refused" not in look(source, data, 1, max_side=500)
        convert(source, data, **SETTINGS)
        assert_same_files(data, expected)
        if not died:
            break
    assert step >= 8


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_removed_before_they_are_all_published_are_made_again(made, tmp_path, overwrite):
    source, expected, _ = made
    for step in itertools.count():
        data = tmp_path / f"data{step}"
        died = converted_until(step, source, data, **SETTINGS)
        if (data / "manifest.json").exists():
            break
        for path in data.glob("*.beton"):
            path.unlink()
        convert(source, data, **SETTINGS | {"overwrite": overwrite})
        assert_same_files(data, expected)
    assert step >= 4 and died


def test_a_run_that_only_publishes_says_so(made, tmp_path, monkeypatch, capsys):
    source, expected, _ = made
    with monkeypatch.context() as patch:
        patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
        convert(source, tmp_path / "data", **SETTINGS)
    capsys.readouterr()
    convert(source, tmp_path / "data", **SETTINGS)
    data = tmp_path / "data"
    told = f"{data}/.converting holds the finished files of an earlier run, which only move to {data}\n"
    assert capsys.readouterr().out == told
    assert_same_files(data, expected)


def test_a_file_that_was_replaced_before_all_are_published_is_not_published(made, tmp_path, monkeypatch):
    source, expected, other = made
    with monkeypatch.context() as patch:
        patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
        convert(source, tmp_path / "data", **SETTINGS)
    shutil.copy(other / "val.beton", tmp_path / "data/.converting")
    convert(source, tmp_path / "data", **SETTINGS)
    assert_same_files(tmp_path / "data", expected)


def test_finished_work_that_another_command_has_begun_to_drop_is_done_again(made, tmp_path, monkeypatch):
    source, expected, _ = made
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), key=lambda each: each.suffix == ".json"))
    for step in itertools.count():
        data = tmp_path / f"data{step}"
        with monkeypatch.context() as patch:
            patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
            convert(source, data, **SETTINGS)
        assert converted_until(step, source, data, **OTHER)
        if names_in(data) != [".converting"]:
            break
        convert(source, data, **SETTINGS)
        assert_same_files(data, expected)
    assert step >= 8
