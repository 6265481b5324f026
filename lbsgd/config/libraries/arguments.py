"""The arguments of each library that repeat numbers of a DeepSpeed JSON, and so must agree with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from lbsgd.config.keypath import get
from lbsgd.errors import ConfigError

Library = Literal["transformers", "accelerate", "lightning", "deepspeed"]
HUGGING_FACE: tuple[Library, ...] = ("transformers", "accelerate")
LIBRARIES: tuple[Library, ...] = get_args(Library)

# Each library's class that takes these arguments.
CALLS: dict[Library, str] = {
    "transformers": "TrainingArguments",
    "accelerate": "Accelerator",
    "lightning": "Trainer",
    "deepspeed": "",
}

# TrainingArguments' names for the JSON's numbers. transformers refuses a file that disagrees with them.
TRAINING_ARGUMENTS = {
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_epsilon": "optimizer.params.eps",
    "warmup_steps": "scheduler.params.warmup_num_steps",
}
HALF_PRECISIONS = ("fp16", "bf16")


def require_library(library: str) -> None:
    """Raise ConfigError for an unknown library."""
    if library not in LIBRARIES:
        raise ConfigError(f"{library!r} is none of the libraries {', '.join(LIBRARIES)}")


def training_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' TrainingArguments."""
    values = {name: get(config, key) for name, key in TRAINING_ARGUMENTS.items()}
    betas = get(config, "optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        values |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    return given(values | {name: get(config, f"{name}.enabled", False) for name in HALF_PRECISIONS})


def accelerator(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of accelerate's Accelerator."""
    passes = get(config, "gradient_accumulation_steps")
    return given({"gradient_accumulation_steps": passes, "mixed_precision": half_precision(config)})


def trainer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of lightning's Trainer."""
    names = {"fp16": "16-mixed", "bf16": "bf16-mixed", "no": "32-true"}
    return given({"precision": names.get(half_precision(config))})


def half_precision(config: Mapping[str, Any]) -> str:
    """Return fp16 or bf16 if one of these blocks is on, "auto" if the library chooses, else "no".

    torch_autocast gives "no" too: it needs no argument, and with one the library would add a bf16 block.
    """
    values = {name: get(config, f"{name}.enabled", False) for name in HALF_PRECISIONS}
    on = [name for name, value in values.items() if value is True]
    return on[0] if on else "auto" if "auto" in values.values() else "no"


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a file gives, without the missing ones and "auto"."""
    return {name: value for name, value in values.items() if value is not None and value != "auto"}


ARGUMENTS: dict[Library, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "transformers": training_arguments,
    "accelerate": accelerator,
    "lightning": trainer,
}


def arguments_of(config: Mapping[str, Any], library: Library) -> dict[str, Any]:
    """Return the arguments that must equal the JSON's numbers; those that are missing there or "auto" are free."""
    return ARGUMENTS[library](config) if library in ARGUMENTS else {}
