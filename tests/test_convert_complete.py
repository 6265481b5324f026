"""The same command on a complete folder: what it reads, and what it says if the source may have changed."""

import json
import os
import shutil

import pytest
from converter import SETTINGS, change_byte, encoded, make_tree
from test_convert_shards import webdataset
from test_sources import LAYOUTS, make_kaggle, make_tar

from lbsgd.convert.beton_writer import METADATA_AT
from lbsgd.convert.convert import convert
from lbsgd.convert.sources import source_version
from lbsgd.convert.verify import verify
from lbsgd.data.folder import open_data
from lbsgd.errors import DataError

MADE = {**LAYOUTS, "shards": webdataset}
LISTED = ("folders", "kaggle", "unpacked", "kaggle from within")
TIMES = (
    "names and sizes in {} agree with it, times do not; to compare the images run: lbsgd convert --source {} --data_dir"
    " {} --verify"
)


@pytest.fixture
def unopened(monkeypatch):
    """Make every read of a source fail, as for lack of space."""

    def forbid():
        monkeypatch.setattr("lbsgd.convert.convert.find_source", None)

    return forbid


@pytest.mark.parametrize("layout", [name for name in MADE if name not in LISTED])
def test_archives_and_shards_are_not_opened_again_to_say_that_their_result_is_complete(
    tmp_path, unopened, capsys, layout
):
    source = MADE[layout](tmp_path / "source")
    convert(source, tmp_path / "data", **SETTINGS)
    assert "complete" not in capsys.readouterr().out
    unopened()
    convert(source, tmp_path / "data", **SETTINGS)
    assert "data is complete: " in capsys.readouterr().out
    with pytest.raises(DataError, match="differs in quality"):
        convert(source, tmp_path / "data", **SETTINGS | {"quality": 80})
    os.truncate(tmp_path / "data/val.beton", 1000)
    with pytest.raises(TypeError, match="NoneType"):  # it has to read it
        convert(source, tmp_path / "data", **SETTINGS)


def test_nor_for_a_folder_that_can_only_be_read(tmp_path, unopened, monkeypatch, capsys):
    source = make_tar(tmp_path / "source", "w:gz", "imagenet.tar.gz")
    convert(source, tmp_path / "data", **SETTINGS)
    monkeypatch.setattr("lbsgd.convert.existing_data.os.access", lambda *_: False)
    unopened()
    convert(source, tmp_path / "data", **SETTINGS)
    assert "data is complete: " in capsys.readouterr().out


def test_nor_beside_what_an_interrupted_command_with_other_settings_had_finished(
    tmp_path, unopened, monkeypatch, capsys
):
    source, data = make_tar(tmp_path / "source", "w:gz", "imagenet.tar.gz"), tmp_path / "data"
    convert(source, data, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
        convert(source, data, **SETTINGS | {"quality": 80, "overwrite": True})
    unopened()
    with pytest.raises(DataError, match="differs in quality"):
        convert(source, data, **SETTINGS | {"quality": 70})
    convert(source, data, **SETTINGS)
    assert "data is complete: " in capsys.readouterr().out


@pytest.mark.parametrize("layout", LISTED)
def test_folders_of_images_have_no_version(tmp_path, layout):
    assert source_version(MADE[layout](tmp_path / "source")) == ""


def test_a_table_of_labels_beside_an_archive_is_a_part_of_its_version(tmp_path):
    folder = make_kaggle(tmp_path / "source")
    archive = shutil.make_archive(str(tmp_path / "kaggle"), "tar", folder / "ILSVRC/..")
    table = shutil.move(folder / "LOC_val_solution.csv", tmp_path / "LOC_val_solution.csv")
    archive = tmp_path / os.path.basename(archive)
    before = source_version(archive)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert source_version(archive) != before != ""


def test_a_source_of_the_same_names_and_sizes_and_other_times_is_not_called_complete_without_a_word(tmp_path, capsys):
    tree, image = make_tree(tmp_path / "source"), tmp_path / "source/val/bee/1.JPEG"
    convert(tree, tmp_path / "data", **SETTINGS)
    content = image.read_bytes()
    other = encoded(phase=50.0, quality=30)
    assert len(other) < len(content)
    image.write_bytes(other.ljust(len(content), b"\0"))
    capsys.readouterr()
    before = (tmp_path / "data/val.beton").stat().st_mtime_ns
    convert(tree, tmp_path / "data", **SETTINGS)
    complete, times = capsys.readouterr().out.splitlines()
    assert "data is complete: " in complete and times == TIMES.format(tree, tree, tmp_path / "data")
    assert (tmp_path / "data/val.beton").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="image 1 .* is not what .*val/bee/1.JPEG gives"):
        verify(tmp_path / "data", 1, tree)


def test_a_disk_that_fails_is_told_with_the_image_when_all_are_verified(tmp_path, monkeypatch):
    convert(make_tree(tmp_path / "source"), tmp_path / "data", **SETTINGS)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)  # in the process that is forked, too
    with pytest.raises(DataError, match=r"train.beton: image 0 .*cannot be read \(Input/output error\)"):
        verify(tmp_path / "data", 1)


def test_an_archive_of_another_time_is_listed_and_its_time_told(tmp_path, capsys):
    source = make_tar(tmp_path / "source")
    convert(source, tmp_path / "data", **SETTINGS)
    os.utime(source, (1, 1))
    capsys.readouterr()
    convert(source, tmp_path / "data", **SETTINGS)
    assert capsys.readouterr().out.splitlines()[1:] == [TIMES.format(source, source, tmp_path / "data")]


def test_a_manifest_of_an_earlier_converter_tells_as_much_as_it_holds(tmp_path, capsys):
    source, manifest = make_tar(tmp_path / "source"), tmp_path / "data/manifest.json"
    convert(source, tmp_path / "data", **SETTINGS)
    content = json.loads(manifest.read_text())
    del content["stamps"], content["source_version"]
    manifest.write_text(json.dumps(content))
    os.utime(source, (1, 1))
    capsys.readouterr()
    convert(source, tmp_path / "data", **SETTINGS)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_file_of_which_any_byte_of_the_tables_has_changed_is_not_called_complete(tmp_path, capsys):
    """Including bytes next to the labels, sizes and checksums, because training would refuse the file."""
    tree, data = make_tree(tmp_path / "source"), tmp_path / "data"
    convert(tree, data, **SETTINGS)
    change_byte(data / "train.beton", METADATA_AT - 1)
    with pytest.raises(DataError, match="is not the file that manifest.json beside it was written for"):
        open_data(data)
    convert(tree, data, **SETTINGS)
    assert "data is damaged: " in capsys.readouterr().out
    open_data(data)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda manifest: manifest.update(converter_version=2), "differs in converter version"),
        (lambda manifest: manifest["settings"].update(sharpen=True), "differs in settings"),
        (lambda manifest: manifest["classes"].reverse(), "differs in classes"),
    ],
)
def test_a_folder_of_another_converter_is_refused_by_what_differs(tmp_path, change, words):
    source, data = make_tree(tmp_path / "source"), tmp_path / "data"
    convert(source, data, **SETTINGS)
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=words):
        convert(source, data, **SETTINGS)
