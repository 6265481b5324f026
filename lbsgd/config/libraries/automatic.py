"""The values "auto" that Hugging Face's libraries replace before DeepSpeed sees the JSON, and what they become."""

from __future__ import annotations

from lbsgd.config.libraries.arguments import Library

# The libraries compute these from model.config.hidden_size or the largest of hidden_sizes. For an image network, which
# has neither: a fourth of ResNet-50's 25.6 million weights at a time, and DeepSpeed's own persistence threshold.
FROM_HIDDEN_SIZE = {
    "zero_optimization.reduce_bucket_size": 6_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 6_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
}
_BOTH = frozenset(FROM_HIDDEN_SIZE) | {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "fp16.enabled",
    "bf16.enabled",
    # accelerate's DeepSpeedPlugin, which transformers builds as well
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
FILLED: dict[Library, frozenset[str]] = {
    "transformers": _BOTH | {"optimizer.params.betas", "optimizer.params.eps"},
    "accelerate": _BOTH,
    "lightning": frozenset(),
    "deepspeed": frozenset(),
}

# The values that "auto" becomes by default, as far as training depends on them.
DEFAULTS: dict[Library, dict[str, str]] = {
    "transformers": {
        "gradient_clipping": "max_grad_norm, by default 1.0",
        "optimizer.params.lr": "learning_rate, by default 5e-05",
        "optimizer.params.weight_decay": "weight_decay, by default 0.0",
        "scheduler.params.warmup_min_lr": "0, so the first updates hardly move a weight",
        "scheduler.params.warmup_max_lr": "learning_rate, by default 5e-05",
        "scheduler.params.warmup_num_steps": "warmup_steps, by default no warmup",
    },
    "accelerate": {
        "gradient_clipping": "1.0",
        "zero_optimization.stage": "2",
        "optimizer.params.lr": "DummyOptim's lr, by default 0.001",
        "optimizer.params.weight_decay": "DummyOptim's weight_decay, by default 0",
        "scheduler.params.warmup_min_lr": "0, so the first updates hardly move a weight",
        "scheduler.params.warmup_max_lr": "DummyOptim's lr, by default 0.001",
        "scheduler.params.warmup_num_steps": "DummyScheduler's warmup_num_steps, by default no warmup",
    },
}
