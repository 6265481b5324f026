"""COCO's annotations as found in practice: what is used, what is left out, and each error in one line with the name."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from tool_modules import load_tool
from torchvision.models.detection.transform import resize_boxes

from lbsgd.data.coco_annotations import read_split, require_same_categories
from lbsgd.data.coco_faults import run_lengths
from lbsgd.data.coco_images import CocoEval, draw_of, example_of, mask_of, pixels_of
from lbsgd.data.share import Share
from lbsgd.errors import DataError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """12 training and 5 validation scenes of digits."""
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    load_tool("render_scenes").render(folder, 12, 5)
    return folder


@pytest.fixture
def changed(scenes, tmp_path):
    """Returns a copy whose training annotations the test changes: changed(function of the parsed file)."""
    shutil.copytree(scenes, tmp_path / "copy")
    path = tmp_path / "copy" / "annotations" / "instances_train.json"

    def change(edit):
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return tmp_path / "copy"

    return change


def test_masks_boxes_and_areas_agree(scenes):
    split = read_split(scenes, "train")
    assert len(split) == 12 and split.is_tall.sum() == 6 and not split.left_out
    for image in split.images:
        for each in image.annotations:
            mask = mask_of(each["segmentation"], image)
            rows, columns = mask.nonzero()
            x, y = columns.min(), rows.min()
            assert each["area"] == mask.sum() and each["bbox"] == [x, y, np.ptp(columns) + 1, np.ptp(rows) + 1]
        masks = [mask_of(each["segmentation"], image) for each in image.annotations]
        assert sum(masks).max() == 1  # no pixel belongs to two digits


def test_a_category_s_label_is_its_place_among_the_ids(changed):
    def gaps(content):
        content["categories"].reverse()
        for each in content["categories"]:
            each["id"] = 3 * each["id"]
        for each in content["annotations"]:
            each["category_id"] = 3 * each["category_id"]

    split = read_split(changed(gaps), "train")
    assert split.label_of == {3 * digit: digit for digit in range(1, 11)}
    assert split.class_names == [split.names[3 * digit] for digit in range(1, 11)]


def test_images_come_by_their_ids_whatever_the_order_of_the_file(scenes, changed):
    """As pycocotools sorts them before it compares detections with equal scores."""
    images = [image.id for image in read_split(changed(lambda content: content["images"].reverse()), "train").images]
    assert images == [image.id for image in read_split(scenes, "train").images] == sorted(images)


def test_crowds_and_boxes_without_an_area_are_not_trained_on_but_kept(changed):
    def crowd(content):
        first = content["annotations"][0]["image_id"]
        of_first = [each for each in content["annotations"] if each["image_id"] == first]
        of_first[0]["iscrowd"], of_first[1]["bbox"][2] = 1, 0

    folder = changed(crowd)
    split = read_split(folder, "train")
    image = split.images[0]
    assert len(image.objects()) == len(image.annotations) - 2 and split.left_out == {"boxes without an area": 1}
    assert not read_split(folder, "train", training=False).left_out  # evaluation keeps them


def test_a_crowd_s_box_without_an_area_is_left_out_as_a_crowd(changed):
    def flat_crowd(content):
        content["annotations"][0]["iscrowd"], content["annotations"][0]["bbox"][2] = 1, 0

    assert not read_split(changed(flat_crowd), "train").left_out


def test_images_without_objects_are_left_out_of_training_and_evaluated(changed):
    def empty(content):
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] > 2]

    folder = changed(empty)
    assert read_split(folder, "train").left_out == {"images without objects": 2}
    assert (len(read_split(folder, "train")), len(read_split(folder, "train", training=False))) == (10, 12)


def polygon(values):
    def edit(content):
        content["annotations"][3]["segmentation"] = values

    return edit


def rle(**changes):
    def edit(content):
        content["annotations"][3]["segmentation"].update(changes)

    return edit


def other(key, value):
    def edit(content):
        content["annotations"][3][key] = value

    return edit


@pytest.mark.parametrize(
    "edit, words",
    [
        (polygon([[1, 2, 3, 4]]), "a polygon of 4 numbers"),
        (polygon([[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers, not of 3 points or more"),
        (polygon([[1, 2, 3, 4, 5, None]]), "a polygon has None in place of a number"),
        (polygon([[1, 1, 9, 1, 9, 9], 7]), "a polygon is 7 and no list"),
        (polygon([1, 1, 9, 1, 9, 9]), "a polygon is 1 and no list"),
        (polygon([]), "no polygon"),
        (rle(size=[5, 5]), r"run lengths are of \[5, 5\]"),
        (rle(counts=[7]), "run lengths make 7 pixels"),
        (other("category_id", 77), "category 77 is not listed"),
        (other("bbox", [1, 2, 3]), "not four numbers"),
        (other("category_id", [1]), r"category \[1\] is not listed"),
        (other("iscrowd", None), "its iscrowd is None, neither 0 nor 1"),
        (other("iscrowd", "0"), "its iscrowd is '0', neither 0 nor 1"),
        (other("area", "361"), "its area '361' is no number"),
        (other("area", -361), "its area -361 is no number from 0 on"),  # it fits no size range
        (rle(counts=[128 * 128 + 5, -5]), "its run lengths are no whole numbers from 0 on"),
        (rle(counts=[1, "2"]), "its run lengths are no whole numbers from 0 on"),
        (rle(counts="8P?oi"), "its run lengths are no text of COCO's"),  # COCOeval hung on it
        (rle(counts="PY"), "its run lengths are no text of COCO's"),  # a mask AP of 0 without an explanation
        (rle(counts="8"), "its run lengths make 8 pixels"),
        (rle(counts="O"), "its run lengths are no whole numbers from 0 on"),  # -1
        (rle(counts=""), "its run lengths make 0 pixels"),
        (rle(counts="o"), "its run lengths are no text of COCO's"),  # ends where another digit must follow
        (rle(counts="1é"), "its run lengths are no text of COCO's"),
        (rle(counts="PPPPPPPPPPPP0"), "its run lengths are no text of COCO's"),  # over 32 bits, where C wraps around
        (polygon([[1, 1, 1e8, 1, 1e8, 11, 1, 11]]), "from 1 to 100000000.0, more than 10 sides outside"),
        (polygon([[1, 1, 9, 1, 9, -3e9]]), "from -3000000000.0 to 9, more than 10 sides outside"),
        (polygon([[1, 1, 9, 1, 9, 10**400]]), "a polygon has 1000.*0 in place of a number"),
        (other("bbox", [1, 2, 3, 10**400]), "not four numbers"),
    ],
)
def test_a_broken_annotation_is_named_or_left_out(changed, edit, words):
    folder = changed(edit)
    with pytest.raises(DataError, match=f"annotation 4 of image .*scene_.*{words}.*--on_error skip") as caught:
        read_split(folder, "train")
    assert "\n" not in str(caught.value)
    assert read_split(folder, "train", "skip").left_out["broken annotations"] == 1


def repeat(kind):
    def edit(content):
        content[kind][1]["id"] = content[kind][0]["id"]

    return edit


def without(kind, key):
    def edit(content):
        del content[kind][0][key]

    return edit


def no_object(content):
    content["annotations"].append("no object")


@pytest.mark.parametrize(
    "edit, words",
    [
        (repeat("images"), "two images have the id 1, so annotations of it may mean either"),
        (repeat("categories"), "two categories have the id 1, so annotations of it may mean either"),
        (without("categories", "id"), "a category has no id or no name"),
        (without("images", "file_name"), "an image has no id, file_name"),
        (lambda content: content["images"][0].update(file_name=None), "an image has no id, file_name"),
        (no_object, "an annotation has no image_id"),
        (lambda content: content["annotations"][3].update(image_id=[1]), "an annotation has no image_id"),
        (lambda content: content["categories"][1].update(id="2"), "ids of categories are numbers and texts"),
        (lambda content: content["images"][1].update(id="2"), "ids of images are numbers and texts"),
        (lambda content: [each.update(id=[each["id"]]) for each in content["images"]], r"an id of images is \[1\]"),
        (lambda content: content["images"][1].update(id=math.nan), "an id of images is nan"),
        (lambda content: content["images"][0].update(height=math.inf), "an image has no .*scene_00000.png"),
        (lambda content: content["images"][0].update(width=10**400), "an image has no .*scene_00000.png"),
        (lambda content: content["images"][0].update(height=-5), "an image has no .*scene_00000.png"),
    ],
)
def test_lists_that_cannot_be_understood_are_one_line_also_under_skip(changed, edit, words):
    folder = changed(edit)
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=f"instances_train.json: .*{words}") as caught:
            read_split(folder, "train", on_error)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("box", [[50, 10, 1e-5, 5], [639.99999, 10, 5, 5], [10, 20, 5, 0.0004], [-9, 10, 5, 5]])
def test_a_box_that_float32_would_flatten_or_outside_the_image_is_none(scenes, box):
    image = dataclasses.replace(read_split(scenes, "train").images[0], width=640, height=480)
    assert image.box_of({"bbox": box}) is None
    left, top, right, bottom = image.box_of({"bbox": [639.9, 10, 5, 0.01]})
    assert torch.tensor(left) < torch.tensor(right) and torch.tensor(top) < torch.tensor(bottom)


@pytest.mark.parametrize("width", [1000, 40_000, 1_000_000])
def test_no_box_is_flattened_by_a_flip_and_a_resize(scenes, width):
    """torchvision refuses a box whose sides are equal in float32 afterwards, with an AssertionError."""
    image = dataclasses.replace(read_split(scenes, "train").images[0], width=width, height=1000)
    thin = ({"bbox": [width - 10, 10, side, 500]} for side in np.geomspace(1e-4, 10, 500))
    boxes = [box for box in map(image.box_of, thin) if box]
    assert 50 < len(boxes) < 450
    boxes = torch.tensor(boxes, dtype=torch.float32)
    flipped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    for kept in (boxes, flipped):
        for longer in (800, 1333, 3999):
            resized = resize_boxes(kept, [1000, width], [longer * 1000 // width, longer])
            assert (resized[:, 2] > resized[:, 0]).all()


def test_hosts_that_lack_different_images_do_not_agree(scenes, tmp_path):
    """With --on_error skip their image numbers would mean different images."""
    prints = []
    for lacking in (1, 2):
        folder = shutil.copytree(scenes, tmp_path / str(lacking))
        (folder / "train" / f"scene_{lacking:05}.png").unlink()
        prints.append(read_split(folder, "train", "skip").fingerprint)
    assert len({*prints}) == 2


def test_an_image_that_pillow_takes_for_a_bomb_is_one_line(scenes, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot be decoded"):
        pixels_of(read_split(scenes, "train").images[0])


@pytest.mark.parametrize("counts", ["ZZZ", [-1], [2**40]])
def test_run_lengths_that_pycocotools_cannot_read_are_one_line(scenes, counts):
    image = read_split(scenes, "train").images[0]
    with pytest.raises(DataError, match=f"image {image.id} .*an outline cannot be decoded"):
        mask_of({"size": [image.height, image.width], "counts": counts}, image)


def test_an_outline_of_several_polygons_is_their_union(scenes):
    image = read_split(scenes, "train").images[0]
    expected = np.zeros((image.height, image.width), np.uint8)
    expected[1:3, 1:4] = expected[7:9, 110:112] = 1
    found = mask_of([[1, 1, 4, 1, 4, 3, 1, 3], [110, 7, 112, 7, 112, 9, 110, 9]], image)
    assert found.dtype == np.uint8 and found.shape == expected.shape and (found == expected).all()


def test_masks_without_pycocotools_are_refused_with_the_command_that_brings_it(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        DataError, match="^pycocotools cannot be imported .*`pip install 'lbsgd.detection.'` brings it$"
    ):
        mask_of([[1, 1, 4, 1, 4, 3]], read_split(scenes, "train").images[0])


def test_a_polygon_that_is_a_point_costs_only_itself(changed):
    good = [[1, 1, 30, 1, 30, 30]]
    folder = changed(polygon([*good, [5, 5], [6, 6]]))
    with pytest.raises(DataError, match="a polygon of 2 numbers, not of 3 points or more"):
        read_split(folder, "train")
    split = read_split(folder, "train", "skip")
    assert split.left_out == {"polygons of fewer than 3 points": 2}
    assert good in [each["segmentation"] for image in split.images for each in image.annotations]


@pytest.mark.parametrize("width, height, fits", [(1332, 1, True), (1333, 1, False), (2, 2666, False), (3, 2666, True)])
def test_an_image_that_would_be_resized_to_nothing_is_named_or_left_out(changed, width, height, fits):
    def thin(content):
        content["images"][4].update(width=width, height=height)
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 5]

    folder = changed(thin)
    if fits:
        assert len(read_split(folder, "train", training=False, longer_side=1333)) == 12
        return
    words = rf"instances_train.json: image 5 \(scene_00004.png\) has {width}x{height} pixels, .*longer_side, 1333; mend"
    with pytest.raises(DataError, match=words):
        read_split(folder, "train", longer_side=1333)
    split = read_split(folder, "train", "skip", training=False, longer_side=1333)
    assert len(split) == 11 and split.left_out == {"images too thin": 1}


def test_a_file_s_name_may_hold_a_folder(changed):
    def moved(content):
        content["images"][4]["file_name"] = "batch1/" + content["images"][4]["file_name"]

    folder = changed(moved)
    (folder / "train" / "batch1").mkdir()
    (folder / "train" / "scene_00004.png").rename(folder / "train" / "batch1" / "scene_00004.png")
    assert len(read_split(folder, "train")) == 12


def test_an_image_that_a_loader_worker_cannot_decode_is_one_line(changed):
    folder = changed(lambda content: None)
    (folder / "val" / "scene_00003.png").write_bytes(b"no image")
    images = CocoEval(read_split(folder, "val", training=False), loader_workers=1, device="cpu", share=Share())
    with pytest.raises(DataError, match="^.*/val/scene_00003.png cannot be decoded .*; fetch it again$") as caught:
        list(images)
    assert "\n" not in str(caught.value)


def test_workers_hand_over_bytes_and_networks_get_fractions(scenes):
    split = read_split(scenes, "train")
    pixels = pixels_of(split.images[0])
    example = example_of(split.images[0], split.label_of, 0, flip=False)
    assert pixels.dtype == example.pixels.dtype == torch.uint8
    assert example.to("cpu").pixels.equal(pixels.float() / 255) and float(example.to("cpu").pixels.max()) == 1.0


def test_an_image_without_its_file_is_named_or_left_out(changed):
    folder = changed(lambda content: None)
    (folder / "train" / "scene_00004.png").unlink()
    with pytest.raises(DataError, match="image 5: .*scene_00004.png does not exist; mend it"):
        read_split(folder, "train")
    split = read_split(folder, "train", "skip")
    assert len(split) == 11 and split.left_out == {"images without a file": 1}


@pytest.mark.parametrize("instead", [lambda place: place.symlink_to("nowhere.png"), lambda place: place.mkdir()])
def test_a_link_to_nowhere_and_a_folder_are_no_file_of_an_image(changed, instead):
    folder = changed(lambda content: None)
    place = folder / "train" / "scene_00004.png"
    place.rename(folder / "elsewhere.png")
    instead(place)
    with pytest.raises(DataError, match="image 5: .*scene_00004.png does not exist; mend it"):
        read_split(folder, "train")
    place.rmdir() if place.is_dir() else place.unlink()
    place.symlink_to(folder / "elsewhere.png")
    assert len(read_split(folder, "train")) == 12


def test_an_annotation_of_an_unknown_image_is_named(changed):
    with pytest.raises(DataError, match="annotation 4 belongs to image 99, which is not listed"):
        read_split(changed(other("image_id", 99)), "train")
    folder = changed(lambda content: content["annotations"][-1].update(image_id=99))
    assert read_split(folder, "train", "skip").left_out["annotations of unknown images"] == 2


def test_files_that_are_not_there_or_not_cocos(changed, tmp_path):
    folder = changed(lambda content: None)
    with pytest.raises(DataError, match="instances_test.json cannot be read .No such file.*docs/detection.md"):
        read_split(folder, "test")
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError, match="val cannot be read"):
        read_split(folder, "val")
    path = folder / "annotations" / "instances_train.json"
    path.write_text("{")
    with pytest.raises(DataError, match="instances_train.json is not JSON"):
        read_split(folder, "train")
    path.write_text('{"images": [], "annotations": 5}')
    with pytest.raises(DataError, match="has no list of annotations, categories"):
        read_split(folder, "train")
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="no image of it can be used: it lists none$"):
        read_split(folder, "train")


def test_a_split_of_which_nothing_can_be_used_says_why(changed):
    folder = changed(lambda content: content["annotations"].clear())
    (folder / "train" / "scene_00004.png").unlink()
    words = "no image of it can be used: 1 images without a file left out; 11 images without objects left out$"
    with pytest.raises(DataError, match=words):
        read_split(folder, "train", "skip")


def test_category_ids_may_be_floats_as_pandas_writes_them(changed):
    def as_floats(content):
        for each in content["categories"]:
            each["id"] = float(each["id"])
        for each in content["annotations"]:
            each["category_id"] = float(each["category_id"])

    split = read_split(changed(as_floats), "train")
    labels = {split.label_of[each["category_id"]] for image in split.images for each in image.annotations}
    assert labels <= {*range(1, 11)} and len(labels) > 3 and not split.left_out


def test_splits_of_different_data_sets_are_told_apart(changed):
    def renamed(content):
        content["categories"][7]["name"] = "seven?"

    folder = changed(renamed)
    with pytest.raises(DataError, match="category 8 is seven.* in instances_train.json and 7 in instances_val.json"):
        require_same_categories(read_split(folder, "train"), read_split(folder, "val"))


def test_ids_of_two_kinds_are_of_different_data_sets(changed):
    def as_text(content):
        for each in content["categories"]:
            each["id"] = str(each["id"])
        for each in content["annotations"]:
            each["category_id"] = str(each["category_id"])

    folder = changed(as_text)
    with pytest.raises(DataError, match="category 1 is not there in instances_train.json and 0 in instances_val.json"):
        require_same_categories(read_split(folder, "train"), read_split(folder, "val"))


def test_a_file_of_ten_thousand_brackets_is_one_line(changed):
    folder = changed(lambda content: None)
    (folder / "annotations" / "instances_train.json").write_text('{"images": ' + 10_000 * "[")
    with pytest.raises(DataError, match="instances_train.json is not JSON"):
        read_split(folder, "train")


def test_a_file_s_name_too_long_for_the_disk_is_one_line(changed):
    def long(content):
        content["images"][4]["file_name"] = 300 * "x"

    with pytest.raises(DataError, match="image 5: .*xxx does not exist"):
        read_split(changed(long), "train")


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    random = np.random.default_rng(0)
    for share in (0.0, 0.03, 0.5, 0.97, 1.0):
        pixels = np.asfortranarray(random.random((67, 301)) < share, dtype=np.uint8)
        pixels[:, 100:200] = 1  # a long run, with several letters
        changes = np.flatnonzero(np.diff(pixels.ravel(order="F"), prepend=0, append=2)).tolist()
        expected = np.diff([0, *changes]).tolist()
        assert run_lengths(coco_mask.encode(pixels)["counts"].decode()) == expected


def test_a_split_of_compressed_run_lengths_is_read(changed):
    def compressed(content):
        for each in content["annotations"]:
            height, width = each["segmentation"]["size"]
            each["segmentation"] = coco_mask.frPyObjects(each["segmentation"], height, width)
            each["segmentation"]["counts"] = each["segmentation"]["counts"].decode()

    split = read_split(changed(compressed), "train")
    assert all(mask_of(each["segmentation"], image).any() for image in split.images for each in image.annotations)


def test_a_polygon_may_reach_ten_sides_out_of_its_image(changed):
    outline = [[1, 1, 11 * 128, 1, 11 * 128, 40, -10 * 128, 40]]
    split = read_split(changed(polygon(outline)), "train")
    [image] = [image for image in split.images if outline in [each["segmentation"] for each in image.annotations]]
    assert mask_of(outline, image).any()


def test_a_flip_mirrors_pixels_boxes_and_masks_alike(scenes):
    image = read_split(scenes, "train").images[0]
    labels = {digit: digit for digit in range(1, 11)}
    plain, flipped = (example_of(image, labels, draw, flip=True) for draw in (2, 3))
    assert plain.pixels.flip(-1).equal(flipped.pixels) and not plain.pixels.equal(flipped.pixels)
    assert plain.target["masks"].flip(-1).equal(flipped.target["masks"])
    for mask, (left, top, right, bottom) in zip(flipped.target["masks"], flipped.target["boxes"].tolist(), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [left, top, right, bottom]
    assert example_of(image, labels, 3, flip=False).pixels.equal(plain.pixels)


def test_draws_are_of_seed_epoch_and_image():
    draws = {draw_of(seed, epoch, number) for seed in (0, 1) for epoch in (0, 1) for number in range(500)}
    assert len(draws) == 2000 and all(0 <= draw < 2**63 for draw in draws)
    assert 0.45 < sum(draw & 1 for draw in draws) / len(draws) < 0.55
    assert draw_of(1, 2, 3) == draw_of(1, 2, 3)


RUN_WITH_WORKERS = """
import multiprocessing, subprocess, time
import psutil
from multiprocessing.process import BaseProcess as Process
from torch.utils.data import Dataset
from lbsgd.data.coco_images import loaded

multiprocessing.set_start_method("forkserver")  # Python's own choice since 3.14

class Slow(Dataset):
    def __getitem__(self, number):
        time.sleep(0.05)
        return number

def at_once(process, start=Process.start):  # when it has hardly begun
    start(process)
    subprocess.run(["sh", "-c", f"kill {process.pid}"])

Process.start = at_once
found = []
for batch in loaded(Slow(), [[number] for number in range(12)], 2):
    for worker in psutil.Process().children():
        subprocess.run(["sh", "-c", f"kill {worker.pid}"])
    found += batch
print(found)
"""


def test_loader_workers_do_not_end_before_their_run():
    """DeepSpeed's launcher sends SIGTERM to them first, and a run that loses a worker cannot save."""
    done = subprocess.run([sys.executable, "-c", RUN_WITH_WORKERS], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{list(range(12))}\n", done.stderr
