"""What is wrong in a DeepSpeed JSON without an `lbsgd` block, for any model and optimizer.

An error is what DeepSpeed 0.19.8 refuses, or what does not train; a warning what is likely not meant; a note what to know.
"auto" is Hugging Face's: such a value is taken as right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lbsgd.algorithm import published as paper
from lbsgd.config.checks.consistency import DELETE, Finding, enabled, get, is_number
from lbsgd.config.checks.deepspeed_keys import block_of, key_findings, nearest, shown
from lbsgd.config.checks.lbsgd_json import combination_findings, cost_findings

OWN_OPTIMIZERS = frozenset("adagrad adam adamw lamb lion muadam muadamw musgd muon".split())  # in any case
TORCH_OPTIMIZERS = frozenset(
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam".split()
)
TESTED_WITH_ZERO = frozenset("adam adamw adagrad lion muon".split())
REMOVED_OPTIMIZERS = frozenset("onebitadam zerooneadam onebitlamb".split())
WARMUPS = frozenset("WarmupLR WarmupDecayLR WarmupCosineLR".split())
OWN_SCHEDULERS = {
    "LRRangeTest": "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase",
    "OneCycle": "cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count "
    "cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate",
    "WarmupLR": "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type",
    "WarmupDecayLR": "total_num_steps warmup_min_lr warmup_max_lr warmup_num_steps warmup_type",
    "WarmupCosineLR": "total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type",
}
OWN_SCHEDULERS = {name: frozenset([*keys.split(), "last_batch_iteration"]) for name, keys in OWN_SCHEDULERS.items()}
TORCH_SCHEDULERS = frozenset(
    "ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR "
    "LambdaLR LinearLR MultiStepLR MultiplicativeLR OneCycleLR PolynomialLR ReduceLROnPlateau "
    "SequentialLR StepLR".split()
)


def stage_of(config: dict) -> Any:
    """The ZeRO stage; 0 where none is given, None where it is "auto" or no stage at all."""
    stage = get(config, "zero_optimization.stage", 0)
    return stage if type(stage) is int and 0 <= stage <= 3 else None


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 10**12


def batch_findings(config: dict) -> Iterator[Finding]:
    """DeepSpeed wants kn or the micro batch, and that kn, micro batch and passes agree."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    kn, micro_batch, passes = values = [config.get(name) for name in names]
    for name, value in zip(names, values):
        if value is not None and value != "auto" and not is_count(value):
            yield Finding("D04", name, f"is {shown(value)}", "give it as a positive whole number")
    if kn is None and micro_batch is None:
        yield Finding("D49", names[0], "is not given, nor the micro batch: DeepSpeed asserts", f"give {names[0]}")
    numbers = [value for value in (micro_batch, passes) if is_count(value)]
    product = math.prod(numbers)
    if is_count(kn) and kn % product:
        yield Finding(
            "D49",
            names[0],
            f"{kn} is no multiple of {' x '.join(map(str, numbers))}, so no number of GPUs fits",
            f"use {max(1, round(kn / product)) * product}",
        )


def optimizer_findings(config: dict) -> Iterator[Finding]:
    """The optimizer block: whether DeepSpeed uses it, knows its type, and ZeRO takes it."""
    if "optimizer" not in config or not isinstance(config["optimizer"], dict):
        return
    kind, params, stage = get(config, "optimizer.type"), block_of(config, "optimizer.params"), stage_of(config)
    if kind is None:
        yield Finding(
            "D30",
            "optimizer",
            "is a dead block: without a type DeepSpeed builds no optimizer from it",
            "give its type, or delete it where your program passes an optimizer",
            "warning",
        )
    elif kind != "auto":
        yield Finding(
            "D30",
            "optimizer",
            "is a dead block where your program passes an optimizer to deepspeed.initialize",
            "keep the two the same, or delete it",
            "note",
        )
        yield from type_findings(kind)
    if "max_grad_norm" in params:
        yield Finding(
            "D33",
            "optimizer.params.max_grad_norm",
            "is refused by DeepSpeed",
            "use gradient_clipping",
            correction={"optimizer.params.max_grad_norm": DELETE, "gradient_clipping": params["max_grad_norm"]},
        )
    known = isinstance(kind, str) and (kind in TORCH_OPTIMIZERS or kind.lower() in ("sgd", "lamb"))
    if (
        stage
        and known
        and kind.lower() not in TESTED_WITH_ZERO
        and config.get("zero_allow_untested_optimizer") is not True
    ):
        yield Finding(
            "D18",
            "zero_allow_untested_optimizer",
            f"is not true, and ZeRO then refuses {kind}",
            "set it to true",
            correction={"zero_allow_untested_optimizer": True},
        )


