"""What a GPU needs to hold, by ZeRO stage: an estimate from counts, no measurement on a GPU.

Activations are counted, not guessed: the values that autograd keeps for the backward pass of torchvision's networks, seen
through torch.autograd.graph.saved_tensors_hooks (tests/test_predict.py counts again). What a GPU's allocator and cuDNN's
workspaces add is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbsgd.config.keypath import get
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError


@dataclass(frozen=True)
class Network:
    """Parameters, the tensors they are in, and the values kept for the backward pass of one image of 224 x 224."""

    num_parameters: int
    num_tensors: int
    kept_values: int


NETWORKS = {
    "resnet18": Network(11_689_512, 62, 5_544_960),
    "resnet34": Network(21_797_672, 110, 8_053_760),
    "resnet50": Network(25_557_032, 161, 21_477_376),
    "resnet101": Network(44_549_160, 314, 31_713_280),
    "resnet152": Network(60_192_808, 467, 44_357_632),
}


def network(name: str) -> Network:
    if name not in NETWORKS:
        raise ConfigError(f"--model {name}: nothing is known of its size; choose of {', '.join(NETWORKS)}")
    return NETWORKS[name]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at one ZeRO stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int  # momentum, and the float32 masters of half weights or of ZeRO's share
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations


def bytes_a_weight(precision: str) -> int:
    """fp16 keeps half weights; bf16 is autocast over float32 weights."""
    return 2 if precision == "fp16" else 4


def bytes_an_activation(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def memory(plan: Plan, size: Network, stage: int) -> Memory:
    """Estimate for P parameters on W GPUs, with w bytes a weight and 4 bytes a master and a momentum:

        stage 0      weights w·P   gradients w·P     momentum 4·P (and masters 4·P where w = 2)
        stage 1      weights w·P   gradients w·P     masters and momentum 8·P/W
        stage 2      weights w·P   gradients w·P/W   masters and momentum 8·P/W

    DeepSpeed keeps masters also of float32 weights under ZeRO. Buckets: two of reduce_bucket_size where aggregation overlaps,
    else one; at stage 0 all gradients are copied into one buffer.
    """
    P, W, w = size.num_parameters, plan.world_size, bytes_a_weight(plan.precision)
    share = math.ceil(P / W)
    bucket = min(P, int(get(plan.config, "zero_optimization.reduce_bucket_size", 5e8)))
    overlaps = get(plan.config, "zero_optimization.overlap_comm") is True
    values = size.kept_values * plan.micro_batch * (plan.recipe.augmentation.resolution / 224) ** 2
    return Memory(
        stage=stage,
        weights=w * P,
        gradients=w * (share if stage == 2 else P),
        optimizer=8 * share if stage else (8 if w == 2 else 4) * P,
        buckets=w * (bucket * (1 + overlaps) if stage else P if W > 1 else 0),
        activations=round(values * bytes_an_activation(plan.precision)),
    )
