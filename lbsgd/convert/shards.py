"""Read data sets that come as numbered shards: TFRecords, WebDataset's tars, Hugging Face's parquet.

    train-00000-of-01024, validation-00000-of-00128         TFRecords; .tfrecord may stand anywhere in the name
    imagenet-train-000000.tar, imagenet-val-000000.tar      WebDataset
    train-00000-of-00294.parquet, validation-...            parquet

All shards lie in one folder, in its folder data/, or in its folders train/ and val/, valid/ or validation/. Classes
are numbers, with names if the shards hold names. Images come class by class and sorted by name, as from any source.
Images of the same name, such as 0000.jpg in every folder that was pushed to Hugging Face, come in the order of the
shards.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lbsgd.convert.archives import listed_once
from lbsgd.convert.by_class import ByClass
from lbsgd.convert.compressed import versions_digest
from lbsgd.convert.files import Files
from lbsgd.convert.folders import followed
from lbsgd.convert.parquet import copy_images
from lbsgd.convert.shard_numbers import refuse_copies, refuse_missing
from lbsgd.convert.source_images import SPLITS, Images
from lbsgd.convert.tfrecords import list_tfrecords
from lbsgd.convert.webdataset import list_webdataset
from lbsgd.disk import exists, is_dir, is_file
from lbsgd.errors import DataError

KINDS = {  # what the names of shards look like
    "webdataset": re.compile(r"\d\.tar$"),
    "parquet": re.compile(r"\.parquet$"),
    "tfrecord": re.compile(r"-\d+-of-\d+$|\.tfrecords?(-\d+-of-\d+)?$"),
}
PACKED = re.compile(r"(\d\.tar|\.parquet|-of-\d+|\.tfrecords?)\.(gz|bz2|xz|zst)$|\d\.tgz$")
COUNTED_AS = {"parquet": "row", "tfrecord": "record"}  # what an image is called in shards whose names may repeat
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
FOLDERS = ("", "data", *SPLIT_WORDS)  # that may hold shards
SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val)(?=[-_.\d]|$)")
TEST = re.compile(r"(?:^|[-_./])test(?=[-_./\d]|$)")  # in a path: no split of ours
CLASS_TAR = re.compile(r"(?:^|/)n\d{8}\.tar$")  # from ImageNet's own archive, not a shard
SYNSET = re.compile(r"_n\d{8}(?=\.\w+$)")  # Hugging Face appends it to ImageNet's own names

NamesBySplit = dict[str, list[str]]


@dataclass(frozen=True)
class Shards:
    """A data set's shards, all of one kind of KINDS, by their names in a folder."""

    path: Path
    kind: str
    names: NamesBySplit

    def copy_path(self, split: str, scratch: Path) -> Path:
        """Return the path in a scratch folder for the images of parquet. Its name changes with the shards."""
        digest = versions_digest(self.path / name for name in self.names[split])
        return scratch / f"{split}.{digest:.16}.images"


def find_shards(path: Path) -> Shards | None:
    """Return the shards of both splits in a folder, or None without shards.

    Raises DataError if there are several kinds of shards, if shards repeat, if those of a split's folder are
    compressed, or if shards are missing, such as all of one split.
    """
    found: dict[str, NamesBySplit] = {}
    for kind, split, name in _shards_in(path):
        found.setdefault(kind, {}).setdefault(split, []).append(name)
    whole = {kind: shards for kind, shards in found.items() if len(shards) == len(SPLITS)}
    if len(whole) > 1:
        raise DataError(f"{path} holds shards of {' and of '.join(sorted(whole))}; keep one kind in the folder")
    for kind, shards in (whole or found).items():
        _refuse_class_tars(path, shards)
        if missing := [split for split in SPLITS if split not in shards]:
            such_as = f"{kind} shards such as {next(iter(shards.values()))[0]}"
            instead = _instead_of_val(path) if missing == ["val"] else ""
            raise DataError(f"{path} holds {such_as}, and none of {missing[0]}; fetch them{instead}")
        for names in shards.values():
            _refuse_other_words(path, names)
            refuse_copies(path, names)
            refuse_missing(path, names)
        return Shards(path, kind, shards)
    if packed := [name for name in packed_shards(path) if os.path.dirname(name) in SPLIT_WORDS]:
        raise DataError(f"{path} holds compressed shards such as {packed[0]}; uncompress all of them")
    return None


def packed_shards(path: Path) -> list[str]:
    """Return the names of a folder's compressed shards."""
    return [str(place.relative_to(path)) for place, split in _places(path) if split and PACKED.search(place.name)]


def shards_beside(path: Path, split: str) -> list[Path]:
    """Return a split's shards in a folder or in its data/, but not in its train/ or val/."""
    return [path / name for _, of, name in _shards_in(path, ("", "data")) if of == split]


def _instead_of_val(path: Path) -> str:
    """Return a hint to rename the shards of a test set, empty if there are none."""
    names = (str(place.relative_to(path)) for place, split in _places(path, ("", "data", "test")) if not split)
    tests = [name for name in names if _kind(os.path.basename(name)) and TEST.search(name)]
    return f", or rename those of test, such as {tests[0]}, to val" if tests else ""


