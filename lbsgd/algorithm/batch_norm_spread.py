"""Measure how much the workers' batch-norm statistics differ, the price of normalising over n images (Sec. 2.3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbsgd.algorithm.batch_norm_statistics import RunningStatistics
from lbsgd.algorithm.process_group import world_size


@torch.no_grad()
def batch_norm_spread(model: nn.Module) -> dict[str, float]:
    """Return for each layer how much its workers' means differed in the last iteration; a collective call.

        √ mean_c(s²_c) / √ mean_c(v_c)     s²_c the unbiased variance over the k workers of channel c's mean,
                                           v_c the mean over them of its variance

    The ratio has no unit. For n independent values per channel it is about 1/√n. The values of one image are not
    independent, so n images count for more than n values and for less than n·H·W. A layer is left out if no iteration
    has moved it, or if its k is 1.
    """
    sums = {
        name: sums_over_workers(module.last)
        for name, module in model.named_modules()
        if isinstance(module, RunningStatistics) and module.last is not None
    }
    if not sums:
        return {}
    flat = torch.cat(list(sums.values()), dim=1)
    if world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.split([part.shape[1] for part in sums.values()], dim=1)
    return {name: spread(part) for name, part in zip(sums, parts, strict=True) if part[0, 0] > 1}


def sums_over_workers(moments: Tensor) -> Tensor:
    """Sum (2, G, C) means and variances over the G workers of a process: (4, C) of 1, mean, mean², variance."""
    mean, var = moments.double()
    return torch.stack([torch.ones_like(mean), mean, mean.square(), var]).sum(1)


def spread(sums: Tensor) -> float:
    """Return √(mean over C of Var_k(μ) / mean over C of the workers' σ²).

    sums    (4, C): over the k workers, of 1, μ, μ² and σ²; Var_k(μ) = (Σμ² - (Σμ)²/k) / (k - 1)
    """
    k, mean, square, var = sums
    between = ((square - mean.square() / k) / (k - 1)).clamp(min=0)
    return float((between.mean() / (var / k).mean()).sqrt())
