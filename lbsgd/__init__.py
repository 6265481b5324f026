"""Large-batch SGD for image networks (Goyal et al. 2017) on DeepSpeed. Start with `initialize`; see the README.

Each name is imported on first use, so `import lbsgd` itself costs nothing. A name is not listed if its library is not
installed, so `help(lbsgd)` and `from lbsgd import *` always work.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING

_HOMES = {
    "initialize": "train.engine",
    "LinearScalingWarmupLR": "train.engine",
    "Parts": "train.parts",
    "parts_for": "train.parts",
    "LargeMinibatchTrainer": "train.hugging_face",
    "Needs": "config.libraries.needs",
    "needs_of": "config.libraries.needs",
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
    "agree_statistics": "algorithm.batch_norm_statistics",
    "recomputing_statistics": "algorithm.batch_norm_statistics",
    "epoch_order": "algorithm.shuffle",
    "rank_batches": "algorithm.shuffle",
    "SharedShuffleSampler": "algorithm.sampler",
    "SharedShuffleOrder": "loader",
    "resnet": "algorithm.resnet",
}
_NEED = {"deepspeed": ("initialize", "LinearScalingWarmupLR"), "ffcv": ("SharedShuffleOrder",)}


def _is_installed(library: str) -> bool:
    try:
        return library in sys.modules or importlib.util.find_spec(library) is not None
    except ImportError:  # the program's own import hook refuses the library
        return False


_unlisted = {name for library, names in _NEED.items() if not _is_installed(library) for name in names}
__all__ = sorted(_HOMES.keys() - _unlisted)
__version__: str

if TYPE_CHECKING:  # the same names for editors and type checkers; "as" marks them as public
    from lbsgd.algorithm.batch_norm import convert_batch_norm as convert_batch_norm
    from lbsgd.algorithm.batch_norm_statistics import agree_statistics as agree_statistics
    from lbsgd.algorithm.batch_norm_statistics import recomputing_statistics as recomputing_statistics
    from lbsgd.algorithm.resnet import resnet as resnet
    from lbsgd.algorithm.sampler import SharedShuffleSampler as SharedShuffleSampler
    from lbsgd.algorithm.schedule import LargeMinibatchSGD as LargeMinibatchSGD
    from lbsgd.algorithm.schedule import Schedule as Schedule
    from lbsgd.algorithm.schedule import learning_rate as learning_rate
    from lbsgd.algorithm.schedule import scaled_lr as scaled_lr
    from lbsgd.algorithm.sgd import MomentumCorrectedSGD as MomentumCorrectedSGD
    from lbsgd.algorithm.sgd import decay_groups as decay_groups
    from lbsgd.algorithm.shuffle import epoch_order as epoch_order
    from lbsgd.algorithm.shuffle import rank_batches as rank_batches
    from lbsgd.algorithm.torch_scheduler import LargeMinibatchLR as LargeMinibatchLR
    from lbsgd.config.libraries.needs import Needs as Needs
    from lbsgd.config.libraries.needs import needs_of as needs_of
    from lbsgd.config.overrides import Overrides as Overrides
    from lbsgd.config.plan import Plan as Plan
    from lbsgd.loader import SharedShuffleOrder as SharedShuffleOrder
    from lbsgd.train.engine import LinearScalingWarmupLR as LinearScalingWarmupLR
    from lbsgd.train.engine import initialize as initialize
    from lbsgd.train.hugging_face import LargeMinibatchTrainer as LargeMinibatchTrainer
    from lbsgd.train.parts import Parts as Parts
    from lbsgd.train.parts import parts_for as parts_for
else:  # hidden from type checkers, which would let any misspelt name pass

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from lbsgd.units import NOT_INSTALLED, installed

            if version := installed("lbsgd"):
                return version
            raise AttributeError(NOT_INSTALLED)
        if name not in _HOMES:
            raise AttributeError(f"module 'lbsgd' has no attribute {name!r}")
        return getattr(importlib.import_module(f"lbsgd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names and Python's own module attributes."""
    private = {name for name in globals() if name.startswith("_") and not name.startswith("__")}
    return sorted({*globals(), "__version__", *__all__} - private - {"TYPE_CHECKING", "importlib", "sys"})
