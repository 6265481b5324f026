"""Rules about measurements left switched on, which make every iteration wait, and about tuning instead of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown

TIMER, FLOPS = "timers.throughput", "flops_profiler"
PROFILER: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a value must be, in words and as a test
    "profile_step": ("a number", lambda value: isinstance(value, (int, float))),
    "module_depth": ("a whole number below 100", lambda value: isinstance(value, int) and value < 100),
    "top_modules": ("a whole number", lambda value: isinstance(value, int)),
    "recompute_fwd_factor": ("a number", lambda value: isinstance(value, (int, float))),
    "output_file": ("a text or null", lambda value: isinstance(value, str) or not value),
}
SWITCHES = ("wall_clock_breakdown", f"{FLOPS}.enabled", "memory_breakdown")


@rule(
    "D39",
    "a measurement left switched on",
    lbsgd="warning",
    plain="warning",
    why="These keys synchronise host and GPU in every pass, so the host can no longer queue work ahead; comms_logger "
    "does so after every single collective call. The throughput timer does unless synchronized is false. `--fix` "
    "switches off only that timer, because DeepSpeed switches it on by itself.",
    fix="delete it when you have measured",
    example={"wall_clock_breakdown": True},
)
def measurement(json: Document) -> Iterator[Hit]:
    for key in SWITCHES:
        broken = key.startswith(FLOPS) and wrong_in_profiler(json)  # D97 reports it
        if json.is_on(key) and not broken:
            yield Hit(key, "makes the host wait for the GPU in every pass")
    if json.is_on("comms_logger.enabled"):
        yield Hit("comms_logger.enabled", "makes the host wait for the GPU after every collective call")
    if json.is_on(f"{TIMER}.enabled") and synchronizes(json):
        key, said = f"{TIMER}.enabled", "makes the host wait for the GPU before and after every pass"
        yield Hit(key, said, "set it to false when you have measured", {key: False})


@rule(
    "D97",
    "a value that ends the flops profiler",
    lbsgd="error",
    plain="error",
    why="DeepSpeed takes any value in flops_profiler when it starts, and computes with it in an update: there the run "
    "ends in a TypeError.",
    fix="correct it, or delete flops_profiler",
    example={"flops_profiler": {"enabled": True, "profile_step": "10"}},
)
def unusable_profiler(json: Document) -> Iterator[Hit]:
    for name, value in wrong_in_profiler(json).items():
        yield Hit(f"{FLOPS}.{name}", f"is {shown(value)}, and must be {PROFILER[name][0]}")


def wrong_in_profiler(json: Document) -> dict[str, Any]:
    """Return the values that the profiler cannot compute with; in a plain JSON only if it runs."""
    if json.plain and not json.is_on(f"{FLOPS}.enabled"):
        return {}
    values = json.block(FLOPS).items()
    return {name: value for name, value in values if name in PROFILER and not PROFILER[name][1](value)}


@rule(
    "D90",
    "a throughput timer that is on by default",
    plain="note",
    why="By default DeepSpeed measures its throughput, and synchronises host and GPU before and after every pass to "
    "do so. The host can then queue no work ahead.",
    fix='write "timers": {"throughput": {"enabled": false}}, or "synchronized": false in its place',
    example={"timers": None},
)
def timer_by_default(json: Document) -> Iterator[Hit]:
    if json.get(f"{TIMER}.enabled") is None and synchronizes(json):
        said = "is true where the JSON does not say: the host waits for the GPU before and after every pass"
        yield Hit(f"{TIMER}.enabled", said)


def synchronizes(json: Document) -> bool:
    """Whether the throughput timer waits for the GPU if it is on."""
    return json.is_on(f"{TIMER}.synchronized", True)


@rule(
    "D40",
    "autotuning instead of training",
    lbsgd="error",
    plain="error",
    why="DeepSpeed's autotuner changes the batch sizes, runs short experiments and exits. It never trains the "
    "network, and it knows nothing of the learning rate that belongs to a batch.",
    fix="delete it to train",
    example={"autotuning": {"enabled": True}},
)
def autotuning(json: Document) -> Iterator[Hit]:
    switch = json.get("autotuning.enabled", False)
    if switch and switch != "auto":
        yield Hit(
            "autotuning",
            "changes the batch sizes, measures and exits",
            correction=json.beside_intent({"autotuning": DELETE}),
        )
