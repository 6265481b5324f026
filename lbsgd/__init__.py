"""Large-batch SGD for image networks (Goyal et al. 2017) on DeepSpeed. `initialize` is the door; see the README.

Each name below is imported with what it needs when it is first used, so `import lbsgd` itself costs nothing.
"""

import importlib

_HOMES = {
    "initialize": "train.engine",
    "LinearScalingWarmupLR": "train.engine",
    "Plan": "config.plan",
    "Overrides": "config.overrides",
    "Schedule": "algorithm.schedule",
    "learning_rate": "algorithm.schedule",
    "scaled_lr": "algorithm.schedule",
    "LargeMinibatchSGD": "algorithm.schedule",
    "LargeMinibatchLR": "algorithm.torch_scheduler",
    "MomentumCorrectedSGD": "algorithm.sgd",
    "decay_groups": "algorithm.sgd",
    "convert_batch_norm": "algorithm.batch_norm",
    "agree_statistics": "algorithm.batch_norm",
    "recomputing_statistics": "algorithm.batch_norm",
    "epoch_order": "algorithm.shuffle",
    "rank_batches": "algorithm.shuffle",
    "SharedShuffleSampler": "algorithm.sampler",
    "SharedShuffleOrder": "data.ffcv_loader",
    "resnet": "algorithm.resnet",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'lbsgd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lbsgd.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
