"""Weights from a file: a `weights.pt`, or any other state_dict of the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbsgd.errors import DataError

if TYPE_CHECKING:  # a flag that is wrong is reported before torch loads
    from torch.nn import Module


def weights_in(path: Path) -> dict[str, Any]:
    """Return the weights in a file; imports PyTorch. Raises DataError for a file that holds none."""
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises whatever the bytes make it raise
        raise DataError(f"{path} cannot be read as weights ({error}); give the weights.pt of a run") from None
    if not isinstance(weights, dict):
        raise DataError(f"{path} holds no state_dict; give the weights.pt of a run")
    return weights


def put_weights(network: Module, weights: dict[str, Any], path: Path) -> None:
    """Load weights into a network. Raises DataError that names the first tensor which is not the network's."""
    here = network.state_dict()
    for name in [*here, *(name for name in weights if name not in here)]:
        theirs, ours = (described(tensors.get(name)) for tensors in (weights, here))
        if theirs != ours:
            raise DataError(f"{path} is of another network: {name} is {theirs} there and {ours} here")
    network.load_state_dict(weights)


def described(tensor: Any) -> str:
    return str(list(tensor.shape)) if hasattr(tensor, "shape") else "missing" if tensor is None else "no tensor"
