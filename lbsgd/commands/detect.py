"""The command behind a detector's recipe: data in COCO's format, and the classifier that gives its first weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.commands.flag_types import named, natural, reword
from lbsgd.commands.plan_lines import SAME_IMAGES
from lbsgd.commands.recipe_flags import with_flags
from lbsgd.commands.train import Request, run_recipe
from lbsgd.commands.trained_on import header_in, other_class
from lbsgd.data.coco_annotations import (
    DOWNLOAD,
    CocoSplit,
    OnError,
    left_out_words,
    names_by_label,
    read_split,
    require_same_categories,
    without_images,
)
from lbsgd.data.coco_file import names_of, read_annotations
from lbsgd.disk import is_there
from lbsgd.errors import ConfigError, DataError
from lbsgd.processes.ending import found_by_rank_0, from_rank_0
from lbsgd.report.lines import say_fact, warn
from lbsgd.report.run_log import LOG_NAME, read_run, require_reportable
from lbsgd.train.checkpoint_names import named_at_start
from lbsgd.train.run import CHECKPOINTS
from lbsgd.train.weights import unwrapped, weights_in

if TYPE_CHECKING:
    from lbsgd.train.images import ImageSource
    from lbsgd.train.task import Task


REFUSED = ("resolution", "compile", "cuda_graphs", "deterministic")  # flags of classifiers
MOST_WORKERS = 8  # each epoch and each evaluation starts new ones


def main(task_of: Callable[[DetectionRequest], Task], description: str) -> None:
    """Run a detector's recipe. `task_of` makes its task from the flags and the data (`commands.train.run_recipe`)."""
    flags = with_flags(description, add_data)
    reword(flags, dict.fromkeys(REFUSED) | {"deepspeed_config": "the recipe, a file of ds_configs/detection"})
    run_recipe(flags, DetectionRequest, task_of)


class DetectionRequest(Request):
    """The flags of a detector, resolved to plan, data and backbone.

    Raises LbsgdError if the flags, the JSON or the data are wrong.
    """

    train: CocoSplit
    val: CocoSplit

    def __init__(self, flags: argparse.Namespace):
        if flags.resolution:  # checked before the plan's own rule, which would call it a key of the JSON
            raise ConfigError("--resolution is for classifiers: use --set lbsgd.detection.shorter_side=PIXELS")
        super().__init__(flags)

    def open_data(self) -> int | None:
        flags = self.flags
        if not self.plan.recipe.detection:
            raise ConfigError(
                f"{self.plan.name}.json trains no detector: it has no lbsgd.detection block; take one of "
                "ds_configs/detection, or train a classifier with recipes/resnet50.py"
            )
        if flags.compile or flags.cuda_graphs:
            flag = "--compile" if flags.compile else "--cuda_graphs"
            raise ConfigError(
                f"{flag} is for classifiers: a detector's images differ in size, and a block is kept for one size"
            )
        if flags.deterministic:
            raise ConfigError("--deterministic is for classifiers: on a GPU RoIAlign adds gradients in any order")
        self.require_backbone()
        self.folder = Path(flags.data_dir or os.environ.get("COCO_DIR") or "data/coco")
        train = None if flags.evaluate_only else self.read("train", flags.train_split)
        self.val = self.read("val", flags.val_split)
        if train:
            require_same_categories(train, self.val)
        self.train = train or without_images(self.val)
        if self.processes.is_rank_0:
            self.print_splits()
        return len(self.train) or None

    def read(self, kind: str, name: str | None) -> CocoSplit:
        """Read the split that a flag names, or the only one."""
        name, sides = name or only_split(self.folder, kind), self.plan.recipe.detection
        assert sides
        training, longer_side = kind == "train", sides.longer_side
        return read_split(self.folder, name, self.flags.on_error, training=training, longer_side=longer_side)

    def print_splits(self) -> None:
        for split in filter(len, (self.train, self.val)):
            print_split(split)
        self.warn_of(self.train.fingerprint, self.train.name)

    def warn_of(self, training_images: str, name: str) -> None:
        """Warn if the training images are also the validation images: if the files' fingerprints begin alike."""
        if training_images.split()[:1] == self.val.fingerprint.split()[:1]:
            warn(SAME_IMAGES.format(f"the split {self.val.name}", name))

    def compare_with_training(self, folder: Path) -> None:
        """Raise DataError if the weights in a run's folder know other categories. Warn if they saw these images.

        If no log names the categories, take the training annotations if they can be read. The weights may have been
        trained on other data, so other categories are then only a warning.
        """
        header = header_in(folder)
        if logged := header.get("classes"):
            trained, images, told_by = logged, header.get("data") or "", "training"
        else:
            try:
                told_by = self.flags.train_split or only_split(self.folder, "train")
                path = self.folder / "annotations" / f"instances_{told_by}.json"
                content, images = read_annotations(path)
                trained = names_by_label(names_of(path, content["categories"]))
            except DataError:
                return
        if other := other_class(trained, self.val.class_names, first_label=1, there=told_by):
            words = f"{other}: instances_{self.val.name}.json has other categories"
            if logged:
                raise DataError(f"{words} than the training of {folder}; evaluate on images of that data set")
            warn(f"{words} than {told_by}; AP says nothing if the weights were trained on that")
        self.warn_of(images, f"the training of {folder}" if logged else told_by)

    def require_backbone(self) -> None:
        """Raise ConfigError if a run would begin from random weights, and DataError if the backbone's file is missing.

        Only rank 0 reads the file, so other hosts need not have it.
        """
        weights = self.flags.backbone_weights
        if weights is None and not self.has_weights():
            missing = ConfigError(
                "--backbone_weights is missing: a detector starts from a classifier, such as runs/8k/weights.pt"
            )
            missing.of_rank_0 = self.flags.resume  # without --resume every process raises it
            raise missing
        if weights is None or not self.processes.is_rank_0:
            return
        with found_by_rank_0():
            if not os.path.isfile(weights):  # also false if the folder may not be entered
                raise DataError(f"--backbone_weights {weights}: cannot be read; give the weights.pt of a run")
            self.started_from = trained_as(Path(weights))

    def has_weights(self) -> bool:
        """Whether a checkpoint brings all weights. Only rank 0 looks, because other hosts may not have the folder."""
        flags = self.flags
        if flags.evaluate_only or not flags.resume or not self.processes.is_rank_0:
            return flags.evaluate_only or flags.resume
        return bool(named_at_start(self.output_dir / CHECKPOINTS))

    def images(self) -> ImageSource:
        from lbsgd.train.coco_source import coco_files

        given = self.flags.loader_workers
        loader_workers = min(MOST_WORKERS, max(1, self.processes.cores - 1)) if given is None else given
        return coco_files(self.folder, self.train, self.val, loader_workers)

    def backbone(self) -> dict | None:
        """Return the classifier's weights from rank 0's file. All processes must call this after they have met.

        DeepSpeed would make only the parameters equal on all processes. Batch norm's frozen statistics are buffers.
        Raises DataError if the file holds no weights.
        """
        path = self.flags.backbone_weights
        return None if path is None else from_rank_0(lambda: unwrapped(weights_in(Path(path))))


