"""Timing in turn: how the first round, a late host and the GPU's queue affect the times."""

import pytest
from simulated_gpu import SimulatedGpu

from lbsgd.bench.figure import Goal
from lbsgd.bench.rounds import LONGEST_SLEEP, WHOLE_STEP_CYCLES, KernelTimer, compared, in_turn

PER_SECOND = WHOLE_STEP_CYCLES / 0.08
KERNELS = 0.010  # seconds of the GPU


def test_what_the_warm_up_of_one_costs_the_others_is_in_no_timed_round():
    """Recording CUDA graphs empties torch's allocator, so the next step must ask the driver for memory."""
    slow = {"plain": False, "graphs": False}

    def plain():
        pass

    def graphs():
        if len(warmed) < 2:
            slow["plain"] = True
        warmed.append(1)

    def timer(step, device, calls):
        step()
        name = step.__name__
        seconds, slow[name] = (100.0 if slow[name] else 1.0), False
        return seconds

    warmed = []
    found = in_turn({"plain": plain, "graphs": graphs}, "cpu", rounds=3, calls=1, warm_up=2, timer=timer)
    assert found == {"plain": [1.0] * 3, "graphs": [1.0] * 3}


def timed(monkeypatch, host_seconds, calls=3):
    gpu = SimulatedGpu()
    gpu.replace_cuda(monkeypatch, PER_SECOND)

    def step():
        gpu.now += host_seconds / 2
        gpu.work(KERNELS / 2)
        gpu.now += host_seconds / 2
        gpu.work(KERNELS / 2)

    timer = KernelTimer(whole_steps=True)
    return timer(step, "cuda", calls), timer, step


@pytest.mark.parametrize("host_seconds, sleeps", [(0.03, 1), (0.1, 2), (0.3, 4)])
def test_a_late_host_gets_a_longer_sleep_so_that_the_time_is_the_gpus(monkeypatch, host_seconds, sleeps):
    seconds, timer, _ = timed(monkeypatch, host_seconds)
    assert seconds == pytest.approx(KERNELS) and not timer.late
    assert timer.sleep_cycles == sleeps * WHOLE_STEP_CYCLES


def test_a_host_that_no_sleep_is_long_enough_for_is_told_and_keeps_no_goal(monkeypatch):
    seconds, timer, step = timed(monkeypatch, 1.0)
    assert seconds > KERNELS and timer.late == {step}
    assert timer.sleep_cycles == LONGEST_SLEEP * WHOLE_STEP_CYCLES
    times = {"loop": [2.0, 2.0], "plain": [1.0, 1.0]}
    figure = compared("loop / plain", times, "loop", "plain", Goal("at most", 1.03), late=["loop"])
    assert figure.verdict == "" and "of loop the host queued too late" in figure.beside
    assert compared("loop / plain", times, "loop", "plain", Goal("at most", 1.03)).verdict == "missed"
