"""Batch norm per worker (Sec. 2.3) for a whole network: `convert_batch_norm`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lbsgd.algorithm.choices import Implementation, Scope, Statistics
from lbsgd.algorithm.network_forwards import NetworkForwards
from lbsgd.algorithm.per_worker_batch_norm import (
    PerWorkerBatchNorm,
    PerWorkerBatchNorm1d,
    PerWorkerBatchNorm2d,
    PerWorkerBatchNorm3d,
    require_choices,
)
from lbsgd.errors import A_NETWORK, require_type

_KINDS: dict[type[_BatchNorm], type[PerWorkerBatchNorm]] = {
    nn.BatchNorm1d: PerWorkerBatchNorm1d,
    nn.BatchNorm2d: PerWorkerBatchNorm2d,
    nn.BatchNorm3d: PerWorkerBatchNorm3d,
    nn.SyncBatchNorm: PerWorkerBatchNorm,
}


def convert_batch_norm(
    model: nn.Module,
    per_worker_batch: int,
    passes: int = 1,
    statistics: Statistics = "average",
    scope: Scope = "worker",
    implementation: Implementation = "loop",
) -> nn.Module:
    """Turn every batch norm of a model, at any depth, into a `PerWorkerBatchNorm` (arguments there); return the model.

    Only a module's class changes: parameters, buffers, hooks, momentum, ε and mode stay the same objects.
    timm's BatchNormAct2d keeps its drop and its activation. Give the module that is called once per pass, because hooks
    on it tell the passes apart if one forward uses a batch norm twice.
    Raises ValueError for a trained batch norm in TorchScript or in a graph of torch.export, for a lazy one that has
    seen no images, and for a batch norm of any other class, because its own behaviour would be lost. The model is then
    unchanged.
    """
    require_type(model, nn.Module, *A_NETWORK)
    require_choices(per_worker_batch, passes, statistics, scope, implementation)
    require_modules(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    # By type: torchvision names the shortcuts' batch norms `downsample.1`, so a search for "bn" misses them.
    kinds = {name: _kind_of(name, module) for name, module in norms.items()}
    for name, module in norms.items():
        module.__class__ = kinds[name]
        assert isinstance(module, PerWorkerBatchNorm)
        module._configure(per_worker_batch, passes, statistics, scope, implementation)
        module._forwards = NetworkForwards.of(model, per_worker_batch)
    return model


def require_modules(model: nn.Module) -> None:
    """Raise ValueError for a trained batch norm in TorchScript or in torch.export's graph: it has no class to change.

    A frozen one in TorchScript, as in a teacher network, may stay, and so may one that a graph has in evaluation mode.
    """
    for name, module in model.named_modules():
        in_torchscript = isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name
        if in_torchscript and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"{name or 'the model'} is a {module.original_name} in TorchScript, which cannot be converted; give the"
                " network as it was before torch.jit.script or torch.jit.trace"
            )
        if isinstance(module, torch.fx.GraphModule) and (node := trained_norm(module.graph)):
            raise ValueError(
                f"{name or 'the model'} computes batch norm in its graph ({node.name}), where it cannot be converted; "
                "give the network as it was before torch.export"
            )


def trained_norm(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """Return the first call of a graph, as torch.export makes it, that computes batch norm over the batch."""
    calls = graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    return next((call for call in calls if call.args[5]), None)  # the 6th argument is aten's `training`


def _kind_of(name: str, norm: _BatchNorm) -> type[PerWorkerBatchNorm]:
    kind = type(norm)
    if issubclass(kind, PerWorkerBatchNorm):
        return kind
    kinds = _KINDS
    if kind.__module__.startswith("timm."):
        from lbsgd.algorithm import timm_batch_norm  # imported late, because timm may not be installed

        kinds = _KINDS | timm_batch_norm.KINDS
    if isinstance(norm, LazyModuleMixin):
        raise ValueError(f"{name or 'the model'} is a {kind.__name__}, still without channels; run one forward before")
    if "FSDPModule" in {base.__name__ for base in kind.__mro__}:
        raise ValueError(
            f"{name or 'the model'} is a {kind.__name__}: FSDP2 shards this batch norm by itself, which must not come"
            " before its conversion; call lbsgd.convert_batch_norm, then fully_shard, then parts_for"
        )
    if kind not in kinds:
        raise ValueError(
            f"{name or 'the model'} is a {kind.__name__}, neither torch's own batch norm nor timm's BatchNormAct2d; put"
            f" one of {', '.join(plain.__name__ for plain in _KINDS)} in its place before converting"
        )
    return kinds[kind]
