"""The traffic of an aggregation over each server's link, by algorithm, and machines to predict for (Sec. 4).

Each server has consecutive ranks, so a ring of all W processes leaves each server once, and everything that a ring
moves, 2·(W−1)/W of the gradients, goes over each link. Three phases move 2·(p−1)/p between p servers: as much for many
servers, but 1.875 times less for two servers of eight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbsgd.algorithm import published
from lbsgd.config.aggregation import Choice, choose
from lbsgd.config.plan import Plan

FLAT_RING, RING, HALVING = "flat ring", "ring", "halving/doubling"
MIXED = "mixed precision"  # fp16 or bf16


@dataclass(frozen=True)
class Machines:
    """Servers with some GPUs and one link each; by default the paper's (Sec. 4 and abstract).

    The latency of one message between servers is an assumption, because the paper does not state it.
    """

    images_per_second: float = published.IMAGES_PER_SECOND  # one GPU's, measured inside its server
    gpus_per_server: int = 8
    link_gbit: float = 50.0  # all links of a server together
    latency_seconds: float = 20e-6
    source: str = ""  # of a preset's numbers; a flag overrides them
    precision: str | None = None  # of a preset's speed, which is ResNet-50's at 224 pixels; None: a flag gave the speed

    def servers(self, gpus: int) -> int:
        """Return the number of servers that hold this number of GPUs."""
        return math.ceil(gpus / self.gpus_per_server)


PRESETS = {
    "p100-2017": Machines(
        precision="fp32",
        source="speed: 90 epochs in 29 h on a server of 8 P100; link: 50 Gbit/s Ethernet (the paper, Sec. 4 and "
        "abstract)",
    ),
    "dgx-a100": Machines(
        images_per_second=16_621 / 8,
        link_gbit=8 * 200.0,
        precision=MIXED,
        source="speed: 16,621 images/s on 8 GPUs in mixed precision (NVIDIA, DeepLearningExamples, ResNet50 v1.5 for "
        "PyTorch); link: 8 x 200 Gbit/s InfiniBand (NVIDIA, DGX A100 datasheet)",
    ),
    "dgx-h100": Machines(
        images_per_second=2 * 16_621 / 8,
        link_gbit=8 * 400.0,
        precision=MIXED,
        source="speed: twice the A100's, an assumption, because NVIDIA publishes none for this network; link: 8 x 400 "
        "Gbit/s InfiniBand (NVIDIA, DGX H100 datasheet)",
    ),
}


def share_over_a_link(algorithm: str, servers: int, gpus: int) -> float:
    """Return the bytes that leave each server in one all-reduce, per byte of gradients."""
    parties = gpus if algorithm == FLAT_RING else servers
    return 2 * (parties - 1) / parties


def steps(algorithm: str, servers: int, gpus: int) -> int:
    """Count the consecutive messages between servers in one all-reduce: 2·(W−1), 2·(p−1) or 2·⌈log2 p⌉."""
    if algorithm == HALVING:
        return 2 * math.ceil(math.log2(servers))
    return 2 * ((gpus if algorithm == FLAT_RING else servers) - 1)


def algorithm_of(choice: Choice) -> str:
    """Return the predicted algorithm of a choice; halving in blocks has the traffic of phases, even if it is flat."""
    if choice.between == "halving_doubling":
        return HALVING
    return RING if choice.hierarchy == "servers" else FLAT_RING


def running(plan: Plan, gpus_per_server: int) -> tuple[str, str]:
    """Return the algorithm that runs with a plan and NCCL on servers of this size, and why.

    Raises ConfigError if the JSON demands an algorithm that cannot run there.
    """
    reason = plan.own_reduction
    if reason is not None or plan.recipe.aggregation is None:
        return FLAT_RING, f"DeepSpeed's own: {reason}"
    full, rest = divmod(plan.world_size, gpus_per_server)
    sizes = [gpus_per_server] * full + ([rest] if rest else [])
    choice = choose(plan.recipe.aggregation, sizes, "nccl")
    return algorithm_of(choice), str(choice)
