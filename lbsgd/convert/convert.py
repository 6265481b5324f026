"""Convert your copy of ImageNet to train.beton, val.beton and manifest.json.

A data folder is complete or absent. All work is done in its folder .converting, which records the progress, so the same
command resumes there and gives the same bytes. Complete files are forced to the disk, then renamed, the manifest last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.convert.beton_writer import BetonWriter
from lbsgd.convert.compressed import telling_what_stays
from lbsgd.convert.convert_split import convert_split
from lbsgd.convert.dry_run import Room, dry_run, to_be_unpacked
from lbsgd.convert.estimate import check_disk, free_bytes, page_size_for
from lbsgd.convert.existing_data import (
    complete_by_version,
    complete_data,
    complete_lines,
    is_finished,
    is_read_only,
)
from lbsgd.convert.image import KINDS, SCALED, UNDECODABLE, libraries, without_opencv_threads
from lbsgd.convert.preflight import left_out_lines, refuse_emptied, refuse_unusable, refuse_unvalidated, warning_lines
from lbsgd.convert.process_pool import checked_num_processes
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Source
from lbsgd.convert.sources import find_source, source_path
from lbsgd.convert.undecodable import names_of, report_undecodable
from lbsgd.convert.work_folder import (
    CONVERTER_VERSION,
    NOTHING_KEPT,
    conversion_identity,
    converting_alone,
    is_partly_published,
    publish,
    remove_added,
    remove_work,
    start_over_if_other,
    writing_to,
)
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, Split
from lbsgd.disk import exists
from lbsgd.errors import ConfigError, DataError
from lbsgd.output import say
from lbsgd.processes.signals import stoppable


def convert(
    source: Path,
    data_dir: Path,
    *,
    num_processes: int | None = None,
    on_error: str = "fail",
    overwrite: bool = False,
    val_subset: bool = False,
    **settings: Any,
) -> None:
    """Make the data folder from a source that `sources.find_source` understands, or resume after an interruption.

    num_processes: by default one per core.
    on_error: "fail" or "skip", what to do about undecodable images once all images have been tried.
    val_subset: whether classes may have no validation images; errors are then among the other classes.
    settings: those of `Settings`.
    Raises ConfigError for settings that cannot be right, Stopped after a stop signal, and DataError if the source or
    one of its images cannot be used. After a DataError, nothing has a final name.
    """
    wanted, num_processes = Settings(**settings), checked_num_processes(num_processes)
    if on_error not in ("fail", "skip"):
        raise ConfigError(f"--on_error {on_error} is not fail or skip")
    source, data_dir = source_path(Path(source)), Path(data_dir)
    work = data_dir / ".converting"
    goes_on = f"what is done is kept in {work}: the same command goes on from there"
    with stoppable(goes_on), without_opencv_threads():
        if not overwrite and _is_complete_and_read_only(source, data_dir, wanted):
            return
        with writing_to(data_dir), converting_alone(work), telling_what_stays(work):
            found = _found_to_convert(source, data_dir, work, wanted, overwrite)
            if found is None:
                remove_work(work)
                return
            _say_all(left_out_lines(found) + warning_lines(found))
            if not val_subset:
                refuse_unvalidated(found)
            if on_error == "fail":
                refuse_unusable(found)
            identity = conversion_identity(found, wanted)
            if is_partly_published(data_dir, work, identity):
                say(f"{work} holds the finished files of an earlier run, which only move to {data_dir}")
            else:
                start_over_if_other(work, identity, found)
                Conversion(found, wanted, work).run(num_processes, on_error, val_subset)
            publish(data_dir, work)


def _is_complete_and_read_only(source: Path, data_dir: Path, settings: Settings) -> bool:
    """Return whether a folder is complete and read-only. No lock can be taken there, and none is needed."""
    if not is_read_only(data_dir):
        return False
    if by_version := complete_by_version(data_dir, source, settings):
        _say_all(complete_lines(data_dir, by_version))
        return True
    with tempfile.TemporaryDirectory() as scratch:
        found = find_source(source, Path(scratch), data_dir)
        complete = complete_data(data_dir, found, settings)
    if complete:
        _say_all(complete_lines(data_dir, complete, found))
    return complete is not None


def _found_to_convert(source: Path, data_dir: Path, work: Path, settings: Settings, overwrite: bool) -> Source | None:
    """Return the source, or None if the folder already holds its conversion. Raises DataError for other data.

    Differences that show without the source are reported first, because an archive may take hours to unpack.
    """
    if not overwrite and not is_finished(work, source, settings):
        if by_version := complete_by_version(data_dir, source, settings):
            _say_all(complete_lines(data_dir, by_version))
            return None
    there = set(work.iterdir())
    found = find_source(source, work, data_dir)
    if overwrite or is_partly_published(data_dir, work, conversion_identity(found, settings)):
        return found
    try:
        complete = complete_data(data_dir, found, settings)
    except DataError:
        remove_added(work, there)
        raise
    if complete:
        _say_all(complete_lines(data_dir, complete, found))
    elif exists(data_dir / "manifest.json"):
        say(f"{data_dir} is damaged: its files are not those of its manifest.json, and are made again")
    return None if complete else found


def look(
    source: Path,
    data_dir: Path,
    num_processes: int | None = None,
    *,
    overwrite: bool = False,
    on_error: str = "fail",
    val_subset: bool = False,
    **settings: Any,
) -> str:
    """Return lines on what `convert` would do (--dry_run). Leaves nothing behind."""
    wanted, num_processes = Settings(**settings), checked_num_processes(num_processes)
    with stoppable(NOTHING_KEPT), tempfile.TemporaryDirectory() as scratch:
        free = free_bytes(data_dir)  # before content is unpacked, perhaps onto the same disk
        found = find_source(Path(source), Path(scratch), data_dir)
        room = Room(free, to_be_unpacked(Path(scratch), data_dir))
        return dry_run(found, wanted, data_dir, room, num_processes, overwrite, on_error, val_subset)


def _say_all(lines: list[str]) -> None:
    for line in lines:
        say(line)


class Conversion:
    """Makes train.beton, val.beton and manifest.json in the work folder, from where an earlier run left them."""

    def __init__(self, source: Source, settings: Settings, work: Path) -> None:
        self.source, self.settings, self.work = source, settings, work
        self.page_size = page_size_for(source, settings)
        self.writers = {
            name: BetonWriter(work / f"{name}.beton", len(images), self.page_size)
            for name, images in source.splits.items()
        }

    def run(self, num_processes: int, on_error: str, val_subset: bool) -> None:
        """Do all the work except `publish`, which gives the files their final names."""
        self.convert_images(num_processes)
        report_undecodable(self.source, self.undecodable(), self.settings, self.page_size, on_error)
        self.finish(val_subset)

    def convert_images(self, num_processes: int) -> None:
        """Convert both splits. Raises DataError if the disk has no room for the result, or if a process dies."""
        done = sum(writer.image_bytes() for writer in self.writers.values())
        check_disk(self.source, self.settings, self.work, done)
        for name, images in self.source.splits.items():
            convert_split(name, images, self.writers[name], self.settings, num_processes)

    def undecodable(self) -> dict[str, list[int]]:
        """Return the numbers of the images that cannot be decoded, by split."""
        kinds = {name: writer.records["kind"] for name, writer in self.writers.items()}
        return {name: np.flatnonzero(kinds[name] == UNDECODABLE).tolist() for name in kinds}

    def finish(self, val_subset: bool) -> None:
        """Complete both files and write the manifest. Raises DataError if a split, or a class in it, has no image left.

        val_subset: whether classes may have no validation images.
        """
        for name, images in self.source.splits.items():
            self.writers[name].finish(images.labels)
        files = {name: BetonFile.open(writer.path) for name, writer in self.writers.items()}
        manifest = self._manifest(files)
        refuse_emptied(self.source, manifest.images_per_class, val_subset)
        manifest.write(self.work / "manifest.json")

    def _manifest(self, files: Mapping[str, BetonFile]) -> Manifest:
        classes = self.source.train.classes
        counts = {name: np.bincount(beton.labels, minlength=len(classes)).tolist() for name, beton in files.items()}
        return Manifest(
            classes=classes,
            train=Split.of(files["train"]),
            val=Split.of(files["val"]),
            source=str(self.source.path.resolve()),
            settings=asdict(self.settings),
            converter_version=CONVERTER_VERSION,
            listing=self.source.digest(),
            stamps=self.source.stamps_digest(),
            source_version=self.source.version,
            images_per_class=counts,
            libraries=libraries(),
            stored={name: _stored_as(writer) for name, writer in self.writers.items()},
            skipped=names_of(self.source, self.undecodable()),
            skipped_numbers=self.undecodable(),
            left_out={name: dict(images.left_out.counts) for name, images in self.source.splits.items()},
        )


def _stored_as(writer: BetonWriter) -> dict[str, int]:
    """Return how many images are kept in each way, and how many in all were scaled from 16 bits to 8."""
    kinds = writer.records["kind"]
    scaled = {name: int(np.count_nonzero(kinds == kind + SCALED)) for name, kind in KINDS.items()}
    ways = {name: int(np.count_nonzero(kinds == kind)) + scaled[name] for name, kind in KINDS.items()}
    return {**ways, "scaled": sum(scaled.values())}
