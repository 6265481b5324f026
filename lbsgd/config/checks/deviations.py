"""Rules about intents that the paper measured as worse, or argues against.

They are warnings even in ds_configs/ablations, where each file exists to break one of them. `lbsgd check --fix` leaves
such intents alone, because the user asked for them. Points are those of ResNet-50 on ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lbsgd.algorithm import published
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import explicit_numbers


def deviation(key: str, message: str, source: str, planned: Planned, lost: published.Loss | None = None) -> Hit:
    """Return the hit for an intent that deviates from the paper, with the source and the points lost at which batch."""
    if lost is None:
        return Hit(key, f"{message} ({source})")
    said = f"{message}; with this the paper lost {lost.points:g} points at {lost.global_batch} images ({source})"
    return Hit(key, said, points=lost.points_at(planned.global_batch))


def loss_of(measured: Mapping[int, tuple[float, float]], planned: Planned) -> published.Loss:
    """Return the points that the paper lost at the measured global batch nearest to this one."""
    return published.loss_of(measured, planned.global_batch)


def has_imagenets_size(planned: Planned) -> bool:
    """Whether the data are as many as ImageNet's, for which the paper chose its numbers."""
    return planned.recipe.num_images > 10**6


def is_scaled_up(planned: Planned) -> bool:
    """Whether the global batch is larger than base_lr's."""
    return planned.global_batch > planned.recipe.linear_scaling.base_batch


@rule(
    "R04",
    "a large minibatch without warmup",
    lbsgd="warning",
    why="Early in training the network changes fast, and the linear scaling rule does not hold yet (Sec. 2.2). "
    "Without warmup the paper lost 1.1 points at 8192 images (Table 1).",
    fix='use "gradual" unless you compare',
    example={
        "lbsgd": {"warmup": {"kind": "none", "epochs": 0}},
        "scheduler": {"params": {"warmup_min_lr": 3.2, "warmup_num_steps": 1}},
    },
)
def no_warmup(planned: Planned) -> Iterator[Hit]:
    kn, scaling = planned.global_batch, planned.recipe.linear_scaling
    rises = explicit_numbers(planned.recipe, kn)["optimizer.params.lr"] > scaling.base_lr
    if is_scaled_up(planned) and planned.recipe.warmup.kind == "none" and rises:
        said = f"is none for {kn} images, {kn / scaling.base_batch:g} times base_batch"
        lost = loss_of(published.NO_WARMUP, planned)
        yield deviation("lbsgd.warmup.kind", said, "Table 1", planned, lost)


@rule(
    "R07",
    "a constant warmup",
    lbsgd="warning",
    why="After a few epochs the small learning rate jumps to the full one, which undoes what the warmup is for (Sec. "
    "2.2). The paper lost 2.14 points with it at 8192 images, more than without any warmup (Table 1).",
    fix='use "gradual" unless you compare',
    example={"lbsgd": {"warmup": {"kind": "constant"}}, "scheduler": {"params": {"warmup_min_lr": 3.2}}},
)
def constant_warmup(planned: Planned) -> Iterator[Hit]:
    if is_scaled_up(planned) and planned.recipe.warmup.kind == "constant":
        said, lost = "is constant, and the jump to the full learning rate undoes it", published.CONSTANT_WARMUP
        yield deviation("lbsgd.warmup.kind", said, "Table 1", planned, loss_of(lost, planned))


@rule(
    "R08",
    "another scaling rule than the linear one",
    lbsgd="warning",
    why="k updates with a small minibatch come close to one update with a k times larger minibatch and a k times "
    "larger learning rate (Sec. 2.1). At 8192 images the square root rule lost 2.48 points, a fixed learning "
    "rate 17.93 (Table 2a).",
    fix='use "linear" unless you compare',
    example={
        "lbsgd": {"linear_scaling": {"rule": "fixed"}},
        "optimizer": {"params": {"lr": 0.1}},
        "scheduler": {"params": {"warmup_max_lr": 0.1}},
    },
)
def other_scaling(planned: Planned) -> Iterator[Hit]:
    rule_name = planned.recipe.linear_scaling.rule
    if is_scaled_up(planned) and rule_name != "linear":
        said = f"is {rule_name}, too small a learning rate for {planned.global_batch} images"
        lost = published.SQRT_RULE if rule_name == "sqrt" else published.FIXED_LR
        yield deviation("lbsgd.linear_scaling.rule", said, "Table 2a", planned, loss_of(lost, planned))


@rule(
    "R09",
    "another base learning rate than the paper's",
    lbsgd="warning",
    why="0.1 for 256 images was the best on ImageNet; half and double of it lost 0.08 to 0.53 points (Table 2a). On "
    "smaller data another one may well be right, so this rule looks only at more than a million images.",
    fix="use 0.1 for 256 images unless you compare",
    example={
        "lbsgd": {"linear_scaling": {"base_lr": 0.05}},
        "optimizer": {"params": {"lr": 1.6}},
        "scheduler": {"params": {"warmup_min_lr": 0.05, "warmup_max_lr": 1.6}},
    },
)
def other_base_lr(planned: Planned) -> Iterator[Hit]:
    scaling = planned.recipe.linear_scaling
    factor = scaling.base_lr / scaling.base_batch / (0.1 / 256)
    if has_imagenets_size(planned) and not 0.51 < factor < 1.99:
        said = f"is {scaling.base_lr:g} for {scaling.base_batch} images, {factor:g} times the paper's"
        tried = {0.5: published.HALF_LR, 2.0: published.DOUBLE_LR}
        measured = next((tried[each] for each in tried if math.isclose(factor, each, rel_tol=0.02)), None)
        lost = loss_of(measured, planned) if measured else None
        yield deviation("lbsgd.linear_scaling.base_lr", said, "Table 2a", planned, lost)


