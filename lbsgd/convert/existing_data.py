"""What a data folder holds already: the result of this very conversion, other data, or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import SPLITS, Source
from lbsgd.convert.sources import source_path, source_version
from lbsgd.convert.work_folder import CONVERTER_VERSION
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, Split
from lbsgd.errors import DataError


def made_with(data_dir: Path, source: Path, settings: Settings) -> Manifest | None:
    """Return the folder's manifest if the same command made it, None if it holds nothing.

    Raises DataError for other data, as far as that can be told before the source is listed.
    """
    if not (data_dir / "manifest.json").exists():
        existing = [name for name in SPLITS if (data_dir / f"{name}.beton").exists()]
        if existing:
            raise DataError(
                f"{data_dir} holds {existing[0]}.beton, but no manifest.json of a complete conversion; "
                f"give --overwrite to replace it, or another --data_dir"
            )
        return None
    manifest = Manifest.read(data_dir / "manifest.json")
    wanted = asdict(settings)
    same = {
        **{name: value == manifest.settings.get(name) for name, value in wanted.items()},
        "settings": wanted.keys() == manifest.settings.keys(),
        "converter version": CONVERTER_VERSION == manifest.converter_version,
        "source": str(source.resolve()) == manifest.source,
    }
    _refuse_other(data_dir, same)
    return manifest


def complete_data(data_dir: Path, source: Source, settings: Settings) -> Manifest | None:
    """Return what the folder holds if it is what this conversion would make. Raises DataError for other data."""
    manifest = made_with(data_dir, source.path, settings)
    if manifest is None:
        return None
    skipped = {name: len(manifest.skipped.get(name, ())) for name in SPLITS}
    same = {
        "classes": source.train.classes == manifest.classes,
        "training images": len(source.train) == manifest.train.num_images + skipped["train"],
        "validation images": len(source.val) == manifest.val.num_images + skipped["val"],
        "names or sizes of images": source.digest() == manifest.listing,
    }
    _refuse_other(data_dir, same)
    return manifest if _is_intact(data_dir, manifest) else None


def complete_by_version(data_dir: Path, source: Path, settings: Settings) -> Manifest | None:
    """Return the same without opening the source, None if its manifest cannot tell. Raises DataError for other data.

    Only archives and shards have a version. Listing them again may take an hour, and room for all that they hold.
    """
    manifest = made_with(data_dir, source_path(source), settings)
    if manifest is None or not manifest.source_version:
        return None
    with contextlib.suppress(OSError, DataError):  # of the source, of which its listing tells more
        if source_version(source) == manifest.source_version and _is_intact(data_dir, manifest):
            return manifest
    return None


def _refuse_other(data_dir: Path, same: Mapping[str, bool]) -> None:
    if not all(same.values()):
        differing = ", ".join(name for name in same if not same[name])
        raise DataError(
            f"{data_dir} already holds another data set: its manifest.json differs in {differing}; "
            f"give --overwrite to replace it, or another --data_dir"
        )


def is_read_only(data_dir: Path) -> bool:
    """Return whether a folder with a manifest cannot be written to, so that only what is complete is of use there."""
    return (data_dir / "manifest.json").exists() and not os.access(data_dir, os.W_OK)


def _is_intact(data_dir: Path, manifest: Manifest) -> bool:
    with contextlib.suppress(DataError):
        return all(Split.of(BetonFile.open(data_dir / f"{name}.beton")) == getattr(manifest, name) for name in SPLITS)
    return False
