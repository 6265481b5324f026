"""Public functions refuse a wrong argument in one line, which says what to give instead."""

import copy
import json

import numpy as np
import pytest
import torch
from commands import ROOT, refused, script
from small_engine import recipe
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lbsgd
from lbsgd.commands.recipe_task import require_maker, require_task
from lbsgd.errors import ConfigError
from lbsgd.report.measure import CLASSIFIER, TOP1
from lbsgd.train.returned import require_evaluation, require_loss

NETWORK = nn.Linear(2, 2)
PLAN = lbsgd.Plan.read(recipe(), 1)


class MixinAlone(lbsgd.LargeMinibatchTrainer):
    pass


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: lbsgd.parts_for(PLAN, NETWORK), "the network is of type Plan; give a torch.nn.Module, then the plan"),
        (lambda: lbsgd.parts_for(NETWORK, "8k.json"), "the plan is of type str; make one by lbsgd.Plan.read"),
        (lambda: lbsgd.parts_for(NETWORK, recipe()), "the plan is of type dict; make one"),
        (lambda: lbsgd.parts_for(NETWORK.parameters(), PLAN), "the network is of type generator; give a torch.nn"),
        (lambda: lbsgd.needs_of("8k.json", "lightning"), "the plan is of type str; make one by lbsgd.Plan.read"),
        (lambda: MixinAlone(plan="8k.json"), "the plan is of type str; make one by lbsgd.Plan.read"),
        (lambda: MixinAlone(plan=PLAN), "make a class of both: class Trainer"),
        (lambda: lbsgd.initialize("8k.json", NETWORK), "the network is of type str; give a torch.nn.Module"),
        (lambda: lbsgd.initialize(NETWORK, None), "the JSON is of type NoneType; give its path, or the parsed object"),
        (lambda: lbsgd.initialize(NETWORK, recipe(), overrides={}), "overrides is of type dict; give lbsgd.Overrides"),
        (lambda: lbsgd.Plan.read([recipe()], 1), "the JSON is of type list; give its path, or the parsed object"),
        (lambda: lbsgd.Plan.read(recipe(), "2"), "world_size is of type str; give the number of processes as an int"),
        (lambda: lbsgd.Plan.read(recipe(), 1, float("nan")), "lbsgd.num_images is NaN; give a whole number"),
        (lambda: lbsgd.Overrides(settings="lbsgd.epochs=3"), "settings is of type str; give a tuple of texts such as"),
        (
            lambda: lbsgd.Overrides(settings=[("lbsgd.warmup.epochs", 2)]),
            "('lbsgd.warmup.epochs', 2) in settings is of type tuple; give a tuple of texts such as",
        ),
        (lambda: lbsgd.convert_batch_norm(NETWORK.parameters(), 4), "the network is of type generator; give a torch"),
        (lambda: lbsgd.decay_groups(NETWORK.parameters(), 1e-4), "the network is of type generator; give a torch"),
        (lambda: lbsgd.agree_statistics(NETWORK.parameters()), "the network is of type generator; give a torch.nn"),
        (
            lambda: lbsgd.LargeMinibatchLR(torch.optim.SGD(NETWORK.parameters(), 0.1), PLAN),
            "the schedule is of type Plan; give plan.schedule, or that of LargeMinibatchSGD",
        ),
    ],
)
def test_an_argument_of_another_type_is_one_line(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


RULE = lbsgd.LargeMinibatchSGD()


def scheduler():
    return lbsgd.LargeMinibatchLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), PLAN.schedule)


