"""COCO's numbers are those of pycocotools on the same files, for any number of processes."""

import contextlib
import io
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from detecting import detector
from processes import in_processes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tool_modules import load_tool

import lbsgd.train.engine as engine
from lbsgd.data.coco_annotations import read_split
from lbsgd.data.coco_images import CocoEval, mask_of
from lbsgd.data.share import Share
from lbsgd.train.coco_evaluation import NAMES, area_of, coco_numbers, compared, detections

NUM_IMAGES = 7


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    load_tool("render_scenes").render(folder, 2, NUM_IMAGES)
    return folder


class Jittered:
    """Finds most of an image's objects a few pixels off, as a detector would. Recognises images by their pixels."""

    def __init__(self, split):
        self.label_of = split.label_of
        self.images = {
            float(pixels.double().sum()): image
            for pixels, image in CocoEval(split, loader_workers=0, device="cpu", share=Share())
        }

    def modules(self):
        return ()  # no head

    def __call__(self, pixels):
        image = self.images[float(pixels[0].double().sum())]
        random = np.random.default_rng(int(image.path.stem.removeprefix("scene_")))
        boxes, labels, masks, scores = [], [], [], []
        for each in image.annotations:
            if random.random() < 0.2:
                continue
            shift = int(random.integers(0, 3))
            x, y, width, height = each["bbox"]
            boxes.append([x + shift, y, x + width + shift, y + height])
            labels.append(self.label_of[each["category_id"]])
            masks.append(np.roll(mask_of(each["segmentation"], image), shift, axis=1))
            scores.append(random.integers(1, 5) / 5)  # equal in several images, as those of a confident detector
        likely = 0.4 + 0.2 * np.array(masks, dtype=np.float32)  # 0.6 inside an object
        tensor = torch.tensor(likely.reshape(-1, 1, image.height, image.width))
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return [{"boxes": boxes, "labels": torch.tensor(labels), "masks": tensor, "scores": torch.tensor(scores)}]


def evaluated(folder, network=Jittered):
    """The numbers on this group of processes."""
    processes = engine.start_processes()
    split = read_split(folder, "val", training=False)
    share = Share(processes.rank, processes.world_size)
    return coco_numbers(network(split), CocoEval(split, loader_workers=0, device="cpu", share=share), split.names)


def by_the_files(folder):
    """The same by pycocotools, from the annotation file and a list of all detections."""
    split = read_split(folder, "val", training=False)
    network, found, numbers = Jittered(split), [], {}
    category_of = {label: category for category, label in split.label_of.items()}
    for pixels, image in CocoEval(split, loader_workers=0, device="cpu", share=Share()):
        for each in detections(image, network([pixels])[0]):
            found.append({**each, "category_id": category_of[each["category_id"]]})
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        kept = {"bbox": "segmentation", "segm": "bbox"}[kind]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(folder / "annotations" / "instances_val.json"))
            results = truth.loadRes([{key: value for key, value in each.items() if key != kept} for each in found])
            judge = COCOeval(truth, results, kind)
            judge.evaluate(), judge.accumulate(), judge.summarize()
        numbers |= {f"val_{name}_{key}": 100 * value for key, value in zip(NAMES, judge.stats, strict=False)}
    return numbers


def require_numbers_of_the_files(numbers, folder):
    known = {key: value for key, value in numbers.items() if key != "val_images"}
    expected = by_the_files(folder)
    assert known == {key: None if value < 0 else pytest.approx(value) for key, value in expected.items()}


def numbers_of_the_files(folder):
    """Return our numbers for a folder, which must be equal to pycocotools'."""
    [numbers] = in_processes(1, evaluated, folder)
    require_numbers_of_the_files(numbers, folder)
    return numbers


def test_the_numbers_are_pycocotools_and_the_same_on_1_2_and_3_processes(scenes, capfd):
    one, two, three = (in_processes(count, evaluated, scenes) for count in (1, 2, 3))
    assert len({json.dumps(numbers) for numbers in one + two + three}) == 1
    require_numbers_of_the_files(one[0], scenes)
    assert one[0]["val_images"] == NUM_IMAGES
    assert 20 < one[0]["val_box_ap"] < 80 and 10 < one[0]["val_mask_ap"] < 80
    assert "Average Precision" not in capfd.readouterr().out


