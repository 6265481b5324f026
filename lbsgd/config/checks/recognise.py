"""Tell a DeepSpeed JSON from a project's other JSONs, which are not to be checked or changed."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from lbsgd.config.accepted.schema import VERSIONS, accepted
from lbsgd.config.keypath import block_of
from lbsgd.config.schema import Recipe

# Keys that only DeepSpeed's files have; others, such as optimizer or checkpoint, are common in other files too.
OWN_KEYS = frozenset(
    """lbsgd train_batch_size train_micro_batch_size_per_gpu zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer gradient_clipping gradient_predivide_factor prescale_gradients steps_per_print
    wall_clock_breakdown communication_data_type activation_checkpointing flops_profiler csv_monitor comms_logger
    torch_autocast data_types hybrid_engine""".split()
)
SWITCHED_BLOCKS = ("fp16", "bf16", "bfloat16", "amp", "elasticity", "tensorboard", "wandb")  # {"enabled": ...}
TYPED_BLOCKS = ("optimizer", "scheduler")  # {"type": ..., "params": {...}}


def is_deepspeed_json(config: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a key or a form of block that only DeepSpeed's files have."""
    return (
        bool(OWN_KEYS & set(config))
        or any("enabled" in block_of(config, name) for name in SWITCHED_BLOCKS)
        or any({"type", "params"} <= set(block_of(config, name)) for name in TYPED_BLOCKS)
    )


def is_meant_as_deepspeed_json(config: Mapping[str, Any]) -> bool:
    """Whether to check a JSON that the user named: a DeepSpeed JSON, even if all its keys are misspelt."""
    resembling = any(get_close_matches(key, OWN_KEYS, n=1, cutoff=0.8) for key in config)
    known = sum(any(key in accepted(version).top_level for version in VERSIONS) for key in config)
    return is_deepspeed_json(config) or resembling or 2 * known >= len(config)


def may_be_deepspeed_json(text: str) -> bool:
    """Whether a text that is not JSON contains a key that only DeepSpeed's files have."""
    return any(f'"{key}"' in text for key in OWN_KEYS)


def misspelt_blocks(config: Mapping[str, Any]) -> list[str]:
    """Return the top-level keys that are a misspelt `lbsgd` block, if there is no `lbsgd` block."""
    return [] if "lbsgd" in config else [key for key, value in config.items() if is_misspelt_block(key, value)]


def is_misspelt_block(key: str, value: object) -> bool:
    """Whether a key is nearly `lbsgd` and its block has several keys of a recipe, unlike other blocks of such names."""
    near = SequenceMatcher(None, key.lower(), "lbsgd").ratio() >= 0.8
    return near and isinstance(value, Mapping) and len(Recipe.model_fields.keys() & value.keys()) > 1
