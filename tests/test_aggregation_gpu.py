"""Aggregation on a GPU, as far as one process on one GPU shows it: streams instead of threads, NCCL instead of gloo."""

from types import SimpleNamespace

import pytest
import torch
from oracle import network

from lbsgd.config.aggregation import Choice
from lbsgd.train.aggregation.aggregation import Aggregation, AggregationSettings
from lbsgd.train.aggregation.phases import Streams
from lbsgd.train.aggregation.placement import Placement
from lbsgd.train.clock import Waits, events_of
from lbsgd.train.engine import start_processes

pytestmark = pytest.mark.gpu
ALONE = Placement(((0,),))


@pytest.mark.parametrize("hierarchy", ["flat", "servers"])
@pytest.mark.parametrize("between", ["backend", "halving_doubling"])
def test_gradients_of_one_process_come_back_as_they_went(hierarchy, between, monkeypatch):
    start_processes()
    model = network().cuda().to(memory_format=torch.channels_last)
    engine = SimpleNamespace(
        module=model,
        inside_no_sync_ctxt=False,
        _running_engine_backward=True,
        micro_steps=0,
        global_steps=0,
        is_gradient_accumulation_boundary=lambda: True,
    )
    choice = Choice(hierarchy, between, between)
    aggregation = Aggregation(engine, AggregationSettings(500, True, 1.0, 1.0), ALONE, choice)
    assert isinstance(aggregation.runner, Streams) and len(aggregation.buckets) > 4
    images = torch.randn(8, 3, 6, 6, device="cuda")
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model(images).square().sum().backward()  # the hooks start buckets
    aggregation.finish()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    plain = network().cuda().to(memory_format=torch.channels_last)
    plain(images).square().sum().backward()
    for ours, theirs in zip(found, (parameter.grad for parameter in plain.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_waiting_is_measured_on_the_device():
    waiting = Waits(events_of("cuda"))
    waiting.timed(lambda: torch.cuda._sleep(10_000_000))()
    torch.cuda.synchronize()  # as before a record
    assert waiting.of_window > 1e-4
