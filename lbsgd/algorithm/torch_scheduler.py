"""The paper's schedule for training loops without DeepSpeed: a learning rate scheduler of torch's own kind."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler

from lbsgd.algorithm.schedule import Schedule, learning_rate


class LargeMinibatchLR(LRScheduler):
    """Warmup and decay of Sec. 2.2 and 5.1, stepped after every update, not every epoch.

        scheduler = LargeMinibatchLR(optimizer, lbsgd.Plan.read("8k.json", world_size).schedule)
        for images, labels in loader:
            ...
            optimizer.step()
            scheduler.step()                # after the last pass of an update, as optimizer.step()

    Update t takes learning_rate(t, schedule), in every parameter group; update 0 that of construction. last_epoch, in torch's
    words, counts updates; a state_dict goes on where it was taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, last_epoch: int = -1):
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [learning_rate(self.last_epoch, self.schedule)] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr
