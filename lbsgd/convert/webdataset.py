"""Read WebDataset shards: tars in which KEY.jpg is an image and KEY.cls its class, a whole number from 0 on."""

from __future__ import annotations

import os
from pathlib import Path

from lbsgd.convert.archives import members
from lbsgd.convert.files import Files, Member
from lbsgd.convert.left_out import MISSING_IMAGE, OTHER_FILE, path_reason
from lbsgd.errors import DataError

CLASS = ".cls"
MAX_CLASS_DIGITS = 9


def is_of_webdataset(members: Files) -> bool:
    """Return whether a tar's members are those of a shard."""
    return any(name.endswith(CLASS) for name in members.names)


def list_webdataset(folder: Path, shard_names: list[str]) -> Files:
    """Return the shards' images. Raises DataError for a damaged shard or an image without a class."""
    files = Files("offsets", "shards", "labels")
    for shard, name in enumerate(shard_names):
        _add_shard(files, shard, folder / name)
    return files


def _add_shard(files: Files, shard: int, path: Path) -> None:
    images: dict[str, Member] = {}
    classes: dict[str, Member] = {}
    passed: set[str] = set()  # samples whose image is left out
    for member in members(path):
        folder, slash, base = member.name.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        if member.name == key + CLASS:
            classes[key] = member
        elif reason := path_reason(member.name):
            files.left_out.add(*reason)
            if reason[0] != OTHER_FILE:  # an image of another kind, or in a hidden folder
                passed.add(key)
        elif key in images:
            raise DataError(f"{path}: {images[key].name} and {member.name} are two images of one sample, {key!r}")
        else:
            images[key] = member
    for key in classes.keys() - images.keys() - passed:
        files.left_out.add(MISSING_IMAGE, f"{key} in {path.name}")
    with open(path, "rb") as tar:
        for key, member in images.items():
            if key not in classes:
                raise DataError(f"{path}: {member.name} has no {key}{CLASS}, which would say its class")
            text = os.pread(tar.fileno(), min(64, classes[key].num_bytes), classes[key].offset)
            label = _label(text, path, classes[key])
            files.add(member.name, offsets=member.offset, sizes=member.num_bytes, shards=shard, labels=label)


def _label(text: bytes, path: Path, member: Member) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > MAX_CLASS_DIGITS:
        raise DataError(f"{path}: {member.name} holds {text[:20]!r}, and no number of a class")
    return int(digits)
