"""The data folder: train.beton, val.beton and manifest.json, which must belong together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import converting_into
from lbsgd.disk import exists, is_there, read_note, replace_file, to_disk
from lbsgd.errors import DataError

UNPUBLISHED = ".converting/manifest.json"  # exists after the converter has finished both files until they are renamed
LISTS = ("images_per_class", "skipped", "skipped_numbers")  # of the manifest, by split
SOURCES = ("train", "ILSVRC2012_img_train.tar", "ILSVRC")  # in a folder of images: class folders, archives, Kaggle's
MOST_CLASSES = 1 << 20  # to infer from labels alone; a higher label is damage


@dataclass(frozen=True)
class Split:
    """The manifest's description of one file, with its fingerprint and the digest of its tables (`Survey`)."""

    num_images: int
    num_bytes: int
    fingerprint: str
    tables: str = field(default="", compare=False)  # manifests of earlier converters have none

    @classmethod
    def of(cls, beton: BetonFile) -> Split:
        return cls(beton.num_images, beton.identity.num_bytes, beton.fingerprint, beton.survey.tables)

    def describes(self, beton: BetonFile) -> bool:
        """Return whether a file is the one described, in all bytes but the images', which `--verify` reads."""
        return self == Split.of(beton) and self.tables in ("", beton.survey.tables)


@dataclass(frozen=True)
class Manifest:
    """manifest.json. The converter writes it last, so the two files that it describes are complete.

    settings are the converter's, and libraries the versions of the libraries that decoded and encoded. stored counts
    the images of each split by the form in which they are stored. If the converter left out images that cannot be
    decoded, skipped has their names, and skipped_numbers their numbers in the source's order. left_out counts the files
    of each split that are not images, by reason.
    """

    classes: list[str]
    train: Split
    val: Split
    source: str
    settings: dict[str, object]
    converter_version: int
    listing: str = ""  # digest of names, labels and sizes of the source
    stamps: str = ""  # digest of its times of modification; earlier converters wrote neither this nor the next
    source_version: str = ""  # digest of its archives' or shards' names, sizes and times; empty for a folder
    images_per_class: dict[str, list[int]] = field(default_factory=dict)  # by split; images lie class by class
    libraries: dict[str, str] = field(default_factory=dict)
    stored: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    skipped_numbers: dict[str, list[int]] = field(default_factory=dict)  # manifests of earlier converters have none
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the manifest so that a reader finds all of it or nothing, even after a power failure."""
        replace_file(path, json.dumps(asdict(self), indent=1).encode())
        to_disk(path.parent)

    @property
    def val_classes(self) -> list[int] | None:
        """Return the numbers of the classes that have validation images; None if all have some, or if it is unknown."""
        counts = self.images_per_class.get("val", [])
        found = [number for number, count in enumerate(counts) if count]
        return found if found and len(found) < len(counts) == len(self.classes) else None

    def first_wrong_label(self, beton: BetonFile) -> int | None:
        """Return the first image of train.beton or val.beton whose label contradicts images_per_class."""
        counts = self.images_per_class.get(beton.path.stem, [])
        if sum(counts) != beton.num_images:
            return None
        wrong = np.flatnonzero(np.repeat(np.arange(len(counts)), counts) != beton.labels)
        return int(wrong[0]) if len(wrong) else None

    def _require_types(self) -> None:
        """Raise TypeError for content that only looks like a manifest."""
        words = [self.train.fingerprint, self.train.tables, self.val.fingerprint, self.val.tables, *self.classes]
        counts = [self.train.num_images, self.train.num_bytes, self.val.num_images, self.val.num_bytes]
        tables = {name: getattr(self, name) for name in ("settings", "libraries", "stored", "left_out", *LISTS)}
        if wrong := [name for name, table in tables.items() if not isinstance(table, dict)]:
            raise TypeError(f"{wrong[0]} is no object")
        if wrong := [name for name in LISTS if not all(isinstance(each, list) for each in tables[name].values())]:
            raise TypeError(f"{wrong[0]} holds something else than lists")
        words += chain(*self.skipped.values())
        counts += chain(*self.images_per_class.values(), *self.skipped_numbers.values())
        if not all(isinstance(word, str) for word in words) or not isinstance(self.classes, list):
            raise TypeError("a class, a fingerprint or a skipped image is no text")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("a number of images or bytes, or of an image, is no natural number")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest. Raise DataError if the file is not a manifest, or if this user may not read it."""
        try:
            content = read_note(path)
            known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
            found = cls(**{**known, "train": Split(**content["train"]), "val": Split(**content["val"])})
            found._require_types()
            return found
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read as a manifest ({error}); "
                f"make the folder again with: {converting_into(path.parent)} --overwrite"
            ) from error


@dataclass(frozen=True, eq=False)
class ValData:
    """The part of a data folder that an evaluation reads."""

    val: BetonFile
    num_classes: int
    classes: list[str] | None  # None without a manifest
    fingerprint: str
    train_fingerprint: str | None  # of train.beton, which need not exist; None if unknown
    val_classes: list[int] | None  # the classes among which errors are counted, if not all


@dataclass(frozen=True, eq=False)
class ImageNetData(ValData):
    """A verified data folder: both files agree with each other and with the manifest, if there is one."""

    train: BetonFile


