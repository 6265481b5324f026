"""Say in one line what changes sums, and so their last bits, at a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from lbsgd.config.aggregation import Choice
from lbsgd.config.keypath import BUCKET, DEFAULT_BUCKET, get
from lbsgd.units import counted

# The JSON's keys on which the last bits of sums depend, with DeepSpeed's defaults: on any number of processes, on
# several processes, and on several processes whose gradients DeepSpeed's ZeRO reduces.
ALONE = {"train_micro_batch_size_per_gpu": None, "zero_optimization.stage": 0, "data_types.grad_accum_dtype": None}
TOGETHER = {"gradient_predivide_factor": 1.0, "prescale_gradients": False, "communication_data_type": None}
BUCKETS = {
    BUCKET: DEFAULT_BUCKET,
    "zero_optimization.reduce_scatter": True,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.use_multi_rank_bucket_allreduce": True,
}

Saved = dict[str, Any]  # a choice as plain data, with the servers, the size of buckets and torch's backend


def saved_choice(engine) -> Saved | None:
    """Return what a checkpoint keeps of the aggregation, None for DeepSpeed's own reduction."""
    aggregation = engine.aggregation
    if aggregation is None:
        return None
    return {
        **aggregation.choice.as_dict(),
        "servers": [list(ranks) for ranks in aggregation.placement.servers],
        "bucket_elements": aggregation.settings.bucket_elements,
        "backend": dist.get_backend(),
    }


def tell_of_another_order(engine, saved: Saved | None, worlds: tuple[int, int], say: Callable[[str], None]) -> None:
    """Say in one line if gradients are summed in another order than before a restart, which changes the last bits.

    saved     the result of `saved_choice` then; None also if the checkpoint is older than aggregation
    worlds    world size then and now
    """
    before, now = worlds
    if before != now:
        say(f"resuming on {counted(now, 'process')} instead of {before}: last bits may differ")
    elif now > 2 and not same_order(saved, saved_choice(engine)):  # a sum of two has only one order
        say("gradients are aggregated otherwise than before the restart: last bits may differ")


def say_other_sums(engine, before: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say in one line which of the JSON's keys change sums at a restart on the same number of processes.

    `tell_of_another_order` reports the kind of aggregation, and the buckets of lbsgd's own aggregation.
    """
    defaults = ALONE if dist.get_world_size() == 1 else ALONE | TOGETHER
    if dist.get_world_size() > 2 and engine.aggregation is None and get(now, "zero_optimization.stage"):
        defaults = defaults | BUCKETS
    if other := [key for key, default in defaults.items() if get(before, key, default) != get(now, key, default)]:
        say(f"{', '.join(other)}: not as in the checkpoint, so the run goes on, but not to the bit")


def same_order(one: Saved | None, other: Saved | None) -> bool:
    """Whether both choices sum every element in the same order."""
    if one is None or other is None:
        return one is other
    return order_of(one) == order_of(other)


def order_of(saved: Saved) -> Any:
    """Return what decides the order: in a tree, the ranks by position; otherwise also buckets and backend."""
    saved = {"backend": "gloo", **saved}  # older checkpoints are from CPUs
    choice = Choice(saved["hierarchy"], saved["between"], saved["inside"])
    if choice.is_tree:
        ranks = [rank for server in saved["servers"] for rank in server]
        return sorted(ranks) if choice.hierarchy == "flat" else ranks
    if choice.hierarchy == "flat" and saved["backend"] == "gloo":  # NCCL's order depends on hosts
        del saved["servers"]
    return saved
