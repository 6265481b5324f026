"""Read the labels of ImageNet's validation images, which come without class folders.

The official devkit numbers the classes in its own order. Line i of its ground truth is the ILSVRC2012_ID, 1 to 1,000,
of validation image i, and data/meta.mat maps that to a WordNet id. Kaggle's LOC_val_solution.csv gives the WordNet id
itself. Training labels follow another order: they are positions in the sorted WordNet ids (torchvision's order).
"""

from __future__ import annotations

import codecs
import csv
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.convert.archives import MAX_DEVKIT_BYTES, read_members
from lbsgd.disk import is_dir
from lbsgd.errors import DataError

META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


def devkit_labels(path: Path) -> dict[str, str]:
    """Return {name of a validation image without its suffix: its WordNet id}.

    path: the devkit's archive or folder. Raises DataError if it does not give the classes.
    """
    meta, truth = (
        [(path / name).read_bytes() for name in (META, GROUND_TRUTH)]
        if is_dir(path)
        else read_members(path, [META, GROUND_TRUTH])
    )
    try:
        wnids = synsets(meta)
        numbers = _decoded(truth).split()
        return {f"ILSVRC2012_val_{image:08}": wnids[int(number)] for image, number in enumerate(numbers, 1)}
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, StopIteration, zlib.error) as error:
        raise DataError(
            f"{path}: {META} and {GROUND_TRUTH} do not give the classes of the validation images ({error!r}); "
            f"fetch the devkit again"
        ) from error


def kaggle_labels(path: Path) -> dict[str, str]:
    """Return the same from LOC_val_solution.csv (ImageId,PredictionString). The string begins with the WordNet id."""
    try:
        rows = csv.DictReader(_decoded(path.read_bytes()).splitlines())
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not Kaggle's LOC_val_solution.csv with ImageId and PredictionString in each line ({error!r})"
        ) from error


def _decoded(text: bytes) -> str:
    """Decode text that may begin with a byte order mark, as Windows editors and spreadsheets write it."""
    is_utf16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return text.decode("utf-16" if is_utf16 else "utf-8-sig")


# --- MATLAB 5 files, as far as meta.mat needs them: a struct array of numbers and strings -----------------------------
# scipy.io.loadmat reads them too, but a damaged file can crash the process (SIGSEGV for one of 35 with random bytes
# changed, scipy 1.17), and nothing limits the uncompressed size.

STRUCT, CHARACTERS = 2, 4  # classes of arrays
COMPRESSED = 15  # the type of an element that holds a compressed element
NUMBERS = dict(enumerate("<i1 <u1 <i2 <u2 <i4 <u4 <f4".split(), 1)) | {9: "<f8", 12: "<i8", 13: "<u8", 16: "<u1"}


def synsets(data: bytes) -> dict[int, str]:
    """Return {ILSVRC2012_ID: WordNet id}. Raises ValueError, KeyError and similar for a damaged file."""
    if data[126:128] != b"IM":
        raise ValueError("not a MATLAB 5 file of little endian numbers")
    for _, element in _elements(data[128:]):
        records = _array(element)
        if isinstance(records, list):
            return {int(record["ILSVRC2012_ID"]): str(record["WNID"]) for record in records}
    raise ValueError("no struct array")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, content) of each element: an 8-byte tag, then the content padded to 8 bytes; or both in 8 bytes."""
    at = 0
    while at + 8 <= len(data):
        kind, num_bytes = struct.unpack_from("<II", data, at)
        if kind >> 16:
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
        else:
            content = data[at + 8 : at + 8 + num_bytes]
            at += 8 + num_bytes + (0 if kind == COMPRESSED else -num_bytes % 8)
            if kind == COMPRESSED:
                content = zlib.decompressobj().decompress(content, MAX_DEVKIT_BYTES)
                [(kind, content)] = _elements(content)
            yield kind, content


def _array(data: bytes) -> Any:
    """Return a list of dictionaries, a string, or the first number. None for other arrays, which are not needed."""
    elements = _elements(data)
    kind = next(elements)[1][0]
    next(elements), next(elements)  # the dimensions and the name
    if kind == STRUCT:
        [length] = np.frombuffer(next(elements)[1], "<i4")
        text = next(elements)[1]
        names = [text[at : at + length].split(b"\0")[0].decode() for at in range(0, len(text), length)]
        values = [_array(content) if content else None for _, content in elements]
        count = len(names)
        starts = range(0, len(values), count)
        return [dict(zip(names, values[at : at + count], strict=True)) for at in starts]
    number_type, content = next(elements, (0, b""))
    numbers = np.frombuffer(content, NUMBERS[number_type]).tolist() if number_type in NUMBERS else []
    if kind == CHARACTERS:
        return "".join(map(chr, numbers))
    return numbers[0] if numbers else None
