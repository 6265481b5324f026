"""The training loop: updates of kn images, epochs, and when to report, evaluate, save and stop (Sec. 2, 3, 5.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lbsgd.config.plan import Plan
from lbsgd.errors import Stopped
from lbsgd.processes.ending import from_rank_0
from lbsgd.processes.guard import Guard
from lbsgd.train.agreement import Agreement, Decision
from lbsgd.train.clock import Clock, events_of
from lbsgd.train.evaluation import evaluate, is_due, sync_batch_norm_statistics, without_number
from lbsgd.train.gradient_noise import GradientNoise
from lbsgd.train.images import Images
from lbsgd.train.loss_scale import step
from lbsgd.train.random_states import random_states
from lbsgd.train.reporter import Reporter
from lbsgd.train.returned import require_loss
from lbsgd.train.saver import BeforeUpdate, Reached, Saver
from lbsgd.train.task import Batch, Task
from lbsgd.train.totals import Totals

FINISH_SECONDS = 10.0  # an iteration that would end sooner is finished before the run stops
NEVER = 2**62  # later than any iteration


class Trainer:
    """One run: engine, plan, task and images, the saver of its checkpoints, and the guard that watches it.

    reporter    rank 0's, unless nothing is reported
    reached     how far the epoch had got in the checkpoint that the run resumes from
    """

    def __init__(
        self,
        engine,
        plan: Plan,
        task: Task,
        images: Images,
        saver: Saver,
        guard: Guard,
        reporter: Reporter | None = None,
        reached: Reached | None = None,
    ):
        self.engine, self.plan, self.task, self.images = engine, plan, task, images
        self.saver, self.guard, self.reporter = saver, guard, reporter
        self.first_bad = torch.full((), NEVER, device=engine.device)  # the first iteration whose loss is not a number
        self.agreement, self.decision = Agreement(engine.device), Decision()
        self.totals = Totals(engine.device, len(task.counts))
        self.clock = Clock(events_of(engine.device), engine.waiting if plan.world_size > 1 else None)
        self.noise = GradientNoise(engine, plan)
        if reached:
            self.go_on(reached)

    @property
    def iteration(self) -> int:
        """Iterations whose images were consumed. fp16 overflow may have skipped the update of some."""
        return self.engine.global_steps

    @property
    def epochs_done(self) -> float:
        """Epochs done, an int if they are whole, as in the log. A run given in iterations may end inside one."""
        per_epoch = self.plan.iterations_per_epoch
        return self.iteration / per_epoch if self.iteration % per_epoch else self.iteration // per_epoch

    @property
    def at_report(self) -> bool:
        """Whether an epoch or the whole schedule has just ended."""
        return self.iteration > 0 and (isinstance(self.epochs_done, int) or self.iteration == self.plan.num_iterations)

    # --- the algorithm ------------------------------------------------------------------------------------------------

    def train(self, last_iteration: int, evaluate_every: int = 1) -> None:
        """Train up to `last_iteration`. Save there and after each epoch, then report and evaluate (`is_due`).

        A run that resumes at the end of an epoch begins with that epoch's report, which may not have been finished.
        """
        if self.at_report:
            self.report_epoch(last_iteration, evaluate_every)
        while self.iteration < last_iteration:
            epoch = self.iteration // self.plan.iterations_per_epoch
            self.train_epoch(epoch, min(last_iteration, (epoch + 1) * self.plan.iterations_per_epoch))
            self.save()
            if self.at_report:
                self.report_epoch(last_iteration, evaluate_every)

    def train_epoch(self, epoch: int, last_iteration: int) -> None:
        """Train the rest of an epoch: one shared permutation of the images, kn of them per iteration (Remark 4)."""
        first_iteration = self.iteration % self.plan.iterations_per_epoch
        if first_iteration == 0:
            self.start_epoch()
        self.engine.train()
        assert self.images.train, "an evaluation opens no training images"
        batches = self.images.train.epoch(epoch, first_iteration)
        while self.iteration < last_iteration:
            self.update(batches)
            self.after_update(last_iteration)

    def update(self, batches: Iterator[Batch]) -> None:
        """Make one update from kn images: `accumulation_steps` passes of `micro_batch` images on each process."""
        several = self.plan.accumulation_steps > 1  # else the iteration is never given up to return to the state before
        before = BeforeUpdate(self.totals.sums, random_states(dist.get_rank())) if several else None
        for number in range(self.plan.accumulation_steps):
            self.train_pass(self.next_batch(batches, number))
            self.after_pass(self.plan.accumulation_steps - 1 - number, before)

    def train_pass(self, batch: Batch) -> None:
        """Add the gradient of one micro batch to the update's."""
        # Normalised by kn (Remark 3): the loss is a mean over the micro batch, backward divides it by the number of
        # passes, and aggregation takes the mean over the processes, which all have equally many images.
        loss, counts = require_loss(self.task.loss(self.engine, batch), self.task)
        with self.noise.watching(self.iteration):
            self.engine.backward(loss)
        self.note(loss.detach(), counts)
        step(self.engine)  # moves the weights in the last pass only

    def note(self, loss: torch.Tensor, counts) -> None:
        """Add one pass to the totals, and remember the first iteration whose loss is not a number."""
        self.totals.add(loss, counts, self.plan.micro_batch)
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=self.iteration))

    # --- stopping and saving ------------------------------------------------------------------------------------------

    def next_batch(self, batches: Iterator[Batch], number: int) -> Batch:
        """Return the next micro batch, in time that counts as waiting for data. number: the pass's in its update."""
        self.guard.alive(f"iteration {self.iteration}, pass {number}")
        batch = self.clock.next_of(batches)
        if self.guard.nothing_to_save:
            # Wait for all processes. From now on none ends at once if told to stop: the others would wait for it.
            self.require_numbers()
            self.guard.nothing_to_save = False
        return batch

    def start_epoch(self) -> None:
        self.totals = Totals(self.engine.device, len(self.task.counts))
        self.clock.start_epoch()
        self.agreement.restart()

    def go_on(self, reached: Reached) -> None:
        """Continue the totals and the time of the epoch in which the checkpoint was saved."""
        self.totals.go_on(reached.totals)
        self.clock.start_epoch(reached.epoch_seconds)

    def after_update(self, last_iteration: int) -> None:
        """Report, save or stop between two iterations, if due."""
        if self.reporter:
            self.reporter.advance()
        if (self.iteration - 1) % self.plan.steps_per_print == 0 or self.noise.measures(self.iteration - 1):
            self.report_iteration(self.iteration - 1)
        if self.iteration < last_iteration and (self.decision.save or self.saver.due_by_iterations()):
            self.save()
        self.stop_if_agreed()

    def after_pass(self, passes_left: int, before: BeforeUpdate | None) -> None:
        """Find out what the processes agree on. Give up the iteration if they stop and it would take long."""
        save = dist.get_rank() == 0 and self.saver.due_by_time()
        decision = self.agreement.after_pass(bool(self.guard.stop_requested), save)
        if decision is None:
            return
        self.decision = decision
        if before and decision.stop and passes_left * decision.pass_seconds > FINISH_SECONDS:
            self.totals.sums = before.sums
            self.stop_if_agreed(before.random)

    def stop_if_agreed(self, random: dict[str, torch.Tensor] | None = None) -> None:
        """Save the run and raise Stopped on all processes, if they have agreed to stop."""
        if not self.decision.stop:
            return
        # At an epoch's end only the existing checkpoint has its totals. Before the first iteration there is none.
        if self.saver.saved_iteration != self.iteration or self.iteration == 0:
            self.save(random)
        # Rank 0 writes, and a launcher kills all processes when the first one ends.
        self.guard.saved = from_rank_0(self.saver.wait)
        outcome = f"saved after {self.iteration} iterations; the same command with --resume goes on"
        if not self.guard.saved:
            missing = f"the checkpoint of iteration {self.iteration} could not be written"
            outcome = f"{missing}; --resume goes on from the one before, if there is any"
        raise Stopped(f"{self.guard.stop_requested or 'another process was told to'}: {outcome}")

    def save(self, random: dict[str, torch.Tensor] | None = None) -> None:
        self.guard.alive(f"the save of iteration {self.iteration}")  # which waits for the disk to take the last one
        self.require_numbers()
        self.saver.save(Reached(self.totals.of_all(), self.clock.epoch_seconds), random)
        self.decision = self.agreement.saved(self.decision)

    def require_numbers(self) -> None:
        """Raise DivergedError on all processes if the loss of an iteration was not a number on one of them."""
        first_bad = self.first_bad.clone()
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        if first_bad < NEVER:
            self.saver.stop(f"the loss of iteration {int(first_bad)} is not a number")

    # --- reports ------------------------------------------------------------------------------------------------------

    def report_iteration(self, iteration: int) -> None:
        """Write an iteration record to the log: means since the previous record, the start of the epoch or a resume."""
        self.require_numbers()
        means, seconds = self.totals.read(since_mark=True), self.clock.window_seconds
        record = {
            "iteration": iteration,
            "num_iterations": means.num_images // self.plan.global_batch,
            "epoch": iteration / self.plan.iterations_per_epoch,
            "lr": self.engine.lr_scheduler.lr_of(iteration),
            "train_loss": means.loss,
            "images_per_second": means.num_images / seconds,
            "data_wait_pct": 100 * self.clock.data.of_window / seconds,
        }
        if self.plan.world_size > 1:
            record["aggregation_wait_pct"] = 100 * self.clock.aggregation.of_window / seconds
        if self.reporter:
            self.reporter.report("iteration", record | self.noise.take())
        self.totals.mark()
        self.clock.start_window()

    def report_epoch(self, last_iteration: int, evaluate_every: int) -> None:
        """Write an epoch record to the log: errors on the augmented training images and on the whole validation set."""
        self.require_numbers()
        means, seconds = self.totals.read(), self.clock.epoch_seconds
        epoch, last = self.epochs_done, last_iteration / self.plan.iterations_per_epoch
        found = self.evaluate(int(epoch)) if is_due(epoch, last, evaluate_every, self.task.judged_by) else {}
        if broken := without_number(found, self.task.judged_by):
            self.saver.stop(f"after iteration {self.iteration - 1} the {broken} is not a number")
        record = {
            "epoch": epoch,
            "iteration": self.iteration,
            "lr": self.engine.lr_scheduler.lr_of(self.iteration - 1),
            "train_loss": means.loss,
            **{f"train_{name}_pct": pct for name, pct in zip(self.task.counts, means.counts_pct, strict=True)},
            **found,
            "seconds": seconds,
            "images_per_second": means.num_images / seconds,
            "skipped_iterations": self.engine.skipped_steps,
        }
        if self.reporter:
            here = seconds - self.clock.seconds_before  # waits before a restart are not known
            self.reporter.advise_on_waiting(100 * self.clock.data.of_epoch / here)
            self.reporter.advise_on_aggregation(100 * self.clock.aggregation.of_epoch / here)
            self.reporter.report("epoch", record)

    def evaluate(self, epoch: int) -> dict[str, Any]:
        """Return the errors on the validation images. The guard may end the process at any time, as all is saved."""
        from_rank_0(self.saver.wait)
        self.guard.nothing_to_save = True
        sync_batch_norm_statistics(self.engine, self.plan.recipe.batch_norm, self.images.train, epoch, self.guard.alive)
        return evaluate(self.engine, self.task, self.images.val, self.guard.alive, self.images.among)
