"""What DeepSpeed is given for a plan: the network with its batch norms converted, the optimizer and the JSON."""

from __future__ import annotations

from typing import Any

import torch

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.algorithm.norm_rule import implementation_for
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups
from lbsgd.config.aggregation import own_reduction
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError


def convert_network(model: torch.nn.Module, plan: Plan, device: torch.device, layout: torch.memory_format) -> None:
    """Make the network's batch norms per-worker ones, and fuse its blocks where Triton computes them."""
    norm = plan.recipe.batch_norm
    how, _ = norm_implementation(plan, device, layout)
    convert_batch_norm(model, norm.per_worker_batch, plan.accumulation_steps, norm.statistics, norm.scope, how)
    if how == "triton":
        fuse_blocks(model)


def norm_implementation(plan: Plan, device: torch.device, layout: torch.memory_format) -> tuple[Implementation, str]:
    """Return what computes batch norm in training on this device, and why. Raises ConfigError if it cannot."""
    try:
        return implementation_for(plan.recipe.batch_norm.implementation, device.type, layout)
    except ValueError as error:
        raise ConfigError(f"{plan.name}: lbsgd.batch_norm: {error}") from error


def build_optimizer(model: torch.nn.Module, plan: Plan) -> MomentumCorrectedSGD:
    """Return SGD as the JSON's optimizer block and the `lbsgd` block say, with batch norm in a group of its own."""
    params, recipe = dict(plan.config["optimizer"]["params"]), plan.recipe
    # One kernel for the whole update: 2.7 times as fast as torch's default on a CPU (docs/experiments.md).
    params.setdefault("fused", recipe.momentum.form == "lr_outside" and not params.get("foreach"))
    groups = decay_groups(model, params.pop("weight_decay"), recipe.weight_decay.on_batch_norm)
    return MomentumCorrectedSGD(groups, **params, form=recipe.momentum.form, correction=recipe.momentum.correction)


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Return the JSON for DeepSpeed: without our block, and without the lines that lbsgd prints itself."""
    config = {key: value for key, value in plan.config.items() if key not in ("lbsgd", "steps_per_print")}
    if own_reduction(plan.config, plan.recipe) is None:  # ZeRO would reduce in its own hooks, before ours
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "overlap_comm": False}
    # Its throughput timer waits for the GPU at every pass.
    return {"timers": {"throughput": {"enabled": False}}, **config}
