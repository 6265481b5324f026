"""Read weights from a file: a `weights.pt`, or any other state_dict of the network."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lbsgd.errors import DataError, one_line

if TYPE_CHECKING:  # a wrong flag is reported before torch loads
    from torch import Tensor
    from torch.nn import Module

BEGINS = b"PK\x03\x04", b"\x80"  # how files of torch.save begin: a zip archive or, before torch 1.6, a pickle


def weights_in(path: Path) -> dict[str, Any]:
    """Return the weights in a file. Imports PyTorch. Raises DataError if the file holds none."""
    import torch

    try:
        with open(path, "rb") as file:
            begin = file.read(8)
        weights = torch.load(path, map_location="cpu", weights_only=True) if begin.startswith(BEGINS) else None
    except UnpicklingError:
        raise DataError(f"{path} holds more than tensors; save the network's state_dict() and give that") from None
    except Exception as error:  # noqa: BLE001  damaged bytes may make torch raise anything
        raise DataError(f"{path} cannot be read as weights ({one_line(error)}); give the weights.pt of a run") from None
    if weights is None:
        raise DataError(
            f"{path} was not written by torch.save, as it begins with {begin!r}; give the weights.pt of a run"
        )
    if not isinstance(weights, dict):
        raise DataError(f"{path} holds no state_dict; give the weights.pt of a run")
    if any(isinstance(value, dict) for value in weights.values()):
        raise DataError(f"{path} holds a state_dict among other things; save that alone and give it")
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and (other := other_than_dense(value)):
            raise DataError(
                f"{path}: {name} is no dense tensor there, but {other}; save the network's state_dict() and give that"
            )
    return weights


def other_than_dense(tensor: Tensor) -> str | None:
    """Return the kind of a tensor that does not store each of its values, None if it does."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "without values"
    if tensor.is_quantized:
        return "quantized"
    return words_of(tensor.layout) if words_of(tensor.layout) != "strided" else None


def put_weights(network: Module, weights: dict[str, Any], path: Path) -> None:
    """Load weights into a network. Raises DataError, naming the first tensor that does not fit the network.

    Batch norm's counters of batches may be missing, as in files of old torch versions. Nothing here reads them.
    """
    here = network.state_dict()
    counters = {name: value for name, value in here.items() if name.endswith("num_batches_tracked")}
    weights = counters | weights
    for name in here | weights:
        theirs, ours = (shape_words(tensors.get(name)) for tensors in (weights, here))
        if theirs != ours:
            raise DataError(f"{path} is of another network: {name} is {theirs} there and {ours} here")
        theirs, ours = (of_numbers(tensors[name]) for tensors in (weights, here))
        if theirs != ours and name not in counters:
            pair = f"of {words_of(weights[name].dtype)} there and of {words_of(here[name].dtype)} here"
            raise DataError(f"{path} is of another network: {name} is {pair}")
    network.load_state_dict(weights)


def shape_words(tensor: Any) -> str:
    return str(list(tensor.shape)) if hasattr(tensor, "shape") else "missing" if tensor is None else "no tensor"


def of_numbers(tensor: Tensor) -> str:
    """Return which kind of numbers a tensor holds. All floats are one kind, because conversion does no harm."""
    return "floats" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def words_of(dtype_or_layout: object) -> str:
    return str(dtype_or_layout).removeprefix("torch.")
