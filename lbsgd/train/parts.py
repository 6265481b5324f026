"""The parts of the algorithm that a plan asks for: singly for lbsgd's engine, together for any other loop.

    plan = lbsgd.Plan.read("ds_configs/8k.json", world_size, len(dataset))
    parts = lbsgd.parts_for(model, plan, num_images=len(dataset))
    loader = DataLoader(dataset, batch_sampler=parts.sampler)

docs/in_your_project.md shows their use in Accelerate, Lightning and timm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lbsgd.algorithm.apart import foreign_batch_norms
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.batch_norm_statistics import RunningStatistics
from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.process_group import world_size
from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups
from lbsgd.algorithm.torch_scheduler import LargeMinibatchLR
from lbsgd.config.plan import Plan, require_plan
from lbsgd.errors import ConfigError, require_number, require_type
from lbsgd.train.pace import watch_pace


class Parts(NamedTuple):
    """What a loop needs in addition to its model, whose batch norms are now per worker (Sec. 2.3).

    optimizer    SGD in the plan's form of momentum (Sec. 3), γ and β in a group without weight decay (Sec. 5.1)
    scheduler    warmup and decay (Sec. 2.2, 5.1); one step per update, with any number of processes
    sampler      this process's micro batches, accumulation_steps per update (Remark 4); set_epoch before each epoch
    """

    optimizer: MomentumCorrectedSGD
    scheduler: LargeMinibatchLR
    sampler: SharedShuffleSampler


def parts_for(model: nn.Module, plan: Plan, num_images: int | None = None) -> Parts:
    """Convert a model's batch norms in place and return the other parts that a plan asks for.

    Call it after the processes have met and before the model is wrapped, but after FSDP2's fully_shard, which replaces
    the parameters. The sampler takes this process's rank from torch.distributed. num_images is the size of the training
    data at hand: if it exceeded the plan's, the sampler would never choose the rest. Raises ConfigError if the number
    of images or of processes is not the plan's, or if the network could not be trained afterwards. The optimizer's
    first step raises it if the optimizer lacks a parameter of the model, or if the batch norms were converted again;
    a later step raises it if a parameter was unfrozen.
    """
    require_network(model)
    require_plan(plan)
    if num_images is not None:
        require_images(plan, num_images, "the training data")
    if world_size() != plan.world_size:
        raise ConfigError(
            f"the plan is for {plan.world_size} processes, and torch.distributed knows of {world_size()}; read the "
            "plan for these, or let the processes meet first"
        )
    sampler = SharedShuffleSampler(
        plan.num_images,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        seed=plan.recipe.seed,
    )
    return parts_around(sampler, model, plan)


def parts_around(sampler: SharedShuffleSampler, model: nn.Module, plan: Plan) -> Parts:
    """Return the parts of `parts_for` with a sampler that a loader has already."""
    convert_network(model, plan)
    optimizer = build_optimizer(model, plan, fused=False)  # FSDP2's parameters have no such kernel
    scheduler = LargeMinibatchLR(optimizer, plan.schedule)
    watch_pace(optimizer, scheduler, sampler, plan)
    require_unchanged(optimizer, model)
    return Parts(optimizer, scheduler, sampler)


def require_unchanged(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer's first step raise ConfigError if the model's parameters or batch norms were replaced.

    Any step raises it if a parameter was unfrozen that the optimizer does not have.
    """
    given = parameters_of(optimizer)
    converted = {name for name, layer in model.named_modules() if isinstance(layer, RunningStatistics)}
    frozen: list[nn.Parameter] | None = None  # as the last check found it

    def check(*_: Any) -> None:  # it stays, because torch fails if a hook removes itself before another
        nonlocal frozen
        if frozen is None:
            require_batch_norms(model, converted)
        if frozen is None or any(parameter.requires_grad for parameter in frozen):
            require_parameters(optimizer, model, given)
            frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]

    optimizer.register_step_pre_hook(check)


def require_parameters(optimizer: torch.optim.Optimizer, model: nn.Module, given: set[torch.Tensor]) -> None:
    """Raise ConfigError if the optimizer lacks a parameter that the model trains."""
    held = parameters_of(optimizer)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if missing and given <= held:  # else a library has replaced them by its own masters, as DeepSpeed does
        raise ConfigError(
            f"{missing[0]} of the network was added, replaced or unfrozen after parts_for, so the optimizer does"
            " not train it: do that before parts_for, as FSDP2's fully_shard, or give it to"
            " optimizer.add_param_group with its weight_decay; the first FSDP needs use_orig_params=True"
        )