def type_findings(kind: Any) -> Iterator[Finding]:
    name = kind.lower() if isinstance(kind, str) else ""
    if name in REMOVED_OPTIMIZERS:
        yield Finding(
            "D06",
            "optimizer.type",
            f"{kind} was removed from DeepSpeed",
            "use Adam or Lamb",
            correction={"optimizer.type": "Lamb" if "lamb" in name else "Adam"},
        )
    elif name not in OWN_OPTIMIZERS and (not name or kind not in TORCH_OPTIMIZERS):
        right = next((known for known in TORCH_OPTIMIZERS if known.lower() == name), None)
        yield Finding(
            "D06",
            "optimizer.type",
            f"is {shown(kind)}, which DeepSpeed refuses: it wants a class of torch.optim, letter for letter",
            f'use "{right}"' if right else nearest(str(kind), TORCH_OPTIMIZERS),
            correction={"optimizer.type": right} if right else None,
        )


def clipping_findings(config: dict) -> Iterator[Finding]:
    """Since 0.19 gradients are clipped unless the JSON says 0."""
    if "gradient_clipping" not in config and "max_grad_norm" not in block_of(config, "optimizer.params"):
        sgd = str(get(config, "optimizer.type")).lower() == "sgd"
        yield Finding(
            "D08",
            "gradient_clipping",
            "is not set: DeepSpeed 0.19 clips the gradients' norm at 1.0, earlier versions did not",
            "write 0.0 for none, or the norm you mean",
            "warning",
            correction={"gradient_clipping": 0.0} if sgd else None,
        )


def scheduler_findings(config: dict) -> Iterator[Finding]:
    """The scheduler block: known, complete, and what its warmup does."""
    if "scheduler" not in config or not isinstance(config["scheduler"], dict):
        return
    kind, params = get(config, "scheduler.type"), block_of(config, "scheduler.params")
    if kind is None:
        yield Finding(
            "D30",
            "scheduler",
            "is a dead block: without a type DeepSpeed builds no scheduler from it",
            "give its type",
            "warning",
        )
    elif not isinstance(kind, str) or kind not in OWN_SCHEDULERS.keys() | TORCH_SCHEDULERS | {"auto"}:
        yield Finding(
            "D48",
            "scheduler.type",
            f"is {shown(kind)}, which DeepSpeed does not know",
            nearest(str(kind), frozenset(OWN_SCHEDULERS)),
        )
    elif kind in TORCH_SCHEDULERS and (stage_of(config) or enabled(config, "fp16") or enabled(config, "bf16")):
        yield Finding(
            "D47",
            "scheduler.type",
            f"{kind} is torch's, which fails on the optimizer that ZeRO, fp16 and bf16 wrap",
            "build it in your program, from a callable: lr_scheduler=lambda optimizer: ...",
        )
    if kind is not None and not isinstance(get(config, "scheduler.params"), dict):
        yield Finding(
            "D45",
            "scheduler.params",
            "is missing, which ends in a TypeError",
            "give {} at least",
            correction={"scheduler.params": {}},
        )
    if isinstance(kind, str) and kind in OWN_SCHEDULERS:
        for key in sorted(set(params) - OWN_SCHEDULERS[kind]):
            yield Finding("D26", f"scheduler.params.{key}", f"is unknown to {kind}", nearest(key, OWN_SCHEDULERS[kind]))
    if isinstance(kind, str) and kind in WARMUPS:
        yield from warmup_findings(kind, params, get(config, "optimizer.params.lr"))


