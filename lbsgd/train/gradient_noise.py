"""Measure the gradient's noise, and up to which batch the linear rule can pay (McCandlish et al. 2018, Sec. 2 and A.1).

Before its reduction, an update's gradient exists in chunks: one per process and pass, of b = micro_batch images each.
With B = kn images in all, and |g_b|² the mean of the chunks' squared norms,

    |G|²  = (B·|g_B|² - b·|g_b|²) / (B - b)         of the true gradient, unbiased
    tr Σ  = (|g_b|² - |g_B|²) / (1/b - 1/B)         of the covariance of one image's gradient, unbiased
    noise scale = tr Σ / |G|²                       images; far above it a larger batch hardly helps

The same iterations also measure |w|/|g| of each layer's weights, and how much the workers' batch-norm statistics differ
in each layer. With one learning rate, the layer with the smallest |w|/|g| moves farthest relative to its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lbsgd.algorithm.batch_norm_spread import batch_norm_spread
from lbsgd.config.plan import Plan
from lbsgd.train.engine import full_gradient


def square(tensor: torch.Tensor) -> float:
    """Return the sum of squares, in float64."""
    return float(tensor.double().square().sum())


def noise(chunk_sq: float, total_sq: float, chunk_images: int, total_images: int) -> dict[str, float]:
    """Return |G|², tr Σ and the noise scale from squared norms. The scale is infinite if |G|² is not positive."""
    b, total = chunk_images, total_images
    gradient_sq = (total * total_sq - b * chunk_sq) / (total - b)
    variance = (chunk_sq - total_sq) / (1 / b - 1 / total)
    scale = variance / gradient_sq if gradient_sq > 0 else float("inf")
    return {"gradient_sq": gradient_sq, "gradient_variance": variance, "noise_scale": scale}


class GradientNoise:
    """Measures the noise as often as the plan says. The numbers go into the next iteration record."""

    def __init__(self, engine: Any, plan: Plan):
        self.engine, self.plan, self.every = engine, plan, plan.recipe.diagnostics.gradient_noise
        self.chunks = plan.world_size * plan.accumulation_steps  # several, because rule F09 refuses one
        self.chunk_sq = torch.zeros((), dtype=torch.float64, device=engine.device)
        self.found: dict[str, Any] = {}
        self.iteration, self.passes = -1, 0

    def measures(self, iteration: int) -> bool:
        """Whether an iteration is measured, on all processes or on none."""
        return self.every is not None and iteration % self.every == 0

    @contextmanager
    def watching(self, iteration: int) -> Iterator[None]:
        """Wrap the backward of one pass: add up its squared gradients, and measure after the last pass."""
        if not self.measures(iteration):
            yield
            return
        if iteration != self.iteration:
            self.iteration, self.passes = iteration, 0
            self.chunk_sq.zero_()
        parameters = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        handles = [parameter.register_hook(self.add) for parameter in parameters.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.passes += 1
        if self.passes == self.plan.accumulation_steps:
            self.measure(parameters)

    def add(self, gradient: torch.Tensor) -> None:
        self.chunk_sq += gradient.detach().double().square().sum()

    def measure(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Compare the chunks of all processes with the reduced gradient. All processes must call this."""
        if self.plan.world_size > 1:
            dist.all_reduce(self.chunk_sq)
        # DeepSpeed divides the loss of a pass by the number of passes, but a chunk is the gradient of the whole loss.
        chunk_sq = float(self.chunk_sq) * self.plan.accumulation_steps**2 / self.chunks
        # A parameter that the loss does not use has no gradient.
        squares = {
            name: square(gradient)
            for name, p in parameters.items()
            if (gradient := full_gradient(self.engine, p)) is not None
        }
        ratios = {
            name: (square(p.detach()) / squares[name]) ** 0.5
            for name, p in parameters.items()
            if p.ndim > 1 and squares.get(name, 0) > 0
        }
        found = noise(chunk_sq, sum(squares.values()), self.plan.micro_batch, self.plan.global_batch)
        spread = batch_norm_spread(self.engine.module)
        self.found = {**found, "weight_to_gradient": ratios, "batch_norm_spread": spread}

    def take(self) -> dict[str, Any]:
        """Return the numbers measured since the last call."""
        found, self.found = self.found, {}
        return found
