"""The data folder: train.beton, val.beton and manifest.json, which must belong together."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lbsgd.data.beton import CONVERT, BetonFile
from lbsgd.disk import replace_file, to_disk
from lbsgd.errors import DataError


@dataclass(frozen=True)
class Split:
    """What the manifest says of one file."""

    num_images: int
    num_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, beton: BetonFile) -> Split:
        return cls(beton.num_images, beton.path.stat().st_size, beton.fingerprint)


@dataclass(frozen=True)
class Manifest:
    """manifest.json, written last: where it stands, the two files beside it are complete, and these.

    settings are the converter's; libraries the versions of what decoded and encoded; skipped names the images that could
    not be decoded, by split, where the converter was told to leave them out; stored counts how the others are kept.
    """

    classes: list[str]
    train: Split
    val: Split
    source: str
    settings: dict[str, object]
    converter_version: int
    listing: str = ""  # digest of the source's names, labels and sizes
    images_per_class: dict[str, list[int]] = field(default_factory=dict)  # by split; images come class by class
    libraries: dict[str, str] = field(default_factory=dict)
    stored: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the manifest so that a reader finds all of it or none, even after a power failure."""
        replace_file(path, json.dumps(asdict(self), indent=1).encode())
        to_disk(path.parent)

    def first_wrong_label(self, beton: BetonFile) -> int | None:
        """The first image of train.beton or val.beton whose label is not that of its place among the classes."""
        counts = self.images_per_class.get(beton.path.stem, [])
        if sum(counts) != beton.num_images:
            return None
        wrong = np.flatnonzero(np.repeat(np.arange(len(counts)), counts) != beton.labels)
        return int(wrong[0]) if len(wrong) else None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            content = json.loads(path.read_text())
            known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
            return cls(**{**known, "train": Split(**content["train"]), "val": Split(**content["val"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read as a manifest ({error}); "
                f"make the folder again with: {CONVERT.format(path.parent)} --overwrite"
            ) from error


@dataclass(frozen=True, eq=False)
class ImageNetData:
    """A verified data folder: the two files agree with each other and with the manifest, if there is one."""

    train: BetonFile
    val: BetonFile
    num_classes: int
    classes: list[str] | None  # None without a manifest
    fingerprint: str


def data_folder(flag: str | None) -> Path:
    """The data folder: --data_dir, else $IMAGENET_FFCV_DIR, else data/imagenet_ffcv."""
    return Path(flag or os.environ.get("IMAGENET_FFCV_DIR") or "data/imagenet_ffcv")


def open_data(data_dir: str | os.PathLike) -> ImageNetData:
    """Opens train.beton and val.beton and verifies that they belong together. Raises DataError.

    With the converter's manifest, the class count, both image counts, sizes and fingerprints come from it. Files that
    were made by other means have none: their classes are 0 ... the highest label of the training images.
    """
    folder = Path(data_dir)
    missing = [name for name in ("train.beton", "val.beton") if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"no data in {folder}: {' and '.join(missing)} not found; make the folder with: "
            f"{CONVERT.format(folder)}, or name another with --data_dir or IMAGENET_FFCV_DIR"
        )
    train, val = BetonFile.open(folder / "train.beton"), BetonFile.open(folder / "val.beton")
    classes = None
    if (folder / "manifest.json").exists():
        manifest = Manifest.read(folder / "manifest.json")
        _check_manifest(manifest, train, val)
        classes = manifest.classes
    num_classes = len(classes) if classes else int(train.labels.max()) + 1
    for beton in (train, val):
        _check_labels(beton, num_classes)
    fingerprint = hashlib.sha256(f"{train.fingerprint} {val.fingerprint} {num_classes}".encode()).hexdigest()
    return ImageNetData(train, val, num_classes, classes, fingerprint)


def _check_manifest(manifest: Manifest, train: BetonFile, val: BetonFile) -> None:
    for beton, expected in ((train, manifest.train), (val, manifest.val)):
        found = Split.of(beton)
        if found != expected:
            if (index := manifest.first_wrong_label(beton)) is not None:
                raise DataError(
                    f"{beton.path}: image {index} has label {beton.labels[index]}, and manifest.json beside it "
                    f"says another; copy both from one folder, or make them again with: "
                    f"{CONVERT.format(beton.path.parent)} --overwrite"
                )
            raise DataError(
                f"{beton.path} is not the file that manifest.json beside it was written for: it has "
                f"{found.num_images:,} images, {found.num_bytes:,} bytes and fingerprint "
                f"{found.fingerprint:.8}, the manifest says {expected.num_images:,}, "
                f"{expected.num_bytes:,} and {expected.fingerprint:.8}; copy all three from one folder"
            )


def _check_labels(beton: BetonFile, num_classes: int) -> None:
    wrong = np.flatnonzero((beton.labels < 0) | (beton.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{beton.path}: image {wrong[0]} has label {beton.labels[wrong[0]]}, outside the "
            f"{num_classes} classes 0 ... {num_classes - 1} ({len(wrong):,} such images)"
        )
