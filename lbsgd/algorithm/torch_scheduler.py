"""The paper's schedule as a torch learning rate scheduler, for training loops without DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.algorithm.sgd import lr_factor
from lbsgd.errors import ConfigError, require_number, require_type


class LargeMinibatchLR(LRScheduler):
    """Warmup and decay of Sec. 2.2 and 5.1, stepped after every update instead of every epoch.

        plan = lbsgd.Plan.read("8k.json", world_size, num_images=len(dataset))
        scheduler = LargeMinibatchLR(optimizer, plan.schedule)
        for images, labels in loader:
            ...
            optimizer.step()
            scheduler.step()                # after the last pass of an update, like optimizer.step()

    In update t every parameter group takes learning_rate(t, schedule) times its lr_factor (`decay_groups`) and its
    lr_scale (timm's layer decay), each 1 by default. The constructor sets the learning rate of update 0. torch's
    last_epoch counts updates here. After load_state_dict the schedule goes on from the update at which the state_dict
    was saved. A learning rate that is a tensor stays the same tensor.

    Raises ValueError for a parameter group with a learning rate of its own, because the schedule would replace it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        require_type(schedule, Schedule, "the schedule", "give plan.schedule, or that of LargeMinibatchSGD")
        _require_one_lr(optimizer.param_groups)
        self.schedule = schedule
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Go to the next update. Raises ConfigError for an argument, which torch would take for an update's number."""
        if epoch is not None:
            raise ConfigError(
                f"scheduler.step({epoch}): the schedule counts updates, not epochs; call step() after each update, and"
                " move_to(t) to go to update t"
            )
        super().step()

    def get_lr(self) -> list[float | torch.Tensor]:
        lr = learning_rate(self.last_epoch, self.schedule)
        return [lr * lr_factor(group) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.move_to(state_dict["last_epoch"])

    def move_to(self, iteration: int) -> None:
        """Give the optimizer the learning rate of update `iteration`, whatever came before.

        Raises ConfigError for a number that is not whole.
        """
        require_number(iteration, "iteration", whole=True)
        self.last_epoch = iteration
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # a compiled or capturable step reads this very tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _require_one_lr(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all groups have one learning rate, multiplied by lr_factor if already scheduled."""
    lrs, factors = [float(group["lr"]) for group in groups], [lr_factor(group) for group in groups]
    scheduled = (math.isclose(lr * factors[0], lrs[0] * factor) for lr, factor in zip(lrs, factors, strict=True))
    if all(scheduled) or len(set(lrs)) == 1:
        return
    number, lr = next((number, lr) for number, lr in enumerate(lrs) if lr != lrs[0])
    raise ValueError(
        f"parameter group {number} has a learning rate of its own, {lr:g}, which the schedule would replace; leave it"
        " out, and give the group lr_factor, the multiple of the schedule's learning rate that it takes"
    )
