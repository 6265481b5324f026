"""Report all images of a conversion that cannot be decoded, the first ones with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest

from lbsgd.convert.files import Member
from lbsgd.convert.image import quiet_opencv, stored_image
from lbsgd.convert.process_pool import Job, ProcessPool
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Images, Source
from lbsgd.data.pil_image import ImageError
from lbsgd.errors import DataError, LbsgdError, one_line
from lbsgd.output import say
from lbsgd.units import shortened

REASONS = 100  # printed per split; limited because each image is decoded again, as only the failure was recorded

Numbers = Mapping[str, Sequence[int]]  # of images, by split
Failed = tuple[int, Member]  # number and place of an image


def names_of(source: Source, numbers: Numbers) -> dict[str, list[str]]:
    """Return the images' names for people, by split."""
    return {name: [images.where(number) for number in numbers[name]] for name, images in source.splits.items()}


def report_undecodable(source: Source, numbers: Numbers, settings: Settings, page_size: int, on_error: str) -> None:
    """Print the images that cannot be decoded. Raises DataError if there are any and on_error is "fail"."""
    by_split = names_of(source, numbers)
    names = [name for split in by_split for name in by_split[split]]
    if not names:
        return
    for split, images in source.splits.items():
        reasons = list(_reasons(images, numbers[split][:REASONS], settings, page_size))
        for name, reason in zip_longest(by_split[split], reasons, fillvalue=""):
            say(f"cannot be decoded: {name}{f': {reason}' if reason else ''}")
    share = f"{len(names):,} of {len(source):,} images"
    if on_error == "fail":
        raise DataError(
            f"{source.path}: {share} cannot be decoded ({shortened(names)}); "
            "leave them out with --on_error skip (the others are done), or replace or remove them (then all are "
            "converted again)"
        )
    say(f"left out: {share}")


def _reasons(images: Images, numbers: Sequence[int], settings: Settings, page_size: int) -> Iterator[str]:
    """Yield why each image cannot be decoded. Stop early if decoding one ends the process."""
    if not numbers:
        return
    with (
        contextlib.suppress(LbsgdError),
        ProcessPool(1, partial(_make_job, images, settings, page_size)) as pool,
    ):
        for reason, _ in pool.results((number, images.member(number)) for number in numbers):
            yield reason


def _make_job(images: Images, settings: Settings, page_size: int) -> Job[Failed, str]:
    quiet_opencv()
    reader = images.reader()

    def reason(failed: Failed, _slot: memoryview) -> str:
        number, member = failed
        try:
            stored_image(reader.read(member), number, settings, page_size)
        except (ImageError, DataError) as error:
            return one_line(error)
        except MemoryError:
            return "not enough memory to decode it once more"
        return ""

    return reason
