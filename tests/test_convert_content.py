"""Unpacked content of archives and parquet shards is in .converting: it goes when useless, and the rest is reported."""

import os
import shutil
from pathlib import Path

import pytest
from converter import SETTINGS, make_tree, save
from test_convert_shards import parquet

from lbsgd.convert import compressed
from lbsgd.convert.convert import convert, look
from lbsgd.errors import DataError


@pytest.fixture
def archive(tmp_path):
    return Path(shutil.make_archive(str(tmp_path / "source"), "gztar", make_tree(tmp_path / "tree")))


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that converts, and stops once the content of the source is there."""

    def run(source, data):
        with monkeypatch.context() as patch:
            patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
            convert(source, data, **SETTINGS)

    return run


def content_in(data):
    return sorted(path.name for path in (data / ".converting").iterdir() if path.suffix in (".tar", ".images"))


def no_room(monkeypatch):
    monkeypatch.setattr(compressed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))


def test_content_of_an_earlier_version_of_an_archive_goes_before_room_is_asked_for(
    archive, interrupted, tmp_path, monkeypatch
):
    data = tmp_path / "data"
    interrupted(archive, data)
    other = data / ".converting" / "other.tar.gz.1.2.tar"  # of another archive, whose conversion may be resumed
    other.write_bytes(b"")
    assert content_in(data) == ["other.tar.gz.1.2.tar", f"{compressed.version(archive)}.tar"]
    os.utime(archive, (1, 1))
    with monkeypatch.context() as full, pytest.raises(DataError, match="has 0.0 MB free, and the content of"):
        no_room(full)
        convert(archive, data, **SETTINGS)
    assert content_in(data) == ["other.tar.gz.1.2.tar"]


@pytest.mark.parametrize("kind", ["tar.gz", "parquet"])
def test_a_dry_run_asks_for_room_for_the_content_and_the_result(archive, interrupted, tmp_path, monkeypatch, kind):
    source, data = archive if kind == "tar.gz" else parquet(tmp_path / "shards"), tmp_path / "data"
    interrupted(source, data)
    content = sum((data / ".converting" / name).stat().st_size for name in content_in(data))
    shutil.rmtree(data)
    with monkeypatch.context() as disk:
        for free, refused in ((content + 2000, True), (2 * content + 8000, False)):
            disk.setattr("lbsgd.convert.convert.free_bytes", lambda _, free=free: free)
            shown = look(source, data, 1, max_side=500)
            assert ("free, and the result and the unpacked content need about" in shown) == refused
            assert " free), beside 0.0 MB of unpacked content: " in shown
    interrupted(source, data)  # whose content is used again
    assert "unpacked content" not in look(source, data, 1, max_side=500)


def test_content_of_earlier_parquet_shards_goes_before_room_is_asked_for(tmp_path, interrupted, monkeypatch):
    source, data = parquet(tmp_path / "source"), tmp_path / "data"
    interrupted(source, data)
    train, val = content_in(data)
    os.utime(source / "data/train-00000-of-00002.parquet", (1, 1))
    with monkeypatch.context() as full, pytest.raises(DataError, match="has 0.0 MB free, and the content of"):
        no_room(full)
        convert(source, data, **SETTINGS)
    assert content_in(data) == [val]
    convert(source, data, **SETTINGS)


def test_content_of_another_source_goes_when_its_work_goes(archive, interrupted, tmp_path):
    data, other = tmp_path / "data", tmp_path / "other.tar.gz"
    interrupted(archive, data)
    shutil.copy(archive, other)
    interrupted(other, data)
    assert content_in(data) == [f"{compressed.version(other)}.tar"]
    interrupted(tmp_path / "tree", data)
    assert content_in(data) == []


def test_content_stays_for_other_settings(archive, interrupted, tmp_path, monkeypatch):
    interrupted(archive, tmp_path / "data")
    monkeypatch.setattr(compressed, "decompress_to", None)
    convert(archive, tmp_path / "data", **SETTINGS | {"quality": 80, "reencode": True})


def test_a_refusal_tells_the_content_that_stays_for_the_next_try(tmp_path, capsys):
    tree = make_tree(tmp_path / "tree")
    save(tree / "val/wasp/1.JPEG")
    archive = shutil.make_archive(str(tmp_path / "source"), "gztar", tree)
    with pytest.raises(DataError, match="has other classes than"):
        convert(archive, tmp_path / "data", **SETTINGS)
    [content] = content_in(tmp_path / "data")
    work = tmp_path / "data/.converting"
    kept = f"{(work / content).stat().st_size / 1e6:.1f} MB"
    assert capsys.readouterr().out == (
        f"{work} keeps {kept} of unpacked content for the next try; remove it if there will be none\n"
    )
    with pytest.raises(DataError, match="has other classes than"):
        convert(tree, tmp_path / "other", **SETTINGS)
    assert capsys.readouterr().out == ""
