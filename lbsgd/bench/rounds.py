"""Times several things against each other: in turn, round by round, so that a drift of the machine meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median_high

import torch

Step = Callable[[], object]
Timer = Callable[[Step, str, int], float]
SLEEP_CYCLES = 20_000_000  # about 10 ms of a GPU
WHOLE_STEP_CYCLES = 150_000_000  # about 80 ms, in which a slow host queues the 1,000 kernels of a step


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

    A round calls every step `calls` times in a row; the order is turned by one place from round to round.
    """
    seconds_per_call = timer or seconds_of
    names = list(steps)
    for name in names:
        for _ in range(warm_up):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            seconds[name].append(seconds_per_call(steps[name], device, calls))
    return seconds


def seconds_of(step: Step, device: str, calls: int) -> float:
    """Time some calls in a row; return the seconds of one.

    A GPU is timed by the clock, a CPU by its process time, which other work on the machine spoils less.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronise(device)
    began = clock()
    for _ in range(calls):
        step()
    synchronise(device)
    return (clock() - began) / calls


def kernel_seconds_of(step: Step, device: str, calls: int, sleep_cycles: int = SLEEP_CYCLES) -> float:
    """Time the kernels of some calls alone; return the seconds of one.

    The GPU sleeps while the host queues them, as it works on something else in training: a small kernel takes less
    time than its launch.
    """
    if device != "cuda":
        return seconds_of(step, device, calls)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronise(device)
    torch.cuda._sleep(sleep_cycles)
    began.record()
    for _ in range(calls):
        step()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / calls


def gpu_seconds_of(step: Step, device: str, calls: int) -> float:
    """Time what the GPU takes for one call of a whole step, with all of it queued before, and so without its host."""
    return kernel_seconds_of(step, device, 1, sleep_cycles=WHOLE_STEP_CYCLES)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(seconds: Mapping[str, list[float]]) -> str:
    """Tell the median milliseconds of each, to stand beside their ratios."""
    medians = {name: median_high(values) for name, values in seconds.items()}
    return ", ".join(f"{name} {1000 * median:.3g} ms" for name, median in medians.items())
