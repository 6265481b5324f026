"""Data sets that come as numbered shards: TFRecords, WebDataset's tars, Hugging Face's parquet.

    train-00000-of-01024, validation-00000-of-00128         TFRecords; .tfrecord may stand anywhere in the name
    imagenet-train-000000.tar, imagenet-val-000000.tar      WebDataset
    train-00000-of-00294.parquet, validation-...            parquet

All shards lie in one folder, in its folder data/, or in folders train/ and val/ or validation/ of it. Classes are
numbers; they get names where the shards hold them. Images come class by class and sorted by name, as from any source.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lbsgd.convert.archives import listed_once
from lbsgd.convert.by_class import ByClass, shortened
from lbsgd.convert.compressed import version
from lbsgd.convert.files import Files
from lbsgd.convert.folders import followed
from lbsgd.convert.parquet import copy_images
from lbsgd.convert.source_images import SPLITS, Images
from lbsgd.convert.tfrecords import list_tfrecords
from lbsgd.convert.webdataset import list_webdataset
from lbsgd.errors import DataError

KINDS = {  # what the names of shards look like
    "webdataset": re.compile(r"\d\.tar$"),
    "parquet": re.compile(r"\.parquet$"),
    "tfrecord": re.compile(r"-\d+-of-\d+$|\.tfrecords?(-\d+-of-\d+)?$"),
}
SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val"}
SPLIT = re.compile(r"(?:^|[-_.])(train|validation|val)(?=[-_.\d]|$)")
COUNTED = re.compile(r"(?P<number>\d+)-of-(?P<total>\d+)")
NUMBERED = re.compile(r"(?:^|[-_.]|train|val|validation)(?P<number>\d+)(?P<total>)(?:\.\w+)*$")
FIRST_YEAR = 1000  # a lowest number from here on, without a zero before it, is a year or a date, and counts nothing

Shards = dict[str, list[str]]  # by split: names in the folder


def find_shards(path: Path) -> tuple[str, Shards] | None:
    """Return the kind and the shards of each split in a folder; None without shards.

    Raises DataError if shards of several kinds are there, or if some are missing, such as all of one split.
    """
    found: dict[str, Shards] = {}
    for folder in ("", "data", *SPLIT_WORDS):
        for place in sorted((path / folder).iterdir()) if (path / folder).is_dir() else []:
            kind, split = _kind(place.name), _split(place.name) or SPLIT_WORDS.get(folder)
            if kind and split and stat.S_ISREG(followed(place).st_mode):
                found.setdefault(kind, {}).setdefault(split, []).append(str(place.relative_to(path)))
    whole = {kind: shards for kind, shards in found.items() if len(shards) == len(SPLITS)}
    if len(whole) > 1:
        raise DataError(f"{path} holds shards of {' and of '.join(sorted(whole))}; keep one kind in the folder")
    for kind, shards in (whole or found).items():
        if missing := [split for split in SPLITS if split not in shards]:
            names = next(iter(shards.values()))
            raise DataError(f"{path} holds {kind} shards such as {names[0]}, and none of {missing[0]}; fetch them")
        for names in shards.values():
            _refuse_missing(path, names)
        return kind, shards
    return None


def is_shard(path: Path) -> bool:
    """Return whether a file is a shard by its name alone; a tar may be many other things."""
    return path.is_file() and _kind(path.name) in ("tfrecord", "parquet") and bool(_split(path.name))


def _kind(name: str) -> str | None:
    if name.startswith("."):
        return None
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)


def _split(name: str) -> str | None:
    word = SPLIT.search(name)
    return SPLIT_WORDS[word[1]] if word else None


def _refuse_missing(path: Path, names: list[str]) -> None:
    """Raise DataError if names such as train-00003-of-01024 or imagenet-train-000002.tar tell of more shards.

    Without a total, nothing tells of shards after the last one.
    """
    series: dict[tuple[str, str], list[re.Match[str]]] = {}
    for name in map(os.path.basename, names):
        if match := COUNTED.search(name) or NUMBERED.search(name):
            series.setdefault((name[: match.start("number")], match["total"]), []).append(match)
    for (_, total), matches in sorted(series.items()):
        there, expected = {int(match["number"]) for match in matches}, _expected(matches, total)
        if num_missing := len(expected) - sum(number in expected for number in there):
            missing = islice((number for number in expected if number not in there), 3)
            lacking = shortened([_with_number(matches[0], number) for number in missing], num_missing)
            raise DataError(f"{path} lacks the shards {lacking} beside {names[0]}; fetch them")


def _expected(matches: list[re.Match[str]], total: str) -> range:
    """Return the numbers that a series has: up to its total, else up to the highest, from 0 or 1 on."""
    numbers = [int(match["number"]) for match in matches]
    padded = any(match["number"].startswith("0") for match in matches)
    if total or not padded and min(numbers) >= FIRST_YEAR:
        return range(int(total or 0))
    return range(min(1, *numbers), max(numbers) + 1)


def _with_number(match: re.Match[str], number: int) -> str:
    """Return the name of another shard of a series; a part of it where the rest may differ, too."""
    digits = f"{number:0{len(match['number'])}}"
    if match["total"]:
        return f"{digits}-of-{match['total']}"
    return match.string[: match.start("number")] + digits + match.string[match.end("number") :]


def images_of_shards(path: Path, kind: str, shards: Shards, scratch: Path) -> tuple[Images, Images]:
    """Return the training and the validation images. Raises DataError if a class has no images in one of them."""
    scratch.mkdir(parents=True, exist_ok=True)
    listed = {split: _listed(path, kind, split, shards[split], scratch) for split in SPLITS}
    numbers = sorted(set(listed["train"].column("labels").tolist()))
    names = listed["train"].class_names | listed["val"].class_names
    classes = [names.get(number, str(number)) for number in numbers]
    train, val = (
        _images(path, kind, split, shards[split], scratch, listed.pop(split), [str(number) for number in numbers])
        for split in SPLITS
    )
    return replace(train, classes=classes), replace(val, classes=classes)


def _listed(path: Path, kind: str, split: str, names: list[str], scratch: Path) -> Files:
    make: dict[str, Callable[[], Files]] = {
        "tfrecord": lambda: list_tfrecords(path, names),
        "webdataset": lambda: list_webdataset(path, names),
        "parquet": lambda: copy_images(path, names, _copy(path, split, names, scratch)),
    }
    listing = _copy(path, split, names, scratch).with_suffix(".listing")
    if kind == "parquet" and not listing.with_suffix(".images").exists():
        listing.unlink(missing_ok=True)
    return listed_once(listing, make[kind], f"reading {len(names):,} shards of {path}", [path / name for name in names])


def _copy(path: Path, split: str, names: list[str], scratch: Path) -> Path:
    """Return where the images of parquet go; its name changes with the shards."""
    digest = hashlib.sha256(
        "\n".join(version(path / name) for name in names).encode(errors="surrogateescape")
    ).hexdigest()
    return scratch / f"{split}.{digest:.16}.images"


def _images(
    path: Path, kind: str, split: str, shards: list[str], scratch: Path, files: Files, classes: list[str]
) -> Images:
    container = _copy(path, split, shards, scratch) if kind == "parquet" else path
    changed = max((path / shard).stat().st_mtime_ns for shard in shards)
    found = ByClass(files, container, str(path), place=f"{path}, {split}", stamp=changed)
    known = set(classes)
    for row, label in enumerate(files.column("labels")):
        if str(label) not in known:
            raise DataError(f"{path}: {files.names[row]} has class {label}, which has no training images")
        found.add(row, str(label))
    found.left_out = files.left_out
    return found.images(lambda name: name.rpartition("/")[2], classes, shards if kind != "parquet" else ())
