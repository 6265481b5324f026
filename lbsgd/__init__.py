"""Large-batch SGD for image networks (Goyal et al. 2017) on DeepSpeed. `initialize` is the door; see the README.

Each name below is imported with what it needs when it is first used, so `import lbsgd` itself costs nothing.
"""

import importlib

_HOMES = {
    "initialize": "engine", "LinearScalingWarmupLR": "engine",
    "Plan": "plan", "Overrides": "config",
    "Schedule": "schedule", "learning_rate": "schedule", "scaled_lr": "schedule",
    "LargeMinibatchSGD": "schedule", "LargeMinibatchLR": "torch_schedule",
    "MomentumCorrectedSGD": "optim", "decay_groups": "optim",
    "convert_batch_norm": "batchnorm", "agree_statistics": "batchnorm",
    "epoch_order": "shuffle", "rank_batches": "shuffle", "SharedShuffleSampler": "sampler", "SharedShuffleOrder": "loader",
    "resnet": "model",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'lbsgd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lbsgd.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
