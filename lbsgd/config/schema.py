"""The `lbsgd` block of a DeepSpeed JSON: the intent of a run, in the paper's terms (Sec. 2, 3 and 5.1).

Plain DeepSpeed ignores the block. This schema checks each value on its own; checks/consistency.py compares the block
with the numbers in DeepSpeed's own blocks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lbsgd.algorithm.choices import ImplementationOrRule, MomentumForm, Scope, Statistics
from lbsgd.algorithm.schedule import ScalingRule, WarmupKind

PROSE = ("purpose", "paper_error_pct")  # keys that explain a file
NO_NUMBER = (*PROSE, "aggregation", "diagnostics")  # keys that change no number of the training
SEEDS = 2**32  # NumPy splits a larger one: (2**32 + s, epoch 0) would be (s, epoch 1)

# Bounded, so that no product of them is infinite or zero.
Positive = Annotated[int, Field(gt=0, le=10**12)]
Pixels = Annotated[int, Field(gt=0, le=10_000)]  # a side of resized images
PositiveFloat = Annotated[float, Field(ge=1e-12, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]


class _Block(BaseModel):
    # Strict: "90" is not 90 and true is not 1. Forbid: a misspelt key is an error, never a silent default.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def one_length(epochs: Any, info: ValidationInfo) -> Any:
    """Check that a length is given in epochs or in iterations, not in both; return the epochs.

    Iterations are those of base_batch images; a run of kn images takes base_batch/kn times as many, the same images.
    """
    iterations = info.data.get("iterations")
    if epochs is None and iterations is None:
        if info.data.get("kind") == "none":
            return 0.0  # a warmup of no length
        raise PydanticCustomError("missing", "is missing")
    if epochs is not None and iterations is not None:
        raise ValueError(f"epochs {epochs:g} and iterations {iterations} are two lengths: give one")
    return epochs


class LinearScaling(_Block):
    """The source of η (Sec. 2.1): scaled by `rule` from `base_lr`, which belongs to `base_batch` images."""

    rule: ScalingRule = "linear"
    base_lr: PositiveFloat = 0.1
    base_batch: Positive = 256


class Warmup(_Block):
    """The first epochs or iterations (Sec. 2.2): gradual (from η0 to η), constant (η0, then η) or none.

    start_fraction    η0 = start_fraction · η; by default η0 is base_lr, and up to base_batch images there is no warmup
    scaled            whether iterations are scaled from base_batch images like the run's, or the same for any kn
    """

    kind: WarmupKind
    iterations: Positive | None = None
    epochs: NonNegativeFloat | None = Field(None, validate_default=True)
    start_fraction: Annotated[float, Field(ge=1e-12, le=1)] | None = None
    scaled: bool = False

    _one_length = field_validator("epochs")(one_length)

    @model_validator(mode="after")
    def _kind_agrees_with_length(self) -> Self:
        if (self.kind == "none") != (not (self.epochs or self.iterations)):
            length = f"{self.iterations} iterations" if self.iterations else f"{self.epochs or 0:g} epochs"
            raise ValueError(f"kind {self.kind} does not go with {length}: none takes 0, others more")
        if self.scaled and self.iterations is None:
            raise ValueError("scaled is about iterations: epochs are those of any global batch")
        return self


class Decay(_Block):
    """η is multiplied by `factor` after each of `epochs` (Sec. 5.1), or of `iterations` of base_batch images."""

    iterations: list[Positive] | None = None
    epochs: list[PositiveFloat] = [30.0, 60.0, 80.0]
    factor: Annotated[float, Field(ge=1e-12, le=1)] = 0.1

    @model_validator(mode="after")
    def _points_ascend(self) -> Self:
        if self.iterations is not None and "epochs" in self.model_fields_set:
            raise ValueError("epochs and iterations are two lists of decay points: give one")
        for name, points in (("epochs", self.epochs), ("iterations", self.iterations or [])):
            if points != sorted(set(points)):
                raise ValueError(f"{name} {points} must ascend")
        times = len(self.epochs if self.iterations is None else self.iterations)
        if -times * math.log10(self.factor) > 100:
            raise ValueError(f"factor {self.factor:g}, {times} times, leaves no learning rate: decay less often")
        return self


class Momentum(_Block):
    """One of the two forms of Sec. 3: lr_outside is (9); lr_inside is (10), with or without Remark 2's correction."""

    form: MomentumForm = "lr_outside"
    correction: bool = True

    @model_validator(mode="after")
    def _form_9_needs_no_correction(self) -> Self:
        if self.form == "lr_outside" and not self.correction:
            raise ValueError("correction false: lr_outside, (9), is corrected by construction; use lr_inside")
        return self


