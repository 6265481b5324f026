"""Prepare a plan's batch norms, optimizer and JSON for DeepSpeed, and say what DeepSpeed refuses of them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch.nn.parameter import is_lazy

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError


def convert_network(model: torch.nn.Module, plan: Plan, implementation: Implementation = "loop") -> None:
    """Make a model's batch norms, found by type, the plan's per-worker ones (Sec. 2.3), in place.

    Raises ConfigError for a network that could not be trained afterwards.
    """
    require_values(model)
    norm = plan.recipe.batch_norm
    passes = plan.accumulation_steps
    convert_batch_norm(model, norm.per_worker_batch, passes, norm.statistics, norm.scope, implementation)


def build_optimizer(model: torch.nn.Module, plan: Plan, fused: bool = True) -> MomentumCorrectedSGD:
    """Return SGD as the JSON's optimizer block and the `lbsgd` block say, with batch norm in a group of its own.

    Biases have one, too, if the recipe trains them otherwise. If the JSON chooses no kernel, one fused kernel makes the
    whole update, 2.7 times as fast as torch's default on a CPU (docs/experiments.md). If torch has no such kernel, as
    for complex weights, it chooses.
    """
    params, recipe = dict(plan.config["optimizer"]["params"]), plan.recipe
    if fused and not any(parameter.is_complex() for parameter in model.parameters()):
        params.setdefault("fused", recipe.momentum.form == "lr_outside" and not params.get("foreach"))
    decay, biases = params.pop("weight_decay"), recipe.biases
    groups = decay_groups(model, decay, recipe.weight_decay.on_batch_norm, biases.weight_decay, biases.lr_factor)
    if not groups:
        raise ConfigError(f"{plan.name}: the network has no parameter to train; all are frozen")
    return MomentumCorrectedSGD(groups, **params, form=recipe.momentum.form, correction=recipe.momentum.correction)


def require_values(model: torch.nn.Module) -> None:
    """Raise ConfigError for weights without values: an optimizer would keep these, and the network get others."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ConfigError(
                f"{name} of the network has no values yet: move it from the meta device by to_empty and load or draw "
                "them, or run one forward where its layers are lazy, and do that before lbsgd is given the network"
            )


def require_real(model: torch.nn.Module, plan: Plan) -> None:
    """Raise ConfigError for complex weights where DeepSpeed keeps their real parts only, or cannot reduce them."""
    if plan.zero_stage:
        why = f"ZeRO stage {plan.zero_stage} would lose its imaginary part; use zero_optimization.stage 0"
    elif plan.world_size > 1 and not plan.aggregates:
        why = f"DeepSpeed cannot reduce its gradient, as it has to because {plan.own_reduction}; add that block"
    else:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise ConfigError(
                f"{name} of the network is complex, and {why}, or use a real parameter behind torch.view_as_complex"
            )


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Return the JSON for DeepSpeed: without our block, and without the lines that lbsgd prints itself."""
    config = {key: value for key, value in plan.config.items() if key not in ("lbsgd", "steps_per_print")}
    zero = dict(config.get("zero_optimization", {}))
    if plan.aggregates:  # ZeRO would reduce in its own hooks, before ours
        zero["overlap_comm"] = False
    if has_nothing_to_reduce(plan):
        zero["contiguous_gradients"] = False  # where DeepSpeed would copy each gradient to, by a hook of its own
    if plan.zero_stage in (1, 2) and not config.get("gradient_clipping") and "offload_optimizer" not in zero:
        # Nobody reads the norm, but for it each update waits for the device, and skips gradients that are NaN unsaid.
        zero.setdefault("compute_grad_norm", False)
    timers = config.get("timers", {})
    # Its throughput timer, on where nobody says otherwise, waits for the GPU at every pass.
    throughput = {"enabled": False, **timers.get("throughput", {})}
    return {**config, "timers": {**timers, "throughput": throughput}, "zero_optimization": zero}


def has_nothing_to_reduce(plan: Plan) -> bool:
    """Whether ZeRO 1 has one process only, and a JSON without offload_optimizer, so gradients stay on the device."""
    alone = plan.world_size == 1 and plan.zero_stage == 1 and plan.aggregates
    return alone and "offload_optimizer" not in plan.config["zero_optimization"]


def refusal(plan: Plan, error: Exception) -> ConfigError:
    """Return DeepSpeed's own words, in one line, for what it refuses when it builds its engine."""
    if isinstance(error, ValidationError):  # an unknown key or a wrong value in a block that DeepSpeed checks itself
        [details, *_] = error.errors()
        key = ".".join(map(str, details["loc"]))
        return ConfigError(
            f"{plan.name}: DeepSpeed refuses {key} in its {error.title}: {details['msg']}; correct or delete it"
        )
    words = " ".join(str(error).split())[:300] or "it does not say why"
    if isinstance(error, ImportError):
        return ConfigError(
            f"{plan.name}: DeepSpeed lacks a package ({words}); install it, or delete the block that asks"
        )
    return ConfigError(
        f"{plan.name}: DeepSpeed refuses the JSON ({type(error).__name__}: {words}); correct or delete what it names"
    )


def require_passes(passes: int, plan: Plan) -> None:
    """Raise ConfigError if DeepSpeed would move the weights after another number of passes than the plan."""
    if passes != plan.accumulation_steps:
        raise ConfigError(
            f"{plan.name}: DeepSpeed would move the weights after {passes:g} passes, and the plan after "
            f"{plan.accumulation_steps}; delete the key that divides a network or a sequence among processes"
        )
