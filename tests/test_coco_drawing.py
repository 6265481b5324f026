"""tools/draw_detections.py draws any data set that a run can be evaluated on."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from tool_modules import load_tool

from lbsgd.errors import DataError
from lbsgd.report.picture import empty_picture


@pytest.fixture(scope="module")
def tool():
    return load_tool("draw_detections")


@pytest.fixture
def scenes(tmp_path):
    """Scenes whose first validation image has no objects, and whose second has only crowds."""
    folder = tmp_path / "scenes"
    load_tool("render_scenes").render(folder, 2, 3)
    path = folder / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 1]
    for each in content["annotations"]:
        each["iscrowd"] = int(each["image_id"] == 2)
    path.write_text(json.dumps(content))
    return folder


def blind(images):
    """Replaces the detector, and finds nothing."""
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    return [{**empty, "masks": torch.zeros(0, 1, *image.shape[1:])} for image in images]


def raise_it(error):
    raise error


@pytest.fixture
def draw(tool, scenes, tmp_path, monkeypatch):
    """Return a function that runs the tool with flags on a run with a blind detector and returns the picture's size."""
    monkeypatch.setattr(tool, "detector_of", lambda *_: blind)
    monkeypatch.setattr(tool, "end_with_error", raise_it)

    def drawn(*flags, longer_side=128):
        sizes = SimpleNamespace(recipe=SimpleNamespace(detection=SimpleNamespace(longer_side=longer_side)))
        monkeypatch.setattr(tool, "trained_as", lambda run: (None, sizes))
        arguments = ["draw_detections.py", str(tmp_path), "--data_dir", str(scenes), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        tool.main()
        with Image.open(tmp_path / "detections.png") as picture:
            return picture.size

    return drawn


def test_images_without_objects_or_with_crowds_only_are_drawn(draw):
    assert draw("--num_images", "3") > (0, 0)


def test_names_lie_inside_the_picture_on_colours_that_a_dark_image_shows(tool):
    picture = empty_picture()
    axes = picture.subplots()
    mask = torch.zeros(40, 40)
    objects = [(torch.tensor([left, 0.0, left + 9.0, 9.0]), mask, f"cat {left:.0f}") for left in range(0, 28, 4)]
    tool.show(axes, torch.zeros(3, 40, 40), objects, "found")
    picture.draw_without_rendering()
    frame = axes.get_window_extent()
    assert all(frame.y1 >= words.get_window_extent().y1 - 1 for words in axes.texts)
    assert [words.get_text() for words in sorted(axes.texts, key=lambda words: -words.zorder)][0] == "cat 0"
    shades = [sum(to_rgb(box.get_edgecolor())) for box in axes.patches]
    assert len(shades) == 7 and min(shades) > 1


def test_an_image_too_thin_for_the_runs_sizes_is_refused_as_in_the_run(draw):
    with pytest.raises(DataError, match="detection.longer_side, 1"):
        draw(longer_side=1)


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_images_that_cannot_be_drawn_is_refused(draw, number, capsys):
    with pytest.raises(SystemExit) as ended:
        draw("--num_images", number)
    assert ended.value.code == 2
    assert f"argument --num_images: {number!r} is not a whole number of at least 1" in capsys.readouterr().err


def test_a_set_that_training_skipped_parts_of_is_drawn_by_the_same_flag(draw, tool, scenes, monkeypatch):
    def ended(error):
        raise error

    monkeypatch.setattr(tool, "end_with_error", ended)
    (scenes / "val" / "scene_00000.png").unlink()
    with pytest.raises(DataError, match="scene_00000.png does not exist.*--on_error skip"):
        draw()
    assert draw("--on_error", "skip") > (0, 0)


def test_weights_that_are_cut_short_are_one_line(tool, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"weight": torch.ones(1000)}, whole)
    weights = shutil.copy(whole, tmp_path / "weights.pt")
    with open(weights, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="weights.pt cannot be read as weights"):
        tool.weights_in(weights)


def test_names_with_dollars_and_an_image_of_one_row_are_drawn(draw, scenes):
    path = scenes / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["name"] = r"US$\bad$"
    low = content["images"][0]
    low |= {"height": 1, "width": 2}
    Image.new("RGB", (2, 1)).save(scenes / "val" / low["file_name"])
    outline = {"size": [1, 2], "counts": [0, 2]}
    box = {"id": 999, "image_id": low["id"], "category_id": 1, "bbox": [0, 0, 2, 1], "segmentation": outline}
    content["annotations"].append(box)
    path.write_text(json.dumps(content))
    assert draw()


def test_a_set_with_other_names_than_the_run_s_is_refused(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "header_in", lambda run: {"classes": ["cat", "dog"]})
    split = SimpleNamespace(class_names=["cat", "zebra"], names={1: "cat", 2: "zebra"}, name="val")
    with pytest.raises(DataError, match="label 2 was dog in training and is zebra here: give --data_dir"):
        tool.detector_of(tmp_path, None, None, split)
