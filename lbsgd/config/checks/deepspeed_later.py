"""Find values that DeepSpeed takes at the start but fails on when it calculates with them.

The schema covers the start (lbsgd/config/accepted). This module defines no rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import as_whole_number
from lbsgd.config.checks.deepspeed_beside import is_taken_beside
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import BUCKET, LARGEST, get, shown

MODULES = "torch_autocast.lower_precision_safe_modules"
COUNTS = {  # the smallest of each
    "aio.block_size": 1,
    "aio.queue_depth": 1,
    "aio.intra_op_parallelism": 1,
    "activation_checkpointing.number_checkpoints": 1,
    "data_efficiency.seed": 0,
    "data_efficiency.data_sampling.num_epochs": 1,
    "data_efficiency.data_sampling.num_workers": 0,
}
NS_METHODS = ("standard", "gram")  # Muon's
OFFLOADS = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")


def refused_later(json: Document) -> Iterator[tuple[str, str]]:
    """Yield the key path of each value on which DeepSpeed fails, and why."""
    yield from too_large(json)
    for key, least in COUNTS.items():
        value = get(json.config, key)
        if is_read(json, key) and value not in (None, "auto") and not is_count_from(least, value):
            yield key, f"is {shown(value)}, and DeepSpeed wants a whole number of at least {least}"
    method = json.get("optimizer.params.ns_method", "auto")
    if json.optimizer == "muon" and method not in ("auto", *NS_METHODS) and json.since("0.19"):
        yield "optimizer.params.ns_method", f"is {shown(method)}, and Muon knows {' and '.join(NS_METHODS)}"
    modules = json.get(MODULES)
    if modules and json.enabled("torch_autocast") and json.since("0.17"):
        yield from no_classes(modules)


def too_large(json: Document) -> Iterator[tuple[str, str]]:
    """Yield each number that is too large for any network, and a bucket that is too large for any memory."""
    for block, accepted in (("optimizer", json.accepted.optimizer), ("scheduler", json.accepted.scheduler)):
        for name, value in json.block(f"{block}.params").items() if accepted(json.get(f"{block}.type")) else ():
            key, is_rate = f"{block}.params.{name}", block == "optimizer" or name.endswith("lr")
            limit = LARGEST if is_rate else 10**300  # a number of steps may be any float
            if any(abs(each) >= limit for each in numbers_in(value)) and not is_taken_beside(json, key):
                yield key, f"is {shown(value)}, and no network survives updates with numbers of 10^12 or more"
    bucket = as_whole_number(json.get(BUCKET))
    is_made = not json.plain or (json.stage and json.is_on("zero_optimization.contiguous_gradients", True))
    if bucket is not None and bucket >= LARGEST and is_made:
        yield BUCKET, f"is {shown(json.get(BUCKET))}, a bucket that no memory holds"


def numbers_in(value: Any) -> list[int | float]:
    """Return a value's numbers: itself, or those of a list."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]


def is_read(json: Document, key: str) -> bool:
    """Whether DeepSpeed itself reads a count; a file with an lbsgd block is judged anyway."""
    return not json.plain or (key.startswith("aio.") and "nvme" in [json.get(device) for device in OFFLOADS])


def is_count_from(least: int, value: Any) -> bool:
    return type(value) is int and least <= value <= LARGEST


def no_classes(modules: Any) -> Iterator[tuple[str, str]]:
    """Yield the reasons why autocast cannot import a value as a list of classes."""
    wanted = 'and DeepSpeed wants classes with their modules, such as ["torch.nn.Linear"]'
    if isinstance(modules, str):
        yield MODULES, f"is {shown(modules)}, {wanted}"
    for each in modules if isinstance(modules, (list, dict)) else ():
        if isinstance(each, str) and not all(each.rpartition(".")[::2]):  # needs both a module and a class
            yield MODULES, f"has {shown(each)}, {wanted}"
