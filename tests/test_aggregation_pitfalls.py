"""Known ways to get aggregation wrong. The right version stays within BOUND, the wrong one exceeds 100 times that.

Each wrong version replaces a part of lbsgd by the usual mistake.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from aggregating import OURS, config, parameters, run
from oracle import BOUND, distance
from processes import in_processes

import lbsgd
from lbsgd.train.aggregation.aggregation import AggregationSettings
from lbsgd.train.aggregation.buckets import fill

# --- an order observed at run time, which processes and resumed runs need not share ---------------------------------


def in_observed_order(monkeypatch):
    """Buckets in the order in which this process observed its gradients. On rank 1 two of them have changed places."""
    observed = fill

    def wrong(parameters, bucket_elements, multiple):
        seen = [*parameters]
        if dist.get_rank() == 1:
            seen[0], seen[-2] = seen[-2], seen[0]
        return observed(seen, bucket_elements, multiple)

    monkeypatch.setattr("lbsgd.train.aggregation.aggregation.fill", wrong)


def divided_after(monkeypatch):
    """fp16: sum first, which overflows where the mean does not."""
    original = AggregationSettings.of.__func__
    monkeypatch.setattr(
        AggregationSettings, "of", classmethod(lambda cls, plan: original(cls, replace(plan, precision="fp32")))
    )


def mean_of_large_gradients(values):
    """The gradient of one weight whose fp16 value is large but fits: 40,000 on both processes."""
    engine, _ = lbsgd.initialize(torch.nn.Linear(1, 1, bias=False), values)
    images = torch.full((8, 1), 40_000.0).half()
    engine.optimizer.loss_scaler.cur_scale = 1.0
    engine.backward(engine(images).mean(dtype=torch.float16))
    return engine.optimizer.averaged_gradients[0][0].flatten().tolist()


def all_versions():
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    found = {}
    for name, stage, mistake in [("right 0", 0, None), ("right 1", 1, None), ("order", 0, in_observed_order)]:
        with pytest.MonkeyPatch.context() as patch:
            if mistake:
                mistake(patch)
            found[name] = parameters(run(config(2, stage=stage, bucket=500_000_000, block=OURS), iterations=3))
    found["expected"] = parameters(run(config(2), iterations=3))
    halves = config(2, stage=1, precision="fp16", block=OURS)
    found["fp16"] = mean_of_large_gradients(halves)
    with pytest.MonkeyPatch.context() as patch:
        divided_after(patch)
        found["fp16 wrong"] = mean_of_large_gradients(halves)
    return found


@pytest.fixture(scope="module")
def versions():
    return in_processes(2, all_versions)[0]


def test_a_bucket_order_of_ones_own_is_wrong(versions):
    for right in ("right 0", "right 1"):
        assert distance(versions[right], versions["expected"]) < BOUND
    assert distance(versions["order"], versions["expected"]) > 100 * BOUND


def test_in_fp16_the_division_comes_before_the_sum(versions):
    assert versions["fp16"] == [40_000.0]
    assert versions["fp16 wrong"] == [float("inf")]
