"""A loop whose optimizer, scheduler and sampler get out of step is warned once, and a right one never."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from small_engine import recipe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lbsgd
from lbsgd.train.pace import watch_pace

IMAGES, PASSES, EPOCH = 256, 2, 4  # an epoch has 4 updates of 2 passes


def pieces():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    config = recipe(micro_batch=32)
    plan = lbsgd.Plan.read(config, 1, num_images=IMAGES)
    assert (plan.accumulation_steps, plan.iterations_per_epoch) == (PASSES, EPOCH)
    return model, plan, lbsgd.parts_for(model, plan, num_images=IMAGES)


class Loop:
    """A user's loop, with each way to get it wrong."""

    def __init__(self, *, passes=PASSES, schedule="update", announce=True, workers=0, times=1):
        self.model, self.plan, (self.sgd, self.scheduler, self.sampler) = pieces()
        self.passes, self.schedule, self.announce, self.times = passes, schedule, announce, times
        data = TensorDataset(torch.randn(IMAGES, 4))
        self.loader = DataLoader(data, batch_sampler=self.sampler, num_workers=workers)

    def evaluate(self):
        with torch.no_grad():
            for (x,) in self.loader:
                self.model.eval()(x)
        self.model.train()

    def epoch(self, number, first=0, skipped=0, stop=None, evaluate_at=()):
        if self.announce:
            self.sampler.set_epoch(number, first)
        for i, (x,) in enumerate(self.loader, start=1):
            if i <= skipped * PASSES:
                continue
            self.model(x).square().mean().backward()
            if i % self.passes == 0:
                self.sgd.step()
                for _ in range(self.times if self.schedule == "update" else 0):
                    self.scheduler.step()
                if i in evaluate_at:
                    self.evaluate()
            if stop is not None and i == stop * PASSES:
                break
        if self.schedule == "epoch":
            self.scheduler.step()


