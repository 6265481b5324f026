"""Finds ImageNet, or any data set with one folder per class, in the forms people hold it, to be read in place.

    train/<class>/*, val/<class>/*                      folders, or a tar of them, compressed or not
    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar    the official archives, beside the devkit's
    ILSVRC/Data/CLS-LOC/train/<class>/*, val/*          Kaggle's folders, with LOC_val_solution.csv above them
    cifar-10-python.tar.gz                              CIFAR-10 as its authors publish it

The parts may be mixed, such as training folders and a validation archive. Images come class by class and sorted by name
(torchvision's order), in whichever form they are held.
"""

from __future__ import annotations

import os
from pathlib import Path

from lbsgd.convert import cifar10
from lbsgd.convert.archives import Member, cached_members, uncompressed
from lbsgd.convert.by_class import as_images, by_folder, by_label, class_folders, plain_file, shortened
from lbsgd.convert.imagenet_labels import devkit_labels, kaggle_labels
from lbsgd.convert.source_images import SPLITS, Images, Source
from lbsgd.data.beton import CONVERT
from lbsgd.errors import DataError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
KAGGLE, KAGGLE_LABELS = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"


def find_source(path: Path, scratch: Path, data_dir: Path) -> Source:
    """Find the images of a folder or a tar.

    scratch: a folder for the content of a compressed archive. data_dir: the data folder, for the commands in messages.
    Raises DataError if there are none, or if the splits have different classes.
    """
    if path.name in (TRAIN_TAR, VAL_TAR, *DEVKITS):
        path = path.parent
    try:
        train, val = _from_archive(path, scratch, data_dir) if path.is_file() else _from_folder(path, scratch, data_dir)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(
            f"{val.container} has other classes than {train.container}: {shortened(differing)} in one of them "
            f"only; both must have the same"
        )
    return Source(path, train, val)


def _from_archive(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    """Return the images of a tar of train/<class>/* and val/<class>/*, whatever stands before these."""
    tar = cifar10.as_tar(path, scratch) if cifar10.is_cifar10(path) else uncompressed(path, scratch)
    found = cached_members(tar, scratch)
    below = {name: _below(found, name) for name in SPLITS}
    if missing := [f"{name}/" for name in SPLITS if not below[name]]:
        raise _nothing_found(path, missing, data_dir)
    stamp = path.stat().st_mtime_ns
    train, val = (as_images(tar, by_folder(below[name], f"{path}, {name}"), stamp, str(path)) for name in SPLITS)
    return train, val


def _below(found: list[Member], folder: str) -> list[tuple[str, Member]]:
    """Return (path below `folder`, member) of all members for which it is the first or the second folder."""
    parts = ((member.name.split("/"), member) for member in found)
    return [("/".join(path[path.index(folder) + 1 :]), member) for path, member in parts if folder in path[:2]]


def _from_folder(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    base = next((path / inner for inner in (KAGGLE, "Data/CLS-LOC") if (path / inner).is_dir()), path)
    train = _train_of(base, scratch)
    val = _val_of(base, path, train.classes, scratch, data_dir) if train else None
    if train and val:
        return train, val
    missing = [] if train else [f"train/ and no {TRAIN_TAR}"]
    missing += [] if (base / "val").is_dir() or (base / VAL_TAR).is_file() else [f"val/ and no {VAL_TAR}"]
    raise _nothing_found(path, missing, data_dir)


def _train_of(base: Path, scratch: Path) -> Images | None:
    if (base / "train").is_dir():
        return class_folders(base / "train")
    tar = base / TRAIN_TAR
    if not tar.is_file():
        return None
    found = ((member.name, member) for member in cached_members(tar, scratch))
    return as_images(tar, by_folder(found, str(tar)), tar.stat().st_mtime_ns)


def _val_of(base: Path, path: Path, classes: list[str], scratch: Path, data_dir: Path) -> Images | None:
    """Return the validation images by their class folders or, without any, by the devkit's or Kaggle's labels."""
    folder, tar = base / "val", base / VAL_TAR
    if folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder)):
        return class_folders(folder)
    if folder.is_dir():
        files = [plain_file(folder, name) for name in sorted(os.listdir(folder))]
        return as_images(folder, by_label(files, folder, _labels_for(folder, base, path, data_dir), classes))
    if tar.is_file():
        labels = _labels_for(tar, base, path, data_dir)
        return as_images(tar, by_label(cached_members(tar, scratch), tar, labels, classes), tar.stat().st_mtime_ns)
    return None


def _labels_for(images: Path, base: Path, path: Path, data_dir: Path) -> dict[str, str]:
    """Return the class of each validation image, from the table beside or above them."""
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


def _nothing_found(path: Path, missing: list[str], data_dir: Path) -> DataError:
    return DataError(
        f"no images in {path}: no {', no '.join(missing)} found; expected train/<class>/* and val/<class>/* "
        f"there, or ImageNet's archives or Kaggle's folders; name the source with: {CONVERT.format(data_dir)}"
    )
