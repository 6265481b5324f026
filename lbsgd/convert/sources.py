"""Find ImageNet, or any data set with one folder per class, in its usual forms, to be read in place.

    train/<class>/*, val/<class>/*                      folders, or a tar of them, compressed or not
    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar    the official archives, next to the devkit's
    ILSVRC/Data/CLS-LOC/train/<class>/*, val/*          Kaggle's folders or archive
    cifar-10-python.tar.gz                              CIFAR-10 as its authors publish it
    train-00000-of-01024, ...                           shards: TFRecords, WebDataset, parquet (see shards)

The forms may be mixed, such as training folders and a validation archive. In any form, images come class by class and
sorted by name (torchvision's order).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lbsgd.convert import cifar10
from lbsgd.convert.annotations import ANNOTATIONS, labels_in_folder, labels_in_tar
from lbsgd.convert.archives import cached_members
from lbsgd.convert.by_class import ByClass
from lbsgd.convert.compressed import no_room, uncompressed, versions_digest
from lbsgd.convert.folders import has_class_folders, has_images, in_folders
from lbsgd.convert.imagenet_labels import devkit_labels, kaggle_labels
from lbsgd.convert.left_out import OTHER_SOURCE
from lbsgd.convert.shards import Shards, find_shards, images_of_shards, is_shard, packed_shards, shards_beside
from lbsgd.convert.source_images import SPLITS, Images, Source
from lbsgd.convert.tar_layout import splits_in
from lbsgd.convert.webdataset import is_of_webdataset
from lbsgd.data.beton_format import converting_into
from lbsgd.disk import exists, is_dir, is_file
from lbsgd.errors import DataError
from lbsgd.units import shortened

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
# For each split: a test whether its folder has images, and the archive to read if it has none.
FORMS = {"train": (has_class_folders, TRAIN_TAR), "val": (has_images, VAL_TAR)}
ALIKE = {"train": ("training", "Train"), "val": ("validation", "valid", "Val")}  # what people also call the folders
KAGGLE, KAGGLE_LABELS = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"

Labels = Callable[[], Mapping[str, str]]  # -> the class of each validation image, by its name without suffix


def find_source(path: Path, scratch: Path, data_dir: Path) -> Source:
    """Find the images of a folder or a tar.

    scratch: a folder for the content of a compressed archive. data_dir: the data folder, for the commands in messages.
    Raises DataError if there are no images, or if a class of validation images has no training images. Classes without
    validation images are refused later, by `preflight.refuse_unvalidated`.
    """
    path = source_path(path)
    try:
        version_ = source_version(path)  # before reading, so that a later change is noticed
        train, val = _from_archive(path, scratch, data_dir) if is_file(path) else _from_folder(path, scratch, data_dir)
    except OSError as error:
        if full := no_room(scratch, path, error):
            raise full from error
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if train.classes != val.classes:
        untrained = sorted(set(val.classes) - set(train.classes))
        raise DataError(
            f"{val.container} has other classes than {train.container}, which has no {shortened(untrained)}; both must "
            "have the same"
        )
    return Source(path, train, val, version_)


def source_path(path: Path) -> Path:
    """Return a source's path. If `path` is one of several files that are read together, this is their folder.

    Raises DataError if something else in the folder would be read instead of `path`, or if the folder cannot be read.
    """
    try:
        is_part = path.name in (TRAIN_TAR, VAL_TAR, *DEVKITS) and not is_dir(path)
        if not (is_part or is_shard(path)):
            return path
        if other := _read_instead(path):
            raise DataError(f"{other} would be read instead of {path}; move it away, or name {path.parent} to read it")
        return path.parent
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_instead(named: Path) -> Path | None:
    """Return what would be read instead of the archive or shard that was named, or None if that itself is read."""
    base = _base_of(named.parent)
    for split, (is_unpacked, archive) in FORMS.items():
        if named.name == archive and base != named.parent:
            return base
        if named.name == archive and is_unpacked(base / split):
            return base / split
    if is_shard(named) and _shards_of(base, named.parent) is None:
        return base
    return None


def source_version(path: Path) -> str:
    """Return a text that changes with the archives or shards of a source, without opening them.

    It is empty if any part of the source lies in a folder of images. Raises DataError if shards are missing, and
    OSError.
    """
    files = _archives_of(path)
    return versions_digest(files) if files else ""


def _archives_of(path: Path) -> list[Path]:
    """Return a source's archives or shards and the tables of labels next to them, empty if it includes a folder."""
    if is_file(path):
        archives, places = [path], [path.parent]
    else:
        base = _base_of(path)
        if shards := _shards_of(base, path):
            return [path / name for names in shards.names.values() for name in names]
        if any(is_unpacked(base / split) for split, (is_unpacked, _) in FORMS.items()):
            return []
        archives, places = [base / TRAIN_TAR, base / VAL_TAR], [base, path]
    labels = {place / name for place in places for name in (KAGGLE_LABELS, ANNOTATIONS, *DEVKITS)}
    files = [*archives, *sorted(label for label in labels if exists(label))]
    return files if all(is_file(file) for file in files) else []


