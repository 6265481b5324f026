"""Forget an unfinished iteration when an engine's state is replaced, even if its back-propagation has raised."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch


def forget_at_each_load(engine: Any) -> None:
    """Let the next pass after engine.load_checkpoint be the first of its iteration, as in a new process.

    DeepSpeed 0.19.8 keeps the gradients and the number of passes of an unfinished iteration. After a back-propagation
    that raised, ZeRO also keeps half-filled buckets, and refuses the gradients of the next.
    """
    load = engine.load_checkpoint

    @wraps(load)
    def load_checkpoint(*arguments: Any, **options: Any) -> Any:
        path, client_state = load(*arguments, **options)
        if path is not None:
            forget_iteration(engine)
        return path, client_state

    engine.load_checkpoint = load_checkpoint


def forget_iteration(engine: Any) -> None:
    """Drop the gradients of an unfinished iteration, wherever they are kept, and begin that iteration again."""
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.passes_without_step = 0  # so that nothing is said of the gradients that are dropped
    engine.optimizer.zero_grad(set_to_none=True)
    if engine.zero_optimization():
        forget_in_zero(engine.optimizer)
    if engine.aggregation:
        engine.aggregation.begin()
    for timer in engine.timers.get_timers().values():  # one that runs could not be started again
        timer.started_ = False


def forget_in_zero(optimizer: Any) -> None:
    """Empty ZeRO's buckets and what it notes of a back-propagation until its end, which an error leaves out."""
    device = optimizer.single_partition_of_fp32_groups[0].device
    torch.get_device_module(device).synchronize()  # its stream may still reduce a buffer that is released here
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer._release_ipg_buffers()
    for kept in ("averaged_gradients", "all_grad_tensors", "extra_large_param_to_reduce"):
        getattr(optimizer, kept).clear()
    optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
    optimizer._backward_active_depth = optimizer._remaining_grad_acc_hooks = 0