def require_batch_norms(model: nn.Module, converted: set[str]) -> None:
    """Raise ConfigError for a batch norm that is trained, or was converted, but is not per worker."""
    for name, layer in foreign_batch_norms(model):
        if name in converted or any(parameter.requires_grad for parameter in layer.parameters()):
            raise ConfigError(
                f"{name} of the network became a {type(layer).__name__} after parts_for, so it does not normalise per"
                " worker: leave out convert_sync_batchnorm, and Lightning's sync_batchnorm"
            )


def parameters_of(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    """Return the parameters of all groups."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def require_images(plan: Plan, num_images: int, what: str) -> None:
    """Raise ConfigError, naming the data, if the number of images is not the plan's."""
    require_number(num_images, "num_images", 1, whole=True)
    if num_images != plan.num_images:
        raise ConfigError(
            f"{what} has {num_images:,} images and the plan {plan.num_images:,}; give Plan.read the size of the data"
        )


def convert_network(model: torch.nn.Module, plan: Plan, implementation: Implementation = "loop") -> None:
    """Convert a model's batch norms, found by type, to the plan's per-worker ones (Sec. 2.3), in place.

    Raises ConfigError for a network that could not be trained afterwards.
    """
    require_wide(model, plan)
    norm = plan.recipe.batch_norm
    passes = plan.accumulation_steps
    try:
        convert_batch_norm(model, norm.per_worker_batch, passes, norm.statistics, norm.scope, implementation)
    except ValueError as error:
        raise ConfigError(f"{plan.name}: {error}") from error


def require_wide(model: nn.Module, plan: Plan) -> None:
    """Raise ConfigError for trained weights of half precision, unless fp16 or ZeRO keeps float32 copies of them.

    Without such copies an update that is less than half of a weight's last bit is lost.
    """
    if plan.precision == "fp16" or plan.zero_stage:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            raise ConfigError(
                f"{name} of the network is {str(parameter.dtype).removeprefix('torch.')}, which rounds most updates"
                f" away; call .float() on the network first: {plan.precision} keeps its weights in float32"
            )


def build_optimizer(model: torch.nn.Module, plan: Plan, fused: bool = True) -> MomentumCorrectedSGD:
    """Return SGD as the JSON's optimizer block and the `lbsgd` block say, with a separate group for batch norm.

    Biases also have one if the recipe trains them differently. If the JSON chooses no kernel, one fused kernel makes
    the whole update, 2.7 times as fast as torch's default on a CPU (docs/experiments.md). If torch has no such kernel,
    as for complex weights, torch chooses.
    """
    params, recipe = dict(plan.config["optimizer"]["params"]), plan.recipe
    if fused and not any(parameter.is_complex() for parameter in model.parameters()):
        params.setdefault("fused", recipe.momentum.form == "lr_outside" and not params.get("foreach"))
    decay, biases = params.pop("weight_decay"), recipe.biases
    groups = decay_groups(model, decay, recipe.weight_decay.on_batch_norm, biases.weight_decay, biases.lr_factor)
    if not groups:
        raise ConfigError(f"{plan.name}: the network has no parameter to train; all are frozen")
    return MomentumCorrectedSGD(groups, **params, form=recipe.momentum.form, correction=recipe.momentum.correction)


def require_network(model: nn.Module) -> None:
    """Raise ConfigError if this is not a network, has weights without values, or makes sparse gradients.

    The optimizer would keep weights without values while the network gets others. Weight decay makes gradients dense.
    """
    require_type(model, nn.Module, "the network", "give a torch.nn.Module, then the plan or its JSON")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ConfigError(
                f"{name} of the network has no values yet: move it from the meta device by to_empty and load or draw "
                "them, or run one forward where its layers are lazy, and do that before lbsgd is given the network"
            )
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse and layer.weight.requires_grad:
            raise ConfigError(
                f"{name or 'the network'} is an {type(layer).__name__} with sparse gradients, which SGD with momentum "
                "and weight decay cannot use; build it with sparse=False"
            )
