"""Read weights from a file of torch.save or safetensors: a `weights.pt`, or any other state_dict of the network."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lbsgd.errors import DataError, one_line

if TYPE_CHECKING:  # a wrong flag is reported before torch loads
    from torch import Tensor
    from torch.nn import Module

BEGINS = b"PK\x03\x04", b"\x80"  # how files of torch.save begin: a zip archive or, before torch 1.6, a pickle
WRAPPERS = "module.", "_orig_mod."  # what DistributedDataParallel and torch.compile put before the name of each weight


def weights_in(path: Path) -> dict[str, Any]:
    """Return the weights in a file. Imports PyTorch. Raises DataError if the file holds none."""
    import torch

    weights: Any
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
        if begin[8:] == b"{":  # after the length of a safetensors header, which may begin as a pickle does
            weights = safetensors_in(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True) if begin.startswith(BEGINS) else None
    except UnpicklingError:
        raise DataError(f"{path} holds more than tensors; save the network's state_dict() and give that") from None
    except Exception as error:  # noqa: BLE001  damaged bytes may make torch raise anything
        raise DataError(f"{path} cannot be read as weights ({one_line(error)}); give the weights.pt of a run") from None
    if weights is None:
        raise DataError(
            f"{path} was not written by torch.save or safetensors, as it begins with {begin[:8]!r}; give the "
            "weights.pt of a run"
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


def safetensors_in(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def unwrapped(weights: dict[str, Any], own: Collection[str] = ()) -> dict[str, Any]:
    """Return weights without the prefixes of wrappers that all names share, unless names of the network have them."""
    for prefix in 2 * WRAPPERS:  # either may be inside the other
        if weights and all(str(name).startswith(prefix) for name in weights):
            if not any(name.startswith(prefix) for name in own):
                weights = {name.removeprefix(prefix): value for name, value in weights.items()}
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
    weights = counters | unwrapped(weights, here)
    for name in here | weights:
        theirs, ours = (shape_words(tensors.get(name)) for tensors in (weights, here))
        if theirs != ours:
            pair = f"{name} is {theirs} there and {ours} here"
            if differ_in_classes(weights, here):
                raise DataError(
                    f"{path} is for another number of classes than the data have: {pair}; evaluate on data with the "
                    "classes of the weights, or fine-tune on these first (docs/running.md)"
                )
            raise DataError(f"{path} is of another network: {pair}; give weights of this recipe's network")
        theirs, ours = (of_numbers(tensors[name]) for tensors in (weights, here))
        if theirs != ours and name not in counters:
            pair = f"of {words_of(weights[name].dtype)} there and of {words_of(here[name].dtype)} here"
            raise DataError(f"{path} is of another network: {name} is {pair}; give weights of this recipe's network")
    network.load_state_dict(weights)


def differ_in_classes(weights: dict[str, Any], here: dict[str, Tensor]) -> bool:
    """Whether the shapes of two sets of weights differ in the number of outputs of last layers alone."""
    if weights.keys() != here.keys() or not all(hasattr(value, "shape") for value in weights.values()):
        return False
    pairs = [(weights[name].shape, tensor.shape) for name, tensor in here.items()]
    return all(len(theirs) == len(ours) and theirs[1:] == ours[1:] for theirs, ours in pairs)


def shape_words(tensor: Any) -> str:
    return str(list(tensor.shape)) if hasattr(tensor, "shape") else "missing" if tensor is None else "no tensor"


def of_numbers(tensor: Tensor) -> str:
    """Return which kind of numbers a tensor holds. All floats are one kind, because conversion does no harm."""
    return "floats" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def words_of(dtype_or_layout: object) -> str:
    return str(dtype_or_layout).removeprefix("torch.")