def only_split(folder: Path, kind: str) -> str:
    """Return the name of the only split of a kind. Raises DataError if there is none, or several."""
    prefix = "instances_"
    annotations = folder / "annotations"
    found = sorted(path.stem for path in annotations.glob(f"{prefix}{kind}*.json")) if is_there(annotations) else []
    if len(found) != 1:
        several = f"{', '.join(found)}: name one by --{kind}_split" if found else f"is not there; {DOWNLOAD}"
        raise DataError(f"{folder}/annotations/{prefix}{kind}*.json {several}")
    return found[0].removeprefix(prefix)


def trained_as(weights: Path) -> str:
    """Return how the weights were trained by the log next to them, the same for every seed; else the file's name."""
    if not is_there(weights.parent / LOG_NAME):
        return weights.name
    try:
        run = read_run(weights.parent)
        require_reportable(run)
    except DataError as error:  # another program may write a log of this name, too
        warn(f"{error}; this run's log names its backbone {weights.name}")
        return weights.name
    lr = run.header["schedule"]["reference_lr"]
    return f"{run.header['model']}, kn = {run.header['global_batch']}, lr {lr:g}, {run.epochs_done:g} epochs"


def print_split(split: CocoSplit) -> None:
    what = [f"{len(split):,} images, {len(split.names)} categories", left_out_words(split.left_out)]
    say_fact(split.name, "; ".join(filter(None, what)))


def add_data(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    add(
        "--data_dir",
        type=named,
        metavar="DIR",
        help="annotations/ and the images' folders; else $COCO_DIR, else data/coco",
    )
    add(
        "--train_split",
        type=named,
        metavar="NAME",
        help="such as train2017 (default: the one that annotations/ has; --evaluate_only reads no images of it)",
    )
    add_val_split(flags)
    add(
        "--backbone_weights",
        type=named,
        metavar="FILE",
        help="weights.pt of the classifier that gives the backbone",
    )
    workers = f"loader workers per process, 0 for none (default: cores / processes - 1, at most {MOST_WORKERS})"
    add("--loader_workers", "--loader_threads", type=natural, metavar="N", help=workers)


def add_val_split(flags: argparse.ArgumentParser) -> None:
    """Add the flags that choose the validation images. `tools/draw_detections.py` has them, too."""
    add = flags.add_argument
    add("--val_split", type=named, metavar="NAME", help="such as val2017 (default: the one that annotations/ has)")
    on_error: tuple[OnError, ...] = ("fail", "skip")
    help_text = "what to do about a missing image or a broken annotation (default: %(default)s)"
    add("--on_error", choices=on_error, default="fail", help=help_text)