@rule(
    "R20",
    "a global batch beyond the end of the linear rule",
    lbsgd="warning",
    why="Up to 8192 images the error is that of the baseline; beyond, it rises: 1.19 points at 16384, 3.95 at "
    "32768, 10.36 at 65536 (Fig. 1).",
    fix="use 8192 or fewer unless you compare",
    example={
        "train_batch_size": 16384,
        "optimizer": {"params": {"lr": 6.4}},
        "scheduler": {"params": {"warmup_max_lr": 6.4, "warmup_num_steps": 390}},
    },
)
def too_large_batch(planned: Planned) -> Iterator[Hit]:
    most, lost = published.LARGEST_GOOD_BATCH, published.loss_to_size(planned.global_batch)
    if planned.global_batch > most:
        said = f"is {planned.global_batch}, beyond the {most} up to which the linear rule matches the baseline"
        yield deviation("train_batch_size", said, "Fig. 1", planned, lost)


@rule(
    "R13",
    "residual blocks that do not begin as the identity",
    lbsgd="warning",
    why="With γ = 0 in the last batch norm of each residual block the network begins shallow, which helps early "
    "training (Sec. 5.1). γ = 1 lost 0.24 points at 256 images and 0.37 at 8192 (Table 2b).",
    fix="use true unless you compare",
    example={"lbsgd": {"batch_norm": {"zero_last_gamma": False}}},
)
def gamma_one(planned: Planned) -> Iterator[Hit]:
    if not planned.recipe.batch_norm.zero_last_gamma:
        said, lost = "is false, so blocks do not begin as the identity", loss_of(published.GAMMA_ONE, planned)
        yield deviation("lbsgd.batch_norm.zero_last_gamma", said, "Table 2b", planned, lost)


@rule(
    "R14",
    "batch norm over all processes",
    lbsgd="warning",
    why="The images that batch norm sees together are part of the loss function (Sec. 2.3). Over all processes "
    "they depend on the hardware, so runs on different numbers of GPUs minimise different functions.",
    fix='use "worker" unless you compare',
    example={"lbsgd": {"batch_norm": {"scope": "all"}}},
)
def statistics_of_all(planned: Planned) -> Iterator[Hit]:
    if planned.recipe.batch_norm.scope == "all":
        said = "is all, and statistics over all processes make another loss function, which depends on their number"
        yield deviation("lbsgd.batch_norm.scope", said, "Sec. 2.3", planned)


@rule(
    "R22",
    "batch norm over another number of images than the paper's",
    lbsgd="warning",
    why="An image's loss depends on the n images that batch norm sees together, so another n is another loss "
    "function (Sec. 2.3). The paper keeps n = 32 for every global batch. On smaller data another one may well be "
    "right, so this rule looks only at more than a million images.",
    fix="use 32 unless you compare; a micro batch of several n fills a GPU and keeps n",
    example={"train_micro_batch_size_per_gpu": 64, "lbsgd": {"batch_norm": {"per_worker_batch": 64}}},
)
def other_n(planned: Planned) -> Iterator[Hit]:
    n, recipe = planned.per_worker_batch, planned.recipe
    is_used = recipe.detection is None and recipe.batch_norm.scope == "worker"  # detectors have M04, scope all R14
    if is_used and has_imagenets_size(planned) and n != published.PER_WORKER_BATCH:
        said = f"is {n}: another loss function than that of n = {published.PER_WORKER_BATCH}"
        yield deviation("lbsgd.batch_norm.per_worker_batch", said, "Sec. 2.3", planned)


@rule(
    "R15",
    "momentum without its correction",
    lbsgd="warning",
    why="Form (10) of momentum holds the learning rate inside, so what it remembers must be scaled by η_t/η_last "
    "whenever the learning rate changes (Remark 2).",
    fix="use true unless you compare",
    example={"lbsgd": {"momentum": {"form": "lr_inside", "correction": False}}},
)
def uncorrected_momentum(planned: Planned) -> Iterator[Hit]:
    if not planned.recipe.momentum.correction:
        said = "is false, and the old momentum is too small while the learning rate rises"
        yield deviation("lbsgd.momentum.correction", said, "Remark 2", planned)


@rule(
    "R16",
    "a weight decay that falls as the learning rate rises",
    lbsgd="warning",
    why="Scaling the loss instead of the learning rate leaves the weight decay unscaled: it is then too small by "
    "the same factor (Remark 1).",
    fix='use "none" unless you compare',
    example={
        "lbsgd": {"weight_decay": {"scaling": "inverse_lr", "base": 0.0001}},
        "optimizer": {"params": {"weight_decay": 3.125e-06}},
    },
)
def scaled_weight_decay(planned: Planned) -> Iterator[Hit]:
    scaling = planned.recipe.weight_decay.scaling
    if scaling != "none":
        said = f"is {scaling}, which scaling the loss in place of the learning rate amounts to"
        yield deviation("lbsgd.weight_decay.scaling", said, "Remark 1", planned)


@rule(
    "R17",
    "weight decay on batch norm",
    lbsgd="warning",
    why="The paper decays all weights but batch norm's γ and β (Sec. 5.1). Decay would pull them to 0, and γ to a "
    "network that passes nothing on.",
    fix="use false unless you compare",
    example={"lbsgd": {"weight_decay": {"on_batch_norm": True}}},
)
def decayed_batch_norm(planned: Planned) -> Iterator[Hit]:
    if planned.recipe.weight_decay.on_batch_norm:
        said = "is true, and gamma and beta shrink, too"
        yield deviation("lbsgd.weight_decay.on_batch_norm", said, "Sec. 5.1", planned)