def sampler(num_images, **changed):
    return lbsgd.SharedShuffleSampler(num_images, **{"global_batch": 16, "micro_batch": 4, **changed})


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: lbsgd.scaled_lr(-5, 0.1, 256), "global_batch is -5, and must be a number of at least 1"),
        (lambda: lbsgd.scaled_lr(256, 0.1, 0), "base_batch is 0, and must be a number of at least 1"),
        (lambda: lbsgd.scaled_lr(256, float("nan"), 256), "base_lr is nan, and must be a number of at least 0"),
        (lambda: lbsgd.learning_rate(-1, PLAN.schedule), "update -1 is before the first, which is update 0"),
        (lambda: lbsgd.LargeMinibatchSGD(decay_epochs=30), "decay_epochs is of type int; give a tuple, (30,) for a"),
        (lambda: lbsgd.Schedule(0.1, float("inf")), "reference_lr is inf, and must be"),
        (lambda: lbsgd.Schedule(0.1, 0.1, decay_iterations=(5, -5)), "a point of decay_iterations is -5, and must be"),
        (lambda: lbsgd.Schedule(0.1, 0.1, decay_factor=-0.1), "decay_factor is -0.1, and must be"),
        (lambda: lbsgd.LargeMinibatchSGD(base_lr=-1), "base_lr is -1, and must be"),
        (lambda: lbsgd.LargeMinibatchSGD(target_batch_size=0), "global_batch is 0, and must be"),
        (lambda: lbsgd.LargeMinibatchSGD(warmup_epochs=-5), "warmup_epochs is -5, and must be"),
        (lambda: RULE.warmup_schedule(0, 0, 0), "iters_per_epoch is 0, and must be a number of at least 1"),
        (lambda: lbsgd.decay_groups(NETWORK, -1e-4), "weight_decay is -0.0001, and must be"),
        (lambda: lbsgd.decay_groups(NETWORK, 1e-4, bias_lr_factor=-2), "bias_lr_factor is -2, and must be"),
        (lambda: lbsgd.Overrides(precision="float16"), "precision is 'float16'; give one of fp16, bf16, fp32"),
        (lambda: sampler(RULE), "num_images is <lbsgd.algorithm.schedule.LargeMinibatchSGD object"),
        (lambda: sampler(64, global_batch="16"), "global_batch is '16', and must be a whole number of at least 0"),
        (lambda: sampler(64, micro_batch=4.0), "micro_batch is 4.0, and must be a whole number of at least 0"),
        (lambda: sampler(64, seed=-1), "seed is -1, and must be a whole number of at least 0"),
        (lambda: sampler(64, world_size="2", rank=0), "world_size is '2', and must be a whole number"),
        (lambda: sampler(64, world_size=2, rank=1.0), "rank is 1.0, and must be a whole number"),
        (lambda: sampler(64).set_epoch(-1), "epoch is -1, and must be a whole number of at least 0"),
        (lambda: sampler(64).set_epoch(1.0), "epoch is 1.0, and must be a whole number"),
        (lambda: sampler(64).set_epoch("1"), "epoch is '1', and must be a whole number"),
        (lambda: sampler(64).set_epoch(0, 0.5), "first_iteration is 0.5, and must be a whole number"),
        (lambda: lbsgd.LargeMinibatchSGD(target_batch_size="8192"), "target_batch_size is '8192', and must be"),
        (lambda: scheduler().move_to(1.5), "iteration is 1.5, and must be a whole number of at least 0"),
        (
            lambda: lbsgd.parts_for(NETWORK, PLAN, "1437"),
            "num_images is '1437', and must be a whole number of at least",
        ),
    ],
)
def test_a_number_that_cannot_be_is_one_line(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(per_worker_batch=32.5), "per_worker_batch is 32.5, and must be a whole number of at least 1"),
        (dict(per_worker_batch="32"), "per_worker_batch is '32', and must be"),
        (dict(per_worker_batch=32, passes=0), "passes is 0, and must be a whole number of at least 1"),
        (dict(per_worker_batch=32, scope="rank"), "scope 'rank' must be one of"),
    ],
)
def test_a_refused_conversion_leaves_the_network_as_it_was(wrong, words):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=words):
        lbsgd.convert_batch_norm(network, **wrong)
    assert type(network[1]) is nn.BatchNorm2d


def test_an_engine_is_no_network():
    engine, _ = lbsgd.initialize(nn.Linear(2, 2), recipe())
    with pytest.raises(ConfigError, match="^the network is an engine already; give engine.module to train it anew$"):
        lbsgd.initialize(engine, recipe())


