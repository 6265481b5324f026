"""Data folders are read and verified without FFCV. A damaged or foreign one is refused."""

import errno
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import ALLOCATION, FIELD, HEADER, IMAGE, IMAGE_FIELD, INT_FIELD, LABEL
from lbsgd.data.beton_layout import read_layout
from lbsgd.data.beton_survey import survey
from lbsgd.data.folder import Manifest, Split, data_folder, open_data, open_val
from lbsgd.errors import DataError


def write_beton(path, labels, *, names=("image", "label"), types=(IMAGE_FIELD, INT_FIELD), version=2, jpegs=None):
    """Write a file in FFCV's layout, with images of width 20 + i and height 30 + i and made-up JPEG bytes."""
    jpegs = jpegs or [bytes([i % 256]) * (50 + i) for i in range(len(labels))]
    fields = np.zeros(len(types), FIELD)
    fields["type_id"], fields["name"] = types, names
    record = np.dtype([("", IMAGE if type_id == IMAGE_FIELD else LABEL) for type_id in types], align=True)
    table = np.zeros(len(labels), record)
    data_at = HEADER.itemsize + fields.nbytes + table.nbytes
    allocations = np.zeros(len(labels), ALLOCATION)
    for i, jpeg in enumerate(jpegs):
        allocations[i] = i, data_at, len(jpeg)
        for column, type_id in zip(record.names, types, strict=True):
            table[column][i] = (0, 20 + i, 30 + i, data_at) if type_id == IMAGE_FIELD else labels[i]
        data_at += len(jpeg)
    header = np.array((version, len(types), 1 << 21, len(labels), data_at), HEADER)
    parts = [header, fields, table, b"".join(jpegs), allocations[::-1]]  # allocations are in no particular order
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts))
    return path


def data_of(folder, train=(0, 1, 2, 2), val=(2, 0), manifest=True):
    folder.mkdir(exist_ok=True)
    files = [
        BetonFile.open(write_beton(folder / f"{name}.beton", labels))
        for name, labels in (("train", train), ("val", val))
    ]
    if manifest:
        Manifest(
            classes=["ant", "bee", "cat"],
            train=Split.of(files[0]),
            val=Split.of(files[1]),
            source="somewhere",
            settings={},
            converter_version=1,
        ).write(folder / "manifest.json")
    return folder


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, types",
    [
        (("image", "label"), (IMAGE_FIELD, INT_FIELD)),
        (("class", "picture"), (INT_FIELD, IMAGE_FIELD)),
    ],
)
def test_fields_are_found_by_type(tmp_path, names, types):
    beton = BetonFile.open(write_beton(tmp_path / "a.beton", [5, 6, 7], names=names, types=types))
    assert beton.num_images == 3 and beton.labels.tolist() == [5, 6, 7]
    assert beton.image_field == names[types.index(IMAGE_FIELD)]


def test_ffcv_reads_the_same_from_its_own_file(digits_data):
    from ffcv.reader import Reader

    beton, reader = BetonFile.open(digits_data / "train.beton"), Reader(str(digits_data / "train.beton"))
    assert beton.num_images == reader.num_samples == 1437
    assert np.array_equal(beton.labels, reader.metadata["f1"])
    assert reader.field_names == [beton.image_field, "label"]


