"""The run of oracle.py through DeepSpeed: its JSON in every precision, and a user's own loop."""

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from oracle import ITERATIONS, K, N, global_batch, network
from torch.nn import functional as F

import lbsgd
from lbsgd.config.precision import set_precision
from lbsgd.train.engine_state import gather_state, restore_state


def recipe(stage=0, momentum=None, micro_batch=N, **batch_norm):
    """The recipe of oracle.py: 64 images per update, lr 0.05 -> 0.4 over 10 iterations, a decay at iteration 15."""
    return {
        "train_batch_size": K * N,
        "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {"type": "SGD", "params": {"lr": 0.4, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.05, "warmup_max_lr": 0.4, "warmup_num_steps": 10, "warmup_type": "linear"},
        },
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 6_000_000},
        "lbsgd": {
            "epochs": 10,
            "num_images": 2 * K * N,
            "linear_scaling": {"base_lr": 0.05, "base_batch": N},
            "warmup": {"kind": "gradual", "epochs": 5},
            "decay": {"epochs": [7.5], "factor": 0.1},
            "momentum": momentum or {},
            "batch_norm": {"per_worker_batch": N, **batch_norm},
        },
    }


def in_precision(precision, stage=0, micro_batch=N, **fp16):
    """Return the recipe in bf16 autocast, or in fp16 with a loss scale of 2^10, at which nothing overflows."""
    config = recipe(stage, micro_batch=micro_batch)
    set_precision(config, precision)
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 10, **fp16}
    return config


def train(engine, plan, first=0, last=ITERATIONS, backward=lambda engine, loss: engine.backward(loss)):
    """A user's own loop: this rank's passes over its part of each global batch. Returns the lr of each update."""
    rank, lrs = torch.distributed.get_rank(), []
    for iteration in range(first, last):
        images, labels = (part.chunk(plan.world_size)[rank].to(engine.device) for part in global_batch(iteration))
        for x, y in zip(images.split(plan.micro_batch), labels.split(plan.micro_batch), strict=True):
            backward(engine, F.cross_entropy(engine(x).float(), y))
            lrs_before_step = [group["lr"] for group in engine.basic_optimizer.param_groups]
            engine.step()
        lrs.append(lrs_before_step)
    return lrs


def trained(config, last=ITERATIONS, state=None, seed=0, **options):
    """Return the state after training in this process's group, starting from a gathered state if one is given."""
    engine, plan = lbsgd.initialize(network(seed, **options), config)
    if state is not None:
        restore_state(engine, state)
    lrs = train(engine, plan, engine.global_steps, last)
    lbsgd.agree_statistics(engine.module)
    end_aggregation(engine)
    return gather_state(engine), lrs


def end_aggregation(engine):
    """End the groups in which the engine aggregates, because a thread of each wakes a hundred times a second."""
    if engine.aggregation is None:
        return
    engine.aggregation.close()
    dist.barrier()  # nobody sends in these groups any more
    for group in [*dist.distributed_c10d._world.pg_map]:
        if group not in (dist.group.WORLD, groups._WORLD_GROUP):
            dist.destroy_process_group(group)


def aggregated(config):
    config["lbsgd"]["aggregation"] = {}
    return config
