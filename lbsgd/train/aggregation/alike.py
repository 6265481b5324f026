"""Check that all processes have the same parameters and settings, before the first collective call that needs them."""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.distributed as dist

from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.aggregation.aggregation import AggregationSettings


def require_alike(model: torch.nn.Module, plan: Plan) -> None:
    """Compare what this process trains, and how, with rank 0. All processes must call this.

    Parameters of different lengths would end a process inside gloo. Different parameters of equal length would silently
    be added to one another. Raises ConfigError, naming the first difference, on all processes.
    """
    if plan.world_size == 1:
        return
    mine = facts(model, plan)
    box = [mine]
    dist.broadcast_object_list(box)
    pairs = zip_longest(mine, box[0], fillvalue="nothing more")
    found: list[tuple[str, str] | None] = [None] * plan.world_size
    dist.all_gather_object(found, next(((here, first) for here, first in pairs if here != first), None))
    for rank, difference in enumerate(found):
        if difference:
            here, first = difference
            raise ConfigError(
                f"rank {rank} has {here}, where rank 0 has {first}; give lbsgd.initialize the same network and JSON on "
                "all processes"
            )


def facts(model: torch.nn.Module, plan: Plan) -> list[str]:
    """Return, in words, the settings and parameters that decide which numbers are added to which."""
    settings = AggregationSettings.of(plan)
    how = {
        "zero_optimization.stage": plan.zero_stage,
        "precision": plan.precision,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "lbsgd.aggregation": plan.recipe.aggregation,
        "gradient_predivide_factor": float(settings.before),
    }
    if plan.aggregates or plan.zero_stage:  # DeepSpeed without ZeRO cuts the same sums into other buckets
        how["zero_optimization.reduce_bucket_size"] = settings.bucket_elements
    parameters = [
        f"{name} ({', '.join(map(str, each.shape))}; {each.dtype}; {'trained' if each.requires_grad else 'frozen'})"
        for name, each in model.named_parameters()
    ]
    return [f"{name} {value}" for name, value in how.items()] + parameters
