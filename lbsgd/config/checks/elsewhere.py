"""DeepSpeed's keys for settings that people know from other libraries or write in the wrong place of the JSON."""

from __future__ import annotations

from lbsgd.config.accepted.schema import Accepted

FIXES = {  # for keys that DeepSpeed does not read, by key path
    "max_grad_norm": "use gradient_clipping",
    "gradient_accumulation_dtype": "use data_types.grad_accum_dtype",
    "grad_accum_dtype": "use data_types.grad_accum_dtype",
    "fp16.dynamic_loss_scale": "use fp16.loss_scale, in which 0 is dynamic",
}
SCHEDULERS = {  # by Hugging Face's names
    "cosine": "WarmupCosineLR",
    "cosine_with_warmup": "WarmupCosineLR",
    "linear": "WarmupDecayLR",
    "constant_with_warmup": "WarmupLR",
}
ARGUMENTS = {"learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps"}  # of optimizers, by other libraries' names


def moved_into_params(accepted: Accepted, block: str, key: str) -> str | None:
    """Return the fix for an argument that belongs in the params of optimizer or scheduler; None for another key."""
    tables = {
        "optimizer": (accepted.optimizers, accepted.torch_optimizers),
        "scheduler": (accepted.schedulers, accepted.torch_schedulers),
    }.get(block, ())
    is_argument = any(key in entry.get("params", {}) for table in tables for entry in table.values())
    return f"move it into {block}.params" if is_argument else None
