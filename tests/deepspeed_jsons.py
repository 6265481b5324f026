"""DeepSpeed JSONs, right and wrong, for the comparison of `lbsgd check` with DeepSpeed.

Written by hand from the documentation of DeepSpeed and torch, and mutated as people make mistakes. Nothing comes from
the schema that the check reads, because the JSONs would then share its blind spots.
"""

import copy
import math
import random

BASE = {"train_batch_size": 4, "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
ALLOW = {"zero_allow_untested_optimizer": True}

OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    "Adam": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "AdamW": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "adam_w_mode": True},
    "adamw": {"lr": 0.001, "torch_adam": True, "amsgrad": False},
    "Lamb": {"lr": 0.001, "weight_decay": 0.01, "max_coeff": 10.0, "min_coeff": 0.01},
    "Lion": {"lr": 0.0001, "betas": [0.9, 0.99], "weight_decay": 0.1},
    "Adagrad": {"lr": 0.01, "eps": 1e-10, "weight_decay": 0.0},
    "Muon": {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.01},
    "RMSprop": {"lr": 0.001, "alpha": 0.99, "momentum": 0.9, "eps": 1e-8, "centered": True},
    "Adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6},
    "Adamax": {"lr": 0.002, "betas": [0.9, 0.999]},
    "NAdam": {"lr": 0.002, "momentum_decay": 0.004},
    "RAdam": {"lr": 0.001, "betas": [0.9, 0.999], "decoupled_weight_decay": False},
    "Rprop": {"lr": 0.01, "etas": [0.5, 1.2], "step_sizes": [1e-6, 50]},
    "ASGD": {"lr": 0.01, "lambd": 0.0001, "alpha": 0.75},
    "Adafactor": {"lr": 0.01, "d": 1.0, "weight_decay": 0.0},
    "SparseAdam": {"lr": 0.01},
    "LBFGS": {"lr": 1.0, "max_iter": 5},
}
LENGTHS = (  # of a OneCycleLR
    {"total_steps": None, "epochs": 9, "steps_per_epoch": 10},
    {"total_steps": None},
    {"total_steps": 100, "epochs": None},
    {"epochs": 3, "steps_per_epoch": None},
)
SCHEDULERS = {
    "WarmupLR": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 5, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 100, "warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 10},
    "WarmupCosineLR": {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_min_ratio": 0.01, "cos_min_ratio": 0.1},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 10, "decay_lr_rate": 0.01},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 10, "lr_range_test_step_rate": 1.5},
    "StepLR": {"step_size": 30, "gamma": 0.1},
    "MultiStepLR": {"milestones": [30, 60, 80], "gamma": 0.1},
    "CosineAnnealingLR": {"T_max": 90, "eta_min": 0.0001},
    "ExponentialLR": {"gamma": 0.95},
    "LinearLR": {"start_factor": 0.1, "total_iters": 5},
    "ConstantLR": {"factor": 0.5, "total_iters": 5},
    "PolynomialLR": {"total_iters": 90, "power": 2.0},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 100},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 20, "mode": "triangular2"},
    "CosineAnnealingWarmRestarts": {"T_0": 10, "T_mult": 2},
    "ReduceLROnPlateau": {"factor": 0.1, "patience": 10, "mode": "min"},
}
BLOCKS = (
    {"zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 500000}, **ALLOW},
    {"zero_optimization": {"stage": 2, "contiguous_gradients": True, "allgather_bucket_size": 2e8}, **ALLOW},
    {"zero_optimization": {"stage": 2, "reduce_scatter": True, "round_robin_gradients": True}, **ALLOW},
    {"zero_optimization": {"stage": 1, "load_from_fp32_weights": True, "ignore_unused_parameters": False}, **ALLOW},
    {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}, **ALLOW},
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 100, "stage3_param_persistence_threshold": 10}},
    {"fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16}},
    {
        "fp16": {
            "enabled": True,
            "initial_scale_power": 8,
            "loss_scale_window": 100,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
    {"bf16": {"enabled": True}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    {"bfloat16": {"enabled": False}},
    {"fp16": {"enabled": False, "auto_cast": False, "fp16_master_weights_and_grads": False}},
    {"gradient_allreduce_op": "sum"},
    {"zero_optimization": {"stage": 1, "allgather_bucket_size": 1000}, **ALLOW},
    {"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": False, "max_tokens": 100}}}},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
    {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    {"train_micro_batch_size_per_gpu": 2},
    {"steps_per_print": 10, "wall_clock_breakdown": False, "dump_state": False, "memory_breakdown": False},
    {"gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0},
    {"gradient_clipping": 0.5, "prescale_gradients": True, "gradient_predivide_factor": 2.0},
    {"communication_data_type": "fp32", "disable_allgather": False, "dataloader_drop_last": True},
    {"data_types": {"grad_accum_dtype": "fp32"}},
    {"csv_monitor": {"enabled": False, "output_path": "logs", "job_name": "run"}},
    {"tensorboard": {"enabled": False, "output_path": "logs", "job_name": "run"}},
    {"wandb": {"enabled": False, "group": "a", "team": "b", "project": "c"}},
    {
        "comms_logger": {
            "enabled": False,
            "verbose": False,
            "prof_all": True,
            "debug": False,
            "prof_ops": ["all_reduce"],
        }
    },
    {"flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True}},
    {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "number_checkpoints": None,
            "profile": False,
        }
    },
    {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}},
    {"checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False}},
    {"hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1}},
    {"compile": {"deepcompile": False}},
    {"timers": {"throughput": {"enabled": False, "synchronized": True}}},
    {"tensor_parallel": {"autotp_size": 0}},
    {"data_efficiency": {"enabled": False, "seed": 1234}},
    {"pipeline": {"stages": "auto", "partition": "best"}},
    {"autotuning": {"enabled": False}},
    {"seq_parallel_communication_data_type": "fp32", "zero_force_ds_cpu_optimizer": False},
    {"vocabulary_size": 50304, "log_level": "info"},
    {"elasticity": {"enabled": False}},
    {"curriculum_learning": {"enabled": False}},
    {"amp": {"enabled": False, "opt_level": "O1"}},
    {"sparse_attention": {"mode": "fixed"}},
    {"eigenvalue": {"enabled": False}},
    {"progressive_layer_drop": {"enabled": False}},
    {"comment": "ResNet-50, 8 GPUs", "checkpoints": "runs", "time": "12:00"},
)
ADAM = {**BASE, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
WARM = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}}
ADAGRAD = {**BASE, **ALLOW, "optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}, "bf16": {"enabled": True}}
MOMENTUM = {**BASE, "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}
TEXT_LR = {**BASE, "optimizer": {"type": "AdamW", "params": {"lr": "0.001"}}}
FUSION = {"type": "Adam", "params": {"lr": 0.001}, "legacy_fusion": True}
STATES = {"enabled": True, "bf16_optimizer_states": True}
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}
ONE_BETA = {**BASE, "optimizer": {"type": "Lion", "params": {"lr": 0.001, "betas": [0.9]}}}
RPROP = {**BASE, "optimizer": {"type": "Rprop", "params": {"lr": 0.0}}}
PREDIVIDED = {**BASE, **ALLOW, "gradient_predivide_factor": "2.0"}
REPORTED = (  # single mistakes and harmless habits that people have reported
    {**ADAM, "communication_data_type": "int4"},
    {**ADAM, "communication_data_type": "FP32"},
    {**ADAM, "gradient_clipping": True, "steps_per_print": True, "gradient_accumulation_steps": True},
    {**ADAM, "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}},
    {**ADAM, "zero_optimization": {"stage": 2, "reduce_bucket_size": 2.5}},
    {**ADAM, "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0.9}},
    {**ADAM, "zero_optimization": {"stage": "2"}},
    {**ADAM, "zero_optimization": {"stage": 1, "legacy_stage1": True}},
    {**ADAM, "zero_optimization": {"stage": 1, "allgather_bucket": 5}},
    {**ADAM, "fp16": {"enabled": False, "loss_scale": "dynamic"}},
    {**ADAM, "fp16": {"enabled": False, "dtype": "float16"}},
    {**ADAM, "bf16": {"enabled": "maybe"}},
    {**ADAM, "bfloat16": {"enabled": True, "loss_scale": 0}, "zero_optimization": {"stage": 1}},
    {**ADAM, "data_types": {"grad_accum_dtype": "float32"}},
    {**ADAM, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bfloat16"}},
    {**ADAM, "timers": {"throughput": {"enabled": False, "foo": 1}}},
    {**ADAM, "tensor_parallel": {"autotp_size": 1, "foo": 2}},
    {**BASE, "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}},
    {**BASE, "scheduler": {"type": "OneCycle", "params": {"cycle_first_step_size": 1000}}},
    {**BASE, "scheduler": {"type": "StepLR", "params": {"gamma": 0.1}}},
    {**BASE, "scheduler": {**WARM, "params": {"warmup_num_steps": "10"}}},
    {**BASE, "train_batch_size": 4.0, "scheduler": WARM},
    {**ADAM, "bf16": {"enabled": True}, "data_types": {"param_dtype": "bf16"}},
    {**ADAM, "bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
    {**ADAM, "fp16": {"enabled": True, "loss_scale": "128"}, "zero_optimization": {"stage": 1}},
    {**ADAM, "fp16": {"enabled": True, "loss_scale_window": 500.0}, "zero_optimization": {"stage": 2}},
    {**ADAM, "fp16": {"enabled": True, "loss_scale_window": 0}, "zero_optimization": {"stage": 2}},
    {**ADAM, "fp16": {"enabled": True, "loss_scale": "nan"}, "zero_optimization": {"stage": 2}},
    {**ADAM, "zero_optimization": {"stage": 3, "leaf_module": {"names": "layer"}}},
    {**ADAM, "zero_optimization": {"stage": 3, "leaf_module": "layer"}},
    {**ADAM, "zero_optimization": {"stage": 3, "compute_grad_norm": "no"}},
    {**ADAM, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2, "compute_grad_norm": False}},
    {**ADAM, "gradient_clipping": 0.5, "zero_optimization": {"stage": 1, "compute_grad_norm": False}},
    {**ADAM, "log_level": "warning"},
    {**ADAM, "log_level": "loud"},
    {
        **ADAM,
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_fp16_weights_on_model_save": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    {**BASE, "optimizer": {"type": "Muon", "params": {"lr": 0.01, "ns_method": "standard"}}},
    {**BASE, "optimizer": {"type": "Muon", "params": {"lr": 0.01, "ns_method": "grm"}}},
    {**BASE, "optimizer": {"type": "Muon", "params": {"lr": 0.01, "weight_decy": 0.1}}},
    {**BASE, "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0}}},
    {**BASE, "scheduler": {"type": "steplr", "params": {"step_size": 30}}},
    {**ADAM, "torch_autocast": {"dtype": "bfloat16"}},
    {**ADAM, "zero_optimization": {"stage": 1, "offload_optimizer": {"ratio": 0.5}}},
    {**BASE, "optimizer": {"type": "Adagrad", "params": {"lr": 0.01, "fused": True, "foreach": True}}},
    ADAGRAD,
    {**ADAGRAD, "zero_optimization": {"stage": 1}},
    {**ADAGRAD, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    {**PREDIVIDED, "prescale_gradients": True},
    {**PREDIVIDED, "prescale_gradients": False},
    {**PREDIVIDED, "zero_optimization": {"stage": 1}},
    {**PREDIVIDED, "zero_optimization": {"stage": 1, "reduce_scatter": False}},
    {**BASE, "scheduler": {"type": "OneCycle", "params": {**SCHEDULERS["OneCycle"], "cycle_first_step_size": "10"}}},
    {**MOMENTUM, "scheduler": {"type": "CyclicLR", "params": {**SCHEDULERS["CyclicLR"], "step_size_up": "20"}}},
    {**MOMENTUM, "scheduler": {"type": "CyclicLR", "params": {**SCHEDULERS["CyclicLR"], "step_size_up": "0"}}},
    {**TEXT_LR, "scheduler": {"type": "OneCycleLR", "params": SCHEDULERS["OneCycleLR"]}},
    {**TEXT_LR, "scheduler": {"type": "CyclicLR", "params": SCHEDULERS["CyclicLR"]}},
    {**TEXT_LR, "scheduler": {"type": "StepLR", "params": SCHEDULERS["StepLR"]}},
    {**BASE, "scheduler": {**WARM, "params": {"warmup_num_steps": True}}},
    {**BASE, "scheduler": {"type": "StepLR", "params": {"step_size": 30, "gamma": "0.1"}}},
    {**BASE, "scheduler": {"type": "StepLR", "params": {"step_size": 30, "gamma": None}}},
    {**BASE, "scheduler": {"type": "PolynomialLR", "params": {"total_iters": 90, "power": -1.0}}},
    {**BASE, "scheduler": {"type": "PolynomialLR", "params": {"total_iters": 40, "power": -1.0}}},
    {**MOMENTUM, "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.1}}},
    {**MOMENTUM, "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.1, "epochs": 9, "steps_per_epoch": 10}}},
    *({**MOMENTUM, "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.1, **length}}} for length in LENGTHS),
    {**BASE, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": False}}},
    {**BASE, "scheduler": {"type": "ExponentialLR", "params": {"gamma": 100}}},
    {**BASE, "optimizer": {"type": "RMSprop", "params": {"lr": 0.001, "alpha": 100}}},
    {**RPROP, "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.95}}},
    {**RPROP, "optimizer": {"type": "Rprop", "params": {"lr": 0.0, "step_sizes": [0, 50]}}},
    {**BASE, "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 7}}},
    {**BASE, "optimizer": {"type": "RMSprop", "params": {"lr": 0.01, "momentum": 100.0}}, "scheduler": WARM},
    {**MOMENTUM, "zero_optimization": {"stage": 1}},
    {**ADAM, "gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
    {**ADAM, "gradient_allreduce_op": "SUM", "zero_optimization": {"stage": 2}},
    {**ADAM, "gradient_allreduce_op": "sum", "zero_optimization": {"stage": 2, "zenflow": {}}},
    {**ADAM, "zero_optimization": {"stage": 3, "zenflow": {}}},
    {**ADAM, "bf16": STATES},
    {**ADAM, "bf16": STATES, "zero_optimization": {"stage": 1}},
    {**ADAM, "bf16": MASTERS, "zero_optimization": {"stage": 2}},
    {**ADAM, "bf16": {**MASTERS, **STATES}, "zero_optimization": {"stage": 3}},
    {**ADAM, "bfloat16": {**MASTERS, **STATES, "enabled": False}, "zero_optimization": {"stage": 1}},
    {**ADAM, "bf16": MASTERS, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    {**ADAM, "fp16": {"enabled": False, "fp16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}},
    {**ADAM, "fp16": {"enabled": False, "auto_cast": True}},
    {**ADAM, "fp16": {"auto_cast": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {**ADAM, "zero_optimization": {"stage": 1, "allgather_bucket_size": 5}},
    {**ADAM, "zero_optimization": {"stage": 3, "allgather_bucket_size": 5}},
    {**ADAM, "zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "double"}},
    {**ADAM, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "int8"}},
    {**ADAM, "data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
    {**ADAM, "data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}},
    ONE_BETA,
    {**ONE_BETA, "scheduler": {"type": "OneCycle", "params": SCHEDULERS["OneCycle"]}},
    {**ADAM, "autotuning": {"enabled": [False]}},  # DeepSpeed takes it as true, tunes and exits
    {**ADAM, "tensor_parallel": {"dtype": "bf16"}},
    {**ADAM, "expert_parallel": {"enabled": False, "top_k": 2}},
    {**ADAM, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "initial_scale_power": 64}},
    {**ADAM, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "initial_scale_power": 63}},
    {**ADAM, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "loss_scale": 1e30}},
    {**ADAM, "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**13}},
    {**ADAM, "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**13, "contiguous_gradients": False}},
    {**ADAM, "zero_optimization": {"stage": 2}, "prescale_gradients": None},
    {**ADAM, "zero_optimization": {"stage": 2}, "prescale_gradients": "false"},
    {**MOMENTUM, "optimizer": {"type": "SGD", "params": {"lr": 10**30}}},
    {**MOMENTUM, "scheduler": {"type": "WarmupLR", "params": {**WARM["params"], "warmup_min_lr": 10**30}}},
    {**ADAM, "flops_profiler": {"enabled": True, "profile_step": "abc"}},
    {**ADAM, "flops_profiler": {"enabled": True, "module_depth": 1000}},
    {**ADAM, "flops_profiler": {"enabled": False, "profile_step": "abc", "detailed": "no"}},
    {**ADAM, "torch_autocast": {"enabled": True, "lower_precision_safe_modules": "torch.nn.Linear"}},
    {**ADAM, "torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["Linear"]}},
    {**ADAM, "torch_autocast": {"enabled": False, "lower_precision_safe_modules": ["Linear"]}},
    {**ADAM, "torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 0, "zero_quantized_weights": True}},
    {**ADAM, "dump_state": "false", "disable_allgather": [], "aio": {"block_size": "1MB"}},
    {**ADAM, "optimizer": FUSION},
    {**ADAM, "optimizer": FUSION, "bf16": {"enabled": True}},
    {**ADAM, "optimizer": FUSION, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    {**ADAM, "optimizer": {**FUSION, "params": {"torch_adam": True}}, "bf16": {"enabled": True}},
    {**ADAM, "checkpoint": {"writer": {"type": "FAST"}}},
    {**ADAM, "checkpoint": {"writer": {"type": "python", "data_parallel": "replica"}}},
    {**ADAM, "checkpoint": {"writer": {"type": "quick", "data_parallel": "replica"}}},
    {**ADAM, "checkpoint": {"writer": {"data_parallel": "process"}}},
    {**ADAM, "checkpoint": {"writer": {"decoupled": True}}, "zero_optimization": {"stage": 3}},
)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
WORDS = ("", "x", "none", "yes", "true", "0", "fp16", "auto_", "float32", "bf16", "cpu", "linear", "log", "SGD", "Adam")
NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 100, -1.0, 0.0, 0.5, 0.9, 1.0, 1.5, 2.0, 2.5, 100.0)


def json_of(random_numbers):
    """Return a plausible JSON: base, optimizer, scheduler and blocks, with at most three mistakes."""
    draw = random_numbers
    config = copy.deepcopy(BASE)
    if draw.random() < 0.75:
        name = draw.choice(list(OPTIMIZERS))
        config["optimizer"] = {"type": name, "params": copy.deepcopy(OPTIMIZERS[name])}
    if draw.random() < 0.4:
        name = draw.choice(list(SCHEDULERS))
        config["scheduler"] = {"type": name, "params": copy.deepcopy(SCHEDULERS[name])}
    for block in draw.sample(BLOCKS, draw.choice((0, 1, 1, 2, 3))):
        config.update(copy.deepcopy(block))
    for _ in range(draw.choice((0, 1, 1, 2))):
        draw.choice(MISTAKES)(config, draw)
    return config


def places(config, inside=()):
    """Yield the dict and the key of every value."""
    for key, value in config.items():
        yield config, key
        if isinstance(value, dict):
            yield from places(value)


def another_value(config, draw):
    """Write another value: of another type, another sign, a text for a number."""
    place, key = draw.choice(list(places(config)))
    value = place[key]
    place[key] = draw.choice(
        [
            str(value),
            [value] if not isinstance(value, list) else [*value, 1],
            None,
            draw.choice((True, False)),
            draw.choice(NUMBERS),
            draw.choice(WORDS),
            {},
            [],
            *([-value, float(value), str(value), value / 2, f"{value:.0e}"] if type(value) in (int, float) else []),
            *([value.upper(), value.lower(), value[:-1], value + "s"] if isinstance(value, str) else []),
            *([value[:1], [str(each) for each in value], [-1, 2.0]] if isinstance(value, list) else []),
        ]
    )


def a_number(config, draw):
    """Write another number."""
    numbers = [(place, key) for place, key in places(config) if type(place[key]) in (int, float)]
    place, key = draw.choice(numbers or [(config, "train_batch_size")])
    place[key] = draw.choice(NUMBERS)


def a_text_for_a_number(config, draw):
    """Put a number into quotation marks."""
    numbers = [(place, key) for place, key in places(config) if type(place[key]) in (int, float)]
    place, key = draw.choice(numbers or [(config, "train_batch_size")])
    place[key] = str(place[key])


def misspell(config, draw):
    """Leave out a letter of a key, double one, swap two, or write it in capitals."""
    place, key = draw.choice(list(places(config)))
    at = draw.randrange(max(1, len(key) - 1))
    place[
        draw.choice(
            (key[:at] + key[at + 1 :], key[:at] + key[at : at + 1] + key[at:], key.upper(), key.replace("_", "-"))
        )
    ] = place.pop(key)


def leave_out(config, draw):
    place, key = draw.choice(list(places(config)))
    del place[key]


def misplace(config, draw):
    """Write a key into another block."""
    place, key = draw.choice(list(places(config)))
    blocks = [config, *(place[key] for place, key in places(config) if isinstance(place[key], dict))]
    target = draw.choice(blocks)
    target[key] = copy.deepcopy(place[key])


def another_type(config, draw):
    """Take another optimizer or scheduler with the same arguments."""
    block, names = draw.choice((("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)))
    if isinstance(config.get(block), dict):
        config[block]["type"] = draw.choice([*names, "sgd", "LARS", "OneBitAdam", "Warmup", "adam"])


def an_argument(config, draw):
    """Give the optimizer an argument that another one has."""
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("params"), dict):
        other = OPTIMIZERS[draw.choice(list(OPTIMIZERS))]
        name = draw.choice(list(other))
        optimizer["params"][name] = copy.deepcopy(other[name])


MISTAKES = (
    another_value,
    another_value,
    a_number,
    a_text_for_a_number,
    misspell,
    leave_out,
    misplace,
    another_type,
    an_argument,
)


def jsons(number, seed):
    """Return `number` JSONs."""
    draw = random.Random(seed)
    return [json_of(draw) for _ in range(number)]


MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def unanswerable(config):
    """Return why one process on one CPU cannot tell whether DeepSpeed trains with a JSON; None if it can."""
    zero = block(config, "zero_optimization")
    params = block(block(config, "optimizer"), "params")
    kind = str(block(config, "optimizer").get("type")).lower()
    for name in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "zenflow"):
        if zero.get(name):
            return "offload compiles an optimizer for the CPU, or wants a disk"
    profiler = block(config, "flops_profiler")
    if profiler.get("enabled") and (profiler.get("module_depth", -1) != -1 or profiler.get("top_modules", 1) != 1):
        return "how many modules the profiler looks for depends on the network, and this one has no modules inside"
    for name in ("fused", "capturable"):
        if name in params:
            return "fused and capturable steps are a GPU's"
    for name in ("amp", "hybrid_engine", *MONITORS, "expert_parallel", "datastates_ckpt"):
        if block(config, name).get("enabled") not in (None, False):
            return f"{name} wants another package, a GPU, or writes files"
    if block(config, "compile").get("deepcompile"):
        return "DeepCompile compiles for a GPU"
    if kind.startswith("mu") and kind != "muon":
        return "wants the package mup"
    if config.get("sequence_parallel_size", 1) != 1 or block(config, "tensor_parallel").get("autotp_size", 0) not in (
        0,
        1,
    ):
        return "a network or a sequence divided among processes wants several"
    if config.get("scheduler") and block(config, "scheduler").get("type") == "OneCycleLR":
        total = block(block(config, "scheduler"), "params").get("total_steps")
        if isinstance(total, (int, float)) and total < 51:
            return "OneCycleLR ends with an error after its total_steps, which may be how many the program takes"
    total, micro, passes = (config.get(key) for key in BATCH_KEYS)
    if type(total) is type(micro) is type(passes) is int and micro * passes > 0 and total % (micro * passes):
        return "the oracle writes micro batch x passes over a global batch, so it never sees one that does not fit them"
    if isinstance(total, float) and type(micro) is type(passes) is int:
        return "the oracle writes micro batch x passes over whole numbers only, and one process is too few for others"
    if type(total) is int and isinstance(micro, float) and micro % 1 and total % micro == 0:
        return "the oracle loads no images, and half of one fails in DeepSpeed's loader only"
    if any(1 < growth < (math.inf if kind == "muon" else TOO_FAST) for growth in growths(config)):
        return "what grows with every update leaves float32 sooner or later, and when depends on the network"
    fp16 = block(config, "fp16")
    if fp16.get("enabled") and str(zero.get("stage", 0)) in ("0", "False", "0.0"):
        return "at stage 0 fp16 divides gradients by a scale that they never had: how far weights move is no yes or no"
    return None


TOO_FAST = 3.4e38 ** (1 / 49)  # a factor at which float32 overflows within 50 updates


def growths(config):
    """Return the factors by which a JSON multiplies its learning rate and its sum of gradients in every update."""
    params, scheduler = block(block(config, "optimizer"), "params"), block(config, "scheduler")
    gamma = block(scheduler, "params").get("gamma") if scheduler.get("type") == "ExponentialLR" else None
    return [factor for factor in (params.get("momentum"), gamma) if isinstance(factor, (int, float))]


def block(config, name):
    value = config.get(name, {})
    return value if isinstance(value, dict) else {}
