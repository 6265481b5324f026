"""fp16's loss scale, which DeepSpeed doubles after `loss_scale_window` updates without an overflow."""

from __future__ import annotations

from typing import Any

from lbsgd.errors import DivergedError


def grow_after_the_update(optimizer: Any) -> None:
    """Let ZeRO's optimizer double the loss scale only after an update.

    DeepSpeed 0.19.8 doubles it between back-propagation and the division of the gradients, although these were computed
    with the old scale. So the last update of each window would use half its gradient (tests/test_upstream.py). An
    overflow still halves the scale at once, because its update is skipped.
    """
    update_scale, update_weights = optimizer._update_scale, optimizer.step

    def shrink(has_overflow: bool = False) -> None:
        if has_overflow:
            update_scale(has_overflow)

    def step() -> None:
        update_weights()
        if not optimizer.overflow:
            update_scale(False)

    optimizer._update_scale, optimizer.step = shrink, step


def step(engine: Any) -> None:
    """Call engine.step(). Raises DivergedError, naming the iteration, if the loss scale cannot fall any further.

    DeepSpeed detects this on all processes at once.
    """
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise DivergedError(
            f"the gradients of iteration {engine.global_steps} overflow fp16 at the smallest loss scale; look at "
            "the learning rate and the data, or use bf16"
        ) from error
