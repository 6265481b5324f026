"""CIFAR-10's own archive in small: pickles as its authors wrote them become the same pixels and labels."""

import gzip
import io
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from lbsgd.convert.cifar10 import BATCHES, FOLDER, as_tar, is_cifar10
from lbsgd.convert.convert import convert
from lbsgd.convert.sources import find_source
from lbsgd.data.folder import open_data
from lbsgd.errors import DataError

NAMES = [b"airplane", b"automobile", b"bird"]


def archive(path, batches, meta=None):
    """cifar-10-python.tar.gz with some images per batch. The pickles use protocol 2, as Python 2 wrote them."""
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in {"batches.meta": meta or {b"label_names": NAMES}, **batches}.items():
            data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def small_batches():
    random = np.random.default_rng(0)
    return {name: {b"data": random.integers(0, 256, (3, 3072), np.uint8), b"labels": [0, 1, 2]} for name in BATCHES}


def test_every_image_is_a_png_of_its_pixels_in_its_class(tmp_path):
    batches = small_batches()
    source = find_source(archive(tmp_path / "cifar-10-python.tar.gz", batches), tmp_path / "work", tmp_path / "data")
    assert (len(source.train), len(source.val)) == (15, 3)
    assert source.train.classes == ["airplane", "automobile", "bird"] and source.val.labels.tolist() == [0, 1, 2]
    with tarfile.open(source.train.container) as tar:
        pixels = np.asarray(Image.open(tar.extractfile("train/automobile/00004.png")))  # second of the second batch
    red, green, blue = batches["data_batch_2"][b"data"][1].reshape(3, 32, 32)
    assert (pixels == np.stack([red, green, blue], axis=-1)).all()


def test_the_same_archive_gives_the_same_tar(tmp_path):
    path = archive(tmp_path / "cifar-10-python.tar.gz", small_batches())
    first, second = as_tar(path, tmp_path / "a"), as_tar(path, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda batches: batches.pop("test_batch"), "test_batch"),
        (lambda batches: batches["data_batch_1"].pop(b"labels"), "labels"),
        (lambda batches: batches["data_batch_1"].update({b"labels": [0, 1]}), "3 images and 2 labels"),
        (lambda batches: batches.update(data_batch_3=pickle.dumps(print)), "it would call builtins.print"),
        (lambda batches: batches.update(data_batch_3=b"\x80\x02}K\x01a."), "data_batch_3: .* no attribute 'append'"),
        (lambda batches: batches.update(data_batch_3=b"\x80\x04\x8e" + b"\xff" * 8), "data_batch_3: BINBYTES"),
        (lambda batches: batches["data_batch_1"].update({b"data": np.zeros((3, 3072))}), "no array of bytes"),
        (lambda batches: batches["data_batch_1"].update({b"data": np.array([{}] * 3)}), "no array of bytes"),
        (lambda batches: batches["data_batch_1"].update({b"data": [[0] * 3072] * 3}), "no array of bytes"),
    ],
)
def test_a_damaged_or_hostile_archive_is_refused(tmp_path, change, reason):
    batches = small_batches()
    change(batches)
    with pytest.raises(DataError, match=reason):
        as_tar(archive(tmp_path / "cifar-10-python.tar.gz", batches), tmp_path / "work")


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo(f"{FOLDER}/batches.meta")
        link.type, link.linkname = tarfile.LNKTYPE, link.name
        tar.addfile(link)
    with pytest.raises(DataError, match="batches.meta is no file"):
        as_tar(path, tmp_path / "work")


@pytest.mark.parametrize("place", [-8, -3, 30_000])
def test_a_flipped_bit_of_the_download_is_found_by_the_checksum_of_gzip(tmp_path, place):
    """Pixels are stored as they are, so a flipped bit in them changes only the checksum."""
    path = archive(tmp_path / "cifar-10-python.tar.gz", small_batches())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="cifar-10-python.tar.gz.*again"):
        find_source(path, tmp_path / "work", tmp_path / "data")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_is_told_of_a_hostile_archive_takes_no_memory(tmp_path, mode):
    """A name of 3 GB, which takes no space in a sparse or compressed file."""
    path = tmp_path / "x.tar"
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    with open(path, "wb") as file:
        file.write(name.tobuf())
        file.truncate(3 << 30)
    if mode == "w:gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(name.tobuf() + bytes(200 << 20))
    tracemalloc.start()
    try:
        assert not is_cifar10(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_it_converts_to_the_very_pixels(tmp_path):
    path = archive(tmp_path / "cifar-10-python.tar.gz", small_batches())
    convert(path, tmp_path / "data", max_side=32, raw_fraction=1.0, num_processes=1)
    data = open_data(tmp_path / "data")
    assert (data.train.num_images, data.val.num_images, data.num_classes) == (15, 3, 3)
