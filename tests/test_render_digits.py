"""tools/render_digits.py: real data without a download, in a tree like ImageNet's."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from lbsgd.errors import ConfigError


def test_the_split_is_fixed_and_has_each_digit_s_share(digits_tree):
    counts = {
        split: [len(list((digits_tree / split / str(digit)).iterdir())) for digit in range(10)]
        for split in ("train", "val")
    }
    assert {split: sum(count) for split, count in counts.items()} == {"train": 1437, "val": 360}
    assert all(35 <= count <= 37 for count in counts["val"])
    train, val = ({path.name for path in digits_tree.glob(f"{split}/*/*")} for split in ("train", "val"))
    assert not train & val


def test_the_test_crop_keeps_the_whole_digit(digits_tree):
    for path in sorted(digits_tree.glob("val/*/*"))[::40]:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 40))
            pixels = np.asarray(image).copy()
        assert pixels.max() > 200
        pixels[3:-3, 3:-3] = 0  # 7/8 of 40 cuts off 2.5 pixels on each side
        assert pixels.max() < 30  # what JPEG adds to black


def test_of_two_that_begin_at_once_the_second_waits_and_leaves_the_first_one_s_folder(render_digits, tmp_path):
    """Two grids on one data set make it. One failed, or deleted files that the other was writing."""
    folder, order = tmp_path / "data/digits", []

    def make(number):
        with render_digits.appearing(folder) as partial:
            order.append(number)
            time.sleep(0.3)
            assert not any(partial.iterdir())
            (partial / f"of {number}").touch()
            order.append(number)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make, range(2)))
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert [path.name for path in folder.iterdir()] == [f"of {order[0]}"]
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_a_complete_tree_is_left_and_an_incomplete_one_refused(render_digits, digits_tree, tmp_path):
    before = digits_tree.stat().st_mtime_ns
    render_digits.render(digits_tree)
    assert digits_tree.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="is not the complete tree of digits"):
        render_digits.render(tmp_path)
