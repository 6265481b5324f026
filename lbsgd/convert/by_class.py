"""Files of a source -> its images, class by class and sorted by name, with the labels that folders or tables give."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lbsgd.convert.archives import MAX_IMAGE_BYTES, Member
from lbsgd.convert.source_images import Images
from lbsgd.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class PlainFile(NamedTuple):
    """A file in a folder: the columns of a Member, and its own stamp."""

    name: str  # in the folder
    offset: int  # 0
    num_bytes: int
    stamp: int  # time of modification


File = Member | PlainFile
Classes = dict[str, list[File]]  # the files of each class


def class_folders(folder: Path) -> Images:
    """Return the images of a folder that holds one folder per class."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files: Classes = {name: [plain_file(folder, path) for path in _images_below(folder, name)] for name in classes}
    return as_images(folder, _not_empty(files, str(folder)))


def _images_below(folder: Path, class_name: str) -> Iterable[str]:
    """Yield the paths, from the folder on, of the images of one class at any depth."""
    for place, _, names in sorted(os.walk(folder / class_name, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                yield os.path.relpath(os.path.join(place, name), folder)


def plain_file(folder: Path, name: str) -> PlainFile:
    """Raises DataError for anything else, such as a pipe, which would be waited for."""
    info = os.stat(folder / name)
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{folder / name} is not a plain file; remove it")
    return PlainFile(name, 0, info.st_size, info.st_mtime_ns)


def by_folder(found: Iterable[tuple[str, Member]], container: str) -> Classes:
    """Return the members by the first folder of their path, in the order in which `class_folders` would find them.

    found: (path from the split's folder on, member) of each.
    """
    files: Classes = {}
    for name, member in found:
        if "/" in name and name.lower().endswith(SUFFIXES):
            files.setdefault(name.split("/")[0], []).append(member)
    for members in files.values():  # class by class, because the keys of a million take more memory than the members
        members.sort(key=lambda member: os.path.split(member.name))
    return _not_empty(dict(sorted(files.items())), container)


def by_label(found: Iterable[File], container: Path, labels: Mapping[str, str], classes: list[str]) -> Classes:
    """Return files that lie in no class folders by class, sorted by name as in class folders.

    labels: the class of each image, by its name without suffix.
    """
    files: Classes = {name: [] for name in classes}
    for file in sorted(found, key=_base_name):
        if not file.name.lower().endswith(SUFFIXES):
            continue
        label = labels.get(Path(file.name).stem)
        if label not in files:
            wrong = (
                f"has class {label}, which has no training images"
                if label
                else "has no label in the devkit or in LOC_val_solution.csv"
            )
            raise DataError(f"{container}: {file.name} {wrong}; use archives of one data set")
        if files[label] and _base_name(files[label][-1]) == _base_name(file):
            raise _duplicate(str(container), file.name)
        files[label].append(file)
    return _not_empty(files, str(container))


def _base_name(file: File) -> str:
    return os.path.basename(file.name)


def as_images(container: Path, files: Classes, stamp: int | None = None, origin: str | None = None) -> Images:
    """Return the Images of files by class.

    stamp: of a tar, for all its members. origin: the container as a person would call it, if that is not its path.
    Raises DataError for a name that is there twice and for a file that is too large to be an image.
    """
    found = [file for members in files.values() for file in members]
    names, origin = [file.name for file in found], origin or str(container)
    if duplicate := next((name for name, following in zip(names, names[1:], strict=False) if name == following), None):
        raise _duplicate(origin, duplicate)
    sizes = np.array([file.num_bytes for file in found], np.int64)
    if sizes.max() > MAX_IMAGE_BYTES:
        raise DataError(
            f"{origin}/{names[sizes.argmax()]} is larger than {MAX_IMAGE_BYTES:,} bytes, and no image; remove it"
        )
    return Images(
        container,
        classes=list(files),
        names=names,
        labels=np.repeat(np.arange(len(files)), [len(members) for members in files.values()]),
        offsets=np.array([file.offset for file in found], np.int64),
        sizes=sizes,
        stamps=np.array([file.stamp if isinstance(file, PlainFile) else stamp for file in found], np.int64),
        origin=origin,
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def _not_empty(files: Classes, container: str) -> Classes:
    empty = [name for name, found in files.items() if not found]
    if not files or empty:
        raise DataError(
            f"no images in {container}{' for class ' if empty else ''}{shortened(empty)}; expected one folder per "
            f"class, with images ({' '.join(SUFFIXES)}) in each"
        )
    return files


def _duplicate(archive: str, name: str) -> DataError:
    return DataError(
        f"{archive}: member {name!r} is there twice, and only one can be meant; use another archive, or unpack "
        f"it yourself and name the folder with --source"
    )


def shortened(names: list[str]) -> str:
    """`a, b, c and 2 more`."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
