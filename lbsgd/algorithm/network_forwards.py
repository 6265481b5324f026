"""Count a network's forwards, to tell a module's second use in one pass from its use in the next pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbsgd.algorithm.compiled_record import exporting, mark_forward, numbered
from lbsgd.algorithm.images_in import images_in


class NetworkForwards:
    """The training forwards of one network, counted by hooks on it; the network's batch norms share this object.

    current: the number of the forward under way. None between forwards, and if the network does not run as a whole, as
    in a graph of torch.fx or when a user calls its parts.
    images: how many images this forward has (`images_in`). None as above, and without a tensor.
    """

    per_worker_batch = 1  # that the network was converted for
    images: int | None = None
    last_images: int | None = None  # of the last forward, which gradient checkpointing may repeat in part
    warned = False

    def __init__(self) -> None:
        self.begun = 0
        self.current: int | None = None
        self.number = numbered(self)
        self._due: dict[Callable[[list[Any]], None], list[Any]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = numbered(self)
        self._due = {}

    @classmethod
    def of(cls, network: nn.Module, per_worker_batch: int) -> NetworkForwards:
        """Return this network's only counter, however often the network is converted."""
        owners = (getattr(hook, "__self__", None) for hook in network._forward_pre_hooks.values())
        counter = next((owner for owner in owners if isinstance(owner, cls)), None)
        if counter is None:
            counter = cls()
            network.register_forward_pre_hook(counter.before, with_kwargs=True)
            # Before other hooks, because they may read the results of the calls that are due at the forward's end.
            network.register_forward_hook(counter.after, always_call=True, prepend=True)
        counter.per_worker_batch = per_worker_batch
        return counter

    def at_the_end(self, do: Callable[[list[Any]], None], item: Any) -> None:
        """Call `do` once when the forward under way ends, with the list of all items given for it."""
        self._due.setdefault(do, []).append(item)

    def mark(self, begins: bool) -> None:
        if begins and not self.warned:
            self.warned = warn_of_broadcast()
        self.begun += begins
        self.current = self.begun if begins else None
        due, self._due = self._due, {}
        for do, items in due.items():
            do(items)

    def before(self, network: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        if network.training:
            self.images = self.last_images = images_in([*inputs, *named.values()], self.per_worker_batch)
        self._mark_training(network, begins=True)

    def after(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self.images = None
        if self.current is not None and not network.training:  # the mode changed inside the forward
            self.mark(begins=False)
        self._mark_training(network, begins=False)

    def _mark_training(self, network: nn.Module, begins: bool) -> None:
        if not network.training:
            return
        if not torch.compiler.is_compiling():
            self.mark(begins)
        elif not exporting():
            mark_forward(self.number, begins)


def warn_of_broadcast() -> bool:
    """Warn and return True if the forward under way belongs to a DDP that overwrites the workers' statistics."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or not ddp.broadcast_buffers or ddp.process_group.size() == 1:
        return False
    if ddp.process_group.rank() == 0:
        warnings.warn(
            "lbsgd: before each forward DistributedDataParallel overwrites the running statistics of all processes with"
            " those of the first; give it broadcast_buffers=False",
            stacklevel=2,
        )
    return True


def within_backward() -> bool:
    """Whether a forward runs inside back-propagation, where gradient checkpointing repeats a part of the network's."""
    return torch._C._current_graph_task_id() != -1
