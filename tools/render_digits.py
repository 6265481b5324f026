"""python tools/render_digits.py [--output_dir data/digits] [--num_val 360]

Renders the handwritten digits that come with scikit-learn, 1,797 grey images of 8x8 pixels, as a tree of JPEGs like
ImageNet's: train/<0..9>/*.JPEG with 1,437 images and val/<0..9>/*.JPEG with 360. This is real data without a download.
`lbsgd reproduce ... digits` uses 1,536 and 261, so that global batches up to 24 x 32 leave no image of an epoch out.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lbsgd.commands.flag_types import OneLineParser, path, positive
from lbsgd.disk import alone_in, is_there
from lbsgd.errors import ConfigError, LbsgdError
from lbsgd.processes.ending import end_with_error

SIDE = 40  # pixels of a JPEG
MARGIN = 4  # black pixels around the digit: a centre crop of 7/8 of the side cuts off only 2.5
NUM_IMAGES, NUM_VAL = 1797, 360


def render(output_dir: Path, num_val: int = NUM_VAL) -> None:
    """Write the tree with num_val validation images, whole or not at all. A complete tree is left as it is.

    Raises ConfigError if the folder holds something else or cannot be written.
    """
    if is_there(output_dir):
        found = {split: len(list(output_dir.glob(f"{split}/*/*.JPEG"))) for split in ("train", "val")}
        if found != {"train": NUM_IMAGES - num_val, "val": num_val}:
            wrong = f"{output_dir} exists and is not the complete tree of digits"
            raise ConfigError(f"{wrong}; remove it or name another --output_dir")
        return
    with appearing(output_dir) as partial:
        from sklearn.datasets import load_digits  # late: it takes a second, and complete trees and refusals need none

        digits = load_digits()
        # At equal distances among the images sorted by class: the same share of each class, without randomness.
        by_class, validation = np.argsort(digits.target, kind="stable"), validation_positions(num_val)
        for position, index in enumerate(by_class):
            split = "val" if position in validation else "train"
            folder = partial / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            _save(digits.images[index], folder / f"digit_{index:04}.JPEG")


@contextlib.contextmanager
def appearing(output_dir: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name once it is complete. Raises ConfigError if it cannot be written.

    Two processes may begin at once, as two grids on one data set do: they take turns, and the first one's folder stays.
    """
    partial = output_dir.with_name(output_dir.name + ".partial")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(output_dir.parent):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial
                if not output_dir.is_dir():
                    partial.rename(output_dir)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{output_dir} cannot be written ({error.strerror}); name another --output_dir") from None


def validation_positions(num_val: int) -> set[int]:
    """Return num_val positions at equal distances, including the first: every fifth image for 360."""
    return {number * (NUM_IMAGES - 2) // max(1, num_val - 1) for number in range(num_val)}


def _save(digit: np.ndarray, file: Path) -> None:
    """Write an 8x8 image with values 0 ... 16 as a JPEG of SIDE x SIDE pixels in RGB."""
    from PIL import Image, ImageOps

    grey = Image.fromarray(np.uint8(digit * (255 / 16)))
    side = SIDE - 2 * MARGIN
    enlarged = grey.resize((side, side), Image.Resampling.BICUBIC)
    ImageOps.expand(enlarged, MARGIN).convert("RGB").save(file, "JPEG", quality=95)


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", type=path, default=Path("data/digits"), help="default: data/digits")
    parser.add_argument(
        "--num_val", type=positive, default=NUM_VAL, metavar="N", help="validation images (default: 360)"
    )
    flags = parser.parse_args()
    if not flags.num_val < NUM_IMAGES - 1:
        parser.error(f"--num_val {flags.num_val}: there are {NUM_IMAGES} images; leave some for training")
    try:
        render(flags.output_dir, flags.num_val)
    except LbsgdError as error:
        end_with_error(error)
