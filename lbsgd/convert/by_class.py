"""Files of a source -> its images, class by class."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lbsgd.convert.archives import MAX_IMAGE_BYTES, Member
from lbsgd.convert.source_images import Images
from lbsgd.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def class_folders(folder: Path) -> Images:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = {
        name: [
            plain_file(folder, os.path.relpath(os.path.join(place, file), folder))
            for place, _, names in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(SUFFIXES)
        ]
        for name in classes
    }
    return as_images(folder, _not_empty(files, str(folder)))


def plain_file(folder: Path, name: str) -> tuple[str, int, int, int]:
    info = os.stat(folder / name)
    if not stat.S_ISREG(info.st_mode):  # a pipe would be waited for
        raise DataError(f"{folder / name} is not a plain file; remove it")
    return name, 0, info.st_size, info.st_mtime_ns


def by_folder(found: Iterable[tuple[str, Member]], what: str) -> dict[str, list[Member]]:
    """Members by the first folder of their path, in the order in which `class_folders` would find them."""
    files: dict[str, list] = {}
    for name, member in found:
        if "/" in name and name.lower().endswith(SUFFIXES):
            files.setdefault(name.split("/")[0], []).append(member)
    for members in files.values():  # class by class, for the keys of a million take more memory than the members
        members.sort(key=lambda member: os.path.split(member.name))
    return _not_empty(dict(sorted(files.items())), what)


def by_label(found: list, container: Path, labels: dict[str, str], classes: list[str]) -> dict[str, list]:
    """Files without class folders, by class and sorted by name as in class folders."""
    files = {name: [] for name in classes}
    for entry in sorted(found, key=lambda entry: os.path.basename(entry[0])):
        if not entry[0].lower().endswith(SUFFIXES):
            continue
        label = labels.get(Path(entry[0]).stem)
        if label not in files:
            raise DataError(
                f"{container}: {entry[0]} "
                + (
                    f"has class {label}, which has no training images"
                    if label
                    else "has no label in the devkit or in LOC_val_solution.csv"
                )
                + "; use archives of one data set"
            )
        if files[label] and os.path.basename(files[label][-1][0]) == os.path.basename(entry[0]):
            raise _twice(str(container), entry[0])
        files[label].append(entry)
    return _not_empty(files, str(container))


def _not_empty(files: dict[str, list], what: str) -> dict[str, list]:
    empty = [name for name, found in files.items() if not found]
    if not files or empty:
        raise DataError(
            f"no images in {what}{' for class ' if empty else ''}{shortened(empty)}; expected one folder a "
            f"class, with images ({' '.join(SUFFIXES)}) in each"
        )
    return files


def as_images(container: Path, files: dict[str, list], stamp: int | None = None, origin: str = "") -> Images:
    """stamp is that of the tar; entries of a folder bring their own."""
    found = [entry for entries in files.values() for entry in entries]
    labels = np.repeat(np.arange(len(files)), [len(entries) for entries in files.values()])
    columns = [np.array([entry[column] for entry in found], np.int64) for column in (1, 2)]
    stamps = [entry[3] for entry in found] if stamp is None else np.full(len(found), stamp)
    names, origin = [entry[0] for entry in found], origin or str(container)
    if twice := next((name for name, following in zip(names, names[1:]) if name == following), None):
        raise _twice(origin, twice)
    sizes = columns[1]
    if sizes.max() > MAX_IMAGE_BYTES:
        raise DataError(
            f"{origin}/{names[sizes.argmax()]} is larger than {MAX_IMAGE_BYTES:,} bytes, and no image; remove it"
        )
    return Images(container, list(files), names, labels, *columns, np.array(stamps, np.int64), origin)


def _twice(archive: str, name: str) -> DataError:
    return DataError(
        f"{archive}: member {name!r} is there twice, and only one can be meant; use another archive, or unpack "
        f"it yourself and name the folder with --source"
    )


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
