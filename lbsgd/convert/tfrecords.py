"""Read ImageNet from TFRecords, the shards of build_imagenet_data.py: train-00000-of-01024, validation-00000-of-00128.

    shard      records, one after the other
    record     length, uint64 | its CRC | data | their CRC          CRC-32C, rotated and shifted by a constant
    data       a tf.train.Example in protobuf: a map from names to lists of bytes, floats or whole numbers

When the source is listed, every record is read once and both CRCs are compared, so a damaged shard is refused before
the conversion begins. The images are then read in place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lbsgd.convert.archives import MAX_IMAGE_BYTES
from lbsgd.convert.files import Files
from lbsgd.errors import DataError

FRAME = struct.Struct("<QI")
CRC = struct.Struct("<I")
MAX_RECORD_BYTES = MAX_IMAGE_BYTES + (1 << 20)
ENCODED = ("image/encoded", "image")  # build_imagenet_data.py's name, and that of TensorFlow Datasets
LABEL = ("image/class/label", "label")
SYNSET = ("image/class/synset",)
NAME = ("image/filename", "file_name")
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf's wire types

Span = tuple[int, int]  # from the first byte to the one after the last


def list_tfrecords(folder: Path, shard_names: list[str]) -> Files:
    """Return the shards' images. Their class_names are WordNet ids if the records hold them.

    Raises DataError for a record that is damaged or is not an Example of an image and its label.
    """
    files = Files("offsets", "shards", "labels")
    for shard, name in enumerate(shard_names):
        path = folder / name
        with open(path, "rb") as file:
            for number, (start, data) in enumerate(_records(file, path, path.stat().st_size)):
                try:
                    _add_example(files, shard, start, data, f"{number:07}")
                except (ValueError, IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
                    raise DataError(
                        f"{path}: record {number} is no tf.train.Example with {ENCODED[0]} and {LABEL[0]} ({error})"
                    ) from error
    return files


def _records(file: BinaryIO, path: Path, num_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (place of the first byte, data) of each record. A cut exactly between two records goes unnoticed."""
    masked_crc, at, number = _masked_crc(), 0, 0
    if not num_bytes:
        raise DataError(f"{path} is empty; fetch it again")
    while at < num_bytes:
        header = file.read(FRAME.size)
        length, crc = FRAME.unpack(header) if len(header) == FRAME.size else (0, -1)
        if crc < 0 or masked_crc(header[:8]) != crc:
            what = "is no TFRecord file" if number == 0 else f"is damaged: the length of record {number} is wrong"
            raise DataError(f"{path} {what}; fetch it again (a compressed one must be uncompressed first)")
        if length > MAX_RECORD_BYTES:
            raise DataError(f"{path}: record {number} is larger than {MAX_RECORD_BYTES:,} bytes, and no image")
        data, tail = file.read(length), file.read(CRC.size)
        if len(tail) < CRC.size:
            raise DataError(f"{path} is truncated: it ends within record {number}; fetch it again")
        if masked_crc(data) != CRC.unpack(tail)[0]:
            raise DataError(f"{path} is damaged: record {number} has another checksum than it says; fetch it again")
        yield at + FRAME.size, data
        at, number = at + FRAME.size + length + CRC.size, number + 1


def _masked_crc() -> Callable[[bytes], int]:
    try:
        from crc32c import crc32c
    except ImportError as error:
        raise DataError(
            f"TFRecords cannot be read without the package crc32c ({error}); run: pip install crc32c"
        ) from error

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    return masked


def _add_example(files: Files, shard: int, start: int, data: bytes, number: str) -> None:
    features = _features(data)
    encoded = _first_bytes(data, _feature(features, ENCODED))
    label = _first_number(data, _feature(features, LABEL))
    name = _text(data, features, NAME) or number
    synset = _text(data, features, SYNSET)
    if files.class_names.setdefault(label, synset or str(label)) != (synset or str(label)):
        raise ValueError(f"label {label} is {synset}, and {files.class_names[label]} in another record")
    place = dict(offsets=start + encoded[0], sizes=encoded[1] - encoded[0], shards=shard, labels=label)
    files.add(name.rpartition("/")[2], **place)


# --- protobuf, as far as an Example needs it --------------------------------------------------------------------------


def _features(data: bytes) -> dict[str, Span]:
    """Return the places of an Example's lists by name: Example.features, Features.feature, map entries."""
    found = {}
    for features in _messages(data, (0, len(data)), 1):
        for entry in _messages(data, features, 1):
            [name], [value] = (list(_messages(data, entry, number)) for number in (1, 2))
            found[data[slice(*name)].decode()] = value
    return found


def _feature(features: dict[str, Span], names: tuple[str, ...]) -> Span:
    found = next((features[name] for name in names if name in features), None)
    if found is None:
        raise ValueError(f"it has no {names[0]}, but {', '.join(sorted(features)) or 'nothing'}")
    return found


def _text(data: bytes, features: dict[str, Span], names: tuple[str, ...]) -> str:
    """Return the first text of a list, empty if the Example lacks the list or the list is empty."""
    if not any(name in features for name in names):
        return ""
    lists = _messages(data, _feature(features, names), 1)
    values = [data[slice(*value)] for each in lists for value in _messages(data, each, 1)]
    return values[0].decode() if values else ""


def _first_bytes(data: bytes, feature: Span) -> Span:
    values = [value for each in _messages(data, feature, 1) for value in _messages(data, each, 1)]
    if len(values) != 1:
        raise ValueError(f"{ENCODED[0]} has {len(values)} values")
    return values[0]


def _first_number(data: bytes, feature: Span) -> int:
    """Return the single number of an Int64List, packed or not."""
    numbers: list[int] = []
    for each in _messages(data, feature, 3):
        for _, kind, (start, end) in _fields(data, each):
            while kind in (VARINT, LENGTH) and start < end:
                value, start = _varint(data, start)
                numbers.append(value)
    if len(numbers) != 1 or numbers[0] >= 1 << 31:  # a negative number n is written as 2^64 + n
        raise ValueError(f"{LABEL[0]} is {numbers}, not one number from 0 on")
    return numbers[0]


def _messages(data: bytes, span: Span, number: int) -> Iterator[Span]:
    """Yield the places of a message's fields that have this number and a length."""
    return (place for field, kind, place in _fields(data, span) if field == number and kind == LENGTH)


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int, Span]]:
    """Yield (number, wire type, place of the content) of each field of a message."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at)
        kind, length = tag & 7, 0
        if kind == VARINT:
            length = _varint(data, at)[1] - at
        elif kind == LENGTH:
            length, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > end:
            raise ValueError(f"a field at byte {at} reaches beyond its message")
        yield tag >> 3, kind, (at, at + length)
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and the place after it. Each byte holds seven bits of the number, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
