"""The parts of the algorithm for a training loop without lbsgd's engine: one call gives all that go together.

    plan = lbsgd.Plan.read("ds_configs/8k.json", world_size, len(dataset))
    parts = lbsgd.parts_for(model, plan, num_images=len(dataset))
    loader = DataLoader(dataset, batch_sampler=parts.sampler)

docs/in_your_project.md shows it in Accelerate, Lightning and timm.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lbsgd.algorithm.process_group import world_size
from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.algorithm.sgd import MomentumCorrectedSGD
from lbsgd.algorithm.torch_scheduler import LargeMinibatchLR
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.inputs import build_optimizer, convert_network


class Parts(NamedTuple):
    """What a loop needs besides its model; the model's batch norms are per worker now (Sec. 2.3).

    optimizer    SGD in the plan's form of momentum (Sec. 3), γ and β in a group without weight decay (Sec. 5.1)
    scheduler    warmup and decay (Sec. 2.2, 5.1); one step per update, whatever the number of processes
    sampler      this process's micro batches, accumulation_steps per update (Remark 4); set_epoch before each epoch
    """

    optimizer: MomentumCorrectedSGD
    scheduler: LargeMinibatchLR
    sampler: SharedShuffleSampler


def parts_for(model: nn.Module, plan: Plan, num_images: int | None = None) -> Parts:
    """Convert a model's batch norms in place and return the other parts that a plan asks for.

    Call it once the processes have met and before the model is wrapped, but after FSDP2's fully_shard, which replaces
    the parameters. The sampler takes this process's rank from torch.distributed. num_images is the size of the training
    data at hand: if it exceeds the plan's, the sampler would never choose the rest. Raises ConfigError for a number of
    images or of processes that is not the plan's, and ValueError for a batch norm of an unknown class.
    """
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
    convert_network(model, plan)
    optimizer = build_optimizer(model, plan, fused=False)  # FSDP2's parameters have no such kernel
    return Parts(optimizer, LargeMinibatchLR(optimizer, plan.schedule), sampler)


def require_images(plan: Plan, num_images: int, what: str) -> None:
    """Raise ConfigError, which names the data, if they have another number of images than the plan."""
    if num_images != plan.num_images:
        raise ConfigError(
            f"{what} has {num_images:,} images and the plan {plan.num_images:,}; give Plan.read the size of the data"
        )
