"""Compare the GPU memory that training takes with the estimate of `lbsgd plan`."""

from __future__ import annotations

import gc

import torch

from lbsgd.bench.contestants import our_step, plan_for
from lbsgd.bench.figure import Figure, Goal
from lbsgd.bench.parts import NotRun, Say
from lbsgd.bench.sizes import BenchSettings
from lbsgd.config.memory import NETWORKS, memory
from lbsgd.train.engine import start_processes
from lbsgd.train.peak_memory import peak_bytes
from lbsgd.units import size

MEMORY_GOAL = Goal("within", 0.1)  # above, a plan that seems to fit may not run; below, one that fits may seem not to


def memory_taken(given: BenchSettings, say: Say) -> None:
    """Compare the peak memory of tensors in training, and the peak that torch reserves, with `lbsgd plan`."""
    if given.device != "cuda":
        raise NotRun("the estimate is of a GPU's memory")
    start_processes()
    for precision, stage in given.sizes.precisions:
        memory_taken_by(given, say, precision, stage)
        gc.collect()  # frees the engine, which refers to itself
        torch.cuda.empty_cache()


def memory_taken_by(given: BenchSettings, say: Say, precision: str, stage: int) -> None:
    """Report both peaks. A GPU runs out of reserved memory: CUDA graphs keep theirs even without tensors in it."""
    plan = plan_for(given, given.sizes.step_batch, precision, stage)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step = our_step(given, plan, given.sizes.blocks)
    for _ in range(given.sizes.warm_up):
        step()
    estimate = memory(plan, NETWORKS[given.task.name], stage).total
    for name, peak, held in zip(("allocated", "reserved"), peak_bytes(given.device).values(), before, strict=True):
        beside = f"{size(peak - held)} and {size(estimate)}"
        name = f"peak of {name} memory / estimate, {precision}, ZeRO {stage}"
        say(Figure(name, (peak - held) / estimate, goal=MEMORY_GOAL, beside=beside))