def test_labels_cannot_be_changed(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        BetonFile.open(write_beton(tmp_path / "a.beton", [0])).labels[0] = 1


def test_the_fingerprint_follows_the_images_and_not_their_places(tmp_path):
    def fingerprint(labels, **options):
        return BetonFile.open(write_beton(tmp_path / "a.beton", labels, **options)).fingerprint

    same = fingerprint([0, 1])
    assert same == fingerprint([0, 1], names=("a much longer", "name"))
    assert same == fingerprint([0, 1], types=(INT_FIELD, IMAGE_FIELD))  # everything is at another place
    assert len({same, fingerprint([0, 2]), fingerprint([0, 1, 1]), fingerprint([0, 1], jpegs=[b"12", b"345"])}) == 4


def test_the_fingerprint_follows_coding_sides_and_checksum_of_an_image(tmp_path, digits_data):
    def fingerprints(path, *places):
        """Those of the file, and those with a bit flipped at each place."""
        content, layout = path.read_bytes(), read_layout(path)
        for place in (None, *(at(layout) for at in places)):
            changed = bytearray(content)
            if place:
                changed[place] ^= 1
            (tmp_path / "changed.beton").write_bytes(changed)
            yield BetonFile.open(tmp_path / "changed.beton").fingerprint

    one = write_beton(tmp_path / "one.beton", [0], jpegs=[bytes(3 * 20 * 30)])  # a JPEG or, flipped, raw pixels
    parts = [lambda layout, at=IMAGE.fields[name][1]: layout.metadata_at + at for name in ("mode", "width", "height")]
    assert len({*fingerprints(one, *parts)}) == 4
    assert len({*fingerprints(digits_data / "val.beton", lambda layout: layout.checksums_at)}) == 2


@pytest.mark.parametrize("missing_bytes", [1, 23, 24, 25, 100])
def test_a_truncated_file_is_refused_even_for_its_last_byte(tmp_path, missing_bytes):
    path = write_beton(tmp_path / "a.beton", range(10))
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(DataError, match=r"a\.beton is truncated or damaged: it has [\d,]+ bytes and should have"):
        BetonFile.open(path)


def test_a_file_that_is_made_shorter_while_its_tables_are_read_is_refused(tmp_path):
    path = write_beton(tmp_path / "train.beton", range(3))
    layout = read_layout(path)
    with open(path, "r+b") as file:
        file.truncate(layout.identity.num_bytes - ALLOCATION.itemsize)
    with pytest.raises(DataError, match="made shorter while it was read"):
        survey(layout)


def test_a_file_that_ffcv_never_finished_is_refused(tmp_path):
    path = write_beton(tmp_path / "a.beton", range(10))
    content = bytearray(path.read_bytes())
    content[HEADER.fields["allocations_at"][1] : HEADER.itemsize] = bytes(8)  # FFCV writes the table's place last
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged"):
        BetonFile.open(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"PK\3\4 something else"), "not an FFCV file of format version 2"),
        (lambda path: path.write_bytes(b"\2\0"), "not an FFCV file of format version 2"),
        (lambda path: write_beton(path, [0], version=3), "not an FFCV file of format version 2"),
        (lambda path: write_beton(path, []), "holds no images"),
        (lambda path: write_beton(path, [0], types=(IMAGE_FIELD, IMAGE_FIELD)), "does not hold images with labels"),
        (lambda path: write_beton(path, [0], types=(IMAGE_FIELD, 0)), "does not hold images with labels"),
        (lambda path: path.unlink(), "cannot read .*No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
    ],
)
def test_what_is_no_ffcv_file_of_labelled_images_is_refused(tmp_path, change, message):
    path = write_beton(tmp_path / "a.beton", [0, 1])
    change(path)
    with pytest.raises(DataError, match=message) as error:
        BetonFile.open(path)
    assert "a.beton" in str(error.value) and "\n" not in str(error.value)


def test_an_allocation_table_that_repeats_an_image_is_refused(tmp_path):
    path = write_beton(tmp_path / "a.beton", [0, 1])
    content = path.read_bytes()
    path.write_bytes(content[:-24] + content[-48:-24])
    with pytest.raises(DataError, match="allocation table does not give each of its 2 images a place"):
        BetonFile.open(path)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_converted_folder_opens(digits_data):
    data = open_data(digits_data)
    assert (data.train.num_images, data.val.num_images, data.num_classes) == (1437, 360, 10)
    assert data.classes == [str(digit) for digit in range(10)]
    assert len(data.fingerprint) == 64


def test_without_a_manifest_the_training_labels_tell_the_classes(tmp_path):
    data = open_data(data_of(tmp_path / "data", manifest=False))
    assert (data.num_classes, data.classes) == (3, None)


def test_labels_that_tell_of_more_classes_than_can_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="train.beton: its highest label is 4611686018427387904, and no manifest"):
        open_data(data_of(tmp_path / "data", train=[0, 1 << 62], manifest=False))


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("val", [[0, 3, 1], [2, -1]])
def test_a_label_outside_the_classes_is_named(tmp_path, val, manifest):
    with pytest.raises(DataError, match=rf"val.beton: image 1 has label {val[1]}, outside the 3 classes"):
        open_data(data_of(tmp_path / "data", val=val, manifest=manifest))


