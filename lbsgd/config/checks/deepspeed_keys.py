"""The keys that DeepSpeed 0.19.8 reads, and what becomes of others: an error at the start, or silence.

tests/test_check.py compares the tables with DeepSpeed's own classes, so an upgrade announces itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from lbsgd.config.checks.consistency import DELETE, Finding, get

# Read at the top level (runtime/config.py); any other key is ignored in silence.
TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates disable_allgather disable_python_gc dump_state
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine lbsgd log_level managed_gradient_accumulation memory_breakdown optimizer
    pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wandb wall_clock_breakdown weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""".split()
)
REMOVED_KEYS = frozenset(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
""".split()
)
REMOVED_ZERO_KEYS = frozenset("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param".split())

# Blocks that refuse an unknown key at the start (pydantic, extra="forbid").
STRICT_BLOCKS = {
    "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint
        offload_param offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload
        prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
        model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
        max_reuse_distance stage3_max_reuse_distance gather_16bit_weights_on_model_save
        stage3_gather_16bit_weights_on_model_save module_granularity_threshold stage3_module_granularity_threshold
        use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
        stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
        round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
        zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
        override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module""",
    "compile": """deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation
        offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters
        sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors
        keep_all_input_tensors passes""",
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "csv_monitor": "enabled output_path job_name",
    "comet": "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    "comms_logger": "enabled prof_all prof_ops verbose debug",
}
STRICT_BLOCKS = {block: frozenset(keys.split()) for block, keys in STRICT_BLOCKS.items()}

# Blocks that ignore an unknown key in silence (plain reads).
LAX_BLOCKS = {
    "optimizer": "type params legacy_fusion",
    "scheduler": "type params",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization writer",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
}
LAX_BLOCKS = {block: frozenset(keys.split()) for block, keys in LAX_BLOCKS.items()}


def key_findings(config: dict) -> Iterator[Finding]:
    """Keys that DeepSpeed would ignore in silence, refuse, or no longer knows."""
    for key in config:
        if key in REMOVED_KEYS:
            yield Finding(
                "D01", key, "was removed from DeepSpeed, which refuses it", "delete it", correction={key: DELETE}
            )
        elif key not in TOP_LEVEL_KEYS:
            yield unknown_key(config, key)
    for key in REMOVED_ZERO_KEYS & set(block_of(config, "zero_optimization")):
        yield Finding(
            "D01",
            f"zero_optimization.{key}",
            "was removed from DeepSpeed, which refuses it",
            "delete it",
            correction={f"zero_optimization.{key}": DELETE},
        )
    yield from block_findings(config)


def unknown_key(config: dict, key: str) -> Finding:
    near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1, cutoff=0.8)
    if not near:
        return Finding(
            "D03", key, "is an unknown key, which DeepSpeed ignores", "delete it unless you read it", "warning"
        )
    correction = None if near[0] in config or "." in key else {key: DELETE, near[0]: config[key]}
    return Finding(
        "D02",
        key,
        "is an unknown key, which DeepSpeed ignores in silence",
        f"did you mean {near[0]}?",
        correction=correction,
    )


def block_of(config: dict, name: str) -> dict:
    """A block, empty where it is absent or no block."""
    block = get(config, name)
    return block if isinstance(block, dict) else {}


def block_findings(config: dict) -> Iterator[Finding]:
    """Unknown keys inside blocks, and blocks that are none."""
    for name in [*STRICT_BLOCKS, *LAX_BLOCKS, "torch_autocast", "lbsgd"]:
        if name in config and not isinstance(config[name], dict):
            yield Finding("D29", name, f"is {shown(config[name])}", "give it as a block of keys: {...}")
    for name, known in STRICT_BLOCKS.items():
        for key in sorted(set(block_of(config, name)) - known - REMOVED_ZERO_KEYS):
            yield Finding(
                "D31",
                f"{name}.{key}",
                "is an unknown key, which DeepSpeed refuses when it starts",
                nearest(key, known),
                correction={f"{name}.{key}": DELETE} if "." not in key else None,
            )
    for name, known in LAX_BLOCKS.items():
        for key in sorted(set(block_of(config, name)) - known):
            yield Finding(
                "D32",
                f"{name}.{key}",
                "is an unknown key, which DeepSpeed ignores in silence",
                nearest(key, known),
                "warning",
            )


def nearest(key: str, known: frozenset[str]) -> str:
    """The fix for an unknown key."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "delete it"


def shown(value: Any) -> str:
    """A value in a message, short."""
    text = repr(value)
    return text if len(text) < 40 else text[:36] + " ..."
