"""python tools/draw_detections.py RUN --data_dir data/scenes [--output FILE] [--num_images 12] [--on_error skip]

Draws what a detector finds on the first validation images. Above are the known objects of each image, below the
detections with a score of at least 0.5, with their boxes, masks, classes and scores.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from lbsgd.commands.detect import add_val_split, only_split, weights_in
from lbsgd.commands.flag_types import OneLineParser, path, positive
from lbsgd.commands.trained_on import header_in, other_class
from lbsgd.config.plan import Plan
from lbsgd.data.coco_annotations import read_split
from lbsgd.data.coco_images import as_fractions, example_of, pixels_of
from lbsgd.errors import DataError, LbsgdError
from lbsgd.processes.ending import end_with_error
from lbsgd.report.picture import COLOURS, empty_picture, replace_picture
from lbsgd.report.run_log import read_run
from lbsgd.train.run import WEIGHTS_NAME

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
COLUMNS, LEAST_SCORE = 6, 0.5
ON_IMAGES = [*COLOURS[:-1], "#F0E442"]  # yellow in place of black, which a dark image hides


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("run", type=path, help="folder of a run that has ended: log.jsonl and weights.pt")
    parser.add_argument("--data_dir", type=path, required=True)
    add_val_split(parser)
    parser.add_argument("--num_images", type=positive, default=12)
    parser.add_argument("--output", type=path, help="default: RUN/detections.png")
    flags = parser.parse_args()
    output = flags.output or flags.run / "detections.png"
    try:
        task, plan = trained_as(flags.run)
        name = flags.val_split or only_split(flags.data_dir, "val")
        longer_side = plan.recipe.detection.longer_side
        split = read_split(flags.data_dir, name, flags.on_error, training=False, longer_side=longer_side)
        detector = detector_of(flags.run, task, plan, split)
        drawn = picture(detector, split, min(flags.num_images, len(split)))
        replace_picture(output, drawn)
    except LbsgdError as error:
        end_with_error(error)
    print(output)


def trained_as(run: Path):
    """Return a run's task and plan. Raises DataError if the run trained no detector, or has not ended."""
    from mask_rcnn import MaskRCNN
    from mask_rcnn_digits import SmallMaskRCNN

    header = read_run(run).header
    tasks = {task.name: task for task in (MaskRCNN, SmallMaskRCNN)}
    model = header["model"]
    if model not in tasks:
        raise DataError(f"{run} is a run of {model}, no detector: give one of {' or '.join(tasks)}")
    if not (run / WEIGHTS_NAME).is_file():
        raise DataError(f"{run / WEIGHTS_NAME}: no such file; a run writes it when it ends, and --resume lets it go on")
    return tasks[model], Plan.read(header["config"], 1, header["num_images"])


def detector_of(run: Path, task, plan: Plan, split):
    """Return a run's network with its weights, for evaluation. Raises DataError if its categories are others."""
    here = split.class_names
    if other := other_class(header_in(run).get("classes") or here, here, first_label=1):
        raise DataError(f"{other}: give --data_dir of the data that the run had")
    network = task(SimpleNamespace(val=split, backbone=lambda: None)).network(len(split.names), plan)
    weights = run / WEIGHTS_NAME
    try:
        network.load_state_dict(weights_in(weights))
    except RuntimeError:  # torch lists each size that differs
        words = f"{weights} is not of a {task.name} for the {len(split.names)} categories of {split.name}"
        raise DataError(f"{words}: give --data_dir of the data that the run had") from None
    return network.eval()


def picture(detector, split, number: int):
    rows = 2 * -(-number // COLUMNS)
    drawn = empty_picture(figsize=(2.2 * COLUMNS, 2.2 * rows), layout="constrained")
    axes = drawn.subplots(rows, COLUMNS, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    names = dict(enumerate(split.class_names, start=1))
    for position in range(number):
        image = split.images[position]
        pixels, target = as_fractions(pixels_of(image)), example_of(image, split.label_of, 0, flip=False).target
        above, column = 2 * (position // COLUMNS), position % COLUMNS
        known = zip(target["boxes"], target["masks"], (names[int(label)] for label in target["labels"]), strict=True)
        show(axes[above][column], pixels, known, "known")
        show(axes[above + 1][column], pixels, found_in(detector, pixels, names), "found")
    return drawn


@torch.no_grad()
def found_in(detector, pixels: torch.Tensor, names: dict[int, str]):
    [found] = detector([pixels])
    for box, mask, label, score in zip(*(found[key] for key in ("boxes", "masks", "labels", "scores")), strict=True):
        if score >= LEAST_SCORE:
            yield box, mask[0] > 0.5, f"{names[int(label)]} {100 * float(score):.0f}"


def show(axes, pixels: torch.Tensor, objects, title: str) -> None:
    axes.imshow(pixels.permute(1, 2, 0))
    axes.set_title(title, fontsize="x-small", loc="left", color="dimgrey")
    axes.set_anchor("NW")  # images of other shapes begin at the same edges
    for number, (box, mask, words) in enumerate(objects):
        colour = ON_IMAGES[number % len(ON_IMAGES)]
        left, top, right, bottom = box.tolist()
        axes.add_patch(rectangle(left, top, right - left, bottom - top, colour))
        if min(mask.shape) > 1:  # a contour needs two pixels each way
            axes.contour(mask.float(), levels=[0.5], colors=colour, linewidths=0.8)
        name_object(axes, words, (left - 0.5, max(top - 0.5, 0)), colour, zorder=3 + 1 / (1 + number))


def name_object(axes, words: str, corner: tuple[float, float], colour: str, zorder: float) -> None:
    """Write black words on the box's colour at its corner, inside the picture. The first, surest one lies above all."""
    patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
    look = {"fontsize": 6, "ha": "left", "va": "top", "color": "black", "bbox": patch, "zorder": zorder}
    axes.annotate(words, corner, (0.8, -0.8), textcoords="offset points", **look, parse_math=False)  # may hold dollars


def rectangle(left: float, top: float, width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1)


if __name__ == "__main__":
    main()