def test_a_training_label_outside_the_manifest_s_classes_is_named(tmp_path):
    with pytest.raises(DataError, match="train.beton: image 2 has label 3, outside the 3 classes"):
        open_data(data_of(tmp_path / "data", train=[0, 1, 3, 5]))


def test_a_file_from_another_data_set_is_refused(tmp_path):
    folder, other = data_of(tmp_path / "data"), data_of(tmp_path / "other", val=(2, 1))
    (folder / "val.beton").write_bytes((other / "val.beton").read_bytes())  # with the same number of images
    with pytest.raises(DataError, match="val.beton is not the file that manifest.json beside it was written for"):
        open_data(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"classes": []}), json.dumps({"train": {}, "val": {}})])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    folder = data_of(tmp_path / "data")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        open_data(folder)


@pytest.mark.parametrize(
    "present, missing",
    [
        ([], "train.beton and val.beton not found"),
        (["train.beton"], "val.beton not found"),
        (["manifest.json", "val.beton"], "train.beton not found"),
    ],
)
def test_a_folder_without_data_says_what_to_run(tmp_path, present, missing):
    folder = data_of(tmp_path / "data")
    for path in folder.iterdir():
        if path.name not in present:
            path.unlink()
    with pytest.raises(DataError, match=missing) as error:
        open_data(folder)
    assert f"lbsgd convert --source IMAGENET --data_dir {folder}" in str(error.value)


def test_an_evaluation_reads_val_beton_and_the_manifest_alone(tmp_path):
    folder = data_of(tmp_path / "data", val=(1, 0))
    (folder / "train.beton").unlink()
    data = open_val(folder)
    assert (data.val.num_images, data.num_classes, data.classes) == (2, 3, open_val(folder).classes)
    (folder / "val.beton").write_bytes((data_of(tmp_path / "other", val=(2, 1)) / "val.beton").read_bytes())
    with pytest.raises(DataError, match="val.beton is not the file that manifest.json beside it was written for"):
        open_val(folder)
    (folder / "val.beton").unlink()
    with pytest.raises(DataError, match=f"no data in {folder}: val.beton not found"):
        open_val(folder)


@pytest.mark.parametrize("source", ["train/ant", "ILSVRC2012_img_train.tar", "ILSVRC/Data"])
def test_a_folder_of_images_is_to_be_converted_into_another(tmp_path, source):
    (tmp_path / "own" / source).mkdir(parents=True)
    own = tmp_path / "own"
    with pytest.raises(DataError, match=f"{own} holds images .*: lbsgd convert --source {own} --data_dir {own}_ffcv"):
        open_data(own)


def test_without_a_manifest_an_evaluation_counts_the_classes_of_the_training_labels_if_there_are_any(tmp_path):
    folder = data_of(tmp_path / "data", val=(1, 0), manifest=False)
    assert open_val(folder).num_classes == 3
    (folder / "train.beton").unlink()
    assert open_val(folder).num_classes == 2


def test_the_data_folder_is_the_flag_else_the_environment_else_the_default(monkeypatch):
    monkeypatch.setenv("IMAGENET_FFCV_DIR", "/from/environment")
    assert str(data_folder("/from/flag")) == "/from/flag"
    assert str(data_folder(None)) == "/from/environment"
    monkeypatch.delenv("IMAGENET_FFCV_DIR")
    assert str(data_folder(None)) == "data/imagenet_ffcv"


def test_reading_a_data_folder_imports_neither_torch_nor_ffcv():
    imports = "import sys, lbsgd.data.folder, lbsgd.algorithm.shuffle"
    code = f"{imports}; sys.exit(any(name in sys.modules for name in ('torch', 'ffcv')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_system_that_maps_no_files_is_named(tmp_path, monkeypatch):
    path = write_beton(tmp_path / "a.beton", [0, 1])

    def none(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", none)
    with pytest.raises(DataError, match="^cannot read .*No such device; its file system maps no files, so copy it"):
        BetonFile.open(path)


def test_a_command_in_an_error_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "my 'data'"
    with pytest.raises(DataError, match="make the folder with: ") as none:
        open_data(folder)
    (folder / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="into another folder, and give that: ") as images:
        open_data(folder)
    for error, last in ((none, folder), (images, f"{folder}_ffcv")):
        command = str(error.value).partition(": ")[2].partition(", or name another")[0].rpartition(": ")[2]
        assert shlex.split(command)[-2:] == ["--data_dir", str(last)]
