"""Spare the host what ZeRO 1 and 2 do for each parameter in each update, while a GPU waits (docs/experiments.md).

The bits stay the same.
"""

from __future__ import annotations

from typing import Any

import torch


def spare_the_host(optimizer: Any) -> None:
    """Apply what works on any number of processes."""
    see_overflow_at_once(optimizer)
    leave_weights_in_place(optimizer)


def see_overflow_at_once(optimizer: Any) -> None:
    """Let ZeRO check all gradients at once for values that are not finite.

    DeepSpeed 0.19.8 launches seven kernels per parameter, one parameter after the other.
    """

    def overflowed() -> torch.Tensor:
        kept = [each for group in optimizer.averaged_gradients.values() for each in group if each is not None]
        if not (kept := [each for each in kept if each.numel()]):
            return torch.zeros(1, dtype=torch.bool, device=optimizer.device)
        largest = torch._foreach_norm(kept, float("inf"))  # NaN propagates
        return torch.stack(largest).isfinite().all().logical_not().view(1)

    optimizer.has_overflow_partitioned_grads_serial = overflowed


def leave_weights_in_place(optimizer: Any) -> None:
    """Let ZeRO give the parameters their places in its flat weights only if a parameter lies elsewhere.

    DeepSpeed 0.19.8 does so after each update, with four views per parameter, before the next forward can begin.
    """
    give_places = optimizer._update_model_bit16_weights

    def give_lost_places(group_index: int) -> None:
        flat = optimizer.bit16_groups_flat[group_index]
        begin, size = flat.data_ptr(), flat.element_size()
        parameters = optimizer.round_robin_bit16_groups[group_index]
        offsets = optimizer.round_robin_bit16_offsets[group_index]
        if any(
            parameter.data_ptr() != begin + size * offset for parameter, offset in zip(parameters, offsets, strict=True)
        ):
            give_places(group_index)

    optimizer._update_model_bit16_weights = give_lost_places


def take_gradients_in_place(engine: Any) -> None:
    """Let ZeRO 1 use the gradients where they lie, which are already means.

    DeepSpeed has a hook for each gradient and copies each twice, which takes the host longer than a GPU computes.
    Without the hooks only engine.backward knows when a pass ends. So any other back-propagation through the engine's
    output is refused, but not through the output of engine.module.
    """
    zero = engine.optimizer
    zero.reduce_gradients = lambda **_: zero.overlapping_partition_gradients_reduce_epilogue()
    engine._support_torch_style_backward = False

    def keep(*_: Any) -> None:
        """Copy gradients that wait for the update, because a pass of CUDA graphs would overwrite them."""
        for gradients in zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.data = gradient.data.clone()  # ZeRO marks some of these tensors, so each object stays

    if engine.aggregation is None:  # else they lie in buckets, which only the next update's gradients overwrite
        engine.module.register_forward_pre_hook(keep)
