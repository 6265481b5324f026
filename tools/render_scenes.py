"""python tools/render_scenes.py [--output_dir data/scenes] [--num_train 1024] [--num_val 200]

Renders scenes of scikit-learn's handwritten digits as a data set in COCO's format, for detectors on small machines. A
scene has 2 to 5 overlapping digits of 20 to 56 pixels on a noisy ground, with exact masks of their visible parts. Half
of the scenes are wide, half tall. Training scenes show the training digits of `tools/render_digits.py --num_val 261`,
validation scenes its validation digits, so that a classifier trained on the former has seen none of the latter.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from render_digits import NUM_IMAGES, appearing, validation_positions

from lbsgd.commands.flag_types import OneLineParser, path, positive
from lbsgd.disk import is_there
from lbsgd.errors import ConfigError, LbsgdError
from lbsgd.processes.ending import end_with_error

SIDES = ((112, 128), (128, 112))  # height and width
NUM_VAL_DIGITS = 261  # of lbsgd/experiments/data_sets/digits.py
SMALLEST, LARGEST = 20, 56  # pixels of a digit's side
FEWEST, MOST = 2, 5  # digits of a scene
INK = 96  # of 255; pixels this bright belong to a digit
SEEN = 0.5  # minimum share of a digit's ink that later digits leave visible
TRIES = 20


def render(output_dir: Path, num_train: int, num_val: int) -> None:
    """Write the data set, whole or not at all. A complete one of this size is left as it is."""
    if is_there(output_dir):
        found = {split: len(list(output_dir.glob(f"{split}/*.png"))) for split in ("train", "val")}
        if found != {"train": num_train, "val": num_val}:
            wrong = f"{output_dir} exists and does not hold {num_train} and {num_val} scenes"
            raise ConfigError(f"{wrong}; remove it or name another --output_dir")
        return
    with appearing(output_dir) as partial:
        from sklearn.datasets import load_digits

        digits = load_digits()
        by_class, validation = np.argsort(digits.target, kind="stable"), validation_positions(NUM_VAL_DIGITS)
        pools = {
            "train": [index for position, index in enumerate(by_class) if position not in validation],
            "val": [index for position, index in enumerate(by_class) if position in validation],
        }
        assert len(pools["train"]) + len(pools["val"]) == NUM_IMAGES
        (partial / "annotations").mkdir()
        for split, number in (("train", num_train), ("val", num_val)):
            write_split(partial, split, number, digits, pools[split])


def write_split(folder: Path, split: str, number: int, digits, pool: list[int]) -> None:
    from PIL import Image

    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in range(number):
        random = np.random.default_rng([split == "val", scene])
        height, width = SIDES[scene % 2]
        pixels, seen = draw(random, height, width, digits, pool)
        name = f"scene_{scene:05}.png"
        Image.fromarray(pixels).convert("RGB").save(folder / split / name)
        images.append({"id": scene + 1, "file_name": name, "height": height, "width": width})
        for label, mask in seen:
            number_of = len(annotations) + 1
            annotations.append(
                {"id": number_of, "image_id": scene + 1, "category_id": label + 1, **annotation_of(mask)}
            )
    content = {
        "info": {"description": "scenes of scikit-learn's digits, for lbsgd"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw(random: np.random.Generator, height: int, width: int, digits, pool: list[int]):
    """Return a scene, uint8 (height, width), and for each digit its label and the mask of its visible part."""
    canvas = random.normal(24, 8, (height, width))
    seen: list[tuple[int, np.ndarray, int]] = []  # label, visible part of the digit, number of all its ink pixels
    for _ in range(random.integers(FEWEST, MOST + 1)):
        for _ in range(TRIES):
            index = int(random.choice(pool))
            ink = placed(digits.images[index], random, height, width)
            mask = ink > INK
            if mask.any() and all((old & ~mask).sum() >= SEEN * whole for _, old, whole in seen):
                seen = [(label, old & ~mask, whole) for label, old, whole in seen]
                seen.append((int(digits.target[index]), mask, int(mask.sum())))
                canvas = np.where(mask, ink, np.maximum(canvas, ink * ~mask))
                break
    return np.clip(canvas, 0, 255).astype(np.uint8), [(label, mask) for label, mask, _ in seen]


def placed(digit: np.ndarray, random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return an 8x8 digit enlarged and put at a random place of an empty scene, values 0 ... 255."""
    from PIL import Image

    side = int(random.integers(SMALLEST, LARGEST + 1))
    grey = Image.fromarray(np.uint8(digit * (255 / 16))).resize((side, side), Image.Resampling.BICUBIC)
    top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    scene = np.zeros((height, width))
    scene[top : top + side, left : left + side] = np.asarray(grey)
    return scene


def annotation_of(mask: np.ndarray) -> dict:
    """Return COCO's box, area and run lengths (column by column, background first) of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff([0, *changes])
    rest = mask.size - counts.sum()
    lengths = [*map(int, counts), *([int(rest)] if rest else [])]
    outline = {"size": list(mask.shape), "counts": lengths}
    return {"bbox": [int(value) for value in box], "area": int(mask.sum()), "iscrowd": 0, "segmentation": outline}


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", type=path, default=Path("data/scenes"), help="default: data/scenes")
    parser.add_argument("--num_train", type=positive, default=1024, metavar="N", help="training scenes (default: 1024)")
    parser.add_argument("--num_val", type=positive, default=200, metavar="N", help="validation scenes (default: 200)")
    flags = parser.parse_args()
    try:
        render(flags.output_dir, flags.num_train, flags.num_val)
    except LbsgdError as error:
        end_with_error(error)
