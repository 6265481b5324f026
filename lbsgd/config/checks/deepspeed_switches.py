"""Rules about switches that are neither true nor false, and about numbers that are: what DeepSpeed takes them for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import as_bool, converts, takes
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown

AUTOCAST = "torch_autocast.enabled"
CONVERTED = ("fp16.enabled", "bf16.enabled", "bfloat16.enabled")  # by pydantic, which knows "yes" and "off"
OF_ZERO = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "compute_grad_norm")
UNCONVERTED = (  # judged by Python's truth value, in DeepSpeed, torch or C++
    "wall_clock_breakdown memory_breakdown dump_state disable_allgather disable_python_gc dataloader_drop_last "
    "prescale_gradients managed_gradient_accumulation use_data_before_expert_parallelism zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer flops_profiler.enabled flops_profiler.detailed aio.overlap_events aio.single_submit "
    "activation_checkpointing.partition_activations activation_checkpointing.contiguous_memory_optimization "
    "activation_checkpointing.cpu_checkpointing activation_checkpointing.synchronize_checkpoint_boundary "
    "activation_checkpointing.profile checkpoint.load_universal checkpoint.use_node_local_storage "
    "checkpoint.checkpoint_serialization data_efficiency.enabled data_efficiency.data_sampling.enabled "
    "data_efficiency.data_sampling.pin_memory data_efficiency.data_routing.enabled optimizer.legacy_fusion"
).split()
OF_OPTIMIZER = (  # arguments of torch's and DeepSpeed's optimizers
    "adam_w_mode amsgrad bias_correction capturable centered decoupled_weight_decay differentiable eps_inside_sqrt "
    "foreach fp32_optimizer_states fused maximize nesterov set_grad_none torch_adam"
).split()
OF_SCHEDULER = "cycle_momentum lr_range_test_staircase three_phase".split()
NUMBERS = (  # outside of DeepSpeed's models, which know their types
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "gradient_predivide_factor steps_per_print sequence_parallel_size"
).split()


@rule(
    "D27",
    "a switch that is neither true nor false",
    lbsgd="error",
    plain="warning",
    why='DeepSpeed takes most of its switches as Python does, so "false" is on, and reads the word in its strict '
    "blocks, such as fp16 and bf16. lbsgd reads precisions and those of ZeRO as they stand.",
    fix="write true or false",
    example={"fp16": {"enabled": "true"}},
)
def ambiguous_switch(json: Document) -> Iterator[Hit]:
    for key in (AUTOCAST, *CONVERTED):
        value = json.get(key, False)
        if type(value) is not bool and not (json.plain and value == "auto"):
            yield Hit(key, taken_for(value, unconverted=key == AUTOCAST))
    for key in (f"zero_optimization.{name}" for name in OF_ZERO):
        value = json.get(key)
        if not json.plain and type(value) is not bool and converts("bool", value):  # D70 judges other values
            yield Hit(key, taken_for(value))
    params = [f"optimizer.params.{name}" for name in OF_OPTIMIZER]
    params += [f"scheduler.params.{name}" for name in OF_SCHEDULER]
    for key in (*params, *(name for name in UNCONVERTED if name in json.accepted.keys)):
        value = json.get(key)
        unclear = value not in (None, False, True, "auto")  # 0 == False and 1 == True
        if unclear and takes(json.accepted.keys.get(key, {}), value):
            yield Hit(key, taken_for(value, unconverted=True))


@rule(
    "D62",
    "true or false in the place of a number",
    lbsgd="error",
    plain="warning",
    why='DeepSpeed takes true for 1 and false for 0. So "gradient_clipping": true clips the gradients\' norm at 1.0.',
    fix="write the number",
    example={"gradient_accumulation_steps": True},
)
def switch_for_a_number(json: Document) -> Iterator[Hit]:
    for key in number_keys(json):
        value = json.get(key)
        if isinstance(value, bool):
            yield Hit(key, f"is {shown(value)}, and DeepSpeed takes it for {int(value)}")


def number_keys(json: Document) -> Iterator[str]:
    """Yield the keys whose values are numbers to DeepSpeed, to the optimizer and to the scheduler."""
    yield from (name for name in NUMBERS if name in json.accepted.keys)
    for block, model in json.accepted.blocks.items():
        for name, field in json.accepted.models[model]["fields"].items():
            if is_numeric(field["type"]):
                yield f"{block}.{field.get('alias', name)}"
    for block, entry in (("optimizer", json.optimizer_entry), ("scheduler", json.scheduler_entry)):
        for name, description in (entry or {}).get("params", {}).items():
            if name not in (*OF_OPTIMIZER, *OF_SCHEDULER) and description.get("int") and not description["text"]["any"]:
                yield f"{block}.params.{name}"


def is_numeric(kind: Any) -> bool:
    """Whether a type of DeepSpeed's models is that of numbers, with bounds or without, such as ZeRO's stages."""
    if isinstance(kind, dict):
        return kind.get("of") in ("int", "float") or any(isinstance(value, int) for value in kind.get("enum", ()))
    return kind in ("int", "float")


def taken_for(value: Any, unconverted: bool = False) -> str:
    """Say what a value is, and what DeepSpeed takes it for unless it refuses the value."""
    if not unconverted and not converts("bool", value):
        return f"is {shown(value)}"
    return f"is {shown(value)}, and DeepSpeed takes it for {shown(bool(value) if unconverted else as_bool(value))}"
