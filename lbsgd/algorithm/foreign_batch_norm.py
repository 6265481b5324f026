"""Batch norms that `convert_batch_norm` has not converted, or that something has put back since."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def foreign_batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the name and module of each batch norm that is not a `PerWorkerBatchNorm`."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and not hasattr(layer, "per_worker_batch"):
            yield name, layer


def warn_of_statistics_left_apart(model: nn.Module) -> None:
    """Warn of the first trained batch norm that is not per worker, unless it sees all processes' images anyway."""
    for name, layer in foreign_batch_norms(model):
        trained = layer.training or any(parameter.requires_grad for parameter in layer.parameters())
        if trained and layer.running_mean is not None and not isinstance(layer, nn.SyncBatchNorm):
            warnings.warn(
                f"agree_statistics leaves {name or 'the model'}, a {type(layer).__name__}, as each process has it: it"
                " is no per-worker batch norm; call parts_for or convert_batch_norm before training",
                stacklevel=4,  # skips agree_statistics and its no_grad
            )
            return
