"""What DeepSpeed 0.19.8 would get wrong in silence, seen from its own blocks alone, with or without an `lbsgd` block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.checks.consistency import DELETE, Finding, enabled, get, is_number
from lbsgd.config.checks.deepspeed_keys import key_findings, shown

SGD_PARAMS = frozenset("lr momentum nesterov weight_decay foreach fused".split())
WARMUP_PARAMS = frozenset("warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration".split())
AUTOCAST_KEYS = frozenset("enabled dtype lower_precision_safe_modules".split())


def batch_findings(config: dict) -> Iterator[Finding]:
    """kn and the micro batch must stand there as numbers; the number of passes follows from the world size."""
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= 10**9:
            yield Finding("D04", key, f"is {shown(value)}", "give it as a positive number of images")
    steps = config.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        yield Finding("D24", "steps_per_print", f"is {steps!r}", "give it as a positive number of iterations")


def reduction_findings(config: dict) -> Iterator[Finding]:
    """What would make another update out of the same gradients."""
    if get(config, "gradient_allreduce_op", "mean") != "mean":
        yield Finding(
            "D05",
            "gradient_allreduce_op",
            "summed gradients multiply the learning rate by the number of processes (Remark 3)",
            "delete it",
            correction={"gradient_allreduce_op": DELETE},
        )
    if config.get("communication_data_type") is not None and not enabled(config, "fp16"):
        yield Finding(
            "D22",
            "communication_data_type",
            "rounds gradients whose loss was not scaled",
            "delete it",
            correction={"communication_data_type": DELETE},
        )
    if config.get("managed_gradient_accumulation", True) is not True:
        yield Finding(
            "D23",
            "managed_gradient_accumulation",
            "is not true, so every pass would move the weights",
            "delete it",
            correction={"managed_gradient_accumulation": DELETE},
        )


def optimizer_findings(config: dict) -> Iterator[Finding]:
    """SGD as torch.optim has it, with nothing in the way of the paper's update."""
    kind, params = get(config, "optimizer.type"), get(config, "optimizer.params", {})
    if kind != "SGD":
        yield Finding(
            "D06",
            "optimizer.type",
            f"is {kind!r}",
            'the paper\'s recipe is "SGD", spelt so',
            correction={"optimizer.type": "SGD"} if str(kind).lower() == "sgd" else None,
        )
    unknown = sorted(set(params) - SGD_PARAMS) if isinstance(params, dict) else [params]
    if unknown:
        yield Finding("D07", "optimizer.params", f"unknown {unknown}", f"known are {sorted(SGD_PARAMS)}")
    elif params.get("nesterov") and params.get("momentum") == 0:
        yield Finding(
            "D25", "optimizer.params.nesterov", "is true with momentum 0", "Nesterov needs a momentum above 0"
        )
    clipping = config.get("gradient_clipping")
    if clipping != 0:
        said = "is not set, and DeepSpeed clips at 1.0 by default" if clipping is None else f"is {clipping!r}"
        yield Finding(
            "D08",
            "gradient_clipping",
            said,
            "the paper does not clip: set it to 0.0",
            correction={"gradient_clipping": 0.0},
        )


def scheduler_findings(config: dict) -> Iterator[Finding]:
    """WarmupLR with a linear ramp, the one DeepSpeed scheduler that gradual warmup can be told to."""
    kind, ramp = get(config, "scheduler.type"), get(config, "scheduler.params.warmup_type")
    if kind != "WarmupLR":
        yield Finding("D09", "scheduler.type", f"is {kind!r}", 'use "WarmupLR", which lbsgd extends')
    elif ramp != "linear":
        said = "is not set, and DeepSpeed's default is a logarithmic ramp" if ramp is None else f"is {ramp!r}"
        yield Finding(
            "D10",
            "scheduler.params.warmup_type",
            said,
            'set it to "linear" (Sec. 2.2)',
            correction={"scheduler.params.warmup_type": "linear"},
        )
    params = get(config, "scheduler.params", {})
    if unknown := sorted(set(params) - WARMUP_PARAMS) if isinstance(params, dict) else [params]:
        yield Finding("D26", "scheduler.params", f"unknown {unknown}", f"known are {sorted(WARMUP_PARAMS)}")