class Blind:
    """Finds nothing."""

    def __init__(self, split):
        pass

    def modules(self):
        return ()

    def __call__(self, pixels):
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
        return [{**empty, "masks": torch.zeros(0, 1, 8, 8)}]


def test_finding_nothing_is_an_average_precision_of_0_of_what_there_is(scenes):
    """For a size that no object has, the number is None, as with detections, because there was nothing to find."""
    [numbers], [with_detections] = in_processes(1, evaluated, scenes, Blind), in_processes(1, evaluated, scenes)
    assert numbers["val_images"] == NUM_IMAGES and numbers["val_box_ap_large"] is None
    for key in numbers.keys() - {"val_images"}:
        assert numbers[key] == (None if with_detections[key] is None else 0.0), key


def overflowing(part, split):
    """A detector with finite weights, whose outputs of one part are not finite."""
    network = detector(num_classes=len(split.names)).eval()
    torch.nn.init.constant_(network.get_submodule(part).weight, 3e38)
    return network


HEADS = ("rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score", "roi_heads.mask_predictor.mask_fcn_logits")


@pytest.mark.parametrize("part", HEADS)
def test_outputs_that_are_not_numbers_give_none_for_a_result(scenes, part):
    [numbers] = in_processes(1, evaluated, scenes, partial(overflowing, part))
    assert numbers.pop("val_images") == NUM_IMAGES and all(math.isnan(number) for number in numbers.values())


def test_an_output_that_is_no_number_on_one_of_the_processes_gives_none(scenes):
    split = read_split(scenes, "val", training=False)
    numbers = compared([([split.images[0]], [], True), ([split.images[1]], [], False)], split.names)
    assert numbers.pop("val_images") == 2 and all(map(math.isnan, numbers.values()))


@pytest.fixture
def changed(scenes, tmp_path):
    """Returns a copy whose validation annotations the test changes: changed(function of the parsed file)."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    path = folder / "annotations" / "instances_val.json"

    def change(edit):
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return folder

    return change


@pytest.mark.parametrize("numbering", [lambda at: at, lambda at: 7, None], ids=["from 0", "all alike", "none"])
def test_ids_of_annotations_mean_nothing(scenes, changed, numbering):
    def renumber(content):
        for at, annotation in enumerate(content["annotations"]):
            del annotation["id"]
            annotation |= {"id": numbering(at)} if numbering else {}

    assert in_processes(1, evaluated, changed(renumber)) == in_processes(1, evaluated, scenes)


@pytest.mark.parametrize("kind, key", [("images", "image_id"), ("categories", "category_id")])
@pytest.mark.parametrize(
    "id_of", [lambda at: at * (2**60 + 1) + 2**62, lambda at: "a" + at * "\0"], ids=["unsigned", "NUL"]
)
def test_ids_of_images_and_categories_may_be_any(scenes, changed, kind, key, id_of):
    def renumber(content):
        new = {each["id"]: id_of(at) for at, each in enumerate(content[kind])}
        for each in content[kind]:
            each["id"] = new[each["id"]]
        for each in content["annotations"]:
            each[key] = new[each[key]]

    assert in_processes(1, evaluated, changed(renumber)) == in_processes(1, evaluated, scenes)


def test_an_area_of_0_is_an_area_and_a_missing_one_is_the_box_s(changed):
    def empty(content):
        for each in content["annotations"][::2]:
            each["area"] = 0

    numbers = numbers_of_the_files(changed(empty))

    def of_the_box(content):
        for each in content["annotations"]:
            each["area"] = each["bbox"][2] * each["bbox"][3]

    def missing(content):
        for each in content["annotations"]:
            del each["area"]

    [with_box] = in_processes(1, evaluated, changed(of_the_box))
    assert with_box["val_box_ap_medium"] != numbers["val_box_ap_medium"]
    assert in_processes(1, evaluated, changed(missing)) == [with_box]
    assert area_of({"bbox": [50, 50, -20, 20]}) == 0  # COCO would ignore an object with a negative area


def test_a_crowd_counts_as_in_coco_and_an_object_that_says_nothing_of_it_is_none(changed):
    def some(content):
        for each in content["annotations"][::3]:
            each["iscrowd"] = 1

    numbers = numbers_of_the_files(changed(some))

    def unsaid(content):
        for each in content["annotations"]:
            if not each["iscrowd"]:
                del each["iscrowd"]

    assert in_processes(1, evaluated, changed(unsaid)) == [numbers]