@pytest.mark.parametrize("wrapper", [nn.DataParallel, DistributedDataParallel])
def test_a_network_that_another_wrapper_spreads_over_processes_is_none(wrapper):
    lbsgd.initialize(nn.Linear(2, 2), recipe())  # the processes have met
    words = f"^the network is in a {wrapper.__name__}, and the engine does that work itself; give its .module$"
    with pytest.raises(ConfigError, match=words):
        lbsgd.initialize(wrapper(nn.Linear(2, 2)), recipe())


def test_no_overrides_and_numbers_of_numpy_are_taken():
    plan = lbsgd.Plan.read(recipe(), np.int64(1), np.int32(PLAN.num_images), None)
    assert plan == PLAN and json.dumps(plan.as_dict())


@pytest.mark.parametrize("library", ["transformers", "accelerate", "lightning", "deepspeed"])
@pytest.mark.parametrize("parts", [False, True])
def test_what_a_library_does_to_its_json_does_not_reach_the_plan(library, parts):
    before = copy.deepcopy(PLAN.config)
    for block in lbsgd.needs_of(PLAN, library, parts).config.values():
        if isinstance(block, dict):
            block.clear()
    assert PLAN.config == before


class Task:
    name, counts, judged_by = "small", ("top1_error",), CLASSIFIER

    def __init__(self, **changed):
        vars(self).update(changed)

    def network(self, num_classes, plan): ...
    def loss(self, network, batch): ...
    def evaluate(self, network, batches): ...


@pytest.mark.parametrize(
    "task, words",
    [
        (NETWORK, "is of type Linear, which has no method network; give main an object with the methods network, loss"),
        (None, "is of type NoneType, which has no method network"),
        (Task, "is the class Task; give main an object, Task()"),
        (Task(network=NETWORK, evaluate="top-1"), "is of type Task, which has no method evaluate"),
        (Task(counts="top1_error"), "counts of the recipe's task Task is 'top1_error'; give a tuple, as"),
        (Task(counts=None), "counts of the recipe's task Task is None; give a tuple, as"),
        (Task(judged_by=TOP1), "judged_by of the recipe's task Task is Measure(key='val_top1_error_pct'"),
        (Task(judged_by=("val_top1_error_pct",)), "is ('val_top1_error_pct',); give a tuple of Measure, such as"),
        (Task(judged_by=()), "judged_by of the recipe's task Task is (); give a tuple of Measure, such as CLASSIFIER"),
        (Task(name=None), "has no name for the log; give it one"),
    ],
)
def test_what_is_no_task_is_one_line(task, words):
    with pytest.raises(ConfigError) as caught:
        require_task(task)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    require_task(Task(counts=[], judged_by=[TOP1]))


@pytest.mark.parametrize("maker", [NETWORK, nn.Linear, Task()])
def test_what_makes_no_task_is_one_line(maker):
    with pytest.raises(ConfigError, match="the recipe gives main a [A-Za-z]+; give the task's class, as"):
        require_maker(maker)
    require_maker(Task)
    require_maker(lambda request: Task())


LOSS, ONE = torch.ones((), requires_grad=True) * 1, torch.ones(())


@pytest.mark.parametrize(
    "returned, words",
    [
        (
            LOSS,
            "returned a tensor of shape (); return two values: the mean loss of the pass's images, and a tuple of 1",
        ),
        (None, "returned None; return two values"),
        ((LOSS, ONE, ONE), "returned a tuple of 3 values; return two values"),
        ((LOSS + torch.zeros(4), (ONE,)), "returned a tensor of shape (4,) as its loss, and not a tensor without dim"),
        ((0.5, (ONE,)), "returned a value of type float as its loss, and not a tensor"),
        ((LOSS.detach(), (ONE,)), "returned a loss that does not depend on the weights, or was detached from them"),
        ((LOSS, ONE), "returned a tensor of shape () as its counts; return two values"),
        ((LOSS, ()), "returned a tuple of 0 values as its counts"),
        ((LOSS, (ONE, ONE)), "returned a tuple of 2 values as its counts"),
        ((LOSS, {"top1_error": ONE}), "returned a dict of 1 values as its counts"),
        ((LOSS, (3,)), "counts top1_error by a value of type int, and not by a tensor without dimensions"),
        ((LOSS, (torch.ones(4),)), "counts top1_error by a tensor of shape (4,), and not by a tensor without"),
        ((LOSS, (ONE.to("meta"),)), "counts top1_error on meta, and its loss is on cpu"),
    ],
)
def test_a_loss_that_is_none_is_one_line(returned, words):
    with pytest.raises(ConfigError) as caught:
        require_loss(returned, Task())
    assert f"loss of the recipe's task Task {words}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("returned", [(LOSS, (ONE,)), [LOSS, [ONE.int()]], (LOSS, torch.ones(1))])
