"""Predict the time of an iteration on many GPUs from the speeds of one GPU and of the links between servers (Sec. 4).

No constant here is fitted. The defaults are the paper's own figures, and its iteration on 256 GPUs lies between the
predictions with and without overlap (tests/test_predict.py prints all three).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbsgd.algorithm.published import IMAGES_PER_SECOND
from lbsgd.config.memory import Network, bytes_per_weight
from lbsgd.config.plan import Plan
from lbsgd.config.traffic import FLAT_RING, HALVING, RING, Machines, share_over_a_link, steps

# Back-propagation takes 120 ms of the paper's iteration of 8 x 32 images (Sec. 4).
BACKWARD_SHARE = 0.120 / (32 / IMAGES_PER_SECOND)
OWN_BUCKET_AT_STAGE_0 = 500_000_000  # elements_per_buffer of DeepSpeed 0.19.8's allreduce_gradients


@dataclass(frozen=True)
class Reduction:
    """Traffic of one aggregation: bytes of gradients in buckets, and bytes of updated weights gathered afterwards."""

    gradient_bytes: float
    num_buckets: int = 1
    weight_bytes: float = 0.0
    times: int = 1  # aggregations per iteration


ALGORITHMS = (RING, HALVING, FLAT_RING)  # three phases with a ring or with halving/doubling between servers; no phases


def gradient_seconds(reduction: Reduction, machines: Machines, gpus: int, algorithm: str) -> float:
    """Time one all-reduce over the links: bytes that leave a server / link + messages · latency · buckets (Sec. 4)."""
    servers = machines.servers(gpus)
    moved = share_over_a_link(algorithm, servers, gpus) * reduction.gradient_bytes
    late = steps(algorithm, servers, gpus) * machines.latency_seconds * reduction.num_buckets
    return moved * 8 / (machines.link_gbit * 1e9) + late


def weight_seconds(reduction: Reduction, machines: Machines, gpus: int) -> float:
    """Time ZeRO's gathering of updated weights by the backend, (W−1)/W of them over each link; never overlapped."""
    if not reduction.weight_bytes:
        return 0.0
    moved = (gpus - 1) / gpus * reduction.weight_bytes
    return moved * 8 / (machines.link_gbit * 1e9) + (gpus - 1) * machines.latency_seconds


@dataclass(frozen=True)
class Prediction:
    """Seconds of one iteration with one all-reduce algorithm."""

    algorithm: str
    compute_seconds: float
    gradient_seconds: float  # all aggregations of an iteration
    weight_seconds: float
    exposed_seconds: float  # the part of gradient_seconds that back-propagation cannot hide

    @property
    def without_overlap(self) -> float:
        return self.compute_seconds + self.gradient_seconds + self.weight_seconds

    @property
    def with_overlap(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.weight_seconds

    def efficiency(self, overlap: bool) -> float:
        """Return a GPU's speed relative to its speed inside a single server."""
        return self.compute_seconds / (self.with_overlap if overlap else self.without_overlap)


def predict(
    images_per_gpu: int, passes: int, gpus: int, reduction: Reduction, machines: Machines, algorithm: str
) -> Prediction:
    """Predict one iteration in which each GPU takes images_per_gpu images in `passes` passes.

    Aggregation overlaps the back-propagation of its own pass, except for the last bucket, which is full only once
    back-propagation is over. So max(aggregation − back-propagation, one bucket) is exposed.
    """
    servers = machines.servers(gpus)
    compute = images_per_gpu / machines.images_per_second
    if servers == 1:  # aggregation inside a server is part of the GPU's speed
        return Prediction(algorithm, compute, 0.0, 0.0, 0.0)
    one = gradient_seconds(reduction, machines, gpus, algorithm)
    backward = compute / passes * BACKWARD_SHARE
    exposed = max(one - backward, one / reduction.num_buckets)
    return Prediction(
        algorithm,
        compute,
        one * reduction.times,
        weight_seconds(reduction, machines, gpus),
        exposed * reduction.times,
    )


def reduction_of(plan: Plan, size: Network) -> Reduction:
    """Return the traffic of a network's gradients at a plan's ZeRO stage and precision; of one GPU there is none.

    Stage 2 aggregates in every pass, stages 0 and 1 once per iteration; stages 1 and 2 then gather the weights. At
    stage 0 DeepSpeed's own reduction ignores reduce_bucket_size.
    """
    if plan.world_size == 1:
        return Reduction(0.0, 0)
    P, w = size.num_parameters, bytes_per_weight(plan.precision)
    own_at_stage_0 = plan.zero_stage == 0 and not plan.aggregates
    bucket = OWN_BUCKET_AT_STAGE_0 if own_at_stage_0 else plan.bucket_elements
    return Reduction(
        w * P,
        max(1, math.ceil(P / bucket)),
        w * P if plan.zero_stage else 0.0,
        plan.accumulation_steps if plan.zero_stage == 2 else 1,
    )


def bytes_per_iteration(reduction: Reduction, gpus: int) -> float:
    """Return the bytes that each of W GPUs would send per iteration in a network without hierarchy.

    These are 2·(W−1)/W of the gradients and (W−1)/W of the weights.
    """
    return (gpus - 1) / gpus * (2 * reduction.gradient_bytes * reduction.times + reduction.weight_bytes)


def no_overlap(plan: Plan, reduction: Reduction) -> str | None:
    """Return why this JSON keeps aggregation from overlapping back-propagation in DeepSpeed 0.19.8, or None."""
    if not reduction.num_buckets:
        return "one GPU aggregates nothing"
    if plan.zero_stage == 0 and not plan.aggregates:
        return "at stage 0 DeepSpeed aggregates after back-propagation"
    if not plan.overlaps:
        return "zero_optimization.overlap_comm is not true"
    return "one bucket holds all gradients" if reduction.num_buckets == 1 else None


def overlap_in_words(plan: Plan, reduction: Reduction) -> str:
    """Say whether this JSON lets aggregation overlap back-propagation, and if not, why."""
    if reason := no_overlap(plan, reduction):
        return f"no: {reason}"
    if plan.aggregates:
        return f"yes: {reduction.num_buckets} buckets"
    return f"yes: ZeRO-{plan.zero_stage} with overlap_comm and {reduction.num_buckets} buckets"
