"""What is found where: ImageNet, or any data set of a folder for each class, as people hold it, read in place.

    train/<class>/*, val/<class>/*                       folders, or a tar of them, also compressed
    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar     the official archives, beside the devkit's ..._devkit_t12.tar.gz
    ILSVRC/Data/CLS-LOC/train/<class>/*, val/*           Kaggle's folders, with LOC_val_solution.csv above them

The parts may be mixed, such as training folders and a validation archive. Images come class by class and sorted by name
(torchvision's order), whichever way they are held.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.convert.archives import MAX_IMAGE_BYTES, Member, listing, uncompressed
from lbsgd.convert.imagenet_labels import devkit_labels, kaggle_labels
from lbsgd.data.beton import CONVERT
from lbsgd.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
SPLITS = ("train", "val")
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
KAGGLE, KAGGLE_LABELS = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, in the order of torchvision's ImageFolder: class by class, sorted by name."""

    container: Path  # a folder, or a tar
    classes: list[str]
    names: list[str]  # within the container
    labels: np.ndarray  # int64
    offsets: np.ndarray  # int64, of the first byte in the tar; 0 in a folder
    sizes: np.ndarray  # int64, bytes
    stamps: np.ndarray  # int64, when each was modified
    origin: str  # what a person would call the container

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """What a person would call image `index`."""
        return f"{self.origin}/{self.names[index]}"

    def listing(self, *columns: np.ndarray) -> str:
        """A digest of the classes, names, labels and sizes, and of further columns."""
        digest = hashlib.sha256("\n".join([*self.classes, "", *self.names]).encode(errors="surrogateescape"))
        for column in (self.labels, self.sizes, *columns):
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    path: Path
    train: Images
    val: Images


def find_source(path: Path, scratch: Path, data_dir: Path) -> Source:
    """Finds the images. scratch is a folder for what a compressed archive holds. Raises DataError."""
    if path.name in (TRAIN_TAR, VAL_TAR, *DEVKITS):
        path = path.parent
    try:
        train, val = _from_archive(path, scratch, data_dir) if path.is_file() else _from_folder(path, scratch, data_dir)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(
            f"{val.container} has other classes than {train.container}: {_some(differing)} in one of them "
            f"only; both must have the same"
        )
    return Source(path, train, val)


def _from_archive(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    """A tar of train/<class>/* and val/<class>/*, whatever stands before these."""
    tar = uncompressed(path, scratch)
    found = listing(tar, scratch)
    splits = [_below(found, name) for name in SPLITS]
    missing = [f"{name}/" for name, below in zip(SPLITS, splits) if not below]
    if missing:
        raise _nothing(path, missing, data_dir)
    stamp = path.stat().st_mtime_ns
    return tuple(
        _images(tar, _by_folder(below, f"{path}, {name}"), stamp, str(path)) for name, below in zip(SPLITS, splits)
    )


def _below(found: list[Member], folder: str) -> list[tuple[str, Member]]:
    """(path below `folder`, member) of all members for which it is the first or the second folder."""
    parts = ((member.name.split("/"), member) for member in found)
    return [("/".join(path[path.index(folder) + 1 :]), member) for path, member in parts if folder in path[:2]]


def _from_folder(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    base = next((path / inner for inner in (KAGGLE, "Data/CLS-LOC") if (path / inner).is_dir()), path)
    train = _train_of(base, scratch)
    val = train and _val_of(base, path, train.classes, scratch, data_dir)
    if not (train and val):
        missing = [] if train else [f"train/ and no {TRAIN_TAR}"]
        missing += [] if (base / "val").is_dir() or (base / VAL_TAR).is_file() else [f"val/ and no {VAL_TAR}"]
        raise _nothing(path, missing, data_dir)
    return train, val


def _train_of(base: Path, scratch: Path) -> Images | None:
    if (base / "train").is_dir():
        return _class_folders(base / "train")
    tar = base / TRAIN_TAR
    if not tar.is_file():
        return None
    found = listing(tar, scratch)
    return _images(tar, _by_folder(((member.name, member) for member in found), str(tar)), tar.stat().st_mtime_ns)


def _val_of(base: Path, path: Path, classes: list[str], scratch: Path, data_dir: Path) -> Images | None:
    """Validation images by their class folders or, where they have none, with labels from the devkit or Kaggle's table."""
    folder, tar = base / "val", base / VAL_TAR
    if folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder)):
        return _class_folders(folder)
    if folder.is_dir():
        found = [_member(folder, name) for name in sorted(os.listdir(folder))]
        return _images(folder, _by_label(found, folder, _labels_for(folder, base, path, data_dir), classes))
    if tar.is_file():
        labels = _labels_for(tar, base, path, data_dir)
        return _images(tar, _by_label(listing(tar, scratch), tar, labels, classes), tar.stat().st_mtime_ns)
    return None