def data_folder(flag: str | None) -> Path:
    """Return the data folder: --data_dir, else $IMAGENET_FFCV_DIR, else data/imagenet_ffcv."""
    return Path(flag or os.environ.get("IMAGENET_FFCV_DIR") or "data/imagenet_ffcv")


def open_data(data_dir: str | os.PathLike) -> ImageNetData:
    """Open train.beton and val.beton and verify that they belong together. Raise DataError if they do not.

    The converter's manifest has the names of the classes, and the number of images, size and fingerprint of both files.
    Files from elsewhere have no manifest; their classes are 0 ... the highest label of the training images.
    """
    [train, val], manifest, num_classes = _open(Path(data_dir), ("train.beton", "val.beton"))
    names, among = (manifest.classes, manifest.val_classes) if manifest else (None, None)
    fingerprint = _fingerprint(train, val, num_classes)
    return ImageNetData(val, num_classes, names, fingerprint, train.fingerprint, among, train)


def open_val(data_dir: str | os.PathLike) -> ValData:
    """Open val.beton and verify it against the manifest. Raise DataError if it is not the described file.

    Without a manifest the classes are counted as `open_data` does, or from val.beton if there is no train.beton.
    """
    folder = Path(data_dir)
    counted = not is_there(folder / "manifest.json") and is_there(folder / "train.beton")
    [*train, val], manifest, num_classes = _open(folder, ("train.beton", "val.beton") if counted else ("val.beton",))
    known = manifest.train.fingerprint if manifest else train[0].fingerprint if train else None
    names, among = (manifest.classes, manifest.val_classes) if manifest else (None, None)
    return ValData(val, num_classes, names, _fingerprint(val, num_classes), known, among)


def _open(folder: Path, names: Sequence[str]) -> tuple[list[BetonFile], Manifest | None, int]:
    """Return the verified files, their manifest, and the number of classes, from the first file without a manifest."""
    missing = [name for name in names if not is_there(folder / name)]
    if missing and any(os.path.exists(folder / source) for source in SOURCES):
        raise DataError(
            f"{folder} holds images that are not converted yet; convert them into another folder, and give that: "
            f"{converting_into(os.path.abspath(folder) + '_ffcv', folder)}"
        )
    if missing:
        raise DataError(
            f"no data in {folder}: {' and '.join(missing)} not found; make the folder with: "
            f"{converting_into(folder)}, or name another with --data_dir or IMAGENET_FFCV_DIR"
        )
    files, manifest = [BetonFile.open(folder / name) for name in names], None
    interrupted = os.path.exists(folder / UNPUBLISHED)  # before manifest.json, because it is moved there
    if exists(folder / "manifest.json"):
        manifest = Manifest.read(folder / "manifest.json")
        _check_manifest(manifest, files)
    elif interrupted:
        raise DataError(
            f"{folder} is not complete: a conversion is giving its files their names, or was interrupted while it did; "
            f"run its command again: {converting_into(folder)}"
        )
    num_classes = len(manifest.classes) if manifest and manifest.classes else _classes_by_labels(files[0])
    for beton in files:
        _check_labels(beton, num_classes)
    return files, manifest, num_classes


def _fingerprint(*parts: BetonFile | int) -> str:
    said = (part.fingerprint if isinstance(part, BetonFile) else str(part) for part in parts)
    return hashlib.sha256(" ".join(said).encode()).hexdigest()


def _check_manifest(manifest: Manifest, files: Sequence[BetonFile]) -> None:
    for beton in files:
        expected = manifest.train if beton.path.stem == "train" else manifest.val
        if expected.describes(beton):
            continue
        if (index := manifest.first_wrong_label(beton)) is not None:
            raise DataError(
                f"{beton.path}: image {index} has label {beton.labels[index]}, and manifest.json beside it says "
                "another; copy both from one folder, or make them again with: "
                f"{converting_into(beton.path.parent)} --overwrite"
            )
        raise DataError(
            f"{beton.path} is not the file that manifest.json beside it was written for: it has "
            f"{_described(Split.of(beton))}, the manifest says {_described(expected)}; copy all three from one folder"
        )


def _described(split: Split) -> str:
    tables = f" and tables {split.tables:.8}" if split.tables else ""
    return f"{split.num_images:,} images, {split.num_bytes:,} bytes, fingerprint {split.fingerprint:.8}{tables}"


def _classes_by_labels(beton: BetonFile) -> int:
    """Return the number of classes that the labels imply. Raise DataError if it is impossibly large."""
    highest = beton.survey.highest_label
    if highest >= max(MOST_CLASSES, beton.num_images):
        raise DataError(
            f"{beton.path}: its highest label is {highest}, and no manifest.json beside it names as many classes; "
            f"copy the file again, or make it again with: {converting_into(beton.path.parent)} --overwrite"
        )
    return highest + 1


def _check_labels(beton: BetonFile, num_classes: int) -> None:
    if beton.survey.lowest_label >= 0 and beton.survey.highest_label < num_classes:
        return
    wrong = np.flatnonzero((beton.labels < 0) | (beton.labels >= num_classes))
    raise DataError(
        f"{beton.path}: image {wrong[0]} has label {beton.labels[wrong[0]]}, outside the "
        f"{num_classes} classes 0 ... {num_classes - 1} ({len(wrong):,} such images)"
    )
