"""Judge a value by other keys, which may keep DeepSpeed from reading it, replace it, or change its use.

The schema judges each value on its own (lbsgd/config/accepted). This module defines no rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.checks.deepspeed_batch import FACTOR, NAMES_OF_TYPES, sums
from lbsgd.config.checks.deepspeed_warmup import ENDING_AT_A_RATE
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import LR, is_number, shown

BETAS = "optimizer.params.betas"
GAMMA, POWER = "scheduler.params.gamma", "scheduler.params.power"
FUSION, WRITER = "optimizer.legacy_fusion", "checkpoint.writer"
OF_WRITER = {"type": ("mock", "python", "fast"), "data_parallel": ("replica", "socket", "machine")}
TRIED = 50  # updates of a trial; later failures were not seen
OLD_NAMES = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
REPLACING = ("OneCycle", "LRRangeTest", "OneCycleLR", "CyclicLR")  # schedulers that never read the first lr


def refused_beside(json: Document) -> Iterator[tuple[str, str]]:
    """Yield each value that DeepSpeed refuses because of other keys, and why."""
    key, gamma = "zero_optimization.legacy_stage1", json.get(GAMMA, 0.1)
    if json.stage and json.is_on(key):
        yield key, "is true, and the old ZeRO stage 1 is gone"
    key = "zero_optimization.zero_quantized_weights"
    if json.enabled("torch_autocast") and json.is_on(key) and json.since("0.17"):
        yield key, "is true, and works without torch_autocast only"
    if json.get("scheduler.type") == "StepLR" and gamma != "auto" and not isinstance(gamma, (int, float)):
        yield GAMMA, f"is {shown(gamma)}, with which StepLR multiplies after step_size updates"
    if json.get(FUSION) and wraps_fused_adam(json):
        yield FUSION, "is true, and DeepSpeed's Adam no longer takes the arguments that this gives it at stage 0"
    if json.block(WRITER) and json.since("0.17"):
        yield from refused_in_writer(json)


def refused_in_writer(json: Document) -> Iterator[tuple[str, str]]:
    """Yield each value that DeepSpeed refuses in checkpoint.writer, whose keys were not tried one by one."""
    for name, known in OF_WRITER.items():
        value = json.get(f"{WRITER}.{name}")
        if value is not None and str(value).lower() not in known:
            yield f"{WRITER}.{name}", f"is {shown(value)}, and DeepSpeed knows {', '.join(known)}"
    if json.get(f"{WRITER}.data_parallel") is None and json.stage in (0, 1, 2):
        yield f"{WRITER}.data_parallel", "is missing, without which DeepSpeed looks for a rank that is not there"


def is_taken_beside(json: Document, key: str) -> bool:
    """Whether DeepSpeed takes any value for a key, because other keys keep it from using the value as usual."""
    return (
        (key == FACTOR and not reads_factor(json))
        or (key == LR and is_replaced(json))
        or (key == BETAS and is_cycled(json))
        or (key == POWER and is_power_of_no_zero(json))
    )


def reads_factor(json: Document) -> bool:
    """Whether DeepSpeed divides by gradient_predivide_factor.

    It does not if it prescales gradients, if it sums them, or if ZeRO-1 scatters them.
    """
    scatters = json.stage == 1 and json.is_on("zero_optimization.reduce_scatter", True)
    return not json.get("prescale_gradients") and not sums(json) and not (scatters and not copies_weights_itself(json))


def copies_weights_itself(json: Document) -> bool:
    """Whether the float32 weights are kept by DeepSpeed's fp16 or bf16 optimizer, not by a ZeRO optimizer."""
    float32 = json.get("data_types.grad_accum_dtype") in NAMES_OF_TYPES["fp32"]
    return (json.stage == 0 and json.weights != "fp32") or (json.stage == 1 and json.enabled("bf16") and float32)


def is_replaced(json: Document) -> bool:
    """Whether a scheduler overwrites the learning rate of DeepSpeed's own optimizer before anything reads it."""
    kind, params = json.get("scheduler.type"), json.block("scheduler.params")
    warms_up = kind in ENDING_AT_A_RATE and params.get("warmup_max_lr") is not None
    own = json.accepted.optimizers.keys() - {"adagrad"}  # Adagrad is torch's, and checks its learning rate
    return (warms_up or kind in REPLACING) and json.has_own_optimizer(own)


def offloading(json: Document, name: str) -> list[str]:
    """Return the keys inside zero_optimization, under today's name or the old one, that switch on an offload."""
    device = json.get(f"zero_optimization.{name}.device", "none")
    old = OLD_NAMES[name]
    switches = {name: device not in ("none", None), old: json.is_on(f"zero_optimization.{old}")}
    return [key for key, on in switches.items() if on]


def is_cycled(json: Document) -> bool:
    """Whether OneCycle overwrites the betas of DeepSpeed's own optimizer before anything reads them."""
    cycles = json.get("scheduler.type") == "OneCycle" and json.get("scheduler.params.cycle_momentum", True)
    own = json.has_own_optimizer(("adam", "adamw", "lamb", "lion"))
    return bool(own and cycles) and not copies_weights_itself(json)


def is_power_of_no_zero(json: Document) -> bool:
    """Whether PolynomialLR's power may be negative: no update that was tried meets 0, the last factor of its decay."""
    end: Any = json.get("scheduler.params.total_iters", 5)
    meets_zero = isinstance(end, (int, float)) and 1 <= end <= TRIED and end == int(end)
    return json.get("scheduler.type") == "PolynomialLR" and is_number(json.get(POWER)) and not meets_zero


def wraps_fused_adam(json: Document) -> bool:
    """Whether DeepSpeed's fused Adam runs inside its fp16 optimizer, which 0.17 and later also use for bf16."""
    half = json.enabled("fp16") or (json.enabled("bf16") and json.since("0.17"))
    on_gpu = json.stage == 0 and not offloading(json, "offload_optimizer")
    return json.has_own_optimizer(("adam", "adamw")) and half and on_gpu


def moves_without_rate(json: Document) -> bool:
    """Whether the optimizer moves the weights at a learning rate of 0, as Rprop does by its smallest step."""
    sizes = json.get("optimizer.params.step_sizes")
    least = sizes[0] if isinstance(sizes, list) and sizes else 1e-6
    return json.get("optimizer.type") == "Rprop" and is_number(least) and least > 0
