"""`--verify` names the first image that differs from what was made, whatever byte has changed."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from converter import SETTINGS, change_byte, damage, make_tree, picture, save
from stock_ffcv import with_stock_ffcv

from lbsgd.convert.beton_writer import METADATA, METADATA_AT
from lbsgd.convert.convert import convert
from lbsgd.convert.verify import ChunkVerifier, verify
from lbsgd.data.beton import BetonFile
from lbsgd.errors import DataError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A source with one image that must be shrunk, and the data folder made from it."""
    folder = tmp_path_factory.mktemp("original")
    save(make_tree(folder / "source") / "train/bee/large.JPEG", size=(700, 600))
    convert(folder / "source", folder / "data", **SETTINGS)
    return folder


@pytest.fixture
def tree(original, tmp_path):
    return shutil.copytree(original / "source", tmp_path / "source")


@pytest.fixture
def converted(original, tmp_path):
    return shutil.copytree(original / "data", tmp_path / "data")


def test_an_intact_folder_is_verified_also_against_its_source(converted, tree, capsys):
    verify(converted, 2)
    verify(converted, 2, tree)
    out = capsys.readouterr().out
    assert "train: 4 images decode and agree with the manifest, their checksums" in out
    assert f"val: 2 images decode and agree with the source {tree}/val, the manifest, their checksums" in out


def test_the_first_damaged_image_is_named(converted):
    beton = BetonFile.open(converted / "train.beton")
    for index in (3, 2):
        change_byte(beton.path, int(beton.images["data_at"][index]) + 300)
        with pytest.raises(
            DataError, match=f"train.beton: image {index} .label 1. is damaged: its bytes have checksum"
        ):
            verify(converted, 2)


def test_the_death_of_a_process_names_the_images_and_promises_nothing(converted, monkeypatch):
    monkeypatch.setattr(ChunkVerifier, "wrong", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    at = f"images 0 to 3 of {converted}/train.beton"
    with pytest.raises(DataError) as raised:
        verify(converted, 2)
    assert str(raised.value) == (
        f"one of the processes that read the images died at {at}: killed by signal 9, as when memory runs out; "
        "nothing of it is kept: the same command begins again; --num_processes sets how many there are"
    )


TABLE = METADATA_AT  # the first image's coding, width, height, place and label


@pytest.mark.parametrize(
    "place, reason",
    [
        (lambda beton: TABLE + 2 * METADATA.itemsize + 1, "does not decode to its 65 x 64 pixels"),
        (lambda beton: TABLE + 2 * METADATA.itemsize + 3, "does not decode to its 64 x 65 pixels"),
        (lambda beton: TABLE + 2 * METADATA.itemsize, "does not have the bytes of its pixels"),  # as raw pixels
        (lambda beton: TABLE + 2 * METADATA.itemsize + 5, "has two places"),
        (lambda beton: TABLE + 2 * METADATA.itemsize + 12, "has two places"),
        (
            lambda beton: int(beton.images["data_at"][-1] + beton.sizes[-1]) + 4 * 2,
            "is damaged: its bytes have checksum",
        ),
        (lambda beton: beton.path.stat().st_size - 24 * 2 + 16, "is damaged: its bytes have checksum"),
    ],
    ids=["width", "height", "coding", "place", "far place", "checksum", "size"],
)
@pytest.mark.parametrize("against", ["manifest", "source"])
def test_a_changed_byte_in_any_table_is_told_with_its_image(converted, tree, place, reason, against):
    path = converted / "train.beton"
    change_byte(path, place(BetonFile.open(path)))
    with pytest.raises(DataError, match=f"train.beton.* image 2 (.label 1. )?{reason}"):
        verify(converted, 2, tree if against == "source" else None)


@pytest.mark.parametrize("against", ["manifest", "source"])
def test_swapped_labels_are_told_with_the_first_of_them(converted, tree, against):
    path = converted / "train.beton"
    for image in (1, 2):  # of classes 0 and 1
        change_byte(path, TABLE + image * METADATA.itemsize + METADATA.fields["f1"][1])
    assert BetonFile.open(path).labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="train.beton: image 1 has label 1, and manifest.json beside it says another"):
        verify(converted, 2, tree if against == "source" else None)


def test_another_s_file_or_a_truncated_one_is_told(converted, tree, tmp_path):
    content = (converted / "train.beton").read_bytes()
    last = int(BetonFile.open(converted / "train.beton").images["data_at"][2])
    for num_bytes, said in (
        (len(content) - 1, "should have [\\d,]+; copy"),
        (last + 1, "cut off from image 2 on"),
        (last - 1, "cut off from image 1 on"),
        (1200, "should have [\\d,]+; copy"),
    ):
        os.truncate(converted / "train.beton", num_bytes)
        with pytest.raises(DataError, match=f"train.beton is truncated or damaged: it has {num_bytes:,} bytes.*{said}"):
            verify(converted, 2)
        (converted / "train.beton").write_bytes(content)
    save(tree / "train/bee/1.JPEG", phase=3)
    convert(tree, tmp_path / "other", **SETTINGS)
    shutil.copy(tmp_path / "other/train.beton", converted)  # nothing in it is wrong
    with pytest.raises(DataError, match="train.beton is not the file that manifest.json beside it was written for"):
        verify(converted, 2)


