"""Runs for the tests of aggregation: a small network on noise, and hosts simulated by processes of this machine."""

import copy

import torch
import torch.distributed as dist
from oracle import N, network
from small_engine import end_aggregation, recipe
from torch.nn import functional as F

import lbsgd
from lbsgd.config.precision import set_precision
from lbsgd.train.aggregation import placement
from lbsgd.train.engine_state import gather_state

SMALL_BUCKETS = 500  # elements; the oracle's network makes six of them
ONE_BUCKET = 500_000_000
TREE, RING = "halving_doubling", "backend"  # how two or more parties sum
OURS = {"hierarchy": "auto", "between": "auto"}


def config(world_size, passes=1, stage=0, bucket=SMALL_BUCKETS, overlap=True, precision="fp32", block=None):
    """The oracle's recipe for `passes` passes of N images. block: `lbsgd.aggregation`, None for DeepSpeed's own."""
    values = copy.deepcopy(recipe(stage))
    values["train_batch_size"] = global_batch = world_size * passes * N
    values["lbsgd"]["num_images"] = 2 * global_batch
    values["lbsgd"]["linear_scaling"] = {"base_lr": 0.05, "base_batch": N}
    lr = 0.05 * global_batch / N
    values["optimizer"]["params"]["lr"] = values["scheduler"]["params"]["warmup_max_lr"] = lr
    values["zero_optimization"] |= {"reduce_bucket_size": bucket, "overlap_comm": overlap}
    if block is not None:
        values["lbsgd"]["aggregation"] = block
    if precision != "fp32":
        set_precision(values, precision)
    return values


def noise(iteration, number):
    """The images and labels of one pass of this process."""
    generator = torch.Generator().manual_seed(1000 * iteration + 100 * number + dist.get_rank())
    return torch.randn(N, 3, 6, 6, generator=generator), torch.randint(0, 5, (N,), generator=generator)


def one_iteration(engine, plan, backward=lambda engine, loss: engine.backward(loss)):
    """All passes of the engine's current iteration."""
    iteration = engine.global_steps
    for number in range(plan.accumulation_steps):
        images, labels = noise(iteration, number)
        backward(engine, F.cross_entropy(engine(images.to(engine.device)).float(), labels.to(engine.device)))
        engine.step()


def run(values, **options):
    """An engine after some iterations on noise, which aggregates no more."""
    engine = going_on(values, **options)
    end_aggregation(engine)
    return engine


def going_on(values, iterations=4, model=None, **loop):
    """An engine after some iterations on noise."""
    engine, plan = lbsgd.initialize(model or network(), values)
    while engine.global_steps < iterations:
        one_iteration(engine, plan, **loop)
    return engine


def parameters(engine):
    """All weights, float32 masters under ZeRO; without running statistics, which each process keeps for itself."""
    weights = gather_state(engine).weights
    return {name: weights[name] for name, _ in engine.module.named_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def play_hosts(*sizes):
    """Simulate hosts of these numbers of processes, which take the ranks in blocks."""
    hosts = [f"host{number}" for number, size in enumerate(sizes) for _ in range(size)]
    placement.host_name = lambda: hosts[dist.get_rank()]


def play_cyclic_hosts(number):
    """Simulate hosts that take the ranks in turn, as with Slurm's --distribution=cyclic."""
    placement.host_name = lambda: f"host{dist.get_rank() % number}"