def _from_archive(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    """Return the images of a tar of train/<class>/* and val/<class>/*, or val/*, at any depth."""
    tar = cifar10.as_tar(path, scratch) if cifar10.is_cifar10(path) else uncompressed(path, scratch)
    members = cached_members(tar, scratch, path)
    found = splits_in(members, tar, path)
    if not found and is_of_webdataset(members):
        first = "name" if tar == path else "uncompress all of them and name"
        raise DataError(f"{path} is a WebDataset shard; {first} its folder: {converting_into(data_dir, path.parent)}")
    if missing := [f"{name}/" for name in SPLITS if name not in found]:
        raise _nothing_found(path, missing, data_dir)
    train = found["train"].images()
    annotated = partial(labels_in_tar, members, tar, path)
    return train, _labelled(found["val"], train.classes, lambda: _labels_for(path, [path.parent], annotated, data_dir))


def _labelled(val: ByClass, classes: list[str], labels: Labels) -> Images:
    """Return the validation images, labelled by their class folders or, without any, by a table."""
    if val.loose and not val.rows:
        val.label_loose(labels(), classes)
        return val.images(lambda name, _: os.path.basename(name), classes)
    return val.images(classes=classes if val.numbers.keys() <= set(classes) else None)


def _from_folder(path: Path, scratch: Path, data_dir: Path) -> tuple[Images, Images]:
    base = _base_of(path)
    if shards := _shards_of(base, path):
        return _noting_others(images_of_shards(shards, scratch), base, path)
    train, val = _split_of("train", base, scratch), _split_of("val", base, scratch)
    if not (train and val):
        missing = [
            f"{split}/ and no {FORMS[split][1]}" for split, found in (("train", train), ("val", val)) if not found
        ]
        raise _nothing_found(path, missing, data_dir)
    images, above, places = train.images(), path, [base, path]
    whole = Path(os.path.abspath(base))  # a relative path may lack the folder's name
    if whole.name == "CLS-LOC":  # Kaggle's
        above = whole.parent.parent
        places.append(above.parent)
    annotated = partial(labels_in_folder, above / ANNOTATIONS)
    labels = partial(_labels_for, val.container, places, annotated, data_dir)
    return _noting_others((images, _labelled(val, images.classes, labels)), base, path)


def _noting_others(found: tuple[Images, Images], base: Path, path: Path) -> tuple[Images, Images]:
    """Note what else in a folder could be a split's images, such as the archive next to its unpacked content."""
    for (split, (is_unpacked, archive)), images in zip(FORMS.items(), found, strict=True):
        others = [place / split for place in (base, path) if is_unpacked(place / split)]
        others += [place / archive for place in (base, path) if is_file(place / archive)]
        if not (images.shard_names or images.copied_from):
            others += shards_beside(path, split)
        for other in dict.fromkeys(others):
            if str(other) != images.origin:
                images.left_out.add(OTHER_SOURCE, str(other))
    return found


def _base_of(path: Path) -> Path:
    """Return the folder in a source that holds train/ and val/, or their archives."""
    return next((path / inner for inner in (KAGGLE, "Data/CLS-LOC") if is_dir(path / inner)), path)


def _shards_of(base: Path, path: Path) -> Shards | None:
    """Return a source's shards, or None if it has images in another form."""
    return None if exists(base / TRAIN_TAR) or has_class_folders(base / "train") else find_shards(path)


def _split_of(split: str, base: Path, scratch: Path) -> ByClass | None:
    """Return a split's images from its folder or, if this is not unpacked yet, from ImageNet's archive, else None."""
    is_unpacked, archive = FORMS[split]
    folder, tar = base / split, base / archive
    if is_unpacked(folder) or not is_file(tar):
        return in_folders(folder)
    content = uncompressed(tar, scratch)
    found = ByClass(cached_members(content, scratch, tar), content, str(tar), stamp=tar.stat().st_mtime_ns)
    for row, name in enumerate(found.files.names):
        found.add_by_folder(row, name if split == "train" else os.path.basename(name))
    return found


def _labels_for(images: Path, folders: list[Path], annotated: Labels, data_dir: Path) -> Mapping[str, str]:
    """Return the class of each validation image, from a table in one of the folders, else from the annotations."""
    for folder in folders:
        if is_file(folder / KAGGLE_LABELS):
            return kaggle_labels(folder / KAGGLE_LABELS)
        for name in DEVKITS:
            if exists(folder / name):
                return devkit_labels(folder / name)
    if labels := annotated():
        return labels
    zips = [folder / f"{KAGGLE_LABELS}.zip" for folder in folders if exists(folder / f"{KAGGLE_LABELS}.zip")]
    raise DataError(
        f"{images} holds validation images without labels: neither {DEVKITS[0]} nor {KAGGLE_LABELS} found in "
        f"{folders[0]}; "
        + (f"unpack {zips[0]} there" if zips else "put one of them there")
        + f" and run: {converting_into(data_dir)}"
    )


def _nothing_found(path: Path, missing: list[str], data_dir: Path) -> DataError:
    if not exists(path):
        return DataError(f"{path}: does not exist; name your copy of ImageNet with: {converting_into(data_dir)}")
    zips = sorted(entry.name for entry in path.glob("*.zip")) if is_dir(path) else []
    packed = packed_shards(path) if is_dir(path) else []
    kind = {"train/": "no training images", "val/": "no validation images"}
    what = kind[missing[0].split()[0]] if len(missing) == 1 else "no images"
    splits = [each.partition("/")[0] for each in missing]
    named = [(path / name, split) for split in splits for name in ALIKE[split] if is_dir(path / name)]
    return DataError(
        f"{what} in {path}: no {', no '.join(missing)} found; expected train/<class>/* and val/<class>/* "
        f"there, or ImageNet's archives or Kaggle's folders; "
        + (f"unpack {shortened(zips)}, or " if zips else "")
        + (f"uncompress all shards such as {packed[0]}, or " if packed else "")
        + "".join(f"rename {folder} to {split}, or " for folder, split in named)
        + ("move some images of each class from train/ to val/, or " if what == kind["val/"] else "")
        + f"name the source with: {converting_into(data_dir)}"
    )
