"""Read CIFAR-10 as its authors publish it: cifar-10-python.tar.gz, pickled arrays of 32x32 pixels.

Its images become lossless PNG files in a tar of train/<class>/* and val/<class>/*, a source like any other.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.convert.archives import MAX_HEADER_BYTES
from lbsgd.convert.compressed import decompressor, uncompressed
from lbsgd.disk import appearing, exists
from lbsgd.errors import DataError, one_line

FOLDER = "cifar-10-batches-py"
BATCHES = {**{f"data_batch_{number}": "train" for number in range(1, 6)}, "test_batch": "val"}
SIDE = 32
DAMAGED = (lzma.LZMAError, zlib.error)  # raised by decompression, as are OSError and EOFError


def is_cifar10(path: Path) -> bool:
    """Return whether a file is CIFAR-10's archive, judged by the name of its first member."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_start_of(path)), mode="r:") as archive:
            first = archive.next()
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return False  # the reader of tars says what is wrong with the file
    return first is not None and first.name.split("/")[0] == FOLDER


def _start_of(path: Path) -> bytes:
    """Return the readable first bytes of a file, uncompressed. They are limited, because a header may claim 3 GB."""
    start = io.BytesIO()
    with (decompressor(path) or open)(path, "rb") as file, contextlib.suppress(OSError, EOFError, *DAMAGED):
        while start.tell() < MAX_HEADER_BYTES and (data := file.read(tarfile.BLOCKSIZE)):
            start.write(data)
    return start.getvalue()


def as_tar(path: Path, scratch: Path) -> Path:
    """Write the archive's images as a tar into `scratch`, with the same bytes each time. Keep an existing tar.

    Raises DataError if the archive is incomplete, or not CIFAR-10 despite its name.
    """
    target = scratch / "cifar10.tar"
    if exists(target) and target.stat().st_mtime_ns == path.stat().st_mtime_ns:
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    content = uncompressed(path, scratch)  # whole, because gzip's checksum lies at its end
    try:
        with appearing(target) as partial:
            _write_images(content, partial)
            os.utime(partial, ns=(path.stat().st_mtime_ns,) * 2)
    except (tarfile.TarError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not the whole cifar-10-python.tar.gz ({error}); download it again") from error
    finally:
        if content != path:
            content.unlink()
    return target


def _write_images(content: Path, target: Path) -> None:
    with tarfile.open(content) as archive, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in images_of(archive):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def images_of(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yield (name, PNG) of every image, such as train/cat/01234.png. Numbers follow the batches within each split."""
    names = [name.decode() for name in unpickled(archive, "batches.meta")[b"label_names"]]
    numbers = {"train": 0, "val": 0}
    for batch, split in BATCHES.items():
        content = unpickled(archive, batch)
        pixels = np.frombuffer(bytes_of(content[b"data"]), np.uint8).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        if len(pixels) != len(content[b"labels"]):
            raise ValueError(f"{batch} has {len(pixels)} images and {len(content[b'labels'])} labels")
        for image, label in zip(pixels, content[b"labels"], strict=True):
            yield f"{split}/{names[label]}/{numbers[split]:05}.png", png(image)
            numbers[split] += 1


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG", compress_level=1)
    return data.getvalue()


def unpickled(archive: tarfile.TarFile, name: str) -> dict[bytes, Any]:
    """Return the content of one of the archive's pickles. Raises ValueError if it is damaged, KeyError if missing."""
    member = archive.getmember(f"{FOLDER}/{name}")
    file = archive.extractfile(member) if member.isreg() else None  # a link may lead to itself
    if file is None:
        raise ValueError(f"{name} is no file")
    try:
        return ArraysOnly(file, encoding="bytes").load()
    except OSError:  # of the disk
        raise
    except Exception as error:  # pickle raises nearly anything for damage
        raise ValueError(f"{name}: {one_line(error)}") from error


class Built:
    """Keeps the state from which NumPy would build an array, because a damaged state may crash NumPy."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        """Ignore the arguments, because the state says the same."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def bytes_of(array: Any) -> bytes:
    """Return the bytes of an array of bytes. Raises ValueError for anything else."""
    match getattr(array, "state", None):
        case (_, (images, num_bytes), _, False, bytes(content)) if images * num_bytes == len(content):
            return content
    raise ValueError("no array of bytes, a row per image")


class ArraysOnly(pickle.Unpickler):
    """Keeps the state of each array and builds nothing else, because a pickle may run any code."""

    HOMES = {"_reconstruct": "numpy.core.multiarray", "ndarray": "numpy", "dtype": "numpy", "encode": "_codecs"}

    def find_class(self, module: str, name: str) -> Any:
        home = self.HOMES.get(name)
        if home is None or module.replace("numpy._core", "numpy.core") != home:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return latin1 if name == "encode" else Built  # Python 3 writes bytes for Python 2 in latin1


def latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it would encode text as {encoding}")
    return text.encode("latin1")
