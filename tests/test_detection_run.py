"""A detector's run: equal bits after a stop inside an epoch, on other numbers of processes, and by its command."""

import json
import os
import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import script
from detecting import SIZES
from mask_rcnn import MaskRCNN
from mask_rcnn_digits import SmallMaskRCNN
from processes import in_processes
from tool_modules import load_tool
from torchvision.models import resnet18
from trainers import NobodyAsks, Records

import lbsgd
from lbsgd.algorithm.mask_rcnn import Sizes, mask_rcnn
from lbsgd.commands.detect import DetectionRequest, add_data, trained_as
from lbsgd.commands.recipe_flags import with_flags
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.data.coco_annotations import read_split
from lbsgd.data.share import Pixels
from lbsgd.errors import ConfigError, DataError, DivergedError
from lbsgd.processes.environment import Processes
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train.coco_source import coco_files
from lbsgd.train.reporter import Reporter
from lbsgd.train.saver import Saver
from lbsgd.train.trainer import Trainer

ROOT = Path(__file__).parent.parent
SCENES = ("recipes/mask_rcnn_digits.py", "--deepspeed_config", "ds_configs/detection/scenes.json")
LENGTHS = ("lbsgd.iterations=4", "lbsgd.decay.iterations=[3]", "lbsgd.warmup.iterations=1")  # 4 of 16: 5 of 12 images
SIDES = ("lbsgd.detection.shorter_side=64", "lbsgd.detection.longer_side=128")


class Small(MaskRCNN):
    name = "small"
    sizes = {name: getattr(SIZES, name) for name in SIZES.__dataclass_fields__ if "side" not in name}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    load_tool("render_scenes").render(folder, 24, 3)
    return folder


def trainer(stack, scenes, folder, resume=False, workers=0):
    """A trainer with 12 images per update and 2 updates per epoch, on this group of processes."""
    lbsgd.train.engine.start_processes()
    processes = Processes.from_environment()
    world_size = torch.distributed.get_world_size()
    train, val = (read_split(scenes, name, training=name == "train") for name in ("train", "val"))
    overrides = Overrides(12, 4, num_images=24, settings=(*LENGTHS, *SIDES))
    config = generate(overrides, detection=True, gpus=world_size)
    config["steps_per_print"] = 1
    plan = Plan.read(config, world_size)
    task = Small(SimpleNamespace(val=val, backbone=lambda: None))
    torch.manual_seed(5)
    engine, plan = lbsgd.initialize(task.network(10, plan), plan)
    source = coco_files(scenes, train, val, workers)
    images = source.open(plan, processes, Pixels(resolution=0, device=engine.device), stack)
    first = torch.distributed.get_rank() == 0
    reporter = Reporter(Records(), Records(), engine) if first else None
    saver = Saver(engine, folder, {"detector": "small"}, {})
    return Trainer(engine, plan, task, images, saver, NobodyAsks(), reporter, saver.restore() if resume else None)


def run(scenes, folder, last, resume=False, workers=0, evaluate_every=1):
    """Train up to an iteration. Return the weights, the iterations' losses and the records of the evaluations."""
    with ExitStack() as stack:
        ours = trainer(stack, scenes, folder, resume, workers)
        ours.train(last, evaluate_every)
        ours.saver.wait()
        weights = {name: value.clone() for name, value in ours.engine.module.state_dict().items()}
        if ours.reporter is None:
            return None
        losses = {record["iteration"]: record["train_loss"] for record in ours.reporter.log.iterations}
        return weights, losses, ours.reporter.log.epochs


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """An uninterrupted run, with images from two loader workers."""
    return in_processes(1, run, scenes, tmp_path_factory.mktemp("whole"), 5, False, 2)[0]