class WeightDecay(_Block):
    """λ, which spares batch norm's γ and β (Sec. 5.1). Scaling inverse_lr, for comparison: λ = base · base_lr/η."""

    on_batch_norm: bool = False
    scaling: Literal["none", "inverse_lr"] = "none"
    base: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _base_goes_with_inverse_lr(self) -> Self:
        if (self.scaling == "inverse_lr") != (self.base is not None):
            raise ValueError("base, the weight decay at base_batch images, goes with scaling inverse_lr alone")
        return self


class Biases(_Block):
    """Biases, which Detectron trains at twice the learning rate and without decay; by default like other weights."""

    lr_factor: PositiveFloat = 1.0
    weight_decay: bool = True


class BatchNorm(_Block):
    """Batch norm over n images (Sec. 2.3), its statistics for evaluation, and γ = 0 in last layers (Sec. 5.1).

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
            raise ValueError(f"statistics_images {self.statistics_images} is no multiple of {self.per_worker_batch}")
        if self.scope == "all" and self.statistics != "average":
            raise ValueError(f"scope all has one set of statistics for all workers: use average, not {self.statistics}")
        return self


class Augmentation(_Block):
    """A random crop with a share `crop_scale` of the area, resized to `resolution`, then a random flip (Sec. 5.1)."""

    resolution: Pixels = 224
    crop_scale: list[PositiveFloat] = [0.08, 1.0]
    flip: bool = True

    @model_validator(mode="after")
    def _crop_scale_is_a_range(self) -> Self:
        if len(self.crop_scale) != 2 or not self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must be two shares of the image, smaller first, up to 1")
        return self


class Detection(_Block):
    """Mask R-CNN (Sec. 5.4): the pixels of an image's sides. A JSON with this block trains a detector.

    batch_norm.per_worker_batch is then the images of a forward, over which the losses are means. Batch norm is frozen.
    """

    shorter_side: Pixels = 800
    longer_side: Pixels = 1333

    @model_validator(mode="after")
    def _longer_is_not_shorter(self) -> Self:
        if self.shorter_side > self.longer_side:
            raise ValueError(f"shorter_side {self.shorter_side} is longer than longer_side {self.longer_side}")
        return self


class Diagnostics(_Block):
    """Measurements during training, with their interval in iterations; they change no number of the run.

    gradient_noise    the gradient's variance over chunks, the noise scale, |w|/|g| and the spread of batch-norm
                      statistics over workers (`train.gradient_noise`)
    """

    gradient_noise: Positive | None = None


class Aggregation(_Block):
    """How gradients are averaged over all processes at ZeRO stages 0 and 1 (Sec. 4); not part of a run's identity.

    hierarchy: phases inside and between servers, or all processes alike. between: the all-reduce between servers.
    config/aggregation.py has the rule for "auto". A JSON without the block keeps DeepSpeed's own reduction.
    """

    hierarchy: Literal["servers", "flat", "auto"] = "auto"
    between: Literal["backend", "halving_doubling", "auto"] = "auto"


class Recipe(_Block):
    """The whole `lbsgd` block; every default is the paper's. A recipe counts in epochs or in iterations, not both.

    purpose and paper_error_pct (mean and std of the paper's 5 runs) explain a file and change no number.
    """

    purpose: Annotated[str, Field(pattern=r"^[^\n]+$")] | None = None
    paper_error_pct: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)] | None = None
    iterations: Positive | None = None
    epochs: Positive | None = Field(None, validate_default=True)
    num_images: Positive
    linear_scaling: LinearScaling = LinearScaling()
    warmup: Warmup
    decay: Decay = Decay()
    momentum: Momentum = Momentum()
    weight_decay: WeightDecay = WeightDecay()
    biases: Biases = Biases()
    batch_norm: BatchNorm = BatchNorm()
    augmentation: Augmentation = Augmentation()
    detection: Detection | None = None
    aggregation: Aggregation | None = None
    diagnostics: Diagnostics = Diagnostics()
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0

    _one_length = field_validator("epochs")(one_length)

    @model_validator(mode="after")
    def _lengths_are_of_one_kind(self) -> Self:
        counted, warmup, decay = self.iterations is not None, self.warmup, self.decay
        if warmup.kind != "none" and counted != (warmup.iterations is not None):
            raise ValueError("a run counted in iterations has its warmup in iterations, others in epochs")
        if counted != (decay.iterations is not None):
            raise ValueError("a run counted in iterations has its decay in iterations, others in epochs")
        return self

    @model_validator(mode="after")
    def _decay_follows_warmup(self) -> Self:
        if self.iterations is None and self.decay.epochs and self.decay.epochs[0] < (self.warmup.epochs or 0):
            raise ValueError(f"decay at epoch {self.decay.epochs[0]:g} is inside the {self.warmup.epochs:g} of warmup")
        return self
