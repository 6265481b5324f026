"""The learning rate of every update: linear scaling rule, warmup and step decay (Sec. 2.1, 2.2 and 5.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from lbsgd.errors import require_number, require_type

ScalingRule = Literal["linear", "sqrt", "fixed"]
WarmupKind = Literal["gradual", "constant", "none"]


def scaled_lr(global_batch: int, base_lr: float, base_batch: int, rule: ScalingRule = "linear") -> float:
    """Return the reference learning rate η of a global batch of kn images (Sec. 2.1; Table 2a for the other rules).

        linear   η = base_lr · kn/base_batch        the paper's rule: 3.2 for 8,192 images
        sqrt     η = base_lr · √(kn/base_batch)     26.22 % error at 8,192 images, for comparison
        fixed    η = base_lr                        41.67 % error at 8,192 images, for comparison

    Raises ValueError for any other rule, for a batch below 1, and for a base_lr that is negative or not finite.
    """
    require_number(global_batch, "global_batch", 1)
    require_number(base_batch, "base_batch", 1)
    require_number(base_lr, "base_lr")
    if rule == "linear":
        return base_lr * global_batch / base_batch
    if rule == "sqrt":
        return base_lr * math.sqrt(global_batch / base_batch)
    if rule == "fixed":
        return base_lr
    raise ValueError(f"unknown scaling rule {rule!r}: must be one of {', '.join(get_args(ScalingRule))}")


@dataclass(frozen=True)
class Schedule:
    """The numbers that determine every learning rate of a run; `Plan.schedule` has those of a JSON.

    Warmup goes from base_lr (η0) to reference_lr (η) in warmup_iterations updates (W), 0 for no warmup. Each of
    decay_iterations multiplies η by decay_factor once that many updates are done.

    Raises ValueError for an unknown warmup_kind, for "none" with warmup_iterations above 0, for a decay_factor above 1,
    and for a number that is negative or not finite.
    """

    base_lr: float
    reference_lr: float
    warmup_kind: WarmupKind = "none"
    warmup_iterations: int = 0
    decay_iterations: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_kind not in get_args(WarmupKind):
            kinds = ", ".join(get_args(WarmupKind))
            raise ValueError(f"unknown warmup_kind {self.warmup_kind!r}: must be one of {kinds}")
        if self.warmup_kind == "none" and self.warmup_iterations:
            raise ValueError(
                f"warmup_kind none does not go with {self.warmup_iterations} warmup_iterations: use gradual"
            )
        for name in ("base_lr", "reference_lr", "warmup_iterations", "decay_factor"):
            require_number(getattr(self, name), name)
        if self.decay_factor > 1:
            raise ValueError(
                f"decay_factor is {self.decay_factor}, and would raise the learning rate: give 0.1 for 1/10"
            )
        for point in self.decay_iterations:
            require_number(point, "a point of decay_iterations")


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """Return the learning rate of update `iteration`, counted from 0 (Sec. 2.2 and 5.1).

        t < W    η0 + (η − η0) · t/W      gradual warmup: by a constant amount per iteration, η0 at t = 0
                 η0                       constant warmup
        t ≥ W    η · factor^d             d = how many of the decay points have been reached

    Every global batch follows the same curve over epochs: the warmup does not shift the decay points.
    Raises ValueError for a negative iteration.
    """
    if iteration < 0:
        raise ValueError(f"update {iteration} is before the first, which is update 0")
    if iteration < schedule.warmup_iterations:
        if schedule.warmup_kind == "constant":
            return schedule.base_lr
        share = iteration / schedule.warmup_iterations
        return schedule.base_lr + (schedule.reference_lr - schedule.base_lr) * share
    num_decays = sum(iteration >= point for point in schedule.decay_iterations)
    return schedule.reference_lr * schedule.decay_factor**num_decays


class LargeMinibatchSGD:
    """The learning rates of Sec. 2 and 5.1 for a training loop that counts epochs: a thin view of `learning_rate`.

        rule = LargeMinibatchSGD(base_lr=0.1, base_batch_size=256, target_batch_size=8192)
        rule.scaled_lr                                            # 3.2
        rule.warmup_schedule(epoch, iteration, iters_per_epoch)   # the lr of that update, both counted from 0

    Up to base_batch_size images there is no warmup. This class updates no weights; `MomentumCorrectedSGD` does.
    Raises ValueError for a batch below 1, a decay_factor above 1, a decay inside the warmup, and any other number that
    is negative or not finite.
    """

    def __init__(
        self,
        base_lr: float = 0.1,
        base_batch_size: int = 256,
        target_batch_size: int = 8192,
        *,
        warmup_epochs: float = 5,
        decay_epochs: Iterable[float] = (30, 60, 80),
        decay_factor: float = 0.1,
    ) -> None:
        require_number(base_batch_size, "base_batch_size")
        require_number(target_batch_size, "target_batch_size")
        self.base_lr, self.base_batch_size, self.target_batch_size = base_lr, base_batch_size, target_batch_size
        self.warmup_epochs = warmup_epochs if target_batch_size > base_batch_size else 0
        self.decay_factor = decay_factor
        require_number(warmup_epochs, "warmup_epochs")
        require_type(decay_epochs, Iterable, "decay_epochs", "give a tuple, (30,) for a single decay")
        self.decay_epochs = tuple(decay_epochs)
        for epoch in self.decay_epochs:
            require_number(epoch, "a point of decay_epochs")
        self.schedule(iters_per_epoch=1)  # checks all other numbers
        if (first := min(self.decay_epochs, default=math.inf)) < self.warmup_epochs:
            raise ValueError(f"the decay at epoch {first:g} is inside the {warmup_epochs:g} of warmup")

    @property
    def scaled_lr(self) -> float:
        """The target batch's η by the linear scaling rule."""
        return scaled_lr(self.target_batch_size, self.base_lr, self.base_batch_size)

    def schedule(self, iters_per_epoch: int) -> Schedule:
        """Return the same numbers in iterations, as `learning_rate` and `LargeMinibatchLR` take them."""
        require_number(iters_per_epoch, "iters_per_epoch", 1)
        return Schedule(
            self.base_lr,
            self.scaled_lr,
            "gradual" if self.warmup_epochs else "none",
            round(self.warmup_epochs * iters_per_epoch),
            tuple(round(epoch * iters_per_epoch) for epoch in self.decay_epochs),
            self.decay_factor,
        )

    def warmup_schedule(self, epoch: int, iteration: int, iters_per_epoch: int) -> float:
        """Return the lr of update `iteration` of `epoch`, both counted from 0: warmup, then η, then its decays."""
        return learning_rate(epoch * iters_per_epoch + iteration, self.schedule(iters_per_epoch))
