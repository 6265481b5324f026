"""The names that DeepSpeed 0.19.8 knows: keys, optimizers, schedulers.

tests/test_check.py compares them with DeepSpeed's own classes, so an upgrade announces itself.
"""

from __future__ import annotations

# Read at the top level (runtime/config.py); any other key is ignored in silence.
TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates disable_allgather disable_python_gc
    dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
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
_STRICT = {
    "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size
        stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
        model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
        max_reuse_distance stage3_max_reuse_distance gather_16bit_weights_on_model_save
        stage3_gather_16bit_weights_on_model_save module_granularity_threshold stage3_module_granularity_threshold
        use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
        stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
        round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
        zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
        override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
        leaf_module""",
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
STRICT_BLOCKS = {block: frozenset(keys.split()) for block, keys in _STRICT.items()}

# Blocks that ignore an unknown key in silence (plain reads).
_LAX = {
    "optimizer": "type params legacy_fusion",
    "scheduler": "type params",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization writer",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
}
LAX_BLOCKS = {block: frozenset(keys.split()) for block, keys in _LAX.items()}

OWN_OPTIMIZERS = frozenset("adagrad adam adamw lamb lion muadam muadamw musgd muon".split())  # in any case
TORCH_OPTIMIZERS = frozenset(
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam".split()
)
TESTED_WITH_ZERO = frozenset("adam adamw adagrad lion muon".split())
REMOVED_OPTIMIZERS = frozenset("onebitadam zerooneadam onebitlamb".split())
WARMUPS = frozenset("WarmupLR WarmupDecayLR WarmupCosineLR".split())
_SCHEDULERS = {
    "LRRangeTest": "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase",
    "OneCycle": """cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size
        cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom
        decay_mom_rate""",
    "WarmupLR": "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type",
    "WarmupDecayLR": "total_num_steps warmup_min_lr warmup_max_lr warmup_num_steps warmup_type",
    "WarmupCosineLR": "total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type",
}
OWN_SCHEDULERS = {name: frozenset([*keys.split(), "last_batch_iteration"]) for name, keys in _SCHEDULERS.items()}
TORCH_SCHEDULERS = frozenset(
    "ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR "
    "LambdaLR LinearLR MultiStepLR MultiplicativeLR OneCycleLR PolynomialLR ReduceLROnPlateau "
    "SequentialLR StepLR".split()
)
