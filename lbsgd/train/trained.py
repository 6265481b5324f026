"""What an engine trains: the parameters that required gradients when it was made, at the plan's batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError, TrainingError
from lbsgd.train.passes import watch_passes


def hold_to_plan(engine: Any, plan: Plan) -> None:
    """Remember the trained parameters as engine.trained, and make updates the same at any world size and ZeRO stage.

    If a loss does not use a parameter, its gradient counts as zeros, as on several processes and under ZeRO. A frozen
    parameter stays where it is. ZeRO's update would still move it by its momentum, so under ZeRO the update raises
    TrainingError. At any stage an update raises it if a parameter that no engine trains was unfrozen, and the first
    update also if one was added or replaced. Between updates anything may be frozen. Another batch size is refused,
    because learning rate and batch norm are the plan's. So is a step of the optimizer outside engine.step. A loop that
    makes other passes than the plan's is warned (`passes`).
    """
    engine.trained = trained(engine)
    fixed = {name: each for name, each in engine.module.named_parameters() if name not in engine.trained}
    for parameter in engine.trained.values():
        parameter.is_trained_by_lbsgd = True
    zero = engine.zero_optimization()
    is_first = True

    def before_update(*_: Any) -> None:
        if not engine._running_engine_step:
            raise ConfigError(
                "engine.optimizer.step() leaves out the mean over processes, the schedule and the count of passes;"
                " call engine.step() after each engine.backward(loss)"
            )
        nonlocal is_first
        if is_first:  # not before each update: the host would search all parameters while a GPU waits
            known = {id(each) for each in (*engine.trained.values(), *fixed.values())}
            later = {name: each for name, each in engine.module.named_parameters() if id(each) not in known}
            refuse_untrained(later, "added or replaced")
            is_first = False
        refuse_untrained(fixed, "unfrozen")
        for name, parameter in engine.trained.items():
            if zero and not parameter.requires_grad:
                refuse(name, "frozen", "ZeRO would go on moving it by its momentum")
            if not zero and parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    engine.basic_optimizer.register_step_pre_hook(before_update)
    engine.set_train_batch_size = engine.set_train_micro_batch_size = refuse_another_batch
    engine.zero_grad = lambda: drop_gradients(engine.module)  # which DeepSpeed calls in each update at stage 0
    watch_passes(engine, plan)


def every_parameter(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return all parameters that a module has now, in a quarter of the time that module.parameters() takes.

    A parameter that several modules share is listed as often.
    """
    modules = [module]
    found: list[torch.nn.Parameter | None] = []
    seen = {*modules}
    for each in modules:  # which grows meanwhile
        found += each._parameters.values()
        for part in each._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                modules.append(part)
    return [parameter for parameter in found if parameter is not None]


def drop_gradients(module: torch.nn.Module) -> None:
    """Drop the gradients of all parameters, as DeepSpeed's engine.zero_grad does by name."""
    for parameter in every_parameter(module):
        parameter.grad = None


def refuse_untrained(parameters: Mapping[str, torch.nn.Parameter], became: str) -> None:
    """Raise TrainingError for the first of these that requires gradients and that no engine trains."""
    for name, parameter in parameters.items():
        if parameter.requires_grad and not hasattr(parameter, "is_trained_by_lbsgd"):
            refuse(name, became, "would not be trained")


def refuse(name: str, became: str, hence: str) -> None:
    raise TrainingError(f"{name} was {became} after lbsgd.initialize, and {hence}; initialize again")


def refuse_another_batch(*_: Any) -> None:
    raise ConfigError(
        "the learning rate and batch norm are those of the plan's batch, which the engine cannot change; initialize "
        "again with a plan of another batch"
    )


def trained(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Return by name the parameters that an engine trains. Without lbsgd's record, all that require gradients."""
    known: dict[str, torch.nn.Parameter] | None = getattr(engine, "trained", None)
    return {n: each for n, each in engine.module.named_parameters() if each.requires_grad} if known is None else known
