"""Times several things against each other: in turn, round by round, so that a drift of the machine meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]


def in_turn(steps: Mapping[str, Step], device: str, *, rounds: int, calls: int, warm_up: int) -> dict[str, list[float]]:
    """Return each step's seconds per call, one number per round.

    A round calls every step `calls` times in a row; the order is turned by one place from round to round. A GPU is
    timed by the clock, a CPU by its process time, which other work on the machine spoils less.
    """
    names = list(steps)
    for name in names:
        for _ in range(warm_up):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            seconds[name].append(seconds_of(steps[name], device, calls))
    return seconds


def seconds_of(step: Step, device: str, calls: int) -> float:
    """Time some calls in a row; return the seconds of one."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronise(device)
    began = clock()
    for _ in range(calls):
        step()
    synchronise(device)
    return (clock() - began) / calls


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(seconds: Mapping[str, list[float]]) -> str:
    """Tell the median milliseconds of each, to stand beside their ratios."""
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return ", ".join(f"{name} {1000 * median:.3g} ms" for name, median in medians.items())
