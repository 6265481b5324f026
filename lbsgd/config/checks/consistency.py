"""Rules that compare DeepSpeed's own blocks with the intent in the JSON's `lbsgd` block."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.algorithm import published
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import NO_WARMUP, explicit_numbers, is_close, is_needless, tidy
from lbsgd.config.keypath import LR, is_number, shown, stated
from lbsgd.config.precision import precision_of


@rule(
    "R01",
    "a number that contradicts the lbsgd block",
    lbsgd="error",
    why="The lbsgd block states the intent, such as 0.1 for 256 images by the linear rule. The numbers in "
    "DeepSpeed's blocks follow from it, so that plain DeepSpeed trains alike with the same file. Where they "
    "differ, nobody can say which was meant.",
    fix="set it to the number that follows",
    example={"optimizer": {"params": {"lr": 0.1}}},
)
def contradicted_number(planned: Planned) -> Iterator[Hit]:
    kn = planned.global_batch
    for key, number in explicit_numbers(planned.recipe, kn).items() if planned.has_whole_workers else ():
        value = planned.get(key)
        if is_close(value, number):
            continue
        cost = published.points_of_lr(kn, value) if key == LR and is_number(value) else None
        lost = f"; the paper lost {cost[0]:g} points with that (Table 2a, {cost[1]})" if cost else ""
        yield Hit(
            key,
            f"{stated(value)}, but the lbsgd block makes it {number:.10g} for a global batch of {kn} of "
            f"{planned.recipe.num_images} images{lost}",
            f"set it to {number:.10g}",
            correction={key: tidy(number)},
            points=cost[0] if cost else None,
        )


@rule(
    "R03",
    "a warmup where there is nothing to warm up to",
    lbsgd="error",
    why="Warmup leads from the learning rate of base_batch images to that of the global batch (Sec. 2.2). Up to "
    "base_batch the second is not larger than the first.",
    fix='use {"kind": "none", "epochs": 0}',
    example={
        "lbsgd": {"linear_scaling": {"base_lr": 3.2, "base_batch": 8192}},
        "scheduler": {"params": {"warmup_min_lr": 3.2}},
    },
)
def needless_warmup(planned: Planned) -> Iterator[Hit]:
    kn, base, kind = planned.global_batch, planned.recipe.linear_scaling.base_batch, planned.recipe.warmup.kind
    if planned.has_whole_workers and is_needless(planned.recipe, kn):
        said = f"is {kind} for {kn} images, but up to base_batch = {base} there is nothing to warm up to"
        yield Hit("lbsgd.warmup.kind", said, correction={"lbsgd.warmup": NO_WARMUP})


@rule(
    "R05",
    "a momentum or a weight decay that is not from 0 to 1",
    lbsgd="error",
    why="Both belong to the recipe, and neither has a default here: DeepSpeed would take torch's, which is 0. With a "
    "momentum of 1 or more the sum of gradients grows without end.",
    fix="give it as a number of at least 0 and below 1 (the paper's: momentum 0.9, weight_decay 0.0001)",
    example={"optimizer": {"params": {"momentum": None}}},
)
def momentum_and_decay(planned: Planned) -> Iterator[Hit]:
    for key in ("optimizer.params.momentum", "optimizer.params.weight_decay"):
        value = planned.get(key)
        if not is_number(value) or not 0 <= value < 1:
            yield Hit(key, stated(value))


@rule(
    "R06",
    "no choice between momentum and Nesterov momentum",
    lbsgd="error",
    why="The paper uses Nesterov momentum (Sec. 5.1). torch's default is plain momentum, so the choice must be "
    "written.",
    fix="write true (the paper's) or false",
    example={"optimizer": {"params": {"nesterov": None}}},
)
def nesterov(planned: Planned) -> Iterator[Hit]:
    value = planned.get("optimizer.params.nesterov")
    if type(value) is not bool:
        yield Hit("optimizer.params.nesterov", stated(value))


@rule(
    "R19",
    "a kernel that momentum form (10) does not have",
    lbsgd="error",
    why="Form (10) keeps the learning rate inside the momentum, which torch's fused kernel does not compute. It runs "
    "on foreach kernels, and the optimizer refuses any other when it is built.",
    fix="delete it, or use momentum form lr_outside, which is the same update (Remark 2)",
    example={"optimizer": {"params": {"fused": True}}, "lbsgd": {"momentum": {"form": "lr_inside"}}},
)
def kernel_of_form_10(planned: Planned) -> Iterator[Hit]:
    for name, refused in (("fused", True), ("foreach", False)):
        key = f"optimizer.params.{name}"
        if planned.recipe.momentum.form == "lr_inside" and planned.get(key) is refused:
            yield Hit(key, f"is {shown(refused)} with momentum form lr_inside", correction={key: DELETE})


@rule(
    "R18",
    "gradient noise measured in fp16",
    lbsgd="error",
    why="In fp16 gradients are multiplied by the loss scale and may overflow, so their size says nothing. The run "
    "refuses to measure it.",
    fix="use torch_autocast with bfloat16, or delete lbsgd.diagnostics.gradient_noise",
    example={"lbsgd": {"diagnostics": {"gradient_noise": 100}}},
)
def noise_in_fp16(planned: Planned) -> Iterator[Hit]:
    every = planned.recipe.diagnostics.gradient_noise
    if every is not None and precision_of(planned.config) == "fp16":
        yield Hit("lbsgd.diagnostics.gradient_noise", f"is {every} with fp16, whose gradients are scaled")
