"""The `lbsgd` block of a DeepSpeed JSON: the intent of a run, in the paper's terms (Sec. 2, 3 and 5.1).

Plain DeepSpeed ignores the block. A value that this schema accepts is right by itself; checks/consistency.py compares
it with the numbers in DeepSpeed's own blocks.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lbsgd.algorithm.choices import ImplementationOrRule, MomentumForm, Scope, Statistics
from lbsgd.algorithm.schedule import ScalingRule, WarmupKind

# The keys that explain a file and change no number.
PROSE = ("purpose", "paper_error_pct")

# Bounded, so that no product of them is infinite or zero.
Positive = Annotated[int, Field(gt=0, le=10**12)]
PositiveFloat = Annotated[float, Field(ge=1e-12, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]


class _Block(BaseModel):
    # Strict: "90" is not 90 and true is not 1. Forbid: a misspelt key is an error, never a silent default.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LinearScaling(_Block):
    """Where η comes from (Sec. 2.1): scaled by `rule` from `base_lr`, which belongs to `base_batch` images."""

    rule: ScalingRule = "linear"
    base_lr: PositiveFloat = 0.1
    base_batch: Positive = 256


class Warmup(_Block):
    """The first `epochs` epochs (Sec. 2.2): gradual (from η0 to η), constant (η0, then η) or none."""

    kind: WarmupKind
    epochs: NonNegativeFloat

    @model_validator(mode="after")
    def _kind_agrees_with_epochs(self) -> Self:
        if (self.kind == "none") != (self.epochs == 0):
            raise ValueError(f"kind {self.kind} does not go with {self.epochs:g} epochs: none takes 0, others more")
        return self


class Decay(_Block):
    """η is multiplied by `factor` after each of `epochs` (Sec. 5.1)."""

    epochs: list[PositiveFloat] = [30.0, 60.0, 80.0]
    factor: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _epochs_ascend(self) -> Self:
        if self.epochs != sorted(set(self.epochs)):
            raise ValueError(f"epochs {self.epochs} must ascend")
        return self


class Momentum(_Block):
    """One of the two forms of Sec. 3: lr_outside is (9); lr_inside is (10), with or without Remark 2's correction."""

    form: MomentumForm = "lr_outside"
    correction: bool = True

    @model_validator(mode="after")
    def _form_9_needs_no_correction(self) -> Self:
        if self.form == "lr_outside" and not self.correction:
            raise ValueError(
                "correction false: lr_outside, the paper's (9), is corrected by construction; use lr_inside"
            )
        return self


class WeightDecay(_Block):
    """λ, which spares batch norm's γ and β (Sec. 5.1). Scaling inverse_lr, for comparison: λ = base · base_lr/η."""

    on_batch_norm: bool = False
    scaling: Literal["none", "inverse_lr"] = "none"
    base: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _base_goes_with_inverse_lr(self) -> Self:
        if (self.scaling == "inverse_lr") != (self.base is not None):
            raise ValueError(
                "base, the weight decay at base_batch images, is needed with scaling inverse_lr, only there"
            )
        return self


class BatchNorm(_Block):
    """Batch norm over n images (Sec. 2.3), the statistics for evaluation, and γ = 0 in last layers (Sec. 5.1).

    implementation: what computes it; "rule" chooses by the device alone (algorithm/norm_rule.py).
    """

    per_worker_batch: Positive = 32
    scope: Scope = "worker"
    statistics: Statistics = "average"
    statistics_images: Positive | None = None
    implementation: ImplementationOrRule = "rule"
    zero_last_gamma: bool = True

    @model_validator(mode="after")
    def _statistics_are_possible(self) -> Self:
        if (self.statistics == "recomputed") != (self.statistics_images is not None):
            raise ValueError("statistics_images is needed with statistics recomputed, only there")
        if self.statistics_images is not None and self.statistics_images % self.per_worker_batch:
            raise ValueError(
                f"statistics_images {self.statistics_images} is no multiple of n = {self.per_worker_batch}"
            )
        if self.scope == "all" and self.statistics != "average":
            raise ValueError(f"scope all has one set of statistics for all workers: use average, not {self.statistics}")
        return self


class Augmentation(_Block):
    """Random crop of a share `crop_scale` of the area, resized to `resolution`, then a random flip (Sec. 5.1)."""

    resolution: Positive = 224
    crop_scale: list[PositiveFloat] = [0.08, 1.0]
    flip: bool = True

    @model_validator(mode="after")
    def _crop_scale_is_a_range(self) -> Self:
        if len(self.crop_scale) != 2 or not self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale {self.crop_scale} must be two shares of the image, the smaller first, up to 1"
            )
        return self


class Diagnostics(_Block):
    """What is measured while training, every so many iterations; changes no number of the run.

    gradient_noise    the gradient's variance over chunks, and the noise scale (`train.gradient_noise`)
    """

    gradient_noise: Positive | None = None


class Aggregation(_Block):
    """How gradients become means over all processes at ZeRO stages 0 and 1 (Sec. 4); part of no run's identity.

    hierarchy: phases inside and between servers, or all processes alike. between: the all-reduce between servers. The
    rule that "auto" follows is in config/aggregation.py. A JSON without the block keeps DeepSpeed's own reduction.
    """

    hierarchy: Literal["servers", "flat", "auto"] = "auto"
    between: Literal["backend", "halving_doubling", "auto"] = "auto"


class Recipe(_Block):
    """The whole `lbsgd` block; every default is the paper's.

    purpose and paper_error_pct (mean and std of the paper's 5 runs) explain a file and change no number.
    """

    purpose: Annotated[str, Field(pattern=r"^[^\n]+$")] | None = None
    paper_error_pct: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)] | None = None
    epochs: Positive
    num_images: Positive
    linear_scaling: LinearScaling = LinearScaling()
    warmup: Warmup
    decay: Decay = Decay()
    momentum: Momentum = Momentum()
    weight_decay: WeightDecay = WeightDecay()
    batch_norm: BatchNorm = BatchNorm()
    augmentation: Augmentation = Augmentation()
    aggregation: Aggregation | None = None
    diagnostics: Diagnostics = Diagnostics()
    # NumPy splits a larger seed: (2**32 + s, epoch 0) would be (s, epoch 1).
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _decay_follows_warmup(self) -> Self:
        if self.decay.epochs and self.decay.epochs[0] < self.warmup.epochs:
            raise ValueError(f"decay at epoch {self.decay.epochs[0]:g} is inside the {self.warmup.epochs:g} of warmup")
        return self
