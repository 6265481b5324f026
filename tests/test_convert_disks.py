"""Sources as found on real disks: what is left out and counted, what is scaled, what is refused before any work."""

import codecs
import io
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from converter import SETTINGS, encoded, make_tree, names_in, save, stored
from PIL import Image
from test_sources import (
    VAL_CLASSES,
    WNIDS,
    find,
    make_folders,
    make_kaggle,
    make_official,
    tar_bytes,
    val_files,
    write_files,
)

from lbsgd.convert.convert import convert, look
from lbsgd.convert.image import stored_image
from lbsgd.convert.preflight import unusable_images
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import ImageReader
from lbsgd.convert.verify import verify
from lbsgd.data.pil_image import ImageError
from lbsgd.errors import DataError

JUNK = {  # what a split's folder may hold besides images, and the reason that is reported
    ".ipynb_checkpoints/1-checkpoint.JPEG": "hidden folder",
    "n01440764/.ipynb_checkpoints/1-checkpoint.JPEG": "hidden folder",
    "n01440764/@eaDir/1.JPEG/SYNOPHOTO_THUMB_XL.jpg": "hidden folder",
    "@eaDir/1.JPEG": "hidden folder",
    "__MACOSX/n01440764/._1.JPEG": "system folder",
    "lost+found/1.JPEG": "system folder",
    "$RECYCLE.BIN/1.JPEG": "system folder",
    "#recycle/1.JPEG": "system folder",
    "#snapshot/1.JPEG": "system folder",
    "~snapshot/1.JPEG": "system folder",
    "System Volume Information/1.JPEG": "system folder",
    "FOUND.000/1.JPEG": "system folder",
    "__pycache__/1.JPEG": "system folder",
    "n01440764/._n01440764_1.JPEG": "AppleDouble file",
    "._n01440764": "AppleDouble file",
    "n01440764/.hidden.JPEG": "hidden file",
    ".DS_Store": "hidden file",
    "n01440764/Thumbs.db": "non-image file",
    "n01440764/n01440764_boxes.txt": "non-image file",
    "stray.JPEG": "stray file",
}
COUNTS = {reason: list(JUNK.values()).count(reason) for reason in JUNK.values()}


def add_junk(folder):
    for name in JUNK:
        save(folder / name)
    for name in ("@eaDir/2.JPEG", "__MACOSX/n01440764/._2.JPEG"):  # their folders count once
        save(folder / name)
    return folder


