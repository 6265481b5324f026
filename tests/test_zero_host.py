"""Saving ZeRO's host work changes nothing: overflows are seen alike, and the weights are in the same places."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from oracle import network
from small_engine import in_precision, train

import lbsgd
from lbsgd.train.zero_host import see_overflow_at_once

BAD = [float("inf"), -float("inf"), float("nan")]


def optimizer(*groups):
    """Replace ZeRO's optimizer by one with all that both ways read."""
    return SimpleNamespace(
        averaged_gradients=dict(enumerate(groups)),
        bit16_groups=groups,
        device="cpu",
        _has_inf_or_nan=DeepSpeedZeroOptimizer._has_inf_or_nan,
    )


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group, gradient", [(0, 2), (1, 1)])
def test_the_answer_is_deepspeeds(bad, dtype, group, gradient):
    groups = [
        [torch.ones(3, 2, dtype=dtype), None, torch.full((4,), -60000.0, dtype=dtype)],
        [torch.zeros(0), torch.ones(1)],
    ]
    if bad is not None:
        groups[group][gradient][-1] = bad
    ours = optimizer(*groups)
    see_overflow_at_once(ours)
    found = ours.has_overflow_partitioned_grads_serial()
    theirs = DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial(optimizer(*groups))
    assert found.shape == theirs.shape and bool(found) == bool(theirs) == (bad is not None)


def test_a_process_without_gradients_of_its_own_saw_no_overflow():
    ours = optimizer([None], [torch.zeros(0)])
    see_overflow_at_once(ours)
    assert ours.has_overflow_partitioned_grads_serial().tolist() == [False]


@pytest.mark.parametrize("bad", [None, *BAD])
def test_an_engine_in_fp16_skips_an_update_with_such_a_gradient(monkeypatch, bad):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "amax", None)  # used by DeepSpeed's own way
    engine, plan = lbsgd.initialize(torch.nn.Linear(3, 2), in_precision("fp16", 1))
    before = engine.module.weight.detach().clone()
    for number in range(plan.accumulation_steps):
        x = torch.ones(plan.micro_batch, 3, dtype=torch.half)
        scale = bad if bad is not None and number == 0 else 1
        engine.backward((engine(x) * scale).sum())
        engine.step()
    assert engine.skipped_steps == (bad is not None)
    assert torch.equal(before, engine.module.weight) is (bad is not None)


@pytest.fixture
def given(monkeypatch):
    """Count how often DeepSpeed assigns all parameters their places."""
    places, calls = DeepSpeedZeroOptimizer._update_model_bit16_weights, []
    monkeypatch.setattr(
        DeepSpeedZeroOptimizer,
        "_update_model_bit16_weights",
        lambda optimizer, group: (calls.append(group), places(optimizer, group)),
    )
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_lie_in_their_places_are_left_there(given, monkeypatch, stage, precision):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = in_precision(precision)
    config["zero_optimization"]["stage"] = stage
    engine, plan = lbsgd.initialize(network(), config)
    assert given  # once for each group, when it is made
    given.clear()
    train(engine, plan, last=2)
    assert not given
    before = engine.module.state_dict()
    engine.optimizer.update_lp_params()  # after loading a checkpoint
    assert not given and same_places(before, engine.module.state_dict())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_weight_that_was_moved_gets_its_place_again(given, stage):
    """Otherwise it would never get an update."""
    engine, plan = lbsgd.initialize(network(), in_precision("fp32", stage))
    given.clear()
    moved = list(engine.module.parameters())[-1]
    moved.data = moved.data.clone()
    old = moved.detach().clone()
    train(engine, plan, last=1)
    assert given and not torch.equal(moved, old)
    given.clear()
    train(engine, plan, first=1, last=2)
    assert not given


def test_deepspeed_gives_all_places_after_each_update(given):
    """Once DeepSpeed checks first, `leave_weights_in_place` can go."""
    engine, plan = lbsgd.initialize(network(), in_precision("fp32", 1))
    del engine.optimizer._update_model_bit16_weights  # ours
    given.clear()
    train(engine, plan, last=2)
    assert len(given) == 2 * len(engine.optimizer.bit16_groups)


def same_places(before, after):
    return {name: each.data_ptr() for name, each in before.items()} == {n: each.data_ptr() for n, each in after.items()}