@pytest.fixture(scope="module")
def stopped_run(scenes, tmp_path_factory):
    """A run that is evaluated every second epoch, stopped after 3 iterations, in the middle of two epochs."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, in_processes(1, run, scenes, folder, 3, False, 0, 2)[0]


@pytest.fixture
def stopped(stopped_run):
    """The checkpoints of that run."""
    return stopped_run[0]


def test_a_run_is_evaluated_after_each_epoch_and_at_its_end(whole):
    weights, losses, epochs = whole
    assert sorted(losses) == [0, 1, 2, 3, 4] and [record["epoch"] for record in epochs] == [1, 2, 2.5]
    assert all({"val_box_ap", "val_mask_ap", "val_box_ap50"} <= record.keys() for record in epochs)
    assert all(record["val_images"] == 3 for record in epochs)


def test_an_epoch_that_is_not_evaluated_has_a_record_without_those_numbers(stopped_run):
    [record] = stopped_run[1][2]
    assert record["epoch"] == 1 and "train_loss" in record
    assert not [key for key in record if key.startswith("val_")]


def overflowing_at_the_evaluation(scenes, folder):
    """Train until outputs overflow in an evaluation. Return the error that ends the run, and its epoch records."""
    with ExitStack() as stack:
        ours = trainer(stack, scenes, folder)
        evaluate, scores = ours.evaluate, ours.engine.module.roi_heads.box_predictor.cls_score
        ours.evaluate = lambda epoch: (torch.nn.init.constant_(scores.weight, 3e38), evaluate(epoch))[1]
        with pytest.raises(DivergedError) as error:
            ours.train(4)
        return str(error.value), ours.reporter.log.epochs


def test_a_detector_whose_outputs_are_no_numbers_has_diverged(scenes, tmp_path):
    [(said, records)] = in_processes(1, overflowing_at_the_evaluation, scenes, tmp_path)
    newest = tmp_path / "iteration_00000002"
    assert said.startswith(f"after iteration 1 the box AP is not a number; the newest checkpoint is {newest}; ")
    assert records == []  # none with an AP of 0


def copied(folder, to):
    return shutil.copytree(folder, to / "copy")


def test_a_run_that_goes_on_inside_an_epoch_ends_with_the_same_bits(whole, stopped, scenes, tmp_path):
    weights, losses, epochs = in_processes(1, run, scenes, copied(stopped, tmp_path), 5, True)[0]
    assert losses == {t: whole[1][t] for t in (3, 4)}
    assert all(torch.equal(value, whole[0][name]) for name, value in weights.items())
    timeless = [{k: v for k, v in record.items() if "second" not in k} for record in (epochs[-1], whole[2][-1])]
    assert timeless[0] == timeless[1]


def test_it_goes_on_with_the_same_images_on_other_numbers_of_processes(whole, stopped, scenes, tmp_path):
    """The next iteration's losses equal those of one process. After it, kinks of ReLU and NMS make the runs differ."""
    result = in_processes(3, run, scenes, copied(stopped, tmp_path), 4, True)[0]
    assert result[1][3] == pytest.approx(whole[1][3], rel=1e-4)


