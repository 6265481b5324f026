"""Where a run's images come from: FFCV files, or seeded random images in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lbsgd.config.plan import Plan
from lbsgd.data.beton import BetonFile
from lbsgd.data.fake import FakeEval, FakeImages
from lbsgd.data.folder import ImageNetData, ValData
from lbsgd.data.native.library import library
from lbsgd.data.read_ahead import ReadFrom, read_whole
from lbsgd.data.share import Cut, EvalData, Pixels, Share, TrainData
from lbsgd.errors import missing_ffcv
from lbsgd.processes.environment import Processes
from lbsgd.report.lines import say_fact

FAKE_CLASSES, FAKE_VAL_IMAGES = 1000, 256
OURS, FFCVS = "lbsgd's own", "FFCV's, because lbsgd was installed without a C compiler or libjpeg's headers"


class Images(NamedTuple):
    """This process's share of the images to train on, if the run trains, and to evaluate on.

    among: the classes that a classifier may answer with in an evaluation, None for all
    """

    train: TrainData | None
    val: EvalData
    among: Sequence[int] | None = None


def cut_of(plan: Plan, processes: Processes) -> Cut:
    """Return how a plan cuts its epochs for this process."""
    return Cut(
        seed=plan.recipe.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        share=Share(processes.rank, plan.world_size),
    )


@dataclass(frozen=True)
class ImageSource:
    """A run's images, described by `ffcv_files`, `fake_images` or `coco_source.coco_files`.

    num_classes       number of labels
    class_names       what the labels mean, in their order; None if unknown
    fingerprint       the same for the same images, and only for them
    place             where they are, as named on the screen and in the log
    waiting_advice    what decodes, and which flags help if training waits for it; only the recipe knows these
    open              opens this process's share, in batches of the given form; the stack closes it
    decoder           which code decodes the images, if there are several whose pixels differ; else empty
    errors            among which classes errors are counted, if not among all; else empty
    """

    num_classes: int
    class_names: list[str] | None
    fingerprint: str
    place: str
    waiting_advice: str
    open: Callable[[Plan, Processes, Pixels, ExitStack], Images]
    decoder: str = ""
    errors: str = ""


def ffcv_files(data: ImageNetData | ValData, threads: int, in_memory: bool = False) -> ImageSource:
    """Return train.beton and val.beton, decoded by `threads` threads. Without `library`, FFCV itself decodes.

    data         only val.beton's if nothing is trained
    in_memory    whether to read the whole files into memory while training begins
    """
    decoder = OURS if library() else FFCVS
    advice = (
        f"{threads} loader threads per process: give more --loader_threads if cores are idle, --in_memory "
        "if the disk is slow, or convert with a smaller --max_side"
    )
    if decoder == FFCVS:
        advice = (
            f"the decoder is {FFCVS}: install libjpeg-turbo's header and a C compiler, and then lbsgd again; "
            "its own decoder is about 2.5 times as fast"
        )
    place, errors = str(data.val.path.parent), ""
    if data.val_classes:
        errors = f"among the {len(data.val_classes):,} of {data.num_classes:,} classes that have validation images"
    opened = partial(open_files, data, threads, in_memory)
    return ImageSource(data.num_classes, data.classes, data.fingerprint, place, advice, opened, decoder, errors)


def open_files(
    data: ImageNetData | ValData,
    threads: int,
    in_memory: bool,
    plan: Plan,
    processes: Processes,
    pixels: Pixels,
    stack: ExitStack,
) -> Images:
    """Open this process's share of train.beton, if data has it, and of val.beton.

    Raises DataError if FFCV is missing, and ConfigError if in_memory is asked for but the files do not fit.
    """
    try:
        from lbsgd.data.loaders import EvalLoader, TrainLoader  # late, because importing FFCV takes seconds
    except ImportError as error:
        raise missing_ffcv(error) from error
    augmentation, cut = plan.recipe.augmentation, cut_of(plan, processes)
    train = None
    if isinstance(data, ImageNetData):
        train = TrainLoader(
            data.train,
            cut,
            from_disk=is_read_from_disk(data.train, in_memory, processes),
            crop_scale=(augmentation.crop_scale[0], augmentation.crop_scale[1]),
            flip=augmentation.flip,
            threads=threads,
            pixels=pixels,
        )
        stack.enter_context(closing(train))
    val = EvalLoader(
        data.val,
        from_disk=is_read_from_disk(data.val, in_memory, processes),
        batch=plan.micro_batch,
        threads=threads,
        share=cut.share,
        pixels=pixels,
    )
    stack.enter_context(closing(val))
    return Images(train, val, data.val_classes)


def is_read_from_disk(file: BetonFile, in_memory: bool, processes: Processes) -> bool:
    """Choose where to read the file from, and print it. With in_memory, one process of each host reads it whole."""
    source = ReadFrom.choose(file.path, in_memory)
    if processes.is_rank_0:
        say_fact(file.path.stem, f"from {source.kind}: {source.reason}")
    if source.kind == "memory" and processes.local_rank == 0:
        # In a thread, because a slow disk would hold up training for longer than the other hosts' guards wait.
        threading.Thread(target=read_whole, args=(file.path,), name="lbsgd read whole", daemon=True).start()
    return source.kind == "disk"


def fake_images() -> ImageSource:
    """Return seeded random images, as many as the plan says (`--fake_data`)."""

    def opened(plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        cut = cut_of(plan, processes)
        train = FakeImages(plan.num_images, FAKE_CLASSES, cut, pixels)
        val = FakeEval(
            FAKE_VAL_IMAGES, FAKE_CLASSES, seed=cut.seed, batch=cut.micro_batch, share=cut.share, pixels=pixels
        )
        return Images(train, val)

    place = "seeded random images (--fake_data)"
    return ImageSource(FAKE_CLASSES, None, "fake", place, "each process draws its own", opened)
