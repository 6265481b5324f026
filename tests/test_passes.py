"""Loops whose calls of an engine are not the plan's passes, which would silently train something else."""

import copy
import warnings

import pytest
import torch
from oracle import K, N, global_batch, network
from processes import in_processes
from small_engine import recipe
from torch.nn import functional as F

import lbsgd
from lbsgd.train.engine_state import gather_state, restore_state

UPDATES = 3


class Loop:
    """A user's own loop, with a method for each moment at which it may do something wrong."""

    rows = N

    def before(self, engine, last): ...

    def forward(self, engine, images):
        return engine(images)

    def backward(self, engine, loss):
        engine.backward(loss)

    def after(self, engine, last):
        engine.step()

    def run(self, config, rows=None):
        engine, plan = lbsgd.initialize(network(), config)
        rows = rows or self.rows
        images, labels = (part.to(engine.device) for part in global_batch(0))
        for i in range(UPDATES * plan.accumulation_steps):
            last = i % plan.accumulation_steps == plan.accumulation_steps - 1
            self.before(engine, last)
            self.backward(engine, F.cross_entropy(self.forward(engine, images[:rows]), labels[:rows]))
            self.after(engine, last)
        return engine


class StepsLast(Loop):
    def after(self, engine, last):
        if last:
            engine.step()


class StepsAgain(Loop):
    def after(self, engine, last):
        engine.step()
        if last:
            engine.step()


class ClearsFirst(Loop):
    def before(self, engine, last):
        engine.zero_grad()


class ClearsInTheOptimizer(Loop):
    def before(self, engine, last):
        engine.optimizer.zero_grad()


class ClearsLast(Loop):
    def after(self, engine, last):
        engine.zero_grad()
        engine.step()


class GivesMore(Loop):
    rows = 2 * N


class GivesMoreByName(GivesMore):
    """As libraries of Hugging Face do."""

    def forward(self, engine, images):
        return engine(x=images)


class Evaluates(Loop):
    """A right loop: it clears what is clear, and its evaluations have other sizes."""

    def before(self, engine, last):
        engine.eval()
        engine(global_batch(0)[0].to(engine.device))
        engine.train()
        with torch.no_grad():
            engine(global_batch(0)[0][: 2 * N].to(engine.device))

    def after(self, engine, last):
        engine.step()
        if last:
            engine.zero_grad()


class InTorchsWay(Loop):
    """A right loop at stages 1 and 2, where DeepSpeed follows torch's own back-propagation."""

    def backward(self, engine, loss):
        if engine.zero_optimization():
            loss.backward()
        else:
            engine.backward(loss)


def said_of(recwarn):
    return [str(each.message).removeprefix("lbsgd: ") for each in recwarn if "lbsgd: " in str(each.message)]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "loop, words",
    [
        (Loop, None),
        (Evaluates, None),
        (InTorchsWay, None),
        (StepsLast, f"{K} calls of engine.backward and none of engine.step; call engine.step() after each"),
        (StepsAgain, "engine.step() is called again without an engine.backward since"),
        (ClearsFirst, "zero_grad() between the passes of an update drops the gradients of those before"),
        (ClearsInTheOptimizer, "zero_grad() between the passes"),
        (ClearsLast, "zero_grad() between the passes"),
        (
            GivesMore,
            f"the engine is given {2 * N} rows in a pass; if each is an image, the learning rate is for the plan's",
        ),
        (GivesMoreByName, f"the engine is given {2 * N} rows in a pass"),
    ],
)
def test_other_passes_than_the_plans_are_told_once(stage, loop, words, recwarn):
    loop().run(recipe(stage))
    said = said_of(recwarn)
    assert len(said) == (words is not None) and all(each.startswith(words) for each in said)


@pytest.mark.parametrize("loop, words", [(ClearsFirst, None), (ClearsLast, "zero_grad() between the passes")])
def test_a_loop_of_one_pass_may_clear_gradients_before_it(loop, words, recwarn):
    loop().run(recipe(micro_batch=K * N), rows=K * N)
    assert [each.startswith(words) for each in said_of(recwarn)] == [True] * (words is not None)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_state_that_is_restored_amid_an_update_is_told_nothing(stage, recwarn):
    engine = Loop().run(recipe(stage))
    state = gather_state(engine)
    engine.backward(engine(global_batch(0)[0][:N].to(engine.device)).sum())
    engine.step()
    restore_state(engine, state)
    assert not said_of(recwarn)


def test_passes_under_no_sync_need_no_step(recwarn):
    engine, plan = lbsgd.initialize(network(), recipe())
    images, labels = (part.to(engine.device) for part in global_batch(0))
    with engine.no_sync():
        for _ in range(plan.accumulation_steps):
            engine.backward(F.cross_entropy(engine(images[:N]), labels[:N]))
    engine.step()
    assert not said_of(recwarn)


def test_a_pass_that_raised_counts_for_nothing(recwarn):
    engine, _ = lbsgd.initialize(network(), recipe())
    for _ in range(2 * K):
        with pytest.raises(AssertionError):
            engine.backward("no loss")
    assert engine.passes_without_step == 0 and not said_of(recwarn)


def test_the_network_of_an_engine_is_used_otherwise_without_a_word(recwarn):
    """By a second engine of another micro batch, alone, and as a copy."""
    first, _ = lbsgd.initialize(network(), recipe())
    second, _ = lbsgd.initialize(first.module, recipe(micro_batch=K * N))
    images = global_batch(0)[0].to(second.device)
    for network_of_it in second, first.module, copy.deepcopy(first.module):
        network_of_it.train()
        network_of_it(images)
    assert not said_of(recwarn)
    first(images)
    assert len(said_of(recwarn)) == 1


def told_here():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        StepsAgain().run(recipe())
    return len(said_of(said))


def test_of_several_processes_rank_0_alone_warns():
    assert in_processes(2, told_here) == [1, 0]
