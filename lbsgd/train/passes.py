"""Warn once of each way in which a user's loop makes other passes than the plan's, which would silently train wrongly.

DeepSpeed counts the calls of engine.step: each is one pass of plan.micro_batch images, and the last of
plan.accumulation_steps moves the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from lbsgd.config.plan import Plan


def watch_passes(engine: Any, plan: Plan) -> None:
    """Warn, on rank 0, of calls of an engine that do not belong together, or are given other images."""
    engine.passes_without_step = 0  # backward passes outside of no_sync, where DeepSpeed allows no step
    if engine.global_rank == 0:
        watch_backward_and_step(engine, Told(), max(2, plan.accumulation_steps))
        watch_zero_grad(engine, Told())
        watch_images(engine, Told(), plan.micro_batch)


class Told:
    """Warns once."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, words: str) -> None:
        if not self.told:
            self.told = True
            warnings.warn(f"lbsgd: {words}", stacklevel=3)  # at the line that calls the engine's method


def watch_backward_and_step(engine: Any, tell: Callable[[str], None], enough: int) -> None:
    """Tell of a step that no pass came before, and of `enough` passes without a step.

    Torch's loops step only in the last pass of an update. With p passes per update, they would update p times too
    rarely. If a loop steps in each pass and again in the last, the schedule runs ahead of the images.
    """
    forward, backward, step = engine.forward, engine.backward, engine.step
    stepped = False  # whether nothing came after the last step

    def watched_forward(*arguments: Any, **options: Any) -> Any:  # at stages 1 and 2 loss.backward() may follow it
        nonlocal stepped
        stepped = False
        return forward(*arguments, **options)

    def watched_backward(*arguments: Any, **options: Any) -> Any:
        nonlocal stepped
        stepped = False
        result = backward(*arguments, **options)  # a pass that raises counts for nothing
        if not engine.inside_no_sync_ctxt:
            engine.passes_without_step += 1
            if engine.passes_without_step == enough:
                tell(
                    f"{enough} calls of engine.backward and none of engine.step; call engine.step() after each"
                    " engine.backward(loss), with the sum of a pass's losses: it counts the passes, and moves the"
                    " weights in the last one of an update"
                )
        return result

    def watched_step(*arguments: Any, **options: Any) -> Any:
        nonlocal stepped
        if stepped:
            tell(
                "engine.step() is called again without an engine.backward since, and counts another pass; call it"
                " once after each engine.backward(loss)"
            )
        stepped, engine.passes_without_step = True, 0
        return step(*arguments, **options)

    engine.forward, engine.backward, engine.step = watched_forward, watched_backward, watched_step


def watch_zero_grad(engine: Any, tell: Callable[[str], None]) -> None:
    """Tell of gradients that are cleared between the passes of an update, as at the head of torch's loops."""
    for owner in engine, engine.optimizer:
        owner.zero_grad = watched_zero_grad(engine, owner.zero_grad, tell)


def watched_zero_grad(engine: Any, zero_grad: Callable[..., Any], tell: Callable[[str], None]) -> Callable[..., Any]:
    def watched(*arguments: Any, **options: Any) -> Any:
        amid = engine.passes_without_step or engine.micro_steps % engine.gradient_accumulation_steps()
        if amid and not engine._running_engine_step:
            tell(
                "zero_grad() between the passes of an update drops the gradients of those before; leave it out:"
                " engine.step() clears them after each update"
            )
        return zero_grad(*arguments, **options)

    return watched


def watch_images(engine: Any, tell: Callable[[str], None], micro_batch: int) -> None:
    """Tell of a training forward whose first input is a tensor of another number of rows than the micro batch."""
    forward, module = engine.forward, engine.module

    def watched(*inputs: Any, **named: Any) -> Any:
        first = next(iter((*inputs, *named.values())), None)
        if module.training and torch.is_grad_enabled() and isinstance(first, torch.Tensor):
            if (rows := first.shape[:1]) and rows[0] != micro_batch:
                tell(
                    f"the engine is given {rows[0]} rows in a pass; if each is an image, the learning rate is for the"
                    f" plan's micro batch of {micro_batch}: give DataLoader a SharedShuffleSampler with"
                    " plan.global_batch and plan.micro_batch as batch_sampler"
                )
        return forward(*inputs, **named)

    engine.forward = watched
