"""The converter forces its work to the disk, in an order that is safe if the power is lost."""

import os
from pathlib import Path

import pytest
from converter import SETTINGS, append_images, blob, make_tree

from lbsgd.convert.convert import convert

NOTED = ("fsync", "fdatasync", "rename", "replace", "unlink", "write", "pwrite")


@pytest.fixture
def events(monkeypatch):
    """All files that are forced to the disk, written, renamed or removed by os, in order: (what, its name)."""
    found = []

    def name_of(path):
        return Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path).name

    def noting(what, function):
        def noted(path, *arguments, **options):
            found.append((what, name_of(path)))
            return function(path, *arguments, **options)

        monkeypatch.setattr(os, what, noted)

    for what in NOTED:
        noting(what, getattr(os, what))
    return found


def test_images_are_on_the_disk_before_the_journal_says_so_and_then_the_journal(tmp_path, events):
    writer = append_images(tmp_path / "train.beton", [blob(0), blob(1)], finish=False, commit_each=2)
    assert writer.done == 2
    written = [event for event in events if event[0] != "unlink"]
    assert written[-3:] == [("fdatasync", "train.beton"), ("write", "train.journal"), ("fdatasync", "train.journal")]


def test_a_finished_file_is_on_the_disk(tmp_path, events):
    append_images(tmp_path / "train.beton", [blob(0), blob(1)])
    assert events[-1] == ("fsync", "train.beton")


def test_a_folder_gets_its_names_on_the_disk_one_step_after_the_other(tmp_path, events):
    data = tmp_path / "data"
    convert(make_tree(tmp_path / "source"), data, **SETTINGS)
    events.clear()
    convert(tmp_path / "source", data, **SETTINGS | {"overwrite": True, "reencode": True})
    steps = [event for event in events if event[0] in ("fsync", "rename", "replace", "unlink")]
    began = steps.index(("replace", "identity.json.tmp"))
    assert steps[began - 2] == ("fsync", ".converting") and ("unlink", "identity.json") in steps[: began - 2]
    manifest = steps.index(("replace", "manifest.json.tmp"))
    assert steps[manifest - 1] == ("fsync", "manifest.json.tmp") and steps[manifest + 1] == ("fsync", ".converting")
    assert steps[manifest + 2 : manifest + 11] == [
        ("unlink", "train.beton"),
        ("unlink", "val.beton"),
        ("unlink", "manifest.json"),
        ("fsync", "data"),
        ("rename", "train.beton"),
        ("rename", "val.beton"),
        ("fsync", "data"),
        ("rename", "manifest.json"),
        ("fsync", "data"),
    ]
