"""Say what a conversion would do, without doing it: what was found, what it takes, and what stands in the way."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lbsgd.convert.compressed import content_in
from lbsgd.convert.estimate import MARGIN, Estimate, estimate, no_room
from lbsgd.convert.existing_data import before_the_conversion
from lbsgd.convert.preflight import left_out_lines, unusable_images, unusable_line, unvalidated_line, warning_lines
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Images, Source
from lbsgd.disk import exists
from lbsgd.units import counted, duration, harmless, size


class Room(NamedTuple):
    """Bytes on the disk of the data folder."""

    free: int
    content: int  # that the conversion will unpack beside its result


def to_be_unpacked(scratch: Path, data_dir: Path) -> int:
    """Return the bytes of content in a dry run's scratch folder that no earlier conversion has left unpacked."""
    work = data_dir / ".converting"
    return sum(num_bytes for name, num_bytes in content_in(scratch).items() if not exists(work / name))


def dry_run(
    source: Source,
    settings: Settings,
    data_dir: Path,
    room: Room,
    num_processes: int,
    overwrite: bool,
    on_error: str,
    val_subset: bool,
) -> str:
    """Return lines on what was found, the result's size, the time it will take, and what stands in the way."""
    found, classes = estimate(source, settings, num_images=200), source.train.classes
    in_the_way = _in_the_way(source, found) if on_error == "fail" else []
    if not val_subset and (unvalidated := unvalidated_line(source)):
        in_the_way.insert(0, unvalidated)
    seconds = duration(found.seconds / num_processes)
    beside = f", beside {size(room.content)} of unpacked content" if room.content else ""
    needed = room.content + int(MARGIN * max(0, found.num_bytes - _bytes_in(data_dir / ".converting")))
    needs = "the result and the unpacked content need" if room.content else "the result needs"
    full = no_room(data_dir, room.free, needed, needs)
    lines = (
        *(_found(images, name) for name, images in (("training", source.train), ("validation", source.val))),
        *left_out_lines(source),
        *warning_lines(source),
        *(f"refused: {line}" for line in in_the_way),
        f"classes {len(classes):,}, from {classes[0]} to {classes[-1]}",
        f"result  about {size(found.num_bytes)} in {data_dir} ({size(room.free)} free){beside}: {_shares(found)}",
        f"time    about {seconds} with {counted(num_processes, 'process')}, if the disk keeps up",
        *(before_the_conversion(data_dir, source, settings, overwrite) or ([f"refused: {full}"] if full else [])),
    )
    return "\n".join(map(harmless, lines))


def _in_the_way(source: Source, found: Estimate) -> list[str]:
    """Return lines on the images that end the conversion unless they are left out."""
    unusable = unusable_images(source)
    lines = [unusable_line(unusable)] if unusable else []
    if found.broken and not unusable:
        damaged = f"{_damaged(found)}, such as {found.broken}"
        lines.append(f"{damaged}: the conversion ends with that unless --on_error skip")
    return lines


def _bytes_in(work: Path) -> int:
    """Return the bytes of an earlier run's work. The conversion continues from that work or deletes it."""
    return sum(512 * path.stat().st_blocks for path in work.glob("*.beton"))  # their tables are holes at first


def _found(images: Images, name: str) -> str:
    return f"found   {images.origin}: {len(images):,} {name} images, {size(images.sizes.sum())}"


def _shares(found: Estimate) -> str:
    words = [f"{found.copied:.0%} of the images untouched", f"{found.encoded:.0%} encoded again"]
    words += [f"{found.raw:.0%} kept as pixels"] if found.raw else []
    words += [f"{found.scaled:.1%} scaled from 16 bits to 8"] if found.scaled else []
    words += [_damaged(found)] if found.damaged else []
    return ", ".join(words)


def _damaged(found: Estimate) -> str:
    return f"{found.damaged:,} of {found.looked_at:,} images looked at cannot be decoded"
