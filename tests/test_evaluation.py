"""An evaluation counts each validation image exactly once, in the same whole numbers on any number of processes."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import network
from processes import in_processes
from resnet50 import ResNet50
from torch.utils.data import DistributedSampler

import lbsgd
from lbsgd.algorithm.shuffle import rank_share
from lbsgd.data.fake import FakeEval, FakeImages
from lbsgd.data.share import Cut, Pixels, Share
from lbsgd.errors import DataError
from lbsgd.report.measure import CLASSIFIER, DETECTOR, Measure
from lbsgd.train import evaluation
from lbsgd.train.engine_state import gather_state
from lbsgd.train.evaluation import is_due, without_number
from lbsgd.train.images import Images
from lbsgd.train.saver import Saver
from lbsgd.train.session import evaluate_only
from lbsgd.train.trainer import Trainer

WORLD_SIZES = (1, 2, 3, 5)
NUM_IMAGES, NUM_CLASSES = 53, 10  # a prime, which no number of processes divides
PIXELS = Pixels(resolution=6, device="cpu")


def config(world_size):
    """k = 30 workers with n = 2, which 1, 2, 3 and 5 processes can share; 20 epochs of 2 iterations."""
    return {
        "train_batch_size": 60,
        "train_micro_batch_size_per_gpu": 60 // world_size,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 0.2, "warmup_num_steps": 10, "warmup_type": "linear"},
        },
        "gradient_clipping": 0.0,
        "lbsgd": {
            "epochs": 20,
            "num_images": 120,
            "linear_scaling": {"base_lr": 0.1, "base_batch": 30},
            "warmup": {"kind": "gradual", "epochs": 5},
            "decay": {"epochs": [15]},
            "batch_norm": {"per_worker_batch": 2},
        },
    }


def test_an_image_whose_outputs_are_not_numbers_is_an_error(monkeypatch):
    """topk takes NaN as the largest value, so images of class 0 would count as correct."""
    monkeypatch.setattr(evaluation, "over_all_processes", torch.Tensor.tolist)
    logits = torch.eye(4)
    logits[0] = torch.nan  # of an image of class 0
    logits[3, :2] = -torch.inf  # excluded by answering_among
    network = lambda images: images  # noqa: E731
    network.device = "cpu"
    found = ResNet50().evaluate(network, [(logits, torch.arange(4))])
    assert (found["val_correct_top1"], found["val_correct_top5"], found["val_images"]) == (3, 3, 4)
    assert math.isnan(found["val_loss"])


@pytest.mark.parametrize(
    "measures, last, every, due",
    [
        (CLASSIFIER, 12, 5, [5, 8, 9, 10, 11, 12]),  # the paper's median is over the last five
        (DETECTOR + CLASSIFIER, 12, 5, [5, 8, 9, 10, 11, 12]),
        (DETECTOR, 12, 5, [5, 10, 12]),
        (DETECTOR, 4.5, 2, [2, 4, 4.5]),
        (CLASSIFIER, 3, 99, [1, 2, 3]),
        (DETECTOR, 3, 1, [1, 2, 3]),
    ],
)
def test_evaluations_are_due_every_so_often_and_where_the_run_is_judged(measures, last, every, due):
    epochs = [*range(1, int(last) + 1), *([last] if last % 1 else [])]
    assert [epoch for epoch in epochs if is_due(epoch, last, every, measures)] == due


def make_trainer(engine, plan, train_data=None, val_data=None, folder=None):
    nobody_asks = SimpleNamespace(stop_requested=None, nothing_to_save=True, alive=lambda position: None)
    images, saver = Images(train_data, val_data), Saver(engine, folder, {}, {})
    return Trainer(engine, plan, ResNet50(), images, saver, nobody_asks)


def trained_and_evaluated(world_size):
    """Return the records with the trainer's shares and with those of torch's DistributedSampler, and the weights."""
    engine, plan = lbsgd.initialize(network(classes=NUM_CLASSES), config(world_size))
    rank = torch.distributed.get_rank()
    share = dict(seed=0, share=Share(rank, world_size))
    cut = Cut(global_batch=60, micro_batch=plan.micro_batch, **share)
    images = FakeImages(120, NUM_CLASSES, cut, PIXELS)
    trainer = make_trainer(engine, plan, images, FakeEval(NUM_IMAGES, NUM_CLASSES, batch=4, pixels=PIXELS, **share))
    for epoch in range(20):
        trainer.train_epoch(epoch, 2 * (epoch + 1))
    right = trainer.evaluate(epoch=20)
    trainer.images.val.numbers = np.array(list(DistributedSampler(range(NUM_IMAGES), world_size, rank, shuffle=False)))
    return right, trainer.evaluate(epoch=20), gather_state(engine).weights


@pytest.fixture(scope="module")
def records():
    """The results of each process, by world size."""
    more = {world_size: in_processes(world_size, trained_and_evaluated, world_size) for world_size in WORLD_SIZES[1:]}
    return {1: [trained_and_evaluated(1)]} | more


def whole_numbers(record):
    return {name: number for name, number in record.items() if isinstance(number, int)}


def test_1_2_3_and_5_processes_count_each_image_once_and_find_the_same_correct(records):
    model = network(classes=NUM_CLASSES).eval()
    model.load_state_dict(records[1][0][2])
    [(images, labels)] = FakeEval(NUM_IMAGES, NUM_CLASSES, batch=NUM_IMAGES, seed=0, share=Share(), pixels=PIXELS)
    with torch.no_grad():
        hits = model(images).topk(5).indices == labels[:, None]
    by_hand = {"val_correct_top1": int(hits[:, 0].sum()), "val_correct_top5": int(hits.sum()), "val_images": NUM_IMAGES}
    assert 0 < by_hand["val_correct_top1"] < by_hand["val_correct_top5"] < NUM_IMAGES  # or a wrong count could not show
    for world_size in WORLD_SIZES:
        for record, _, _ in records[world_size]:
            assert whole_numbers(record) == by_hand
            assert record["val_top1_error_pct"] == 100 * (1 - by_hand["val_correct_top1"] / NUM_IMAGES)


def test_shares_padded_to_equal_lengths_count_images_twice(records):
    """torch's DistributedSampler pads, so the error in % depends on the number of processes."""
    wrong = [records[world_size][0][1] for world_size in WORLD_SIZES]
    assert [record["val_images"] for record in wrong] == [53, 54, 54, 55]
    assert len({record["val_top1_error_pct"] for record in wrong}) > 1


