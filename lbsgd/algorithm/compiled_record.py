"""Operators that a graph of torch.compile calls to move running statistics; the compiler does not look into them.

A graph reads and writes tensors, but the moments of the passes so far and the forward under way are Python objects. If
the graph read those, they would become its guards, and every pass would be compiled again. So each such object has a
number in a tensor. The graph takes the tensor as an input, and the operators find the object by its number.

torch.func calls the operators too: they see the tensors beneath its transforms, so statistics can move there as well.
"""

from __future__ import annotations

import itertools
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_by_number: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()

# The operators run Python, which a CUDA graph would not replay. Older versions of torch have no such tag.
_TAGS = [getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)]


def numbered(thing: object) -> Tensor:
    """Give an object its own number; a copy of the object needs another."""
    number = next(_numbers)
    _by_number[number] = thing
    return torch.tensor(number, device="cpu")


def exporting() -> bool:
    """Whether torch.export traces the code that runs. Versions of torch before 2.7 cannot tell."""
    # Not torch.compiler.is_exporting(): Dynamo takes it for true everywhere, in torch.compile too.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


# `_disable_dynamo` keeps the compiler out of the Python that the operators run; torch.compiler.disable would load the
# compiler for everyone. Both operators declare that they write to `forwards`, so that no compiler drops or reorders
# them.


@torch.library.custom_op(
    "lbsgd::mark_forward", mutates_args=("forwards",), schema="(Tensor(a!) forwards, bool begins) -> ()", tags=_TAGS
)
@torch._disable_dynamo
def mark_forward(forwards: Tensor, begins: bool) -> None:
    """Tell a network's `NetworkForwards` that a forward begins or ends."""
    _by_number[int(forwards)].mark(begins)


@torch.library.custom_op(
    "lbsgd::record_moments",
    mutates_args=("forwards", "running_mean", "running_var", "num_batches_tracked"),
    schema="(Tensor layer, Tensor(a!) forwards, Tensor moments, SymInt count, Tensor(b!) running_mean,"
    " Tensor(c!) running_var, Tensor(d!) num_batches_tracked) -> ()",
    tags=_TAGS,
)
@torch._disable_dynamo
def record_moments(
    layer: Tensor,
    forwards: Tensor,
    moments: Tensor,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
) -> None:
    """Have a layer take in the moments of one training forward; the tensors may stand in for the layer's own."""
    # A copy, because the graph reuses the memory of its own tensors after the call.
    _by_number[int(layer)].take_in(moments.clone(), count, (running_mean, running_var), num_batches_tracked)


@mark_forward.register_fake
def _(forwards: Tensor, begins: bool) -> None:
    """Do nothing: the schema tells the compiler which tensors the operator changes."""


@record_moments.register_fake
def _(*tensors: Any) -> None:
    """Do nothing: the schema tells the compiler which tensors the operator changes."""


@record_moments.register_vmap
def _(*arguments: Any) -> NoReturn:
    raise ValueError(
        "torch.vmap cannot move a batch norm's running statistics: set its track_running_stats to False, or take"
        " model.eval()"
    )
