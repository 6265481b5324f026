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

FAKE_CLASSES, FAKE_VAL_IMAGES = 1000, 512
OURS, FFCVS = "lbsgd's own", "FFCV's, because lbsgd was installed without a C compiler or libjpeg's headers"


class Images(NamedTuple):
    """This process's share of the images to train on, if the run trains, and to evaluate on.

    among: the classes that a classifier may answer with in an evaluation; None for all
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
    """The images of a run: `ffcv_files`, `fake_images` and `coco_source.coco_files` describe theirs.

    num_classes       how many labels there are
    class_names       what the labels mean, in their order; None if unknown
    fingerprint       the same for the same images, and only for them
    place             where they are, as screen and log name it
    waiting_advice    what decodes, and which flags help if training waits for it; only its recipe knows these
    open              opens this process's share, in batches of the form that is given; the stack closes it
    decoder           which code makes pixels of them, if there are several that differ; else empty
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
    """Return train.beton and val.beton, decoded by `threads` threads; without `library` FFCV itself decodes.

    data         of val.beton alone if nothing is trained
    in_memory    read the files whole while training begins
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

    Raises DataError if FFCV is missing, and ConfigError if in_memory is asked for and does not fit.
    """
    try:
        from lbsgd.data.loaders import EvalLoader, TrainLoader  # imports FFCV: seconds that fake data need not wait
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
    """Choose where the file is read from and print it; with in_memory one process of each host reads it whole."""
    source = ReadFrom.choose(file.path, in_memory)
    if processes.is_rank_0:
        say_fact(file.path.stem, f"from {source.kind}: {source.reason}")
    if source.kind == "memory" and processes.local_rank == 0:
        # Beside training, which a slow disk would hold up for longer than the guards of the other hosts wait.
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
