"""Restore the order of every sum after a restart, and so every bit, if possible; say in one line if it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from lbsgd.config.aggregation import Choice
from lbsgd.config.keypath import get
from lbsgd.train.aggregation.aggregation import Aggregation

# Keys of the JSON on which the last bits of sums depend, with DeepSpeed's defaults: on any number of processes, on
# several, and on several whose gradients DeepSpeed's ZeRO reduces.
ALONE = {"train_micro_batch_size_per_gpu": None, "zero_optimization.stage": 0, "data_types.grad_accum_dtype": None}
TOGETHER = {"gradient_predivide_factor": 1.0, "prescale_gradients": False, "communication_data_type": None}
BUCKETS = {
    "zero_optimization.reduce_bucket_size": 5e8,
    "zero_optimization.reduce_scatter": True,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.use_multi_rank_bucket_allreduce": True,
}

Saved = dict[str, Any]  # a choice as plain data, with the servers, the size of buckets and torch's backend


def saved_choice(engine) -> Saved | None:
    """Return what a checkpoint keeps of the aggregation; None for DeepSpeed's own reduction."""
    aggregation = engine.aggregation
    if aggregation is None:
        return None
    return {
        **aggregation.choice.as_dict(),
        "servers": [list(ranks) for ranks in aggregation.placement.servers],
        "bucket_elements": aggregation.settings.bucket_elements,
        "backend": dist.get_backend(),
    }


def resume_choice(engine, saved: Saved | None, worlds: tuple[int, int], say: Callable[[str], None]) -> None:
    """Aggregate as before the restart, or say in one line that last bits may differ; all processes must call it.

    saved     the result of `saved_choice` then; None also for a checkpoint from before aggregation existed
    worlds    world size then and now

    What the JSON demands by name takes precedence over what was saved.
    """
    before, now = worlds
    saved = saved and {"backend": "gloo", **saved}  # older checkpoints are of CPUs
    if before != now:
        say(f"resuming on {now} process{'es' * (now > 1)} instead of {before}: last bits may differ")
    elif now > 2 and saved != saved_choice(engine):  # the sum of two has one order
        if not same_order(saved, saved_choice(engine)) and not go_back(engine.aggregation, saved):
            say("gradients are aggregated otherwise than before the restart: last bits may differ")


def say_other_sums(engine, before: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say in one line which keys of the JSON make other sums than before the restart, on as many processes.

    `resume_choice` speaks of the kind of aggregation, and of the buckets of lbsgd's own.
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
    if choice_of(one).is_tree and choice_of(other).is_tree:
        return order_of(one) == order_of(other)
    return one == other


def go_back(aggregation: Aggregation | None, saved: Saved | None) -> bool:
    """Aggregate by the saved choice, if JSON, servers and buckets allow it."""
    if aggregation is None or saved is None:
        return False
    demanded = {key: value for key, value in aggregation.wanted.model_dump().items() if value != "auto"}
    choice = choice_of(saved)
    if any(getattr(choice, key) != value for key, value in demanded.items()):
        return False
    servers, backend = [list(ranks) for ranks in aggregation.placement.servers], dist.get_backend()
    if saved["backend"] != backend:
        return False
    by_placement = choice.hierarchy == "servers" or (backend != "gloo" and not choice.is_tree)  # NCCL looks at hosts
    if by_placement and saved["servers"] != servers:
        return False
    if not choice.is_tree and saved["bucket_elements"] != aggregation.settings.bucket_elements:
        return False
    aggregation.use(choice)
    return True


def choice_of(saved: Saved) -> Choice:
    return Choice(saved["hierarchy"], saved["between"], saved["inside"], "as before the restart")


def order_of(saved: Saved) -> list[int]:
    """Return the ranks by their position in the tree."""
    ranks = [rank for server in saved["servers"] for rank in server]
    return sorted(ranks) if saved["hierarchy"] == "flat" else ranks
