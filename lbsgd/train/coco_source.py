"""A run's images from a COCO data set. A detector's recipe gives this to the session in place of FFCV files."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lbsgd.config.plan import Plan
from lbsgd.data.coco_annotations import CocoSplit
from lbsgd.data.share import Pixels
from lbsgd.processes.environment import Processes
from lbsgd.train.images import Images, ImageSource, cut_of


def coco_files(folder: Path, train: CocoSplit, val: CocoSplit, loader_workers: int) -> ImageSource:
    """Return a folder's two splits, loaded by `loader_workers` workers per process (with 0, by the process itself)."""
    if loader_workers:
        advice = (
            f"{loader_workers} loader workers per process: give more --loader_workers if cores are idle; a faster disk "
            "or smaller images help, too"
        )
    else:
        advice = "each process loads its own between its updates: give --loader_workers if cores are idle"

    def opened(plan: Plan, processes: Processes, pixels: Pixels, stack: ExitStack) -> Images:
        from lbsgd.data.coco_images import CocoEval, CocoTrain

        cut, device = cut_of(plan, processes), pixels.device
        n, flip = plan.per_worker_batch, plan.recipe.augmentation.flip
        of_train = CocoTrain(train, cut, per_forward=n, flip=flip, loader_workers=loader_workers, device=device)
        return Images(of_train, CocoEval(val, loader_workers=loader_workers, device=device, share=cut.share))

    # Depends on both annotation files and on how many images are usable.
    fingerprint = f"{train.fingerprint} {len(train)} {val.fingerprint} {len(val)}"
    return ImageSource(len(train.names), train.class_names, fingerprint, str(folder), advice, opened)
