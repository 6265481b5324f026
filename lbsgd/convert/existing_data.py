"""Find what a data folder already holds: the result of this very conversion, other data, or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import SPLITS, Source
from lbsgd.convert.sources import source_version
from lbsgd.convert.work_folder import (
    CONVERTER_VERSION,
    conversion_identity,
    damage_passed_over,
    is_partly_published,
    refuse_if_held,
)
from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import converting_into
from lbsgd.data.folder import Manifest
from lbsgd.disk import exists, is_dir, is_there, nearest
from lbsgd.errors import DataError
from lbsgd.units import counted


def made_with(data_dir: Path, source: Path, settings: Settings) -> Manifest | None:
    """Return the folder's manifest if the same command made it, None if the folder holds no data.

    Raises DataError for other data, if the difference shows before the source is listed.
    """
    if not is_there(data_dir / "manifest.json"):
        existing = [name for name in SPLITS if exists(data_dir / f"{name}.beton")]
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
    """Return the folder's manifest if its data are intact and this conversion's. Raises DataError for other data."""
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
    """Return the same without opening the source, None if the manifest does not tell. Raises DataError for other data.

    Only archives and shards have a version. Listing them again may take an hour, and as much disk as their content.
    """
    manifest = made_with(data_dir, source, settings)
    if manifest is None or not manifest.source_version:
        return None
    with contextlib.suppress(OSError, DataError):  # listing the source gives a better message
        if source_version(source) == manifest.source_version and _is_intact(data_dir, manifest):
            return manifest
    return None


def is_finished(work: Path, source: Path, settings: Settings) -> bool:
    """Return whether a work folder holds the finished result of the same command, according to its manifest."""
    with damage_passed_over():
        return made_with(work, source, settings) is not None
    return False


def before_the_conversion(data_dir: Path, source: Source, settings: Settings, overwrite: bool) -> list[str]:
    """Return lines on why a conversion would not start: it is already done, or would be refused."""
    identity, work = conversion_identity(source, settings), data_dir / ".converting"
    try:
        refuse_if_held(work)
        to_be_published = is_partly_published(data_dir, work, identity)
        if not (overwrite or to_be_published) and (complete := complete_data(data_dir, source, settings)):
            return complete_lines(data_dir, complete, source)
        _require_writable(data_dir)
    except DataError as error:
        return [f"refused: {error}"]
    return []


def _require_writable(data_dir: Path) -> None:
    place = nearest(data_dir, os.path.lexists)
    if not is_dir(place) or not os.access(place, os.W_OK | os.X_OK):
        number = errno.EACCES if is_dir(place) else errno.ENOTDIR
        raise DataError(f"cannot write to {data_dir}: {os.strerror(number)}; name another folder with --data_dir")


def complete_lines(data_dir: Path, data: Manifest, source: Source | None = None) -> list[str]:
    """Return lines on what the folder holds and, if the source was listed, whether images may have changed since."""
    skipped = sum(map(len, data.skipped.values()))
    told = f", {counted(skipped, 'image')} skipped" if skipped else ""
    lines = [
        f"{data_dir} is complete: {data.train.num_images:,} training and {data.val.num_images:,} validation images, "
        f"{len(data.classes):,} classes{told}; --overwrite makes it again"
    ]
    if source and data.stamps not in ("", source.stamps_digest()):
        lines.append(
            f"names and sizes in {source.path} agree with it, times do not; to compare the images run: "
            f"{converting_into(data_dir, source.path)} --verify"
        )
    return lines


def _refuse_other(data_dir: Path, same: Mapping[str, bool]) -> None:
    if not all(same.values()):
        differing = ", ".join(name for name in same if not same[name])
        raise DataError(
            f"{data_dir} already holds another data set: its manifest.json differs in {differing}; "
            f"give --overwrite to replace it, or another --data_dir"
        )


def is_read_only(data_dir: Path) -> bool:
    """Return whether a folder has a manifest and cannot be written to. It is then useful only if it is complete."""
    return is_there(data_dir / "manifest.json") and not os.access(data_dir, os.W_OK)


def _is_intact(data_dir: Path, manifest: Manifest) -> bool:
    with damage_passed_over():
        return all(getattr(manifest, name).describes(BetonFile.open(data_dir / f"{name}.beton")) for name in SPLITS)
    return False
