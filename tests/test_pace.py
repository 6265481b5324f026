"""A loop in which optimizer, scheduler and sampler part from each other is told once, and a right one never."""

import warnings

import pytest
import torch
from small_engine import recipe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lbsgd

IMAGES, PASSES, EPOCH = 256, 2, 4  # an epoch has 4 updates of 2 passes


def pieces():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    config = recipe(micro_batch=32)
    plan = lbsgd.Plan.read(config, 1, num_images=IMAGES)
    assert (plan.accumulation_steps, plan.iterations_per_epoch) == (PASSES, EPOCH)
    return model, plan, lbsgd.parts_for(model, plan, num_images=IMAGES)


class Loop:
    """A loop of anybody's, and each way to get it wrong."""

    def __init__(self, *, passes=PASSES, schedule="update", announce=True, workers=0, times=1):
        self.model, self.plan, (self.sgd, self.scheduler, self.sampler) = pieces()
        self.passes, self.schedule, self.announce, self.times = passes, schedule, announce, times
        data = TensorDataset(torch.randn(IMAGES, 4))
        options = dict(num_workers=workers, persistent_workers=True) if workers else {}
        self.loader = DataLoader(data, batch_sampler=self.sampler, **options)

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
    """What lbsgd warns of in a run."""
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

    assert said(run) == []
