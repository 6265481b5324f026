"""Warn, once, of a loop in which optimizer, scheduler and sampler of one plan part from each other."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lbsgd.algorithm.sampler import Pass, SharedShuffleSampler
from lbsgd.algorithm.torch_scheduler import LargeMinibatchLR
from lbsgd.config.plan import Plan


def watch_pace(
    optimizer: torch.optim.Optimizer, scheduler: LargeMinibatchLR, sampler: SharedShuffleSampler, plan: Plan
) -> None:
    """Look before each of the optimizer's steps, until the first warning.

    An evaluation over the same sampler takes no step, so it is none of the passes that are compared.
    """
    pace = _Pace(scheduler, sampler, plan)

    def check(*_: Any) -> None:
        said = None if pace.told else pace.before_step()
        if said is not None:
            pace.told = True  # the hook stays, because torch cannot remove one while it calls them
            warnings.warn(said, stacklevel=2)

    if sampler.cut["rank"] == 0:
        optimizer.register_step_pre_hook(check)


class _Pace:
    """What the optimizer's steps have seen of the sampler and the scheduler.

    A pass that takes no batch between two steps, such as an evaluation or a look at one batch, trains nothing.
    """

    def __init__(self, scheduler: LargeMinibatchLR, sampler: SharedShuffleSampler, plan: Plan) -> None:
        self.scheduler, self.sampler, self.plan = scheduler, sampler, plan
        self.told = False
        self.trained: Pass | None = None  # begun last, as the last step saw it
        self.given = 0  # batches of that pass at its first step
        self.repeated = False  # whether that pass follows a whole one and set_epoch did not announce it

    def before_step(self) -> str | None:
        """Return what is wrong before this step of the optimizer, or None."""
        now, last = self.sampler.begun, self.trained
        if now is None:
            return None
        if now is not last:
            announced, self.sampler.announced = self.sampler.announced, False
            self.repeated = last is not None and last.given == len(self.sampler) and not announced
            self.trained, self.given = now, now.given
        if self.repeated and now.given > self.given:
            return (
                f"lbsgd: another epoch takes the batches of epoch {now.first_update // self.plan.iterations_per_epoch}"
                " in the same order; call sampler.set_epoch(epoch) before each"
            )
        return None