def test_the_command_trains_evaluates_and_exports(scenes, tmp_path):
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "weights.pt")
    output = tmp_path / "run"
    settings = [part for setting in (*LENGTHS, *SIDES) for part in ("--set", setting)]
    base = ("--set", "lbsgd.linear_scaling.base_batch=12", "--global_batch", "24", "--micro_batch", "4")
    data = ("--data_dir", scenes, "--backbone_weights", tmp_path / "weights.pt", "--loader_workers", "0")
    done = script(*SCENES, *base, *settings, *data, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    log = read_run(output)
    assert log.header["classes"] == read_split(scenes, "val", training=False).class_names
    assert log.header["batch_norm"] == "frozen"
    assert log.header["started_from"] == "weights.pt" and log.epochs_done == 2 == log.planned_epochs
    assert "train          24 images, 10 categories" in done.stdout and "mask AP" in done.stdout
    assert log.result.keys() == {"kind", "val_box_ap", "val_mask_ap"}
    assert "backbone.body.layer2.0.conv1.weight" in torch.load(output / "weights.pt", weights_only=True)


@pytest.mark.parametrize("val_split, warned", [("train", True), ("val", False)])
def test_a_detector_that_is_evaluated_on_its_training_images_says_so(val_split, warned, scenes, capsys, tmp_path):
    (tmp_path / "weights.pt").touch()
    flags = ("--train_split", "train", "--val_split", val_split, "--data_dir", str(scenes))
    flags += ("--backbone_weights", str(tmp_path / "weights.pt"))
    config = ("--deepspeed_config", str(ROOT / "ds_configs/detection/scenes.json"))
    DetectionRequest(with_flags("", add_data).parse_args([*config, *flags]))
    assert ("warning: the split train holds the images of train" in capsys.readouterr().out) == warned


def evaluation(scenes, weights, *flags):
    """The request of an evaluation of weights, which rank 0 has compared with their training."""
    config = ("--deepspeed_config", str(ROOT / "ds_configs/detection/scenes.json"), "--data_dir", str(scenes))
    weights.parent.mkdir(exist_ok=True)
    weights.touch()
    flags = (*config, "--evaluate_only", "--weights", str(weights), *flags)
    request = DetectionRequest(with_flags("", add_data).parse_args(flags))
    request.require_place()
    return request


@pytest.fixture
def other_categories(scenes, tmp_path):
    """The scenes with another name for the third category in the training annotations."""
    folder = shutil.copytree(scenes, tmp_path / "others")
    place = folder / "annotations/instances_train.json"
    content = json.loads(place.read_text())
    content["categories"][2]["name"] = "zebra"
    place.write_text(json.dumps(content))
    return folder


def test_weights_that_may_know_other_categories_by_the_training_annotations_are_told(
    other_categories, tmp_path, capsys
):
    told = "warning: label 3 was zebra in train and is "
    evaluation(other_categories, tmp_path / "weights.pt")
    assert told in capsys.readouterr().out
    annotations = other_categories / "annotations/instances_train.json"
    for damage in (lambda: annotations.write_text("version https://git-lfs.github.com"), annotations.unlink):
        damage()
        evaluation(other_categories, tmp_path / "weights.pt")  # nobody knows what they were trained on
        assert told not in capsys.readouterr().out


def test_weights_that_know_other_categories_by_their_log_are_not_evaluated(scenes, other_categories, tmp_path):
    train, plan = read_split(scenes, "train"), Plan.read(ROOT / "ds_configs/detection/scenes.json", 1)
    header = {"model": "small", **plan.as_dict(), "data": coco_files(Path(), train, train, 0).fingerprint}
    with RunLog(tmp_path / "run", {**header, "classes": train.class_names}):
        evaluation(other_categories, tmp_path / "run/weights.pt")  # whatever the annotations say
    with RunLog(tmp_path / "other", {**header, "classes": [*train.class_names, "zebra"]}):
        with pytest.raises(DataError, match=f"label 11 was zebra .* than the training of {tmp_path}/other; evaluate"):
            evaluation(scenes, tmp_path / "other/weights.pt")


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("val_split", ["train", "val"])
def test_a_detector_that_is_evaluated_alone_on_its_training_images_says_so(logged, val_split, scenes, capsys, tmp_path):
    train, plan = read_split(scenes, "train"), Plan.read(ROOT / "ds_configs/detection/scenes.json", 1)
    header = {"model": "small", **plan.as_dict(), "data": coco_files(Path(), train, train, 0).fingerprint}
    with RunLog(tmp_path / "run", {**header, **({"classes": train.class_names} if logged else {})}):
        evaluation(scenes, tmp_path / "run/weights.pt", "--val_split", val_split)
    assert ("warning: the split train holds the images of " in capsys.readouterr().out) == (val_split == "train")


ONE_PIXEL = ("--set", "lbsgd.detection.shorter_side=1", "--set", "lbsgd.detection.longer_side=1")


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "--backbone_weights is missing: a detector starts from a classifier"),
        (("--backbone_weights", "no.pt"), "--backbone_weights no.pt: cannot be read"),
        (("--evaluate_only", "--resolution", "64"), "error: --resolution is for classifiers: use --set"),
        (("--evaluate_only", "--data_dir", "nowhere"), "nowhere/annotations/instances_val.*json is not there; docs"),
        (("--evaluate_only", *ONE_PIXEL), "image 1 .* pixels, .*longer_side, 1; mend"),
        (("--evaluate_only", "--precision", "fp16"), "box coordinates do not survive it.*M01"),
    ],
)
def test_flags_that_cannot_be_right_are_one_line(flags, words, scenes):
    import re

    data = () if "--data_dir" in flags else ("--data_dir", scenes)
    done = script(*SCENES, *data, *flags)
    assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "resume, rank, checkpoint, asked",
    [(False, 0, True, True), (True, 0, False, True), (True, 0, True, False), (True, 1, False, False)],
)
def test_a_run_that_goes_on_needs_no_backbone(tmp_path, resume, rank, checkpoint, asked):
    (tmp_path / "checkpoints/iteration_00000002.bak").mkdir(parents=True)
    if checkpoint:
        (tmp_path / "checkpoints/iteration_00000003").mkdir()
    request = DetectionRequest.__new__(DetectionRequest)
    request.processes = SimpleNamespace(is_rank_0=rank == 0)
    request.flags = SimpleNamespace(backbone_weights=None, evaluate_only=False, resume=resume)
    request.output_dir = tmp_path
    with pytest.raises(ConfigError, match="--backbone_weights is missing") if asked else nullcontext() as refused:
        request.require_backbone()
    assert not asked or refused.value.of_rank_0 == resume