def said(run):
    """lbsgd's warnings in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if str(each.message).startswith("lbsgd: ")]


def epochs(number, evaluated=False, **options):
    def run():
        loop = Loop(**options)
        for epoch in range(number):
            loop.epoch(epoch)
            if evaluated:
                loop.evaluate()

    return run


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_right_loop_is_told_nothing_also_if_it_evaluates_on_its_training_images(workers, evaluated):
    assert said(epochs(3, evaluated, workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_forgotten_set_epoch_is_told_once_and_the_loop_goes_on(workers):
    [line] = said(epochs(4, announce=False, workers=workers))
    assert "another epoch takes the batches of epoch 0 in the same order; call sampler.set_epoch(epoch)" in line


def test_the_epoch_that_is_taken_again_is_named():
    def run():
        loop = Loop()
        loop.epoch(0), loop.epoch(1)
        loop.announce = False
        loop.epoch(2)

    [line] = said(run)
    assert "takes the batches of epoch 1 in the same order" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_look_at_a_batch_or_an_evaluation_near_the_end_of_an_epoch_is_no_epoch(workers):
    def run():
        loop = Loop(workers=workers)
        for epoch in range(2):
            loop.epoch(epoch, evaluate_at=(4, 6, 8))
            next(iter(loop.sampler))

    assert said(run) == []


def test_the_same_batches_after_a_break_or_around_an_evaluation_are_no_second_epoch():
    def run():
        loop = Loop()
        loop.epoch(0, evaluate_at=(4,))
        loop.epoch(1, stop=2)
        loop.sampler.set_epoch(1, 2), list(loop.sampler)[:1]
        loop.announce = False
        loop.sampler.set_epoch(1, 2)
        loop.epoch(1)
        broken = Loop(announce=False)
        broken.epoch(0, stop=2), broken.epoch(0)

    assert said(run) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_per_pass_is_told_in_the_first_epoch(workers):
    [line] = said(epochs(3, passes=1, workers=workers))
    assert "steps of the optimizer for" in line and "of which each update takes 2;" in line
    assert workers or line.startswith("lbsgd: 1 steps of the optimizer for 1 batches of the sampler")


def test_a_step_per_pass_is_told_also_in_a_later_epoch():
    def run():
        loop = Loop()
        loop.epoch(0)
        loop.passes = 1
        loop.epoch(1)

    [line] = said(run)
    assert line.startswith("lbsgd: 1 steps of the optimizer for 1 batches of the sampler")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scheduler_that_steps_once_per_process_is_told_in_the_first_epoch(workers):
    [line] = said(epochs(3, times=2, workers=workers))
    assert "steps of the scheduler for" in line


def test_of_several_processes_rank_0_alone_warns():
    _, plan, (_, scheduler, _) = pieces()
    cut = dict(global_batch=plan.global_batch, micro_batch=plan.micro_batch, world_size=PASSES, seed=0)
    second = lbsgd.SharedShuffleSampler(IMAGES, rank=1, **cut)
    watch_pace(SimpleNamespace(register_step_pre_hook=pytest.fail), scheduler, second, plan)


def test_a_scheduler_that_steps_per_epoch_is_told_in_the_second():
    [line] = said(epochs(3, schedule="epoch"))
    assert line.startswith("lbsgd: the scheduler is at update 1 and the sampler at 4, with 4 updates per epoch; call")


@pytest.mark.parametrize(
    "steps, words", [(1, "at update 5 and the sampler at 4"), (4, "at update 4 and the sampler at 0")]
)
def test_a_scheduler_that_is_ahead_is_told_at_the_next_epoch_or_at_once_where_it_is_a_whole_one(steps, words):
    def run():
        loop = Loop()
        for _ in range(steps):
            loop.scheduler.step()
        loop.epoch(0), loop.epoch(1)

    [line] = said(run)
    assert words in line


@pytest.mark.parametrize("batches", [slice(None, None, 2), slice(4)])
def test_batches_that_are_split_between_processes_again_are_told(batches):
    def run():
        loop = Loop()
        loop.loader = loop.loader.batch_sampler
        for epoch in range(3):
            loop.sampler.set_epoch(epoch)
            for i, numbers in enumerate(list(loop.sampler)[batches], start=1):
                loop.model(torch.randn(len(numbers), 4)).square().mean().backward()
                if i % PASSES == 0:
                    loop.sgd.step(), loop.scheduler.step()

    [line] = said(run)
    assert "at update 2 and the sampler at 4" in line


def resumed(load, first=None, skipped=0):
    """Go on after 6 updates, in the middle of the second epoch, for two more epochs."""

    def run():
        whole, loop = Loop(), Loop()
        whole.epoch(0), whole.epoch(1, stop=2)
        if load:
            loop.scheduler.load_state_dict(whole.scheduler.state_dict())
        loop.epoch(1, first or 0, skipped)
        for epoch in (2, 3):
            loop.epoch(epoch)

    return run


def test_a_loop_that_resumes_without_the_schedulers_state_is_told():
    [line] = said(resumed(load=False, first=2))
    assert "at update 0 and the sampler at 6" in line and "load its state_dict" in line


@pytest.mark.parametrize("how", [dict(first=2), dict(skipped=2)])
def test_a_loop_that_resumes_in_the_middle_of_an_epoch_is_told_nothing(how):
    assert said(resumed(load=True, **how)) == []


def test_an_epoch_that_begins_again_after_a_resume_is_told_when_it_has_made_too_many_updates():
    [line] = said(resumed(load=True))
    assert "at update 10 and the sampler at 8" in line


def test_a_run_longer_than_the_plan_and_updates_that_overflow_skips_are_told_nothing():
    def run():
        loop = Loop()
        loop.sgd.step = (lambda step: lambda: loop.skip.pop() or step() if loop.skip else step())(loop.sgd.step)
        loop.skip = [True, False, False, True]
        for epoch in range(loop.plan.num_iterations // EPOCH + 2):
            loop.epoch(epoch)

    assert said(run) == []


def test_a_step_for_each_parameter_group_as_zero_takes_it_is_told_nothing():
    def run():
        loop = Loop()
        step = loop.sgd.step
        loop.sgd.step = lambda: [step() for _ in loop.sgd.param_groups]
        for epoch in range(2):
            loop.epoch(epoch)

    assert said(run) == []
