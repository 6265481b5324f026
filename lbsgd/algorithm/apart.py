"""Find what differs between processes: batch norms that are not per worker, and other layers' buffers."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
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


def warn_of_buffers_left_apart(model: nn.Module) -> None:
    """Warn of the first buffer of another layer that differs between processes; a collective call if there are any.

    So do the statistics of an InstanceNorm that tracks them. A checkpoint would hold one process's buffers, and give
    them to all.
    """
    buffers = dict(_other_buffers(model))
    if not buffers:
        return
    devices = [tensor.device for tensor in chain(model.parameters(), buffers.values())]
    reached = (each for each in devices if each.type not in ("cpu", "meta"))  # NCCL reaches no tensor of a CPU
    device = next(reached, devices[0])
    most = torch.tensor([_checksum(buffer) for buffer in buffers.values()], device=device)
    least = most.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if differing := [name for name, apart in zip(buffers, (least != most).tolist(), strict=True) if apart]:
        warnings.warn(
            f"{differing[0]} of the network differs between processes. agree_statistics makes only batch norms equal:"
            " evaluations use each process's own, and checkpoints hold process 0's. Make it equal in the network, or"
            " keep no such buffer (an InstanceNorm with track_running_stats=False)",
            stacklevel=4,  # skips agree_statistics and its no_grad
        )


def _other_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a state_dict holds, but for those of batch norms and those that are spread over devices.

    Buffers outside of it, such as caches, are lost at each restart anyway.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            continue
        for name, buffer in layer._buffers.items():
            plain = type(buffer) is torch.Tensor and buffer.layout is torch.strided
            if plain and not (buffer.is_meta or buffer.is_quantized) and name not in layer._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _checksum(buffer: torch.Tensor) -> int:
    copy = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu").copy_(buffer)  # contiguous, whatever it was
    return zlib.crc32(copy.reshape(-1).view(torch.uint8).numpy().data)
