"""Images in, FFCV files out: what is written, what is kept, and what is refused."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
from converter import ROOT, SETTINGS, damage, make_tree, names_in, save, stored
from PIL import Image

from lbsgd.convert import convert_split
from lbsgd.convert.convert import convert, look
from lbsgd.convert.settings import Settings
from lbsgd.convert.verify import verify
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import open_data
from lbsgd.errors import DataError


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "source")


def test_the_manifest_says_what_was_made(tree, tmp_path):
    save(tree / "train/bee/2.JPEG", size=(700, 10))
    convert(tree, tmp_path / "data", **SETTINGS)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert (
        manifest["classes"] == ["ant", "bee"] and manifest["source"] == str(tree) and manifest["converter_version"] == 3
    )
    assert manifest["settings"] == dict(max_side=500, short_side=None, quality=90, raw_fraction=0, reencode=False)
    assert manifest["stored"]["train"] == dict(copied=3, encoded=1, raw=0, scaled=0)
    assert manifest["skipped"] == dict(train=[], val=[]) and manifest["left_out"] == dict(train={}, val={})
    assert manifest["images_per_class"] == dict(train=[2, 2], val=[1, 1])
    for name, num_images in (("train", 4), ("val", 2)):
        beton = BetonFile.open(tmp_path / f"data/{name}.beton")
        assert manifest[name] == {
            "num_images": num_images,
            "num_bytes": beton.path.stat().st_size,
            "fingerprint": beton.fingerprint,
            "tables": beton.survey.tables,
        }
    assert names_in(tmp_path / "data") == ["manifest.json", "train.beton", "val.beton"]


def test_original_bytes_are_kept_where_no_resize_is_needed(tree, tmp_path):
    convert(tree, tmp_path / "data", **SETTINGS)
    assert stored(tmp_path / "data/train.beton") == [path.read_bytes() for path in sorted(tree.glob("train/*/*"))]
    convert(tree, tmp_path / "again", reencode=True, **SETTINGS)
    assert stored(tmp_path / "again/train.beton") != stored(tmp_path / "data/train.beton")


def test_the_files_do_not_depend_on_the_number_of_processes_or_on_chunks(tree, tmp_path, monkeypatch):
    for number in range(20):
        save(tree / f"train/ant/{number}.JPEG", size=(40 + number, 600))
    contents = set()
    for num_processes, chunk, slot_bytes in ((1, 32, 1 << 23), (3, 2, 1 << 23), (2, 5, 4096)):  # also too small ones
        monkeypatch.setattr(convert_split, "CHUNK_IMAGES", chunk)
        monkeypatch.setattr("lbsgd.convert.process_pool.SLOT_BYTES", slot_bytes)
        convert(tree, tmp_path / str(num_processes), **{**SETTINGS, "num_processes": num_processes})
        contents.add((tmp_path / str(num_processes) / "train.beton").read_bytes())
    assert len(contents) == 1


def test_a_complete_folder_is_left_and_a_damaged_one_made_again(tree, tmp_path, capsys):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    before = (data / "train.beton").stat().st_mtime_ns
    convert(tree, data, **SETTINGS)
    assert (data / "train.beton").stat().st_mtime_ns == before
    assert "is complete: 3 training and 2 validation images, 2 classes" in capsys.readouterr().out

    os.truncate(data / "train.beton", 1000)
    convert(tree, data, **SETTINGS)
    assert (
        "data is damaged: its files are not those of its manifest.json, and are made again" in capsys.readouterr().out
    )
    assert open_data(data).train.num_images == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree, data: SETTINGS | {"quality": 80}, "differs in quality"),
        (lambda tree, data: (save(tree / "val/bee/new.JPEG"), SETTINGS)[1], "differs in validation images"),
        (
            lambda tree, data: (save(tree / "val/bee/1.JPEG", quality=50), SETTINGS)[1],
            "differs in names or sizes of images",
        ),
        (
            lambda tree, data: ((data / "manifest.json").unlink(), SETTINGS)[1],
            "holds train.beton, but no manifest.json",
        ),
    ],
)
def test_other_data_is_not_replaced_unasked(tree, tmp_path, change, message):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    settings = change(tree, data)
    content = (data / "train.beton").read_bytes()
    with pytest.raises(DataError, match=message) as error:
        convert(tree, data, **settings)
    assert "--overwrite" in str(error.value)
    assert (data / "train.beton").read_bytes() == content
    convert(tree, data, **{**settings, "overwrite": True})
    open_data(data)


def test_a_conversion_that_fails_leaves_the_old_data_as_it_was(tree, tmp_path):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    fingerprint = open_data(data).fingerprint
    (tree / "val/ant/1.JPEG").write_text("no image")
    with pytest.raises(DataError):
        convert(tree, data, **{**SETTINGS, "overwrite": True})
    assert open_data(data).fingerprint == fingerprint
    assert names_in(data) == [".converting", "manifest.json", "train.beton", "val.beton"]


@pytest.fixture
def damaged(tree):
    return damage(tree)


def test_undecodable_images_are_all_listed_before_it_fails(damaged, tmp_path, capsys):
    with pytest.raises(DataError, match="2 of 6 images cannot be decoded") as error:
        convert(damaged, tmp_path / "data", **SETTINGS)
    assert f"{damaged}/train/ant/1.JPEG, {damaged}/val/bee/1.JPEG" in str(error.value)
    assert str(error.value).endswith(
        "leave them out with --on_error skip (the others are done), or replace or remove them (then all are "
        "converted again)"
    )
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot be decoded: ")]
    assert len(listed) == 2 and listed[0].startswith(f"cannot be decoded: {damaged}/train/ant/1.JPEG: OSError: ")
    assert listed[1] == f"cannot be decoded: {damaged}/val/bee/1.JPEG: no image that PIL knows"
    assert names_in(tmp_path / "data") == [".converting"]


def by_pil(mode, size, file_format):
    data = io.BytesIO()
    Image.new(mode, size).save(data, file_format)
    return data.getvalue()


def png_header(width, height):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    made = [
        struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "an empty file"),
        (by_pil("F", (8, 8), "TIFF"), "floating-point samples, of which nobody can tell which is white"),
        (
            png_header(20_000, 20_000),
            "DecompressionBombError: Image size (400000000 pixels) exceeds limit of 178956970",
        ),
        (by_pil("L", (70_000, 1), "PNG"), "70000 x 1 pixels, and a JPEG holds sides of at most 65,500"),
    ],
    ids=["empty", "floats", "too many pixels", "too wide"],
)
def test_why_an_image_cannot_be_decoded_is_told(tree, tmp_path, capsys, data, reason):
    (tree / "train/ant/1.JPEG").write_bytes(data)
    convert(tree, tmp_path / "data", short_side=64, num_processes=2, on_error="skip")
    assert f"cannot be decoded: {tree}/train/ant/1.JPEG: {reason}" in capsys.readouterr().out


def test_the_first_of_many_undecodable_images_have_their_reasons_also_after_an_interruption(
    tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lbsgd.convert.undecodable.REASONS", 2)
    for path in (tree / "train").glob("*/*"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match="3 of 5 images cannot be decoded"):
            convert(tree, tmp_path / "data", **SETTINGS)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot be")]
        assert [line.endswith(": an empty file") for line in lines] == [True, True, False]


def test_a_source_of_nothing_but_empty_files_is_refused(tree, tmp_path, capsys):
    for path in tree.glob("*/*/*"):
        path.write_bytes(b"")
    assert "5 of 5 images looked at cannot be decoded" in look(tree, tmp_path / "data", 2, max_side=500)
    with pytest.raises(DataError, match="5 of 5 images cannot be decoded"):
        convert(tree, tmp_path / "data", **SETTINGS)
    with pytest.raises(DataError, match="none of the 3 images can be decoded"):
        convert(tree, tmp_path / "data", on_error="skip", **SETTINGS)


def test_told_to_skip_them_it_leaves_them_out_and_says_so_without_doing_the_others_again(
    damaged, tmp_path, monkeypatch
):
    with pytest.raises(DataError):
        convert(damaged, tmp_path / "data", **SETTINGS)
    monkeypatch.setattr(convert_split, "ProcessPool", None)
    convert(damaged, tmp_path / "data", on_error="skip", **SETTINGS)
    data, manifest = open_data(tmp_path / "data"), json.loads((tmp_path / "data/manifest.json").read_text())
    assert data.train.labels.tolist() == [0, 1] and data.val.labels.tolist() == [0, 1]
    assert manifest["skipped"] == {"train": [f"{damaged}/train/ant/1.JPEG"], "val": [f"{damaged}/val/bee/1.JPEG"]}
    verify(tmp_path / "data", 1, damaged)
    convert(damaged, tmp_path / "data", on_error="skip", **SETTINGS)  # the folder is complete


def test_after_one_of_them_is_replaced_all_are_converted_again(damaged, tmp_path, capsys):
    """As the message says. Images are recognised by names, sizes and times, and one may have become another."""
    with pytest.raises(DataError, match="2 of 6 images cannot be decoded"):
        convert(damaged, tmp_path / "data", **SETTINGS)
    save(damaged / "train/ant/1.JPEG")
    save(damaged / "val/bee/1.JPEG")
    capsys.readouterr()
    convert(damaged, tmp_path / "data", **SETTINGS)
    said = capsys.readouterr().out
    assert "it begins again\n" in said and "train: 3 images in " in said and "val: 3 images in " in said


def test_a_disk_without_room_for_the_result_is_refused_before_anything_is_written(tree, tmp_path, monkeypatch):
    needed = sum(path.stat().st_size for path in tree.glob("*/*/*"))
    for free, refused in ((needed // 2, True), (2 * needed, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(
                DataError, match=r"has [\d.]+ MB free, and the result needs about [\d.]+ MB more; make room"
            ):
                convert(tree, tmp_path / "data", **SETTINGS)
            last = look(tree, tmp_path / "data", 1, max_side=500).splitlines()[-1]
            assert last.startswith(f"refused: {tmp_path}/data has 0.0 MB free, and the result needs about 0.0 MB more;")
        else:
            assert "refused" not in look(tree, tmp_path / "data", 1, max_side=500)
            convert(tree, tmp_path / "data", **SETTINGS)


def test_a_folder_that_cannot_be_written_to_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match="cannot write to .*file/data: Not a directory; name another folder with --data_dir"
    ):
        convert(tree, tmp_path / "file/data", **SETTINGS)


def test_nothing_is_left_where_there_is_no_source(tmp_path):
    with pytest.raises(DataError, match="nowhere: does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "data", **SETTINGS)
    assert not (tmp_path / "data").exists()


def test_converting_needs_neither_torch_nor_ffcv():
    code = (
        "import sys, lbsgd.convert.convert, lbsgd.convert.verify\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ffcv', 'cv2', 'PIL', 'rich', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- a bug of ours ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bug(tree, tmp_path, monkeypatch):
    """Make a data folder, then break our code that every image goes through. Return the settings."""
    settings = dict(max_side=40, num_processes=1)
    convert(tree, tmp_path / "data", **settings)
    monkeypatch.setattr(Settings, "is_raw", lambda self, index: index + None)
    return settings


def test_a_bug_of_ours_is_a_traceback_and_not_a_damaged_image(bug, tree, tmp_path):
    told = r"Traceback .*\n(.*\n)*TypeError: unsupported operand"
    with pytest.raises(RuntimeError, match=told):
        look(tree, tmp_path / "other", **bug)
    with pytest.raises(RuntimeError, match=told):  # in the estimate's process
        convert(tree, tmp_path / "other", on_error="skip", **bug)
    with pytest.raises(RuntimeError, match=told):
        verify(tmp_path / "data", 1, tree)


def test_a_bug_of_ours_in_a_process_is_its_traceback(bug, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lbsgd.convert.convert.check_disk", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"Traceback .*\n(.*\n)*TypeError: unsupported operand"):
        convert(tree, tmp_path / "other", on_error="skip", **bug)
    assert "cannot be decoded" not in capsys.readouterr().out