def test_a_backbone_in_a_folder_that_nobody_may_enter_is_one_line(monkeypatch):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", path)

    flags = SimpleNamespace(backbone_weights="locked/weights.pt", evaluate_only=False)
    request = SimpleNamespace(flags=flags, processes=SimpleNamespace(is_rank_0=True))
    with (
        monkeypatch.context() as locked,
        pytest.raises(DataError, match="locked/weights.pt: cannot be read") as refused,
    ):
        locked.setattr(os, "stat", refuse)
        DetectionRequest.require_backbone(request)
    assert refused.value.of_rank_0


@pytest.mark.parametrize("log", ['{"mode": "train", "loss": 1.5}\n', '{"kind": "run"}\n', ""])
def test_a_backbone_beside_a_log_of_another_program_is_named_by_its_file(log, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text(log)
    assert trained_as(tmp_path / "resnet50.pt") == "resnet50.pt"
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path}/log.jsonl, line 1: not a run log")


def backbone_of(folder):
    rank = lbsgd.train.engine.start_processes().rank
    request = DetectionRequest.__new__(DetectionRequest)
    request.processes = SimpleNamespace(is_rank_0=rank == 0)
    request.flags = SimpleNamespace(backbone_weights=str(folder / f"host{rank}" / "weights.pt"), evaluate_only=False)
    request.require_backbone()
    return request.backbone(), request.started_from


def test_all_processes_begin_with_the_backbone_of_rank_0(tmp_path):
    """DeepSpeed makes parameters equal, but would leave each host its own batch-norm statistics.

    The weights are those of a network in DistributedDataParallel.
    """
    for rank in range(2):  # the third has none
        (tmp_path / f"host{rank}").mkdir()
        torch.save({"module.bn1.running_mean": torch.full((4,), float(rank))}, tmp_path / f"host{rank}" / "weights.pt")
    found = in_processes(3, backbone_of, tmp_path)
    assert [weights["bn1.running_mean"].tolist() for weights, _ in found] == 3 * [4 * [0.0]]
    assert [started_from for _, started_from in found] == ["weights.pt", None, None]


def test_an_evaluation_needs_no_training_images(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes", ignore=shutil.ignore_patterns("*train*"))
    sides = [part for setting in SIDES for part in ("--set", setting)]
    torch.save(detector_of_digits().state_dict(), tmp_path / "weights.pt")
    data = ("--data_dir", tmp_path / "scenes", "--weights", tmp_path / "weights.pt", "--loader_workers", "0")
    done = script(*SCENES, "--evaluate_only", *sides, *data)
    assert done.returncode == 0, done.stderr
    assert "val            3 images, 10 categories" in done.stdout and "on 3 images of" in done.stdout, done.stdout


def detector_of_digits():
    sizes = Sizes(shorter_side=64, longer_side=128, **SmallMaskRCNN.sizes)
    return mask_rcnn(10, 2, sizes, seed=0)


def test_a_backbone_that_does_not_fit_is_one_line(scenes, tmp_path):
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "weights.pt")
    data = ("--data_dir", scenes, "--backbone_weights", tmp_path / "weights.pt")
    run = script(*SCENES, *data, "--output_dir", tmp_path / "run")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "error: --backbone_weights: " in run.stderr and "weights.pt lacks bn1.bias" in run.stderr, run.stderr
