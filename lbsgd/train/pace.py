"""Warn once if a loop's optimizer, scheduler and sampler, all of one plan, get out of step."""

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
    """Check before each of the optimizer's steps, until the first warning.

    An evaluation over the same sampler takes no step, so its pass is not compared.
    """
    pace, sampler.watched = _Pace(scheduler, sampler, plan), True

    def check(*_: Any) -> None:
        said = None if pace.told else pace.before_step()
        if said is not None:
            pace.told = True  # the hook stays, because torch cannot remove a hook while it calls hooks
            warnings.warn(said, stacklevel=2)

    if sampler.cut["rank"] == 0:
        optimizer.register_step_pre_hook(check)


class _Pace:
    """What the optimizer's steps have seen of the sampler and the scheduler.

    A pass that begins and ends between two steps, such as an evaluation or a look at one batch, trains nothing.
    """

    def __init__(self, scheduler: LargeMinibatchLR, sampler: SharedShuffleSampler, plan: Plan) -> None:
        self.scheduler, self.sampler, self.plan = scheduler, sampler, plan
        self.told = False
        self.trained: Pass | None = None  # the newest pass at the last step
        self.given = 0  # batches of that pass at its first step
        self.repeated = False  # whether that pass follows a whole one without a set_epoch
        self.epoch: Pass | None = None  # the last pass that set_epoch announced
        self.start = self.steps = 0  # the scheduler's update at that pass's first step, and steps since
        self.last = 0  # batches of all passes at the last step

    def before_step(self) -> str | None:
        """Return what is wrong before this step of the optimizer, or None."""
        now, last = self.sampler.begun, self.trained
        if now is None:
            return None
        if now is not last:
            announced, self.sampler.announced = self.sampler.announced, False
            self.repeated = last is not None and last.given == len(self.sampler) and not announced
            self.trained, self.given = now, now.given
            if announced:
                first, self.epoch, self.start, self.steps = self.epoch is None, now, self.scheduler.last_epoch, 0
                if self.is_off(now, first):
                    return self.off(now)
        if self.repeated and now.given > self.given:
            return (
                f"lbsgd: another epoch takes the batches of epoch {now.first_update // self.plan.iterations_per_epoch}"
                " in the same order; call sampler.set_epoch(epoch) before each"
            )
        return self.too_many()

    def is_off(self, now: Pass, first: bool) -> bool:
        """Whether scheduler and sampler begin an epoch at different updates.

        A library that resumes in the middle of an epoch skips the sampler's first batches. A loop may leave the
        scheduler where it is if fp16 skips an update.
        """
        ahead, epoch = self.scheduler.last_epoch - now.first_update, self.plan.iterations_per_epoch
        return ahead >= (epoch if first else 1) or -2 * ahead >= epoch

    def off(self, now: Pass) -> str:
        return (
            f"lbsgd: the scheduler is at update {self.scheduler.last_epoch} and the sampler at {now.first_update}, with"
            f" {self.plan.iterations_per_epoch} updates per epoch; call scheduler.step() once after each update, load"
            " its state_dict when you resume, and let no library split the sampler's batches again"
        )

    def too_many(self) -> str | None:
        """Return what to say if this epoch has had more updates than its batches make, else None."""
        if self.epoch is None:
            return None
        self.steps += self.sampler.given > self.last  # ZeRO steps once per parameter group, on the same batches
        self.last = self.sampler.given
        batches, passes = self.sampler.given - self.epoch.earlier, self.plan.accumulation_steps
        for what, number in {"optimizer": self.steps, "scheduler": self.scheduler.last_epoch - self.start}.items():
            if number * passes > batches:
                return (
                    f"lbsgd: {number} steps of the {what} for {batches} batches of the sampler, of which each update"
                    f" takes {passes}; step once per update, that is, per plan.accumulation_steps batches"
                )
        return None
