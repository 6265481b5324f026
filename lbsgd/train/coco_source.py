"""A run's images from a COCO data set: a detector's recipe gives the session this in place of FFCV files."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from lbsgd.config.plan import Plan
from lbsgd.data.coco_annotations import Split
from lbsgd.data.share import Pixels
from lbsgd.processes.environment import Processes
from lbsgd.train.images import Images, cut_of


@dataclass(frozen=True)
class CocoSource:
    """The training and the validation split of a folder, loaded by `workers` processes (in this one with 0)."""

    folder: str
    train: Split
    val: Split
    workers: int

    @property
    def num_classes(self) -> int:
        return len(self.train.names)

    @property
    def class_names(self) -> list[str]:
        return self.train.class_names

    @property
    def fingerprint(self) -> str:
        """Depends on both files of annotations and on how many images could be used."""
        return f"{self.train.fingerprint} {len(self.train)} {self.val.fingerprint} {len(self.val)}"

    @property
    def place(self) -> str:
        return self.folder

    @property
    def decoder(self) -> str:
        return ""

    @property
    def waiting_advice(self) -> str:
        if not self.workers:
            return "each process loads its own between its updates: give --loader_workers if cores are idle"
        return (
            f"{self.workers} loader workers per process: give more --loader_workers if cores are idle; a faster disk "
            "or smaller images help, too"
        )

    def open(self, plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        from lbsgd.data.coco_images import CocoEval, CocoTrain

        cut = cut_of(plan, processes)
        train = CocoTrain(
            self.train,
            cut,
            per_forward=plan.per_worker_batch,
            flip=plan.recipe.augmentation.flip,
            workers=self.workers,
            device=pixels.device,
        )
        return Images(train, CocoEval(self.val, workers=self.workers, device=pixels.device, share=cut.share))