def warmup_findings(kind: str, params: dict, lr: Any) -> Iterator[Finding]:
    """WarmupLR and its kin: a logarithmic ramp by default, from 0, one iteration late."""
    ramp, steps, most = params.get("warmup_type"), params.get("warmup_num_steps", 1000), params.get("warmup_max_lr")
    if ramp is None or ramp not in ("linear", "log", "auto"):
        said = (
            "is not set, and the default is logarithmic"
            if ramp is None
            else f"is {shown(ramp)}, and DeepSpeed takes log"
        )
        yield Finding(
            "D10",
            "scheduler.params.warmup_type",
            f"{said}: half of the ramp after {halfway(steps)} steps",
            'set it to "linear" (Sec. 2.2)',
            "warning",
            correction={"scheduler.params.warmup_type": "linear"},
        )
    if params.get("warmup_min_lr", 0) == 0 and "warmup_min_ratio" not in params:
        yield Finding(
            "D43",
            "scheduler.params.warmup_min_lr",
            "is 0, and DeepSpeed takes the first value twice: the first two updates move nothing",
            "give the learning rate of a small batch (Sec. 2.2)",
            "warning",
        )
    if steps != "auto" and not is_count(steps):
        whole = {"scheduler.params.warmup_num_steps": int(steps)} if is_number(steps) and steps >= 1 else None
        yield Finding(
            "D46",
            "scheduler.params.warmup_num_steps",
            f"is {shown(steps)}, and DeepSpeed wants a whole number",
            "give one, or delete the scheduler",
            correction=whole,
        )
    if kind != "WarmupLR" and "total_num_steps" not in params:
        yield Finding(
            "D45",
            "scheduler.params.total_num_steps",
            f"is missing, and {kind} needs it",
            "give the iterations of the run",
        )
    if is_number(most) and is_number(lr) and most != lr and kind != "WarmupCosineLR":
        yield Finding(
            "D44",
            "optimizer.params.lr",
            f"{lr:g} is a dead number: the scheduler goes to {most:g}",
            "make them the same",
            "warning",
            correction={"optimizer.params.lr": most},
        )


def halfway(steps: Any) -> str:
    """After how many steps log(t+1)/log(W) is a half: √W, as 32 of 1000."""
    return f"{round(steps**0.5)} of {steps}" if is_count(steps) else "a few"


def large_batch_findings(config: dict) -> Iterator[Finding]:
    """SGD over large minibatches: the linear rule, warmup and decay, as far as a JSON without intent can tell; notes."""
    kn, lr = config.get("train_batch_size"), get(config, "optimizer.params.lr")
    if str(get(config, "optimizer.type")).lower() != "sgd" or not is_count(kn) or kn <= 256:
        return
    cost = paper.points_of_lr(kn, lr) if is_number(lr) else None
    if cost and cost[1] in ("fixed", "sqrt"):
        yield Finding(
            "D53",
            "optimizer.params.lr",
            f"is {lr:g} for {kn} images, where the linear rule gives {0.1 * kn / 256:g}; the "
            f"paper lost {cost[0]:g} points so (Table 2a)",
            "scale it with the batch (Sec. 2.1)",
            "note",
            cost[0],
        )
    if get(config, "scheduler.type") is None:
        points = paper.points_lost(paper.NO_WARMUP, kn)
        yield Finding(
            "D52",
            "scheduler",
            f"is not given: without warmup the paper lost {points:g} points at 8192 images (Table 1)",
            "WarmupLR, linear, over 5 epochs, unless your program has a schedule",
            "note",
            points,
        )
    elif get(config, "scheduler.type") == "WarmupLR":
        yield Finding(
            "D54",
            "scheduler.type",
            "WarmupLR holds its last learning rate for ever",
            "decay it in your program, as by 10 at epochs 30, 60 and 80 (Sec. 5.1), or use lbsgd.initialize",
            "note",
        )


