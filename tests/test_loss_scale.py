"""Whether fp16 overflowed: asked of all gradients at once, with DeepSpeed's own answer."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import lbsgd
from lbsgd.train.loss_scale import see_overflow_at_once

BAD = [float("inf"), -float("inf"), float("nan")]


def optimizer(*groups):
    """Stand in for ZeRO's optimizer, with all that both ways read."""
    return SimpleNamespace(
        averaged_gradients=dict(enumerate(groups)),
        bit16_groups=groups,
        device="cpu",
        _has_inf_or_nan=DeepSpeedZeroOptimizer._has_inf_or_nan,
    )


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_answer_is_deepspeeds(bad, dtype):
    groups = [
        [torch.ones(3, 2, dtype=dtype), None, torch.full((4,), -60000.0, dtype=dtype)],
        [torch.zeros(0), torch.ones(1)],
    ]
    if bad is not None:
        groups[0][2][1] = bad
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
    from deepspeed.accelerator import get_accelerator
    from small_engine import in_precision

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "amax", None)  # of DeepSpeed's own way
    engine, plan = lbsgd.initialize(torch.nn.Linear(3, 2), in_precision("fp16", 1))
    before = engine.module.weight.detach().clone()
    for number in range(plan.accumulation_steps):
        x = torch.ones(plan.micro_batch, 3, dtype=torch.half)
        scale = bad if bad is not None and number == 0 else 1
        engine.backward((engine(x) * scale).sum())
        engine.step()
    assert engine.skipped_steps == (bad is not None)
    assert torch.equal(before, engine.module.weight) is (bad is not None)
