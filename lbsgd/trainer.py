"""The training loop: kn images -> one update; an epoch; an evaluation that counts every image once (Sec. 2, 3 and 5.1)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional, Protocol

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lbsgd import checkpoint
from lbsgd.batchnorm import agree_statistics, recomputing_statistics
from lbsgd.engine import EngineState, gather_state, restore_state, step
from lbsgd.errors import TrainingError
from lbsgd.launch import from_rank_0
from lbsgd.plan import Plan
from lbsgd.progress import Progress
from lbsgd.runlog import RunLog

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainingData(Protocol):
    """What the trainer asks of its data; `loader.TrainLoader` and `fake.FakeImages` are such."""

    def epoch(self, epoch: int, first_iteration: int = 0) -> Iterator[Batch]: ...

    def statistics_batches(self, epoch: int, num_images: int, per_worker_batch: int) -> Iterator[torch.Tensor]: ...


@dataclass
class Reporter:
    """Where numbers go, on rank 0: the run log and the screen."""

    log: RunLog
    progress: Progress

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        self.log.close()


class Totals:
    """Sums over training images, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of the losses, of the errors, of the images

    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        errors = (logits.argmax(1) != labels).sum().double()
        images = errors.new_full((), len(labels))  # filled on the device: a copy from the host would wait for all its work
        self.sums += torch.stack([loss.double() * images, errors, images])

    def read(self, since: Optional[torch.Tensor] = None) -> tuple[float, float, int]:
        """Mean loss, error in %, number of images, less an earlier state of `sums`; all processes must call it."""
        sums = self.sums.clone() if since is None else self.sums - since
        dist.all_reduce(sums)
        loss, errors, images = sums.tolist()
        return loss / images, 100 * errors / images, int(images)