def precision_findings(config: dict) -> Iterator[Finding]:
    """fp16 only where DeepSpeed really trains with it; bf16 as autocast over float32 parameters."""
    stage = get(config, "zero_optimization.stage", 0)
    for block in ("fp16", "bf16", "torch_autocast"):
        if type(get(config, f"{block}.enabled", False)) is not bool:
            yield Finding("D27", f"{block}.enabled", f"is {get(config, f'{block}.enabled')!r}", "write true or false")
    autocast = config.get("torch_autocast", {})
    if unknown := sorted(set(autocast) - AUTOCAST_KEYS) if isinstance(autocast, dict) else [autocast]:
        yield Finding(
            "D28",
            "torch_autocast",
            f"unknown {unknown}, which DeepSpeed ignores in silence",
            f"known are {sorted(AUTOCAST_KEYS)}",
        )
    if enabled(config, "fp16") and stage == 0:
        yield Finding(
            "D11",
            "zero_optimization.stage",
            "is 0 with fp16, where DeepSpeed 0.19.8 does not scale the loss and the weights never move",
            "set it to 1, or use torch_autocast with bfloat16",
            correction={"zero_optimization.stage": 1, "zero_allow_untested_optimizer": True},
        )
    if enabled(config, "fp16") and get(config, "fp16.auto_cast") is not True:
        yield Finding(
            "D12",
            "fp16.auto_cast",
            "is not true, so plain DeepSpeed feeds float32 images to half weights",
            "set it to true",
            "warning",
            correction={"fp16.auto_cast": True},
        )
    if enabled(config, "bf16"):
        yield Finding(
            "D13",
            "bf16",
            "keeps the weights themselves in bfloat16 and does not cast the images",
            'use {"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}',
            correction={"bf16": DELETE, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        )
    dtype = str(get(config, "torch_autocast.dtype", "bfloat16"))
    if enabled(config, "torch_autocast") and dtype not in ("bfloat16", "torch.bfloat16"):
        yield Finding(
            "D14",
            "torch_autocast.dtype",
            f"is {dtype}, whose loss scale DeepSpeed 0.19.8 neither saves nor lowers under ZeRO",
            "use bfloat16, or the fp16 block with ZeRO stage 1",
        )
    if enabled(config, "torch_autocast") and enabled(config, "fp16"):
        yield Finding("D15", "torch_autocast", "and fp16 are both enabled", "choose one")
    if get(config, "data_types.buffer_dtype") is not None:
        yield Finding(
            "D16",
            "data_types.buffer_dtype",
            "would round batch norm's running statistics",
            "delete it",
            correction={"data_types.buffer_dtype": DELETE},
        )


def zero_findings(config: dict) -> Iterator[Finding]:
    """ZeRO with SGD, and buckets that let aggregation overlap back-propagation (Sec. 4)."""
    stage = get(config, "zero_optimization.stage", 0)
    if stage not in (0, 1, 2):
        yield Finding(
            "D17", "zero_optimization.stage", f"is {stage!r}", "use 0, 1 or 2: ResNets fit on every GPU whole"
        )
    if stage in (1, 2) and config.get("zero_allow_untested_optimizer") is not True:
        yield Finding(
            "D18",
            "zero_allow_untested_optimizer",
            "is not true, and ZeRO then refuses SGD",
            "set it to true",
            correction={"zero_allow_untested_optimizer": True},
        )
    if get(config, "zero_optimization.offload_optimizer.device", "none") != "none":
        yield Finding(
            "D19",
            "zero_optimization.offload_optimizer",
            "works with Adam only, and SGD has 100 MB to offload",
            "delete it",
            correction={"zero_optimization.offload_optimizer": DELETE},
        )
    bucket = get(config, "zero_optimization.reduce_bucket_size", 5e8)
    if not is_number(bucket) or bucket < 1:
        yield Finding(
            "D51",
            "zero_optimization.reduce_bucket_size",
            f"is {shown(bucket)}",
            "give it as a number of elements",
            correction={"zero_optimization.reduce_bucket_size": 6_000_000},
        )
    elif stage in (1, 2) and bucket > 25e6:
        yield Finding(
            "D20",
            "zero_optimization.reduce_bucket_size",
            f"of {bucket:g} elements holds all gradients of "
            "ResNet-50 (25.6 million), so none is reduced during back-propagation (Sec. 4)",
            "use 6000000",
            "warning",
            correction={"zero_optimization.reduce_bucket_size": 6_000_000},
        )


def combination_findings(config: dict) -> Iterator[Finding]:
    """What DeepSpeed accepts one by one and cannot do together; with any optimizer."""
    stage, sgd = get(config, "zero_optimization.stage", 0), get(config, "optimizer.type") == "SGD"
    if stage in (2, 3) and get(config, "zero_optimization.reduce_scatter", True) is True:
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if config.get(key, neutral) != neutral:
                yield Finding(
                    "D34",
                    key,
                    f"is {shown(config[key])}, which ZeRO-{stage} refuses with reduce_scatter",
                    "delete it",
                    correction={key: DELETE},
                )
    weights = "fp16" if enabled(config, "fp16") else "bf16" if enabled(config, "bf16") else "fp32"
    if stage == 0 and get(config, "data_types.grad_accum_dtype") not in (None, weights):
        yield Finding(
            "D35",
            "data_types.grad_accum_dtype",
            f"is not {weights}, and stage 0 knows one type for both",
            "delete it, or use ZeRO stage 1",
            correction={"data_types.grad_accum_dtype": DELETE},
        )
    for key in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        if get(config, key, False) is not False:
            yield Finding(
                "D36", key, "works with Adam on the CPU under offload only", "delete it", correction={key: DELETE}
            )
    for key in ("zero_optimization.elastic_checkpoint", "checkpoint.load_universal"):
        if sgd and get(config, key, False) is not False:
            yield Finding(
                "D37",
                key,
                "expects Adam's state: with SGD it fails when a checkpoint is loaded",
                "delete it",
                correction={key: DELETE},
            )


def cost_findings(config: dict) -> Iterator[Finding]:
    """What makes every iteration wait, or never lets training begin."""
    for key in ("wall_clock_breakdown", "flops_profiler.enabled", "memory_breakdown"):
        if get(config, key, False) is True:
            yield Finding(
                "D39",
                key,
                "makes the host wait for the GPU in every pass",
                "delete it when you have measured",
                "warning",
                correction={key: DELETE},
            )
    if get(config, "autotuning.enabled", False) is True:
        yield Finding(
            "D40",
            "autotuning",
            "changes the batch sizes, measures and exits",
            "delete it to train",
            correction={"autotuning": DELETE},
        )
    if (
        get(config, "zero_optimization.stage", 0) in (1, 2)
        and get(config, "zero_optimization.overlap_comm") is not True
    ):
        yield Finding(
            "D41",
            "zero_optimization.overlap_comm",
            "is not true, so gradients are reduced after back-propagation, not during it (Sec. 4)",
            "set it to true, with a small reduce_bucket_size",
            "note",
        )


def auto_findings(config: Any, path: str = "") -> Iterator[Finding]:
    """Hugging Face's "auto" is unknown to DeepSpeed itself, except for data_types.keep_in_fp32_modules; ours knows one."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from auto_findings(value, f"{path}.{key}" if path else str(key))
    elif config == "auto" and not path.endswith("keep_in_fp32_modules") and not path.startswith("lbsgd.aggregation."):
        yield Finding("D21", path, 'is "auto", which only Hugging Face fills in', "write the number")


DEEPSPEED_RULES = (
    key_findings,
    batch_findings,
    reduction_findings,
    optimizer_findings,
    scheduler_findings,
    precision_findings,
    zero_findings,
    combination_findings,
    cost_findings,
    auto_findings,
)


def deepspeed_findings(config: dict) -> list[Finding]:
    """Everything wrong in DeepSpeed's own blocks, with or without an `lbsgd` block beside them."""
    return [finding for rule in DEEPSPEED_RULES for finding in rule(config)]