def _shards_in(path: Path, folders: Sequence[str] = FOLDERS) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, split, name) of each shard, once per split even if links such as val -> validation repeat it."""
    seen = set()
    for place, split in _places(path, folders):
        kind = _kind(place.name)
        if kind and split and stat.S_ISREG((info := followed(place)).st_mode):
            file = (split, info.st_dev, info.st_ino)
            if file not in seen:
                yield kind, split, str(place.relative_to(path))
            seen.add(file)


def _places(path: Path, folders: Sequence[str] = FOLDERS) -> Iterator[tuple[Path, str | None]]:
    """Yield all that lies in some folders, with the split that its name tells, or else its folder's."""
    for folder in folders:
        for place in sorted((path / folder).iterdir()) if is_dir(path / folder) else []:
            yield place, _split(place.name) or SPLIT_WORDS.get(folder)


def _refuse_other_words(path: Path, names: Sequence[str]) -> None:
    """Raise DataError if a split has shards under several words, such as val and valid, of which one may be a copy."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_word(os.path.basename(name)) or os.path.dirname(name), name)
    if len(first) > 1:
        raise DataError(f"{path} holds shards such as {' and '.join(first.values())}; keep those of one name")


def _refuse_class_tars(path: Path, shards: NamesBySplit) -> None:
    """Raise DataError if ImageNet's archive of training images was unpacked, but not the tars in it."""
    if tars := [path / name for names in shards.values() for name in names if CLASS_TAR.search(name)]:
        unpack = "for tar in n*.tar; do mkdir -p ${tar%.tar} && tar xf $tar -C ${tar%.tar}; done"
        raise DataError(
            f"{tars[0]} holds the images of one class; unpack each class's tar into a folder of its name: "
            f"cd {tars[0].parent} && {unpack}"
        )


def is_shard(path: Path) -> bool:
    """Return whether a file is a shard by its name alone. A tar is not, because it may be many other things."""
    return is_file(path) and _kind(path.name) in ("tfrecord", "parquet") and bool(_split(path.name))


def _kind(name: str) -> str | None:
    if name.startswith("."):
        return None
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)


def _split(name: str) -> str | None:
    return SPLIT_WORDS.get(_word(name) or "")


def _word(name: str) -> str | None:
    """Return the word in a shard's name that tells its split."""
    found = SPLIT.search(name)
    return found[1] if found else None


def images_of_shards(shards: Shards, scratch: Path) -> tuple[Images, Images]:
    """Return the training and the validation images.

    Raises DataError if a class has no training images or has two names.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    listed = {split: _listed(shards, split, scratch) for split in SPLITS}
    numbers = sorted(set(listed["train"].column("labels").tolist()))
    names = _class_names(shards.path, listed["train"], listed["val"])
    classes = [names.get(number, str(number)) for number in numbers]
    known = [str(number) for number in numbers]
    train, val = (_images(shards, split, scratch, listed.pop(split), known) for split in SPLITS)
    return replace(train, classes=classes), replace(val, classes=classes)


def _class_names(path: Path, train: Files, val: Files) -> dict[int, str]:
    names = dict(train.class_names)
    for number, name in val.class_names.items():
        if (other := names.setdefault(number, name)) != name:
            raise DataError(
                f"{path}: label {number} is {other} in the training shards and {name} in the validation shards; use "
                f"shards of one data set"
            )
    return names


def _listed(shards: Shards, split: str, scratch: Path) -> Files:
    path, names, copy = shards.path, shards.names[split], shards.copy_path(split, scratch)

    def make() -> Files:
        if shards.kind == "parquet":
            return copy_images(path, names, copy)
        return list_tfrecords(path, names) if shards.kind == "tfrecord" else list_webdataset(path, names)

    listing = copy.with_suffix(".listing")
    if shards.kind == "parquet" and not exists(copy):
        listing.unlink(missing_ok=True)
    return listed_once(listing, make, f"reading {len(names):,} shards of {path}", [path / name for name in names])


def _images(shards: Shards, split: str, scratch: Path, files: Files, classes: list[str]) -> Images:
    path, names, kind = shards.path, shards.names[split], shards.kind
    container = shards.copy_path(split, scratch) if kind == "parquet" else path
    changed = max((path / name).stat().st_mtime_ns for name in names)
    found = ByClass(files, container, str(path), place=f"{path}, {split}", stamp=changed)
    known = set(classes)
    for row, label in enumerate(files.column("labels")):
        if str(label) not in known:
            place = path / names[files.member(row).shard]
            raise DataError(f"{place}: {files.names[row]} has class {label}, which has no training images")
        found.add(row, str(label))
    found.left_out = files.left_out
    images = found.images(_by_own_name if kind == "parquet" else _by_base_name, classes, may_repeat=True)
    images = replace(images, counted_as=COUNTED_AS.get(kind, ""))
    return replace(images, copied_from=names) if kind == "parquet" else replace(images, shard_names=names)


def _by_base_name(name: str, shard: int) -> tuple[str, int, str]:
    return name.rpartition("/")[2], shard, name


def _by_own_name(name: str, shard: int) -> tuple[str, int, str]:
    """Sort n01440764_18_n01440764.JPEG as n01440764_18.JPEG, in the order of ImageNet's own files."""
    return SYNSET.sub("", name), shard, name