def precision_findings(config: dict) -> Iterator[Finding]:
    """Half precision that does not train, is ambiguous, or wants other inputs."""
    stage, dtype = stage_of(config), str(get(config, "torch_autocast.dtype", "bfloat16"))
    on = [block for block in ("fp16", "bf16", "torch_autocast") if enabled(config, block)]
    for block in ("fp16", "bf16", "bfloat16", "torch_autocast"):
        if get(config, f"{block}.enabled", False) not in (True, False, "auto"):
            yield Finding(
                "D27",
                f"{block}.enabled",
                f"is {shown(get(config, f'{block}.enabled'))}",
                "write true or false",
                "warning",
            )
    if len(on) > 1:
        yield Finding("D15", on[0], f"and {' and '.join(on[1:])} are enabled together", "choose one")
    if enabled(config, "fp16") and stage == 0 and get(config, "fp16.loss_scale", 0) != 1:
        yield Finding(
            "D11",
            "zero_optimization.stage",
            "is 0 with fp16, where DeepSpeed 0.19.8 does not scale the loss, yet "
            "divides the gradients by its scale: the weights never move",
            "set it to 1",
            correction={"zero_optimization.stage": 1},
        )
    if enabled(config, "torch_autocast") and dtype in ("float16", "torch.float16", "fp16", "half") and stage:
        yield Finding(
            "D14",
            "torch_autocast.dtype",
            "is float16, whose loss scale never falls under ZeRO",
            "use bfloat16",
            correction={"torch_autocast.dtype": "bfloat16"},
        )
    if str(get(config, "optimizer.type")).lower() == "sgd" and {"fp16", "bf16"} & set(on):
        yield Finding(
            "D12",
            on[0],
            "makes weights half precision, and torch's BatchNorm then fails on a CPU and on contiguous GPU tensors",
            "lbsgd.convert_batch_norm, or torch_autocast",
            "note",
        )
    if enabled(config, "fp16") and config.get("steps_per_print") is None:
        yield Finding(
            "D42",
            "steps_per_print",
            "is not set, and updates that overflow skips then go unseen",
            "set it to 10",
            "note",
        )


def zero_findings(config: dict) -> Iterator[Finding]:
    """ZeRO's stage, its offload, and keys without effect at this stage."""
    given, stage = get(config, "zero_optimization.stage", 0), stage_of(config)
    if stage is None and given != "auto":
        yield Finding("D17", "zero_optimization.stage", f"is {shown(given)}", "use 0, 1, 2 or 3")
    block, bucket = block_of(config, "zero_optimization"), get(config, "zero_optimization.reduce_bucket_size", 5e8)
    idle = sorted(key for key in block if key.startswith("stage3_") or key == "offload_param")
    if idle and stage in (0, 1, 2):
        yield Finding(
            "D50",
            f"zero_optimization.{idle[0]}",
            f"has no effect at stage {stage}" + (f", nor have {len(idle) - 1} more keys" if len(idle) > 1 else ""),
            "delete it, or use stage 3",
            "note",
        )
    sgd = str(get(config, "optimizer.type")).lower() == "sgd"
    if sgd and block_of(config, "zero_optimization.offload_optimizer").get("device", "none") not in ("none", None):
        yield Finding(
            "D19",
            "zero_optimization.offload_optimizer",
            "is made for Adam on the CPU; SGD's one state is small",
            "delete it",
            "warning",
            correction={"zero_optimization.offload_optimizer": DELETE},
        )
    if stage in (1, 2) and is_number(bucket) and bucket > 1e8:
        yield Finding(
            "D20",
            "zero_optimization.reduce_bucket_size",
            f"of {bucket:g} elements: a smaller network's gradients are "
            "then reduced in one piece, after back-propagation",
            "use a fourth of its parameters, or less",
            "note",
        )


def auto_findings(config: Any) -> Iterator[Finding]:
    """Hugging Face's "auto", in one finding for the whole file."""
    found = sorted(path for path in auto_paths(config) if not path.endswith("keep_in_fp32_modules"))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield Finding(
            "D21",
            found[0],
            f'is "auto"{more}, which only Hugging Face\'s Trainer and Accelerate fill in',
            "write numbers for any other program",
            "note",
        )


def auto_paths(config: Any, path: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from auto_paths(value, f"{path}.{key}" if path else key)
    elif config == "auto":
        yield path


FOREIGN_RULES = (
    key_findings,
    batch_findings,
    optimizer_findings,
    clipping_findings,
    scheduler_findings,
    large_batch_findings,
    precision_findings,
    zero_findings,
    combination_findings,
    cost_findings,
    auto_findings,
)


def foreign_findings(config: dict) -> list[Finding]:
    """Everything to say about a DeepSpeed JSON that is not ours."""
    return [finding for rule in FOREIGN_RULES for finding in rule(config)]