def in_tar(folder):
    """Return a tar of the folder's files in an arbitrary order."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.with_suffix(".tar").write_bytes(tar_bytes(files))
    return folder.with_suffix(".tar")


def test_photos_that_are_not_read_are_told_by_suffix_and_how_to_keep_them(tmp_path):
    folder = make_folders(tmp_path / "source")
    for name in ("1.gif", "2.GIF", "1.avif", "readme.txt"):
        (folder / "train/n01440764" / name).write_bytes(b"x")
    told = look(folder, tmp_path / "data", 1, max_side=500).splitlines()[2]
    assert told == (
        "left out of train: 1 .avif file (n01440764/1.avif), 2 .gif files (such as n01440764/1.gif), 1 non-image file "
        "(n01440764/readme.txt); to keep .gif, .avif, make JPEGs of them first"
    )


@pytest.mark.parametrize("form", [lambda folder: folder, in_tar], ids=["folder", "tar"])
def test_torchvision_s_suffixes_and_jfif_are_those_of_images(tmp_path, form):
    folder = make_folders(tmp_path / "source")
    names = {f"a.{suffix}" for suffix in "jpg jpeg jfif JFIF png ppm bmp pgm tif tiff webp".split()}
    for name in names:
        (folder / "train/n01440764" / name).write_bytes(encoded())
    found = find(form(folder), tmp_path)
    assert names < set(map(os.path.basename, found.train.names)) and not found.train.left_out.counts


@pytest.mark.parametrize("form", [lambda folder: folder, in_tar], ids=["folder", "tar"])
def test_what_is_no_image_is_left_out_told_and_counted(tmp_path, form):
    clean = find(make_folders(tmp_path / "clean"), tmp_path)
    add_junk(make_folders(tmp_path / "source") / "train")
    path = form(tmp_path / "source")
    source = find(path, tmp_path)
    assert list(source.train.names)[0].endswith(
        "n01440764/n01440764_1.JPEG" if path.is_file() else clean.train.names[0]
    )
    assert source.train.labels.tolist() == clean.train.labels.tolist() and source.train.classes == WNIDS
    assert source.train.left_out.counts == COUNTS and source.val.left_out.counts == {}
    told = look(path, tmp_path / "data", 1, max_side=500).splitlines()[2]
    assert told.startswith("left out of train: 2 AppleDouble files (such as ") and "4 hidden folders" in told
    assert "2 non-image files (such as n01440764/Thumbs.db), 1 stray file (" in told


def test_the_manifest_counts_what_was_left_out_and_the_conversion_tells_it(tmp_path, capsys):
    tree = make_tree(tmp_path / "source")
    save(tree / "val/bee/._1.JPEG")
    save(tree / "train/.git/1.JPEG")
    convert(tree, tmp_path / "data", **SETTINGS)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["left_out"] == {"train": {"hidden folder": 1}, "val": {"AppleDouble file": 1}}
    assert capsys.readouterr().out.splitlines()[:2] == [
        "left out of train: 1 hidden folder (.git)",
        "left out of val: 1 AppleDouble file (bee/._1.JPEG)",
    ]
    verify(tmp_path / "data", 1, tree)
    convert(tree, tmp_path / "data", **SETTINGS)
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("make", [make_kaggle, make_official])
def test_junk_beside_validation_images_without_folders_is_left_out(tmp_path, make):
    folder = make(tmp_path / "source")
    if make is make_kaggle:
        val = folder / "ILSVRC/Data/CLS-LOC/val"
        save(val / "._ILSVRC2012_val_00000001.JPEG")
        save(val / ".ipynb_checkpoints/1.JPEG")
        (val / "empty").mkdir()
    else:
        junk = {"._ILSVRC2012_val_00000001.JPEG": b"x"}
        (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(junk | val_files()))
        with_double = {"._n01440764.tar": b"no tar", **tars_of(folder)}
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(with_double))
    source = find(folder, tmp_path)
    assert len(source.val) == 6 and source.val.left_out.counts["AppleDouble file"] == 1
    assert source.train.classes == WNIDS


def tars_of(folder):
    import tarfile

    with tarfile.open(folder / "ILSVRC2012_img_train.tar") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "link, target",
    [
        ("train/n01440764/self", "."),
        ("train/n01440764/up", ".."),
        ("train/n01440764/root", "/"),
        ("train/loop", "."),
        ("train/whole", "../.."),
        ("train/n01440764/again", "deeper"),
    ],
)
def test_a_link_to_a_folder_that_is_in_already_is_left_out(tmp_path, link, target):
    folder = make_folders(tmp_path / "source")
    save(folder / "train/n01440764/deeper/1.JPEG")
    clean = list(find(folder, tmp_path).train.names)
    (folder / link).symlink_to(target)
    source = find(folder, tmp_path)
    assert list(source.train.names) == clean and source.train.left_out.counts == {"repeated folder": 1}


def test_links_to_class_folders_and_files_elsewhere_are_followed(tmp_path):
    whole, subset = make_folders(tmp_path / "whole"), tmp_path / "subset"
    for split in ("train", "val"):
        (subset / split).mkdir(parents=True)
        (subset / split / WNIDS[0]).symlink_to(whole / split / WNIDS[0])
    (subset / "train" / WNIDS[1]).mkdir()
    (subset / "train" / WNIDS[1] / "1.JPEG").symlink_to(whole / "train" / WNIDS[1] / f"{WNIDS[1]}_1.JPEG")
    (subset / "val" / WNIDS[1]).symlink_to(whole / "val" / WNIDS[1])
    source = find(subset, tmp_path)
    assert source.train.classes == WNIDS[:2] and source.train.labels.tolist() == [0, 0, 0, 1]


def test_a_folder_of_two_classes_and_links_to_nothing_are_refused(tmp_path):
    folder = make_folders(tmp_path / "source")
    link = folder / "train/n01440764/other"
    link.symlink_to(f"../{WNIDS[1]}")
    with pytest.raises(DataError, match="is a folder that class n01440764 holds as well"):
        find(folder, tmp_path)
    link.unlink()
    (folder / "train/n01440764/gone.JPEG").symlink_to("/nowhere/1.JPEG")
    with pytest.raises(DataError, match="gone.JPEG is a link to /nowhere/1.JPEG, which cannot be read"):
        find(folder, tmp_path)
    (folder / "train/n01440764/gone.JPEG").unlink()
    (folder / "train/n01440764/circle.JPEG").symlink_to("circle.JPEG")
    with pytest.raises(DataError, match="circle.JPEG is a link to circle.JPEG"):
        find(folder, tmp_path)


@pytest.mark.parametrize("link", ["train/n03", "val/n03", "train/n01440764/deeper", "train/notes.txt"])
def test_a_link_to_nothing_is_refused_whatever_its_name(tmp_path, link):
    """It may be a class folder on a disk that is not mounted."""
    folder = make_folders(tmp_path / "source")
    (folder / link).symlink_to("/nowhere/n03")
    with pytest.raises(DataError, match=f"{link} is a link to /nowhere/n03, which cannot be read"):
        find(folder, tmp_path)
    (folder / link).rename((folder / link).with_name(".hidden"))
    assert sum(find(folder, tmp_path).splits[link.split("/")[0]].left_out.counts.values()) == 1


# --- archives ---------------------------------------------------------------------------------------------------------


def test_archives_of_other_kinds_are_called_by_their_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/a/1.JPEG", "x")
    for content, said in (
        ((tmp_path / "a.zip").read_bytes(), "is a zip: unpack it and name the folder with --source"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "is a 7z archive: unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "is compressed by zstd: unpack it"),
        (b"\n<!DOCTYPE html><html>", "is a web page, as you get when a download needs a login"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs, run: git lfs pull"),
    ):
        for name in ("imagenet.tar", "ILSVRC2012_img_train.tar"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError) as error:
                find(tmp_path / name, tmp_path)
            assert said in str(error.value) and name in str(error.value)


def test_a_folder_of_zips_says_that_they_are_to_be_unpacked(tmp_path):
    (tmp_path / "imagenet.zip").write_bytes(b"")
    with pytest.raises(DataError, match="no images in .* unpack imagenet.zip, or name the source"):
        find(tmp_path, tmp_path)
    folder = make_kaggle(tmp_path / "source")
    (folder / "LOC_val_solution.csv").rename(folder / "LOC_val_solution.csv.zip")
    with pytest.raises(DataError, match="without labels: .* unpack .*LOC_val_solution.csv.zip there"):
        find(folder, tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_kaggle_s_own_archive_is_read(tmp_path, mode):
    """Boxes are also in folders train and val, and the labels of the validation images are next to the archive."""
    folder = make_kaggle(tmp_path / "source")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.JPEG")}
    files |= {f"ILSVRC/Annotations/CLS-LOC/{split}/n01440764/1.xml": b"<annotation/>" for split in ("train", "val")}
    archive = tmp_path / "kaggle.tar.gz"
    archive.write_bytes(tar_bytes(dict(reversed(files.items())), mode))
    with pytest.raises(DataError, match="kaggle.tar.gz holds validation images without labels"):
        find(archive, tmp_path)
    shutil.copy(folder / "LOC_val_solution.csv", tmp_path)
    ours, theirs = find(archive, tmp_path), find(folder, tmp_path)
    for split in ("train", "val"):
        assert ours.splits[split].labels.tolist() == theirs.splits[split].labels.tolist()
        names = [os.path.basename(name) for name in ours.splits[split].names]
        assert names == [os.path.basename(name) for name in theirs.splits[split].names]


def annotation(*classes):
    objects = "".join(f"<object>\n\t<name>{name}</name>\n\t<pose>x</pose></object>" for name in classes)
    return f"<annotation>\n\t<folder>val</folder><source><name>x</name></source>{objects}</annotation>".encode()


@pytest.mark.parametrize("make", [make_official, make_kaggle])
def test_validation_images_that_have_a_label_and_are_not_there_are_told(tmp_path, make):
    """As after an interrupted copy or unpacking, which may lack images of any class."""
    source, images = make(tmp_path / "source"), val_files()
    lacking = [images.popitem()[0], images.popitem()[0]]
    if make is make_official:
        (source / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(images))
    for name in lacking:
        (source / "ILSVRC/Data/CLS-LOC/val" / name).unlink(missing_ok=True)
    told = look(source, tmp_path / "data", 1, max_side=500).splitlines()[2]
    assert told == "left out of val: 2 missing images (such as ILSVRC2012_val_00000005)"


def with_annotations(folder):
    """Remove the table of labels and give each validation image its annotation."""
    (folder / "LOC_val_solution.csv").unlink()
    for label, name in zip(VAL_CLASSES, val_files(), strict=True):
        path = folder / "ILSVRC/Annotations/CLS-LOC/val" / name.replace(".JPEG", ".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(annotation(WNIDS[label], WNIDS[label]))
    return folder


def test_annotations_give_the_labels_where_no_table_does(tmp_path):
    by_table = find(make_kaggle(tmp_path / "table"), tmp_path).val.labels.tolist()
    folder = with_annotations(make_kaggle(tmp_path / "source"))
    (folder / "ILSVRC/Annotations/CLS-LOC/val/._ILSVRC2012_val_00000001.xml").write_bytes(b"of macOS")
    write_files(folder / "ILSVRC/Annotations/CLS-LOC/train", {"n01440764/n01440764_1.xml": b"<annotation/>"})
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "kaggle.tar.gz").write_bytes(tar_bytes(files, "w:gz"))
    for source in (folder, folder / "ILSVRC", folder / "ILSVRC/Data/CLS-LOC", tmp_path / "kaggle.tar.gz"):
        assert find(source, tmp_path).val.labels.tolist() == by_table


@pytest.mark.parametrize("classes", [(), (WNIDS[0], WNIDS[1])])
def test_an_annotation_without_one_class_is_refused_by_name(tmp_path, classes):
    folder = with_annotations(make_kaggle(tmp_path / "source"))
    name = "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000003.xml"
    (folder / name).write_bytes(annotation(*classes))
    told = f"{name} names {len(classes)} classes, and a validation image has one"
    with pytest.raises(DataError, match=f"^{folder}/{told}"):
        find(folder, tmp_path)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "kaggle.tar.gz").write_bytes(tar_bytes(files, "w:gz"))
    with pytest.raises(DataError, match=f"^{tmp_path}/kaggle.tar.gz: {told}"):  # not the copy of its content
        find(tmp_path / "kaggle.tar.gz", tmp_path)


def test_two_data_sets_in_one_tar_are_refused(tmp_path):
    names = [f"{base}/{split}/a/1.JPEG" for base in ("one", "two") for split in ("train", "val")]
    (tmp_path / "a.tar").write_bytes(tar_bytes({name: encoded() for name in names}))
    with pytest.raises(DataError, match=r"holds train/ in several folders \(one/, two/\)"):
        find(tmp_path / "a.tar", tmp_path)


def test_classes_may_be_called_train_and_val(tmp_path):
    names = [f"{split}/{name}/1.JPEG" for split in ("train", "val") for name in ("train", "val")]
    (tmp_path / "a.tar").write_bytes(tar_bytes({name: encoded() for name in names}))
    assert find(tmp_path / "a.tar", tmp_path).train.classes == ["train", "val"]


@pytest.mark.parametrize(
    "written",
    [
        lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    ],
)
def test_labels_with_a_byte_order_mark_are_read(tmp_path, written):
    folder = make_kaggle(tmp_path / "source")
    labels = find(folder, tmp_path).val.labels.tolist()
    table = folder / "LOC_val_solution.csv"
    table.write_bytes(written(table.read_text()))
    assert find(folder, tmp_path).val.labels.tolist() == labels


# --- depths -----------------------------------------------------------------------------------------------------------

GREY = np.arange(0, 65536, 16, np.uint16).reshape(64, 64)
COLOURS = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)


def by_pil(pixels, file_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def by_opencv(suffix, pixels):
    return cv2.imencode(suffix, np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels))[1].tobytes()


DEEP = {
    "grey PNG": (by_pil(GREY, "PNG"), GREY),
    "grey TIFF": (by_pil(GREY, "TIFF"), GREY),
    "grey TIFF whose 0 is white": (by_pil(GREY, "TIFF", tiffinfo={262: 0}), 65535 - GREY),
    "grey PGM": (by_opencv(".pgm", GREY), GREY),
    "PNG": (by_opencv(".png", COLOURS), COLOURS),
    "TIFF": (by_opencv(".tif", COLOURS), COLOURS),
    "PPM": (by_opencv(".ppm", COLOURS), COLOURS),
}


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_become_eight(kind):
    data, pixels = DEEP[kind]
    kept = stored_image(data, 0, Settings(max_side=64, raw_fraction=1.0), 1 << 23)
    expected = np.rint(pixels / 257).astype(np.uint8).reshape(64, 64, -1)
    assert (np.frombuffer(kept.view, np.uint8).reshape(64, 64, 3) == expected).all()
    assert kept.scaled


def test_sixteen_bits_of_a_whole_pixel_are_not_scaled():
    """A BMP with 5, 6 and 5 bits."""
    pixels = np.full((8, 8), 0xF81F, "<u2").tobytes()
    masks = struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, len(pixels), 0, 0, 0, 0) + masks
    data = struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels
    kept = stored_image(data, 0, Settings(max_side=64, raw_fraction=1.0), 1 << 23)
    assert not kept.scaled and bytes(kept.view[:3]) == bytes((255, 0, 255))


def test_the_manifest_and_the_dry_run_tell_what_was_scaled(tmp_path):
    tree = make_tree(tmp_path / "source")
    (tree / "train/ant/deep.png").write_bytes(DEEP["grey PNG"][0])
    assert "16.7% scaled from 16 bits to 8" in look(tree, tmp_path / "data", 1, max_side=500)
    convert(tree, tmp_path / "data", **SETTINGS)
    counts = json.loads((tmp_path / "data/manifest.json").read_text())["stored"]
    assert counts["train"] == dict(copied=3, encoded=1, raw=0, scaled=1) and counts["val"]["scaled"] == 0
    verify(tmp_path / "data", 1, tree)


UNUSABLE = {
    "floating-point": by_pil(GREY.astype(np.float32) / 65535, "TIFF"),
    "32-bit or signed": by_pil(GREY.astype(np.int32), "TIFF"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_floats_and_their_like_are_refused_before_the_work_begins(tmp_path, kind):
    tree = make_tree(tmp_path / "source")
    (tree / "train/ant/odd.tif").write_bytes(UNUSABLE[kind])
    told = f"1 image cannot become 8 bits, because nobody can tell which value is white: .*odd.tif .{kind} samples."
    with pytest.raises(DataError, match=told):
        convert(tree, tmp_path / "data", **SETTINGS)
    assert names_in(tmp_path) == ["source"]
    assert "refused: 1 image cannot become" in look(tree, tmp_path / "data", 1, max_side=500)
    convert(tree, tmp_path / "data", on_error="skip", **SETTINGS)
    assert json.loads((tmp_path / "data/manifest.json").read_text())["skipped"]["train"] == [
        f"{tree}/train/ant/odd.tif"
    ]
    assert len(stored(tmp_path / "data/train.beton")) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_depths_are_told_from_the_headers_alone(tmp_path, monkeypatch, packed):
    tree = make_tree(tmp_path / "source")
    (tree / "train/ant/x.TIF").write_bytes(by_pil(np.zeros((1500, 2000), np.float32), "TIFF"))
    (tree / "val/bee/x.pgm").write_bytes(b"P5 2000 2000 65535\n" + bytes(8_000_000))
    (tree / "val/ant/x.tif").write_bytes(b"")
    (tree / "val/bee/y.tiff").write_bytes(UNUSABLE["32-bit or signed"])
    source = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", tree)) if packed else tree
    found, taken, pread = find(source, tmp_path), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: taken.append(arguments[1]) or pread(*arguments))
    monkeypatch.setattr(ImageReader, "read", None)
    first, second = unusable_images(found)
    assert first.endswith("ant/x.TIF (floating-point samples)") and second.endswith("y.tiff (32-bit or signed samples)")
    assert sum(taken) < 100_000


def test_twelve_bits_in_sixteen_are_not_taken_for_black():
    with Image.open(io.BytesIO(by_pil(GREY, "TIFF"))) as image:
        assert image.tag_v2[258] == (16,)
    twelve = bytearray(by_pil(GREY, "TIFF"))
    at = twelve.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    twelve[at + 8] = 12
    with pytest.raises(ImageError, match="12-bit samples"):
        stored_image(bytes(twelve), 0, Settings(max_side=64), 1 << 23)
