"""Where a run's images come from: FFCV files, or seeded random images in their place."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    """This process's share of the images to train on, if the run trains, and to evaluate on."""

    train: TrainData | None
    val: EvalData


def cut_of(plan: Plan, processes: Processes) -> Cut:
    """Return how a plan cuts its epochs for this process."""
    return Cut(
        seed=plan.recipe.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        share=Share(processes.rank, plan.world_size),
    )


class ImageSource(Protocol):
    """The images of a run, whatever they are: `FfcvFiles` and `FakeImageSource` are such.

    num_classes    how many labels there are
    class_names    what the labels mean, in their order; None if unknown
    fingerprint    the same for the same images, and only for them
    place          where they are, for the screen and the log
    decoder        which code makes pixels of them, if there are several that differ; else empty
    waiting_advice    what decodes, and which flags help if training waits for it; only its recipe knows these
    """

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def decoder(self) -> str: ...

    @property
    def waiting_advice(self) -> str: ...

    def open(self, plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        """Open this process's share of the training and validation images; `stack` closes them.

        pixels: the form of the batches.
        """
        ...


@dataclass(frozen=True)
class FfcvFiles:
    """train.beton and val.beton, decoded by `threads` threads; in_memory reads them whole while training begins.

    data: of val.beton alone if nothing is trained
    """

    data: ImageNetData | ValData
    threads: int
    in_memory: bool = False

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.data.classes

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def place(self) -> str:
        return str(self.data.val.path.parent)

    @property
    def decoder(self) -> str:
        return OURS if library() else FFCVS

    @property
    def waiting_advice(self) -> str:
        if self.decoder == FFCVS:
            return (
                f"the decoder is {FFCVS}: install libjpeg-turbo's header and a C compiler, and then lbsgd again; "
                "its own decoder is 2.6 times as fast"
            )
        return (
            f"{self.threads} loader threads per process: give more --loader_threads if cores are idle, --in_memory "
            "if the disk is slow, or convert with a smaller --max_side"
        )

    def open(self, plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        """Raise DataError if FFCV is missing, ConfigError if in_memory is asked for and a file does not fit."""
        try:
            from lbsgd.data.loaders import EvalLoader, TrainLoader  # imports FFCV: seconds that fake data need not wait
        except ImportError as error:
            raise missing_ffcv(error) from error
        augmentation, cut = plan.recipe.augmentation, cut_of(plan, processes)
        train = None
        if isinstance(self.data, ImageNetData):
            train = TrainLoader(
                self.data.train,
                cut,
                from_disk=self.is_read_from_disk(self.data.train, processes),
                crop_scale=(augmentation.crop_scale[0], augmentation.crop_scale[1]),
                flip=augmentation.flip,
                threads=self.threads,
                pixels=pixels,
            )
            stack.enter_context(closing(train))
        val = EvalLoader(
            self.data.val,
            from_disk=self.is_read_from_disk(self.data.val, processes),
            batch=plan.micro_batch,
            threads=self.threads,
            share=cut.share,
            pixels=pixels,
        )
        stack.enter_context(closing(val))
        return Images(train, val)

    def is_read_from_disk(self, file: BetonFile, processes: Processes) -> bool:
        """Choose where the file is read from and print it; with in_memory one process of each host reads it whole."""
        source = ReadFrom.choose(file.path, self.in_memory)
        if processes.is_rank_0:
            say_fact(file.path.stem, f"from {source.kind}: {source.reason}")
        if source.kind == "memory" and processes.local_rank == 0:
            # Beside training, which a slow disk would hold up for longer than the guards of the other hosts wait.
            threading.Thread(target=read_whole, args=(file.path,), name="lbsgd read whole", daemon=True).start()
        return source.kind == "disk"


@dataclass(frozen=True)
class FakeImageSource:
    """Seeded random images, as many as the plan says (`--fake_data`)."""

    num_classes: int = FAKE_CLASSES
    class_names: None = None
    fingerprint: str = "fake"
    place: str = "seeded random images (--fake_data)"
    decoder: str = ""
    waiting_advice: str = "each process draws its own"

    def open(self, plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        cut = cut_of(plan, processes)
        train = FakeImages(plan.num_images, self.num_classes, cut, pixels)
        val = FakeEval(
            FAKE_VAL_IMAGES, self.num_classes, seed=cut.seed, batch=cut.micro_batch, share=cut.share, pixels=pixels
        )
        return Images(train, val)
