"""Time several steps in turn, round by round, so that a drift of the machine affects them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median_high

import torch

from lbsgd.bench.figure import Figure, Goal, ratio_figure

Step = Callable[[], object]
Timer = Callable[[Step, str, int], float]
SLEEP_CYCLES = 20_000_000  # about 10 ms on a GPU
WHOLE_STEP_CYCLES = 150_000_000  # about 80 ms, enough for a slow host to queue the 1,000 kernels of one step
LONGEST_SLEEP = 4  # times the first sleep; a longer one does not help, because the GPU's queue is full


def in_turn(
    steps: Mapping[str, Step],
    device: str,
    *,
    rounds: int,
    calls: int,
    warm_up: int,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Return each step's seconds per call, one number per round, by `seconds_of` or another timer.

    A round calls every step `calls` times in a row; each round rotates the order by one place. The first round does not
    count: recording CUDA graphs empties torch's store of free memory, so even warm steps must ask the driver for memory
    again.
    """
    seconds_per_call = timer or seconds_of
    names = list(steps)
    for name in names:
        for _ in range(warm_up):
            steps[name]()
    for name in names:
        seconds_per_call(steps[name], device, calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            seconds[name].append(seconds_per_call(steps[name], device, calls))
    return seconds


def seconds_of(step: Step, device: str, calls: int) -> float:
    """Time some calls in a row. Return the seconds per call.

    On a GPU this is wall-clock time. On a CPU it is process time, which other work on the machine affects less.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronise(device)
    began = clock()
    for _ in range(calls):
        step()
    synchronise(device)
    return (clock() - began) / calls


class KernelTimer:
    """Times only the kernels of some calls, or of one call for whole steps. On a CPU it uses `seconds_of`.

    A small kernel takes less time than its launch. So the GPU sleeps while the host queues the kernels; in training it
    would do other work. If the sleep ends before all are queued, they are timed again with a longer sleep.

    late: the steps for which even the longest sleep was too short, so that their times include the host's
    """

    def __init__(self, whole_steps: bool = False):
        self.whole_steps = whole_steps
        self.sleep_cycles = WHOLE_STEP_CYCLES if whole_steps else SLEEP_CYCLES
        self.longest = LONGEST_SLEEP * self.sleep_cycles
        self.late: set[Step] = set()

    def __call__(self, step: Step, device: str, calls: int) -> float:
        if device != "cuda":
            return seconds_of(step, device, calls)
        calls = 1 if self.whole_steps else calls
        seconds, was_late = self.attempt(step, calls)
        while was_late and self.sleep_cycles < self.longest:
            self.sleep_cycles *= 2
            seconds, was_late = self.attempt(step, calls)
        if was_late:
            self.late.add(step)
        return seconds

    def attempt(self, step: Step, calls: int) -> tuple[float, bool]:
        """Return the seconds per call, and whether the GPU woke before all kernels were queued."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(self.sleep_cycles)
        began.record()
        for _ in range(calls):
            step()
        ended.record()
        was_late = began.query()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / calls, was_late


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(seconds: Mapping[str, list[float]]) -> str:
    """Return the median milliseconds of each step in words, to show next to the ratios."""
    medians = {name: median_high(values) for name, values in seconds.items()}
    return ", ".join(f"{name} {1000 * median:.3g} ms" for name, median in medians.items())


def compared(
    name: str,
    seconds: Mapping[str, list[float]],
    above: str,
    below: str,
    goal: Goal | None = None,
    late: Sequence[str] = (),
) -> Figure:
    """Return the ratio of two of the steps that took turns, with the times of all.

    late: the steps whose GPU times include the host's. If there are any, the goal is dropped.
    """
    beside = milliseconds(seconds)
    if late:
        goal, beside = None, f"{beside}; of {' and '.join(late)} the host queued too late, so its time is in it"
    return ratio_figure(name, seconds[above], seconds[below], goal=goal, beside=beside, seconds=seconds)
