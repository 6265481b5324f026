"""The precision of a run, which DeepSpeed spreads over several blocks: fp32, bf16 (autocast) or fp16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbsgd.config.keypath import enabled

PRECISIONS = ("fp16", "bf16", "fp32")
FP16 = {  # DeepSpeed's own loss scale, written out
    "enabled": True,
    "auto_cast": True,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


def precision_of(config: Mapping[str, Any]) -> str:
    """Return the precision that a JSON's blocks choose: fp32, bf16 or fp16."""
    if enabled(config, "fp16"):
        return "fp16"
    return "bf16" if enabled(config, "torch_autocast") else "fp32"


def set_precision(config: dict[str, Any], precision: str) -> None:
    """Switch a JSON's blocks to fp32, bf16 or fp16.

    fp16 raises the ZeRO stage to 1, because stage 0 does not train; bf16 sets it to 0, because ZeRO rounds gradients to
    bfloat16 before it adds them up.
    """
    if precision_of(config) == precision:
        return
    for block in ("fp16", "bf16", "torch_autocast"):
        config.pop(block, None)
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = 0
        if zero.get("compute_grad_norm") is False:  # stage 0 refuses false
            del zero["compute_grad_norm"]
    if precision == "fp16":
        config["fp16"] = dict(FP16)
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = max(1, zero.get("stage", 0))
        config["zero_allow_untested_optimizer"] = True
