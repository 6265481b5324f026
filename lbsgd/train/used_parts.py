"""Refuse a network of which only some processes use a part, where DeepSpeed reduces only what each process has.

At ZeRO stages 1 and 2 DeepSpeed fills its buckets with the gradients that come. Where one process lacks a gradient, the
following ones lie elsewhere, and gradients of different weights are added to one another without a message.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lbsgd.config.plan import Plan
from lbsgd.errors import TrainingError

UPDATES = 5  # that are looked at; the hooks are then removed


def require_same_parts(engine: Any, plan: Plan) -> None:
    """Let the first updates raise TrainingError, on all processes, if a parameter gets a gradient on some only.

    They raise it before they move the weights. Nothing is done where gradients of zeros take the place of missing ones:
    on one process, at stage 0 and with lbsgd's aggregation.
    """
    if plan.world_size > 1 and plan.zero_stage and not engine.aggregation:
        engine.basic_optimizer.register_step_pre_hook(UsedParts(engine, plan).before_update)


class UsedParts:
    """Counts the gradients of each parameter in each pass of an update, and compares them with other processes."""

    def __init__(self, engine: Any, plan: Plan):
        self.engine, self.plan, self.left, self.update = engine, plan, UPDATES, -1
        self.names = list(engine.trained)
        self.came = torch.zeros(plan.accumulation_steps, len(self.names), dtype=torch.int32)
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self.note, number))
            for number, parameter in enumerate(engine.trained.values())
        ]

    def note(self, number: int, _: torch.Tensor) -> None:
        if self.engine._running_engine_backward:  # not another engine's on the same network
            self.came[self.engine.micro_steps % self.plan.accumulation_steps, number] += 1

    def before_update(self, *_: Any) -> None:
        """Compare once per update, though ZeRO makes a step for each group of parameters. All processes call this."""
        if not self.left or self.engine.global_steps == self.update:
            return
        self.update, self.left = self.engine.global_steps, self.left - 1
        if name := differing(self.came.to(self.engine.device), self.names):
            raise TrainingError(
                f"{name} gets a gradient on some processes only, and at ZeRO stage {self.plan.zero_stage} DeepSpeed "
                "then adds gradients of different weights to one another; use stage 0 or, in fp32 and fp16, stage 1 "
                "with a block lbsgd.aggregation"
            )
        self.came.zero_()
        if not self.left:
            for hook in self.hooks:
                hook.remove()


def differing(came: torch.Tensor, names: list[str]) -> str | None:
    """Return the name of the first parameter whose column differs between processes. A collective call."""
    most = came.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(came, op=dist.ReduceOp.MIN)
    apart = (most != came).any(0).tolist()
    return next((name for name, differs in zip(names, apart, strict=True) if differs), None)
