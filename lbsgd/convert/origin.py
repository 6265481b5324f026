"""The source's images from which a data folder was made, found again by its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Images, Source
from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import converting_into
from lbsgd.data.folder import Manifest
from lbsgd.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Origin:
    """The source's images from which a file's images were made."""

    images: Images
    numbers: np.ndarray  # the file's images among the source's
    settings: Settings
    libraries: dict[str, str]  # that made the file

    @classmethod
    def of(cls, beton: BetonFile, source: Source, manifest: Manifest) -> Origin:
        """Match the file's images with the source's. Raises DataError if their number, classes or labels differ."""
        images = source.splits[beton.path.stem]
        numbers = kept_numbers(source, images, manifest, beton.path.stem)
        if len(numbers) != beton.num_images or images.classes != manifest.classes:
            raise DataError(
                f"{images.origin} holds {len(numbers):,} images of {len(images.classes):,} classes, {beton.path} "
                f"{beton.num_images:,} of {len(manifest.classes):,}: it was made from another source; name "
                f"that one with --source"
            )
        if wrong := np.flatnonzero(images.labels[numbers] != beton.labels).tolist():
            index, number = wrong[0], int(numbers[wrong[0]])
            raise DataError(
                f"{beton.path}: image {index} has label {beton.labels[index]}, and {images.where(number)} has "
                f"{images.labels[number]}"
            )
        return cls(images, numbers, _settings(manifest, beton.path.parent), manifest.libraries)


def _settings(manifest: Manifest, data_dir: Path) -> Settings:
    """Return a manifest's settings. Raises DataError for unknown settings."""
    try:
        return Settings(**cast(dict[str, Any], manifest.settings))
    except (TypeError, ConfigError) as error:
        raise DataError(
            f"{data_dir / 'manifest.json'} has settings that this version does not know ({error}); verify the folder "
            f"without --source, or make it again with: {converting_into(data_dir)} --overwrite"
        ) from error


def kept_numbers(source: Source, images: Images, manifest: Manifest, split: str) -> np.ndarray:
    """Return the numbers of the images that were not skipped, however the source was spelled then.

    The manifest names a skipped image by the source, as it was given with --source, and by its place within. The image
    still has its number unless the source has changed since, for example because skipped images were removed.
    """
    skipped, numbers = manifest.skipped.get(split, []), manifest.skipped_numbers.get(split, [])
    parts = [name.split("/") for name in skipped]
    ends = {"/".join(each[start:]) for each in parts for start in range(len(each))}
    inside = os.path.relpath(images.origin, source.path)
    place = "" if inside == "." else f"{inside}/"

    def is_skipped(number: int) -> bool:
        return any(place + name in ends for name in _names(images, number))

    kept = np.ones(len(images), bool)
    if len(numbers) != len(skipped) or not all(number < len(images) and is_skipped(number) for number in numbers):
        numbers = [number for number in range(len(images)) if is_skipped(number)]
    kept[numbers] = False
    return np.flatnonzero(kept)


def _names(images: Images, number: int) -> Iterator[str]:
    """Yield an image's name in its source, then the name that earlier converters gave to an image in a shard."""
    name = images.within(number)
    yield name
    if images.counted_as:
        yield images.names[number] if images.copied_from else name.rpartition(" (")[0]