class Trainer:
    """One run: engine, plan and data, the checkpoints in `folder`, what a resumed one must agree in (`identity`).

    `reporter` is set on rank 0 alone, which prints and writes for all.
    """

    def __init__(self, engine, plan: Plan, train_data: TrainingData, val_data: Iterable[Batch], folder: Path,
                 identity: dict[str, Any]):
        self.engine, self.plan, self.folder, self.identity = engine, plan, folder, identity
        self.train_data, self.val_data = train_data, val_data
        self.reporter: Optional[Reporter] = None
        self.start_epoch()
        self.first_bad = torch.full((), NEVER, device=engine.device)  # first iteration whose loss is not a number

    @property
    def iteration(self) -> int:
        """Iterations whose images were consumed; fp16 overflow may have skipped the update of some."""
        return self.engine.global_steps

    def train(self, last_iteration: int) -> None:
        """Trains up to `last_iteration`, evaluating and saving after each epoch, and saving where it stops within one."""
        per_epoch = self.plan.iterations_per_epoch
        while self.iteration < last_iteration:
            epoch = self.iteration // per_epoch
            self.train_epoch(epoch, min(last_iteration, (epoch + 1) * per_epoch))
            if self.iteration % per_epoch == 0:
                self.report_epoch(epoch + 1)
            self.save()

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

    def start_epoch(self) -> None:
        self.totals = Totals(self.engine.device)
        self.epoch_began = time.perf_counter()
        self.start_window()

    def start_window(self) -> None:
        """What an iteration record tells of begins here: after the record before, or with the epoch."""
        self.window_totals, self.window_began, self.waited = self.totals.sums.clone(), time.perf_counter(), 0.0

    def update(self, batches: Iterator[Batch]) -> None:
        """One update from kn images: `accumulation_steps` passes of `micro_batch` images on each process."""
        iteration = self.iteration
        for _ in range(self.plan.accumulation_steps):
            images, labels = self.wait_for(batches)
            logits = self.engine(images)
            # Remark 3, normalised by kn: this is the mean over the micro batch; backward divides it by the number of
            # passes, and aggregation takes the mean over the processes, all of which hold equally many images.
            loss = F.cross_entropy(logits.float(), labels)
            self.engine.backward(loss)
            step(self.engine)  # moves the weights in the last pass only
            self.totals.add(logits.detach(), labels, loss.detach())
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=iteration))

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def require_numbers(self) -> None:
        """Raises TrainingError on all processes when the loss of an iteration was not a number on one of them."""
        first_bad = self.first_bad.clone()
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        if first_bad < NEVER:
            self.stop(f"the loss of iteration {int(first_bad)} is not a number")

    def stop(self, reason: str) -> NoReturn:
        kept = checkpoint.newest(self.folder)
        raise TrainingError(f"{reason}; " + (f"the newest checkpoint is {kept}" if kept else "no checkpoint was written yet")
                            + "; look at the learning rate and the data")

    # --- what is reported -----------------------------------------------------------------------------------------------

    def report_iteration(self, iteration: int) -> None:
        """A record of the log: means over the iterations since the record before, or since the epoch began."""
        self.require_numbers()
        loss, _, images = self.totals.read(since=self.window_totals)
        seconds, waited = time.perf_counter() - self.window_began, self.waited
        self.report("iteration", {
            "iteration": iteration, "epoch": iteration / self.plan.iterations_per_epoch,
            "lr": self.engine.lr_scheduler.lr_of(iteration), "train_loss": loss,
            "images_per_second": images / seconds, "data_wait_pct": 100 * waited / seconds})
        self.start_window()

    def report_epoch(self, epoch: int) -> None:
        """Errors on the training images as they were augmented, and on the whole validation set."""
        self.require_numbers()
        loss, error, images = self.totals.read()
        seconds = time.perf_counter() - self.epoch_began
        self.report("epoch", {
            "epoch": epoch, "iteration": self.iteration, "lr": self.engine.lr_scheduler.lr_of(self.iteration - 1),
            "train_loss": loss, "train_top1_error_pct": error, **self.evaluate(epoch), "seconds": seconds,
            "images_per_second": images / seconds, "skipped_iterations": self.engine.skipped_steps})

    def report(self, kind: str, record: dict[str, Any]) -> None:
        if not self.reporter:
            return
        getattr(self.reporter.log, kind)(record)
        getattr(self.reporter.progress, kind)(record)
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(f"lbsgd/{name}", value, self.engine.global_samples)
                                              for name, value in record.items() if name not in ("iteration", "epoch")])

    # --- evaluation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, Any]:
        """Top-1 and top-5 error over the validation images, each counted once on one process (Sec. 5.1)."""
        self.settle_statistics(epoch)
        self.engine.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        for images, labels in self.val_data:
            logits = self.engine(images).float()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum").double(), best[:, 0].sum().double(),
                                 best.sum().double(), sums.new_full((), len(labels))])
        dist.all_reduce(sums)
        loss, top1, top5, images = sums.tolist()
        return {"val_loss": loss / images, "val_top1_error_pct": 100 * (1 - top1 / images),
                "val_top5_error_pct": 100 * (1 - top5 / images), "val_correct_top1": int(top1),
                "val_correct_top5": int(top5), "val_images": int(images)}

    def settle_statistics(self, epoch: int) -> None:
        """Gives all processes the batch norm statistics that serve evaluation, checkpoint and export (Sec. 5.2)."""
        norm = self.plan.recipe.batch_norm
        if norm.statistics != "recomputed":
            agree_statistics(self.engine.module)
            return
        self.engine.train()
        with recomputing_statistics(self.engine.module):
            for images in self.train_data.statistics_batches(epoch, norm.statistics_images, norm.per_worker_batch):
                self.engine(images)

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint. A disk that fails is said and costs no more than this checkpoint."""
        self.require_numbers()
        agree_statistics(self.engine.module)
        state = gather_state(self.engine)
        # Every process holds the whole state, so all find the same. A checkpoint that cannot be trained on must not take the
        # place of one that can.
        if broken := [name for name, tensor in state.weights.items() if not tensor.isfinite().all()]:
            self.stop(f"after iteration {self.iteration - 1} the weights {broken[0]} are not numbers")
        random_states: list = [None] * dist.get_world_size()
        dist.all_gather_object(random_states, checkpoint.random_states(dist.get_rank()))
        totals = self.totals.sums.clone()
        dist.all_reduce(totals)
        if not self.reporter:
            return
        tensors = {"weights": state.weights, "momentum": state.momentum,
                   "random": {name: tensor for states in random_states for name, tensor in states.items()}}
        described = {"counters": state.counters, "identity": self.identity, "epoch_totals": totals.tolist(),
                     "epoch_seconds": time.perf_counter() - self.epoch_began, "world_size": dist.get_world_size(), "num_threads": torch.get_num_threads(),
                     "plan": self.plan.as_dict()}
        try:
            checkpoint.save(self.folder, self.iteration, tensors, described)
        except OSError as error:
            self.reporter.progress.say(f"warning: the checkpoint of iteration {self.iteration} could not be written "
                                       f"({error}); the one before it stands and training goes on")


    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint, which rank 0 reads and sends to the others; all processes must call it.

        World size, micro batch and passes may be others than when it was written. Raises CheckpointError for a checkpoint of
        another recipe, network or data.
        """
        tensors, described = from_rank_0(lambda: checkpoint.load_same(path, self.identity))
        restore_state(self.engine, EngineState(tensors["weights"], tensors["momentum"], described["counters"]))
        if dist.get_rank() == 0:
            self.totals.sums += torch.tensor(described["epoch_totals"], dtype=torch.float64, device=self.engine.device)
            self.start_window()
            self.epoch_began -= described["epoch_seconds"]
        if described["world_size"] == dist.get_world_size():
            checkpoint.restore_random_states(tensors["random"], dist.get_rank())


NEVER = 2**62  # later than any iteration