# --- which images a rank takes ----------------------------------------------------------------------------------------


def times_seen(shares):
    return np.bincount(np.concatenate([list(share) for share in shares]), minlength=NUM_IMAGES)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_our_shares_hold_each_image_once_where_a_sampler_repeats_or_drops_some(world_size):
    ranks, padding = range(world_size), -NUM_IMAGES % world_size
    padded, dropped = (
        [DistributedSampler(range(NUM_IMAGES), world_size, rank, shuffle=False, drop_last=drop_last) for rank in ranks]
        for drop_last in (False, True)
    )
    ours = [rank_share(NUM_IMAGES, world_size=world_size, rank=rank) for rank in ranks]
    assert (times_seen(ours) == 1).all()
    assert (times_seen(padded) == 2).sum() == padding == {1: 0, 2: 1, 3: 1, 5: 2}[world_size]
    assert (times_seen(dropped) == 0).sum() == NUM_IMAGES % world_size


def test_the_real_loader_gives_the_digits_once_on_any_number_of_ranks(digits_data):
    """Compare the labels, and how many of them an untrained classifier gets right. 360 images are no multiple of 7."""
    from lbsgd.data.loaders import EvalLoader

    torch.manual_seed(0)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

    pixels = Pixels(resolution=32, device="cpu")
    loader = EvalLoader(digits_data / "val.beton", batch=64, share=Share(), pixels=pixels, threads=1)

    def counted(world_size):
        batches = []
        for rank in range(world_size):
            of_rank = copy.copy(loader)  # avoids a compilation
            of_rank.numbers = rank_share(len(loader.numbers), world_size=world_size, rank=rank)
            batches += [(labels, classifier(images).argmax(1) == labels) for images, labels in of_rank]
        labels, correct = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return labels.tolist(), int(correct.sum())

    labels, correct = counted(1)
    assert len(labels) == 360 and 0 < correct < 360
    assert all(counted(world_size) == (labels, correct) for world_size in (2, 3, 5, 7))


@pytest.mark.parametrize("value, broken", [(math.nan, "loss"), (-math.inf, "loss"), (0.5, None), (None, None)])
def test_a_run_is_judged_by_finite_numbers_only(value, broken):
    lbsgd.initialize(network(), config(1))
    assert without_number({"val_loss": value}, [Measure("val_loss", "loss", "loss", of_run="last")]) == broken


@pytest.mark.parametrize(
    "value, words",
    [
        (float("nan"), "iteration 0: the weights {} are not numbers; evaluate weights from before that"),
        (3e38, "iteration 0: val_loss is not a number in fp32, so nothing else is a result"),
    ],
)
def test_weights_without_numbers_give_no_result(value, words, capsys):
    """Comparisons with their logits are false, so an error of 90 % or an AP of 0.00 would pass for a result."""
    engine, plan = lbsgd.initialize(network(), config(1))
    trainer = make_trainer(engine, plan, val_data=FakeEval(6, 5, seed=0, batch=6, share=Share(), pixels=PIXELS))
    (name, weight), (_, bias) = list(engine.module.named_parameters())[-2:]
    with torch.no_grad():
        weight.fill_(value)
        bias.fill_(value)
    with pytest.raises(DataError, match=words.format(name)):
        evaluate_only(SimpleNamespace(weights=None), trainer)
    assert "top-1 error" not in capsys.readouterr().out
