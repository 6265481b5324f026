"""Waiting for data is the time in which the device has nothing to do, not the time in which the host has none."""

import pytest
import torch
from simulated_gpu import SimulatedGpu

from lbsgd.train.clock import Clock, HostEvent, Waits, events_of

LAUNCH = 0.001  # seconds that the host takes to queue an update


def trained(seconds_per_batch, seconds_per_update, updates=100):
    """Return the share of time that a run waits if its loader and its device take this long."""
    gpu = SimulatedGpu()
    clock = Clock(gpu.event)

    def batches():
        ready_at = 0.0
        while True:
            ready_at += seconds_per_batch
            gpu.now = max(gpu.now, ready_at)
            yield "a batch"

    source = batches()
    for _ in range(updates):
        clock.next_of(source)
        gpu.now += LAUNCH
        gpu.work(seconds_per_update)
    gpu.synchronise()  # as before a record
    assert clock.data.of_window == clock.data.of_epoch and not clock.data.pairs
    return clock.data.of_window / gpu.now


@pytest.mark.parametrize(
    "batch, update, share",
    [
        (0.030, 0.046, 0.0),  # the host waits for most of each batch; the device never
        (0.046, 0.030, 15 / 46),  # the device waits for the rest of each batch, and for the launch
        (0.0, 0.030, 0.0),
    ],
)
def test_a_gpu_that_has_work_left_waits_for_no_data(batch, update, share):
    assert trained(batch, update) == pytest.approx(share, abs=0.01)


def test_the_clock_never_waits_for_the_gpu():
    gpu = SimulatedGpu()
    clock, source = Clock(gpu.event), iter("abc")
    for _ in "abc":
        clock.next_of(source)
        gpu.work(1.0)
        assert clock.data.of_window == 0.0
    assert gpu.now == 0.0 and len(clock.data.pairs) == 2
    gpu.now = 1.5
    clock.start_window()
    assert len(clock.data.pairs) == 1


def test_events_are_used_again():
    made = []

    def event():
        made.append(HostEvent())
        return made[-1]

    clock, source = Clock(event), iter(range(100))
    for _ in range(100):
        clock.next_of(source)
    assert len(made) == 3  # the very first wait does not count


def test_waits_that_are_over_are_counted_and_not_kept_even_if_nobody_asks():
    gpu = SimulatedGpu()
    waits = Waits(gpu.event)
    aggregate = waits.timed(lambda: gpu.work(2.0))
    aggregate(), aggregate()
    gpu.synchronise()
    aggregate()
    assert len(waits.pairs) == 1 and waits.seconds == 4.0
    assert waits.of_window == waits.of_epoch == 4.0
    waits.start_window()
    assert (waits.of_window, waits.of_epoch) == (0.0, 4.0)


def test_the_events_are_those_of_the_device(monkeypatch):
    gpu = SimulatedGpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    assert events_of("cuda")().gpu is gpu
    assert isinstance(events_of(torch.device("cpu"))(), HostEvent)