def test_an_image_that_is_not_the_source_s_is_named(converted, tree):
    save(tree / "train/bee/large.JPEG", size=(700, 600), phase=1)
    verify(converted, 2)
    with pytest.raises(DataError, match="train.beton: image 3 .label 1. is not what .*large.JPEG gives with"):
        verify(converted, 2, tree)
    save(tree / "train/ant/more.JPEG")
    with pytest.raises(DataError, match="it was made from another source"):
        verify(converted, 2, tree)
    (tree / "train/bee/1.JPEG").unlink()
    with pytest.raises(DataError, match="image 2 has label 1, and .*more.JPEG has 0"):
        verify(converted, 2, tree)


def test_where_images_differ_and_other_libraries_made_them_both_are_told(converted, tree):
    save(tree / "train/bee/1.JPEG", phase=9)
    told = "gives with the manifest's settings and {'opencv': .*}; copy"
    with pytest.raises(DataError, match=told):
        verify(converted, 1, tree)
    manifest = json.loads((converted / "manifest.json").read_text())
    manifest["libraries"]["opencv"] = "3.0"
    (converted / "manifest.json").write_text(json.dumps(manifest))
    told = r"and {'opencv': .*} \(it was made with {'opencv': '3.0', .*}, which may give other bytes\); copy"
    with pytest.raises(DataError, match=told):
        verify(converted, 1, tree)


def test_a_source_whose_classes_have_other_names_is_another(converted, tree):
    for split in ("train", "val"):
        (tree / split / "bee").rename(tree / split / "wasp")
    with pytest.raises(DataError, match="it was made from another source"):
        verify(converted, 2, tree)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spelling", ["{name}", "./{name}", "link/{name}", "link/../{folder}/{name}", "{path}"])
def test_images_that_were_left_out_are_known_however_the_source_is_spelled(
    tree, tmp_path, monkeypatch, packed, spelling
):
    damage(tree)
    path = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", tree)) if packed else tree
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = Path(spelling.format(name=path.name, folder=tmp_path.name, path=path))
    convert(source, tmp_path / "data", on_error="skip", **SETTINGS)
    for other in (source, path, Path(path.name)):
        verify(tmp_path / "data", 1, other)


def test_images_that_were_left_out_are_known_in_the_folder_itself(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(damage(tree))
    convert(Path("."), tmp_path / "data", on_error="skip", **SETTINGS)
    for source in (Path("."), tree):
        verify(tmp_path / "data", 1, source)


def change_manifest(folder, **content):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **content}))


@pytest.mark.parametrize("form", ["earlier", "now"])
def test_images_that_were_left_out_may_have_been_removed_since(tree, tmp_path, form):
    convert(damage(tree), tmp_path / "data", on_error="skip", **SETTINGS)
    if form == "earlier":
        change_manifest(tmp_path / "data", skipped_numbers={})
    verify(tmp_path / "data", 1, tree)
    (tree / "train/ant/1.JPEG").unlink()
    verify(tmp_path / "data", 1, tree)


@pytest.mark.parametrize(
    "settings, reason", [({"turbo": 1}, "unexpected keyword"), ({"max_side": "5"}, "<="), ({"max_side": 0}, "0 is not")]
)
def test_settings_of_another_converter_are_told_in_one_line(converted, tree, settings, reason):
    change_manifest(converted, settings=settings)
    verify(converted, 2)
    with pytest.raises(DataError, match=f"has settings that this version does not know .*{reason}.*; verify the fold"):
        verify(converted, 2, tree)


def write_with_ffcv(folder):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    multiprocessing.set_start_method("fork", force=True)  # for the writer's processes, else they import all again
    for name in ("train", "val"):
        fields = {"image": RGBImageField("jpg"), "label": IntField()}
        DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1).from_indexed_dataset(
            [(picture(20, 30 + i), i) for i in range(3)]
        )


def test_a_file_of_ffcv_s_own_writer_is_verified_by_decoding_it(tmp_path, capsys):
    with_stock_ffcv(write_with_ffcv, tmp_path)
    verify(tmp_path, 1)
    assert "val: 3 images decode and agree with their sizes" in capsys.readouterr().out
    beton = BetonFile.open(tmp_path / "val.beton")
    with open(beton.path, "r+b") as file:
        file.seek(int(beton.images["data_at"][1]))
        file.write(bytes(100))
    with pytest.raises(DataError, match="val.beton: image 1 .label 1. does not decode to its 31 x 20 pixels"):
        verify(tmp_path, 1)
