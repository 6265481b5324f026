"""Simulate k workers on one process: when each gradient comes, and how old its weights are (Sec. 6).

A worker takes n images at a time. Its time is drawn per gradient, log-normal with mean 1 and a given spread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.algorithm.sgd import lr_factor
from lbsgd.config.plan import Plan
from lbsgd.errors import DivergedError
from lbsgd.train.parts import build_optimizer

Batch = tuple[Tensor, Tensor]  # n images and their labels


class Server:
    """The weights, their momentum and the workers that take them.

    asynchronous: each gradient moves the weights as soon as its worker is ready, and the worker then takes the new
    weights. Else the weights move once per k gradients, when the slowest worker is ready. Batch norm's running
    statistics move with the weights.
    """

    def __init__(self, network: nn.Module, plan: Plan, asynchronous: bool, spread: float):
        gradients_per_update = 1 if asynchronous else plan.num_workers
        self.network, self.plan = convert_batch_norm(network, plan.per_worker_batch, gradients_per_update), plan
        self.asynchronous, self.spread = asynchronous, spread
        self.optimizer, self.weights = build_optimizer(network, plan), list(network.parameters())
        self.random = np.random.default_rng([plan.recipe.seed, 1])
        self.num_workers, self.time, self.num_gradients, self.num_moves = plan.num_workers, 0.0, 0, 0
        self.ready = [(self.draw(), worker) for worker in range(self.num_workers)]
        heapq.heapify(self.ready)
        # The weights that each worker holds, and after how many moves it took them.
        self.held = [(self.copies(), 0) for _ in range(self.num_workers if asynchronous else 0)]

    def copies(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def draw(self) -> float:
        """Return how long a worker takes for its next gradient, 1 on average."""
        return float(self.random.lognormal(-(self.spread**2) / 2, self.spread))

    def train(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Take an epoch's batches of n images, one worker each. Return the epoch's record for the log."""
        losses, wrong, seen, ages, began = 0.0, 0, 0, [], self.time
        self.network.train()
        for batch in batches:
            loss, hits, age = self.asynchronously(batch) if self.asynchronous else self.synchronously(batch)
            losses, wrong, seen = losses + loss * len(batch[1]), wrong + hits, seen + len(batch[1])
            ages.append(age)
        return {
            "train_loss": losses / seen,
            "train_top1_error_pct": 100 * wrong / seen,
            "seconds": self.time - began,  # simulated
            "simulated_time": self.time,
            "staleness": sum(ages) / len(ages),
        }

    def gradient(self, batch: Batch, share: float) -> tuple[float, int]:
        """Add a share of the gradient of n images. Return their loss and the number of wrong answers."""
        images, labels = batch
        logits = self.network(images)
        loss = cross_entropy(logits, labels)
        self.require_numbers([loss])
        (loss * share).backward()
        return loss.item(), int((logits.argmax(1) != labels).sum())

    def require_numbers(self, found: Sequence[Tensor]) -> None:
        """Raise DivergedError for a loss or weights that are not numbers, as the trainer does."""
        if not all(tensor.isfinite().all() for tensor in found):
            raise DivergedError(f"after {self.num_gradients // self.num_workers} iterations the loss is not a number")

    def move(self, lr: float) -> None:
        """Move the weights by the accumulated gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * lr_factor(group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_moves += 1

    def lr(self) -> float:
        return learning_rate(self.num_gradients // self.num_workers, self.plan.schedule)

    def asynchronously(self, batch: Batch) -> tuple[float, int, int]:
        """Compute the gradient of the worker that is ready first, at the weights it holds, and move the server's.

        Return the loss, the number of wrong answers, and how many moves old the worker's weights were.
        """
        self.time, worker = heapq.heappop(self.ready)
        held, version = self.held[worker]
        now = self.copies()
        self.put(self.weights, held)
        loss, wrong = self.gradient(batch, 1.0)
        self.put(self.weights, now)
        age = self.num_moves - version
        self.move(self.lr() / self.num_workers)
        self.num_gradients += 1
        self.put(held, self.weights)
        self.held[worker] = (held, self.num_moves)
        heapq.heappush(self.ready, (self.time + self.draw(), worker))
        return loss, wrong, age

    @staticmethod
    @torch.no_grad()
    def put(into: list[Any], values: list[Any]) -> None:
        torch._foreach_copy_(into, values)

    def synchronously(self, batch: Batch) -> tuple[float, int, int]:
        """Add one worker's gradient. After the last one, move the weights when the slowest worker is ready."""
        loss, wrong = self.gradient(batch, 1 / self.num_workers)
        lr = self.lr()
        self.num_gradients += 1
        if self.num_gradients % self.num_workers == 0:
            self.time += max(self.draw() for _ in range(self.num_workers))
            self.move(lr)
        return loss, wrong, 0

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the validation error for the log. Raises DivergedError for weights that are not numbers."""
        self.require_numbers(self.weights)  # no loss follows the last update
        self.network.eval()
        wrong = seen = 0
        with torch.no_grad():
            for images, labels in batches:
                wrong += int((self.network(images).argmax(1) != labels).sum())
                seen += len(labels)
        return {"val_top1_error_pct": 100 * wrong / seen, "val_images": seen}