def test_a_loss_and_its_counts_pass(returned):
    assert require_loss(returned, Task()) is returned
    with pytest.raises(ConfigError, match=r"images, and \(\), as it counts none$"):
        require_loss(returned, Task(counts=()))


TOP1_ALONE = {TOP1.key: 20.0}


@pytest.mark.parametrize(
    "found, words",
    [
        (None, "returned None; return a dict of numbers, with the keys val_top1_error_pct"),
        (20.0, "returned a value of type float; return a dict of numbers"),
        ({}, "returned no val_top1_error_pct, by which the run is judged; return it, or name others in judged_by"),
        ({TOP1.key: torch.ones(())}, "returned a tensor of shape () as val_top1_error_pct; return a number, as with"),
        ({TOP1.key: "20 %"}, "returned a value of type str as val_top1_error_pct; return a number"),
        (TOP1_ALONE | {"val_loss": torch.ones(2)}, "returned a tensor of shape (2,) as val_loss; return a number"),
        (TOP1_ALONE | {"val_loss": np.float32(1)}, "returned a value of type float32 as val_loss; return a number"),
        (TOP1_ALONE | {0: 1.0}, "returned the key 0; give each number a name"),
        (TOP1_ALONE | {"val_loss": "2.3"}, "returned a value of type str as val_loss; return a number"),
        (TOP1_ALONE | {"epoch": 3}, "returned the key epoch, which the log has from the trainer; give that number"),
        (TOP1_ALONE | {"train_top1_error_pct": 3}, "returned the key train_top1_error_pct, which the log has from the"),
    ],
)
def test_an_evaluation_that_is_none_is_one_line(found, words):
    with pytest.raises(ConfigError) as caught:
        require_evaluation(found, Task(judged_by=(TOP1,)))
    assert f"evaluate of the recipe's task Task {words}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [20, None, float("nan"), np.float64(20)])
def test_an_evaluation_passes_with_any_number_and_further_values(value):
    found = {TOP1.key: value, "per_class": [1.0, 2.0], "note": "text"}
    assert require_evaluation(found, Task(judged_by=(TOP1,))) == found


SIMULATION = "run_simulation(parser(''), lambda request: opened(request, {}, {{}}, ExitStack()))"


@pytest.mark.parametrize(
    "json, module, call, words",
    [
        ("digits", "train", "main({}, '')", "the recipe's task is of type Linear, which has no method network"),
        ("digits", "simulate", SIMULATION, "the recipe's task is of type Linear, which has no method network"),
        ("detection/scenes", "detect", "main({}, '')", "the recipe gives main a Linear; give the task's class"),
    ],
)
def test_a_recipe_that_gives_main_its_network_ends_with_2_and_one_line(tmp_path, json, module, call, words):
    lines = ["import torch", f"from lbsgd.commands.{module} import *", call.format("torch.nn.Linear(2, 2)")]
    (tmp_path / "recipe.py").write_text("\n".join(lines))
    data = ("--fake_data",) if json == "digits" else ("--data_dir", tmp_path)
    asked = (tmp_path / "recipe.py", "--deepspeed_config", ROOT / f"ds_configs/{json}.json", *data)
    refused(script(*asked, "--output_dir", tmp_path / "run"), words)
