"""Public functions refuse a wrong argument in one line, which says what to give."""

import copy

import numpy as np
import pytest
import torch
from small_engine import recipe
from torch import nn

import lbsgd
from lbsgd.errors import ConfigError

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
        (lambda: lbsgd.Plan.read(recipe(), 1, float("nan")), "lbsgd.num_images is NaN, and must be a whole number"),
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


def test_an_engine_is_no_network():
    engine, _ = lbsgd.initialize(nn.Linear(2, 2), recipe())
    with pytest.raises(ConfigError, match="^the network is an engine already; give engine.module to train it anew$"):
        lbsgd.initialize(engine, recipe())


def test_no_overrides_and_numbers_of_numpy_are_taken():
    assert lbsgd.Plan.read(recipe(), np.int64(1), np.int32(PLAN.num_images), None) == PLAN


@pytest.mark.parametrize("library", ["transformers", "accelerate", "lightning", "deepspeed"])
@pytest.mark.parametrize("parts", [False, True])
def test_what_a_library_does_to_its_json_does_not_reach_the_plan(library, parts):
    before = copy.deepcopy(PLAN.config)
    for block in lbsgd.needs_of(PLAN, library, parts).config.values():
        if isinstance(block, dict):
            block.clear()
    assert PLAN.config == before