def _labels_for(images: Path, base: Path, path: Path, data_dir: Path) -> dict[str, str]:
    above = [base.absolute().parents[2]] if base.name == "CLS-LOC" else []
    for folder in (base, path, *above):
        if (folder / KAGGLE_LABELS).is_file():
            return kaggle_labels(folder / KAGGLE_LABELS)
        for name in DEVKITS:
            if (folder / name).exists():
                return devkit_labels(folder / name)
    raise DataError(
        f"{images} holds validation images without labels: neither {DEVKITS[0]} nor {KAGGLE_LABELS} found in "
        f"{path}; put one of them there and run: {CONVERT.format(data_dir)}"
    )


# --- from files to images ---------------------------------------------------------------------------------------------


def _class_folders(folder: Path) -> Images:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = {
        name: [
            _member(folder, os.path.relpath(os.path.join(place, file), folder))
            for place, _, names in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(SUFFIXES)
        ]
        for name in classes
    }
    return _images(folder, _not_empty(files, str(folder)))


def _member(folder: Path, name: str) -> tuple[str, int, int, int]:
    info = os.stat(folder / name)
    if not stat.S_ISREG(info.st_mode):  # a pipe would be waited for
        raise DataError(f"{folder / name} is not a plain file; remove it")
    return name, 0, info.st_size, info.st_mtime_ns


def _by_folder(found: Iterable[tuple[str, Member]], what: str) -> dict[str, list[Member]]:
    """Members by the first folder of their path, in the order in which `_class_folders` would find them."""
    files: dict[str, list] = {}
    for name, member in found:
        if "/" in name and name.lower().endswith(SUFFIXES):
            files.setdefault(name.split("/")[0], []).append(member)
    for members in files.values():  # class by class, for the keys of a million take more memory than the members
        members.sort(key=lambda member: os.path.split(member.name))
    return _not_empty(dict(sorted(files.items())), what)


def _by_label(found: list, container: Path, labels: dict[str, str], classes: list[str]) -> dict[str, list]:
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
            f"no images in {what}{' for class ' if empty else ''}{_some(empty)}; expected one folder a "
            f"class, with images ({' '.join(SUFFIXES)}) in each"
        )
    return files


def _images(container: Path, files: dict[str, list], stamp: int | None = None, origin: str = "") -> Images:
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


def _nothing(path: Path, missing: list[str], data_dir: Path) -> DataError:
    return DataError(
        f"no images in {path}: no {', no '.join(missing)} found; expected train/<class>/* and val/<class>/* "
        f"there, or ImageNet's archives or Kaggle's folders; name the source with: {CONVERT.format(data_dir)}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


class Files:
    """Reads the bytes of images; one for each process."""

    def __init__(self, container: Path) -> None:
        self.container = str(container)
        self.tar = os.open(container, os.O_RDONLY) if container.is_file() else None

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Raises DataError where the file is not what it was when the source was listed."""
        path = self.container if self.tar is not None else f"{self.container}/{name}"
        try:
            if self.tar is not None:
                data = os.pread(self.tar, num_bytes, offset)
            else:
                with open(path, "rb", buffering=0) as file:
                    data = file.read()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != num_bytes:
            what = path if self.tar is None else f"{path}: {name}"
            raise DataError(
                f"{what} has changed while it was read: {len(data):,} bytes, not {num_bytes:,}; run the same "
                f"command again"
            )
        return data
