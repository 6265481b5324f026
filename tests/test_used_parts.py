"""Parts of a network that only some processes use: refused where DeepSpeed would mix up their gradients."""

import pytest
import torch
import torch.distributed as dist
from aggregating import OURS, config, one_iteration, same_bits
from oracle import BOUND, distance, network
from processes import in_processes
from torch import nn

import lbsgd
from lbsgd.errors import TrainingError
from lbsgd.train.used_parts import UPDATES


class Chosen(nn.Module):
    """A network that chooses one of two equal layers in each update, and has one that nobody uses."""

    def __init__(self, choose):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second, self.idle = network(), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.choose, self.updates = choose, 0

    def forward(self, images):
        self.updates += self.training
        return (self.first if self.choose(dist.get_rank(), self.updates - 1) else self.second)(self.body(images))


CHOICES = {
    "by rank": lambda rank, update: rank == 0,
    "by rank, later": lambda rank, update: rank == 0 or update < UPDATES - 1,
    "by update": lambda rank, update: update % 2 == 0,
}


def updates_until_refused(choice, stage, block=None):
    """The number of updates and the refusal of a run, and its weights; a run without one makes UPDATES + 2."""
    engine, plan = lbsgd.initialize(Chosen(CHOICES[choice]), config(2, stage=stage, block=block))
    said = ""
    try:
        for _ in range(UPDATES + 2):
            one_iteration(engine, plan)
    except TrainingError as error:
        said = str(error)
    hooks = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in engine.trained.values())
    if engine.aggregation:
        engine.aggregation.close()
    return engine.global_steps, said, hooks, {n: each.detach().clone() for n, each in engine.module.named_parameters()}


def of_two():
    cases = [(choice, stage, block) for choice in CHOICES for stage, block in ((0, None), (1, None), (2, None))]
    cases.append(("by rank", 1, OURS))
    return {f"{case[0]}, {case[1]}, {bool(case[2])}": updates_until_refused(*case) for case in cases}


@pytest.fixture(scope="module")
def found():
    one, other = in_processes(2, of_two)
    assert all(one[case][:2] == other[case][:2] and same_bits(one[case][3], other[case][3]) for case in one)
    return one


@pytest.mark.parametrize("stage", [1, 2])
def test_a_part_that_only_some_processes_use_ends_the_run_before_it_moves_the_weights(found, stage):
    for choice, updates in (("by rank", 0), ("by rank, later", UPDATES - 1)):
        done, said, _, weights = found[f"{choice}, {stage}, False"]
        assert done == updates and said.startswith("first.weight gets a gradient on some processes only, and at ZeRO")
        if not updates:
            initial = dict(Chosen(None).named_parameters())
            assert all(torch.equal(weights[name], initial[name]) for name in weights)


def test_it_trains_where_zeros_take_the_place_of_missing_gradients(found):
    for case in ("by rank, 0, False", "by rank, 1, True"):
        assert found[case][:2] == (UPDATES + 2, "")
    # ZeRO keeps weights in NCHW, in which a convolution has other bits.
    assert distance(found["by rank, 0, False"][3], found["by rank, 1, True"][3]) < BOUND


def test_a_part_that_all_use_or_none_is_no_such_part_and_the_hooks_are_removed(found):
    for stage in (0, 1, 2):
        done, said, hooks, _ = found[f"by update, {stage}, False"]
        assert (done, said) == (UPDATES + 2, "")
        assert hooks == found["by update, 0, False"][2] or stage
