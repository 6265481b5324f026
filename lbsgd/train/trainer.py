"""The training loop: kn images -> one update; an epoch; what is reported, evaluated and saved on the way (Sec. 2, 3, 5.1)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lbsgd.config.plan import Plan
from lbsgd.errors import Stopped
from lbsgd.processes.ending import from_rank_0
from lbsgd.train.engine import step
from lbsgd.train.evaluation import evaluate, settle_statistics
from lbsgd.train.random_states import random_states
from lbsgd.train.reporter import Reporter, Totals
from lbsgd.train.saver import Saver

Batch = tuple[torch.Tensor, torch.Tensor]

AGREE_SECONDS = 0.25  # between two looks at what other processes were told, at the past speed of passes
FINISH_SECONDS = 10.0  # an iteration that ends sooner is finished before the run stops


class TrainingData(Protocol):
    """What the trainer asks of its data; `loader.TrainLoader` and `fake.FakeImages` are such."""

    def epoch(self, epoch: int, first_iteration: int = 0) -> Iterator[Batch]: ...

    def statistics_batches(self, epoch: int, num_images: int, per_worker_batch: int) -> Iterator[torch.Tensor]: ...


class Watcher(Protocol):
    """What the trainer tells, and is told by; `guard.Guard` is such."""

    stop_requested: str | None
    nothing_to_save: bool

    def alive(self, position: str) -> None: ...


class Trainer:
    """One run: engine, plan and data, the saver of its checkpoints, and the guard that watches over it.

    `reporter` is set on rank 0 alone, which prints and writes for all.
    """

    def __init__(
        self, engine, plan: Plan, train_data: TrainingData, val_data: Iterable[Batch], saver: Saver, guard: Watcher
    ):
        self.engine, self.plan, self.saver, self.guard = engine, plan, saver, guard
        self.train_data, self.val_data = train_data, val_data
        self.reporter: Reporter | None = None
        self.first_bad = torch.full((), NEVER, device=engine.device)  # first iteration whose loss is not a number
        self.passes_to_agreement = 1
        self.save_is_due = self.stopping = False
        self.start_epoch()

    @property
    def iteration(self) -> int:
        """Iterations whose images were consumed; fp16 overflow may have skipped the update of some."""
        return self.engine.global_steps

    @property
    def at_epoch_end(self) -> bool:
        return self.iteration > 0 and self.iteration % self.plan.iterations_per_epoch == 0

    def train(self, last_iteration: int) -> None:
        """Trains up to `last_iteration`, saving where it stops, and saving and then evaluating after each epoch.

        A run that goes on from the end of an epoch begins with the evaluation, which may not have been finished.
        """
        per_epoch = self.plan.iterations_per_epoch
        if self.at_epoch_end:
            self.report_epoch(self.iteration // per_epoch)
        while self.iteration < last_iteration:
            epoch = self.iteration // per_epoch
            self.train_epoch(epoch, min(last_iteration, (epoch + 1) * per_epoch))
            self.save()
            if self.at_epoch_end:
                self.report_epoch(epoch + 1)

    def train_epoch(self, epoch: int, last_iteration: int) -> None:
        """The rest of an epoch: one shared permutation of the images, kn of them an iteration (Remark 4)."""
        if self.iteration % self.plan.iterations_per_epoch == 0:
            self.start_epoch()
        self.engine.train()
        batches = self.train_data.epoch(epoch, self.iteration % self.plan.iterations_per_epoch)
        while self.iteration < last_iteration:
            self.update(batches)
            if self.reporter:
                self.reporter.progress.advance()
            if (self.iteration - 1) % self.plan.steps_per_print == 0:
                self.report_iteration(self.iteration - 1)
            if self.iteration < last_iteration and (self.save_is_due or self.saver.due_by_iterations()):
                self.save()
            self.stop_if_asked()

    def start_epoch(self) -> None:
        self.totals, self.epoch_began, self.waited_before = Totals(self.engine.device), time.perf_counter(), 0.0
        self.passes_since, self.agreed_at = 0, time.monotonic()
        self.start_window()

    def start_window(self) -> None:
        """What an iteration record tells of begins here: after the record before, or with the epoch."""
        self.window_totals, self.window_began, self.waited = self.totals.sums, time.perf_counter(), 0.0

    def update(self, batches: Iterator[Batch]) -> None:
        """One update from kn images: `accumulation_steps` passes of `micro_batch` images on each process."""
        iteration, passes = self.iteration, self.plan.accumulation_steps
        before = (self.totals.sums, random_states(dist.get_rank())) if passes > 1 else None
        for number in range(passes):
            self.guard.alive(f"iteration {iteration}, pass {number}")
            images, labels = self.wait_for(batches)
            self.guard.nothing_to_save = False
            logits = self.engine(images)
            # Remark 3, normalised by kn: this is the mean over the micro batch; backward divides it by the number of
            # passes, and aggregation takes the mean over the processes, all of which hold equally many images.
            loss = F.cross_entropy(logits.float(), labels)
            self.engine.backward(loss)
            step(self.engine)  # moves the weights in the last pass only
            self.totals.add(logits.detach(), labels, loss.detach())
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=iteration))
            self.agree(before, passes - 1 - number)

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    # --- stopping and saving --------------------------------------------------------------------------------------------

    def agree(self, before: tuple | None, passes_left: int) -> None:
        """Every quarter of a second: what one process was told, such as by SIGTERM, all learn after the same pass.

        An iteration that would go on for long is then given up, and the state before it is saved. The next look comes a
        number of passes later, for clocks differ; a process alone looks after each pass, which costs nothing.
        """
        self.passes_since += 1
        if self.passes_since < self.passes_to_agreement:
            return
        asked = [
            bool(self.guard.stop_requested),
            self.saver.due_by_time() and dist.get_rank() == 0,
            (time.monotonic() - self.agreed_at) / self.passes_since,
        ]
        if dist.get_world_size() > 1:
            largest = torch.tensor(asked, dtype=torch.float64, device=self.engine.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            asked = largest.tolist()
            self.passes_to_agreement = max(1, int(AGREE_SECONDS / max(asked[2], 1e-3)))
        stop, self.save_is_due, pass_seconds = asked
        self.stopping = bool(stop)
        self.passes_since, self.agreed_at = 0, time.monotonic()
        if self.stopping and passes_left * pass_seconds > FINISH_SECONDS:
            sums, random = before
            self.totals.sums = sums
            self.save(random)
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raises Stopped on all processes, with the run saved, once they have agreed to stop."""
        if not self.stopping:
            return
        if self.saver.last_iteration != self.iteration:
            self.save()
        written = from_rank_0(self.saver.wait)  # which writes; a launcher kills all when the first process ends
        raise Stopped(
            f"{self.guard.stop_requested or 'another process was told to'}: "
            + (
                f"saved after {self.iteration} iterations; the same command with --resume goes on"
                if written
                else f"the checkpoint of iteration {self.iteration} could not be written; --resume goes on from the one before"
            )
        )

    def save(self, random: dict[str, torch.Tensor] | None = None) -> None:
        self.require_numbers()
        self.saver.save(self.totals.of_all(), time.perf_counter() - self.epoch_began, random)
        self.save_is_due = False

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint; all processes must call it. Raises CheckpointError as Saver.restore."""
        totals, epoch_seconds = self.saver.restore()
        if dist.get_rank() == 0:
            self.totals.sums = self.totals.sums + totals.to(self.engine.device)
        self.epoch_began = time.perf_counter() - epoch_seconds
        self.start_window()

    def require_numbers(self) -> None:
        """Raises TrainingError on all processes when the loss of an iteration was not a number on one of them."""
        first_bad = self.first_bad.clone()
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        if first_bad < NEVER:
            self.saver.stop(f"the loss of iteration {int(first_bad)} is not a number")

    # --- what is reported -----------------------------------------------------------------------------------------------

    def report_iteration(self, iteration: int) -> None:
        """A record of the log: means over num_iterations, those since the record before, the epoch's begin or a resume."""
        self.require_numbers()
        loss, _, images = self.totals.read(since=self.window_totals)
        seconds, waited = time.perf_counter() - self.window_began, self.waited
        self.report(
            "iteration",
            {
                "iteration": iteration,
                "num_iterations": images // self.plan.global_batch,
                "epoch": iteration / self.plan.iterations_per_epoch,
                "lr": self.engine.lr_scheduler.lr_of(iteration),
                "train_loss": loss,
                "images_per_second": images / seconds,
                "data_wait_pct": 100 * waited / seconds,
            },
        )
        self.waited_before += waited
        self.start_window()

    def report_epoch(self, epoch: int) -> None:
        """Errors on the training images as they were augmented, and on the whole validation set."""
        self.require_numbers()
        loss, error, images = self.totals.read()
        seconds = time.perf_counter() - self.epoch_began
        if self.reporter:
            self.reporter.advise_on_waiting(100 * (self.waited_before + self.waited) / seconds)
        self.report(
            "epoch",
            {
                "epoch": epoch,
                "iteration": self.iteration,
                "lr": self.engine.lr_scheduler.lr_of(self.iteration - 1),
                "train_loss": loss,
                "train_top1_error_pct": error,
                **self.evaluate(epoch),
                "seconds": seconds,
                "images_per_second": images / seconds,
                "skipped_iterations": self.engine.skipped_steps,
            },
        )

    def report(self, kind: str, record: dict[str, Any]) -> None:
        if self.reporter:
            self.reporter.report(kind, record, self.engine)

    def evaluate(self, epoch: int) -> dict[str, Any]:
        """Errors on the validation images; the guard may end the process at once meanwhile, as all is saved."""
        from_rank_0(self.saver.wait)
        self.guard.nothing_to_save = True
        settle_statistics(self.engine, self.plan.recipe.batch_norm, self.train_data, epoch, self.guard.alive)
        return evaluate(self.engine, self.val_data, self.guard.alive)


NEVER = 2**62  # later than any iteration
