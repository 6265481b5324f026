"""Estimate a GPU's memory by ZeRO stage from counts.

Without CUDA graphs ResNet-50's peak on an H100 was 1.03 to 1.04 times the estimate. With graphs it was not measured on
a GPU. Counted on a CPU (tests/test_graphs_memory.py), the peaks of the graphs' pool and of the rest add up to 1.10
times the peak of a plain step for ResNet-50, which is 1.0 times the estimate, and to 1.17 times for ResNet-18.

Activations are counted: they are the values that autograd keeps for the backward of torchvision's networks, seen
through torch.autograd.graph.saved_tensors_hooks (tests/test_predict.py counts them again). The estimate leaves out the
overhead of a GPU's allocator and cuDNN's workspaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.aggregation import own_reduction
from lbsgd.config.keypath import block_of
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError


@dataclass(frozen=True)
class Network:
    """Counts for one image of 224 x 224.

    num_parameters    of the whole network
    kept_values       values kept for the backward
    """

    num_parameters: int
    kept_values: int


NETWORKS = {
    "resnet18": Network(11_689_512, 5_544_960),
    "resnet34": Network(21_797_672, 8_053_760),
    "resnet50": Network(25_557_032, 21_477_376),
    "resnet101": Network(44_549_160, 31_713_280),
    "resnet152": Network(60_192_808, 44_357_632),
}


def network(name: str) -> Network:
    """Return the counts of a network. Raises ConfigError for a name that is not in NETWORKS."""
    if name not in NETWORKS:
        raise ConfigError(f"--model {name}: its size is not known; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at one ZeRO stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int  # momentum and, for half weights or under ZeRO, float32 masters
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations


def bytes_per_weight(precision: str) -> int:
    """Return 2 for fp16, which keeps half weights, else 4: bf16 is autocast over float32 weights."""
    return 2 if precision == "fp16" else 4


def bytes_per_activation(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def memory(plan: Plan, size: Network, stage: int) -> Memory:
    """Estimate the memory for P parameters on W GPUs, with w bytes per weight and 4 per master and per momentum:

        stage 0      weights w·P   gradients w·P     momentum 4·P (and masters 4·P if w = 2)
        stage 1      weights w·P   gradients w·P     masters and momentum 8·P/W
        stage 2      weights w·P   gradients w·P/W   masters and momentum 8·P/W

    Under ZeRO, DeepSpeed keeps masters of float32 weights too. lbsgd's buckets hold all gradients; on one GPU it needs
    none. DeepSpeed's own buckets are two of reduce_bucket_size if aggregation overlaps back-propagation, else one; at
    stage 0 DeepSpeed copies all gradients into one buffer. Whose buckets are counted depends on `stage`, which need not
    be the plan's.
    """
    P, W, w = size.num_parameters, plan.world_size, bytes_per_weight(plan.precision)
    share = math.ceil(P / W)
    bucket = plan.bucket_elements  # also for a smaller network
    is_zeros = stage and own_reduction(at_stage(plan.config, stage), plan.recipe) is not None
    buckets = bucket * (1 + plan.overlaps) if is_zeros else P if W > 1 else 0
    images = plan.micro_batch * (plan.recipe.augmentation.resolution / 224) ** 2  # as many of 224 pixels
    return Memory(
        stage=stage,
        weights=w * P,
        gradients=w * (share if stage == 2 else P),
        optimizer=8 * share if stage else (8 if w == 2 else 4) * P,
        buckets=w * buckets,
        activations=round(size.kept_values * images * bytes_per_activation(plan.precision)),
    )


def at_stage(config: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """Return a JSON with another ZeRO stage."""
    return {**config, "zero_optimization": {**block_of(config, "zero_optimization"), "stage": stage}}
