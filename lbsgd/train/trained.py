"""The parameters that an engine trains: those that asked for gradients when it was made."""

from __future__ import annotations

from typing import Any

import torch

from lbsgd.errors import ConfigError, TrainingError


def watch(engine: Any) -> None:
    """Remember which parameters are trained, as engine.trained, and see to it that an update is the same everywhere.

    A parameter that a loss does not use counts as zeros, as it does on several processes and under ZeRO. One that is
    frozen later stays where it is, but not under ZeRO, whose update moves it by its momentum; there, and where one is
    unfrozen, the next forward raises TrainingError. Another batch size is refused: learning rate and batch norm are the
    plan's.
    """
    engine.trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
    fixed = {name: each for name, each in engine.module.named_parameters() if not each.requires_grad}
    zero = engine.zero_optimization()

    def require_as_made(module: torch.nn.Module, _: Any) -> None:
        if module.training and any(each.requires_grad for each in fixed.values()):
            refuse([name for name, each in fixed.items() if each.requires_grad], "unfrozen", "would not be trained")
        if module.training and zero and not all(each.requires_grad for each in engine.trained.values()):
            frozen = [name for name, each in engine.trained.items() if not each.requires_grad]
            refuse(frozen, "frozen", "ZeRO would go on moving it by its momentum")

    engine.module.register_forward_pre_hook(require_as_made)
    engine.set_train_batch_size = engine.set_train_micro_batch_size = refuse_another_batch
    if not zero:
        engine.basic_optimizer.register_step_pre_hook(lambda *_: count_as_zeros(engine))


def trained(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that an engine trains, by name; of an engine that is not lbsgd's, those that would be."""
    known: dict[str, torch.nn.Parameter] | None = getattr(engine, "trained", None)
    return {n: each for n, each in engine.module.named_parameters() if each.requires_grad} if known is None else known


def refuse(names: list[str], became: str, hence: str) -> None:
    raise TrainingError(f"{names[0]} was {became} after lbsgd.initialize, and {hence}; initialize again")


def refuse_another_batch(*_: Any) -> None:
    raise ConfigError(
        "the learning rate and batch norm are those of the plan's batch, which the engine cannot change; initialize "
        "again with a plan of another batch"
    )


def count_as_zeros(engine: Any) -> None:
    """Give each trained parameter without a gradient zeros."""
    for parameter in engine.trained.values():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
