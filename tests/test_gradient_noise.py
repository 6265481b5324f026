"""The gradient's noise: the formulas on numbers worked out by hand, and Var(∇L_k) = Var(∇L_1)/k on real digits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import in_processes

import lbsgd
from lbsgd.algorithm.batch_norm_spread import batch_norm_spread, spread
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.engine import start_processes
from lbsgd.train.gradient_noise import GradientNoise, noise


def test_the_formulas_on_numbers_worked_by_hand():
    # |G|² = 4 and tr Σ = 60: a mean over b images has 4 + 60/b. b = 10: 10; b = 30: 6
    found = noise(chunk_sq=10.0, total_sq=6.0, chunk_images=10, total_images=30)
    assert found == pytest.approx({"gradient_sq": 4.0, "gradient_variance": 60.0, "noise_scale": 15.0})
    below = noise(chunk_sq=10.0, total_sq=3.0, chunk_images=10, total_images=30)
    assert below["gradient_sq"] == pytest.approx(-0.5) and below["noise_scale"] == float("inf")


def gradients_of_digits():
    """Each digit's gradient (1797, 650) of a linear classifier's cross-entropy, at weights that are not zero."""
    from sklearn.datasets import load_digits  # late: it takes two seconds, and each worker collects all tests

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    weights = 0.1 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = torch.softmax(images @ weights.T, 1) - torch.nn.functional.one_hot(labels, 10)
    return torch.cat([(errors[:, :, None] * images[:, None, :]).flatten(1), errors], 1)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_variance_of_the_mean_over_k_times_n_images_is_the_variance_over_n_by_k(k):
    gradients, random, n, draws = gradients_of_digits(), np.random.default_rng(k), 8, 2000
    true = gradients.mean(0)
    squares = {}
    for size in (n, k * n):
        chosen = torch.tensor(random.integers(0, len(gradients), (draws, size)))
        squares[size] = np.array([((gradients[indices].mean(0) - true) ** 2).sum().item() for indices in chosen])
    ratio = squares[n].mean() / squares[k * n].mean()
    relative = [values.std(ddof=1) / values.mean() / draws**0.5 for values in squares.values()]
    half_width = 1.96 * ratio * (relative[0] ** 2 + relative[1] ** 2) ** 0.5
    assert abs(ratio - k) < 2 * half_width and half_width < 0.05 * k  # inside twice the 95 % interval, which is narrow


def test_the_estimate_from_two_batch_sizes_is_the_true_noise_scale():
    gradients, random = gradients_of_digits(), np.random.default_rng(0)
    true = noise_of(gradients)
    chunk_sq, total_sq = [], []
    for _ in range(3000):
        chunks = gradients[torch.tensor(random.integers(0, len(gradients), (4, 16)))].mean(1)
        chunk_sq.append((chunks**2).sum(1).mean().item())
        total_sq.append((chunks.mean(0) ** 2).sum().item())
    found = noise(float(np.mean(chunk_sq)), float(np.mean(total_sq)), 16, 64)
    assert found["noise_scale"] == pytest.approx(true, rel=0.05)


def noise_of(gradients):
    mean = gradients.mean(0)
    return (((gradients - mean) ** 2).sum(1).mean() / (mean**2).sum()).item()


def config(stage, every=1):
    settings = (f"lbsgd.diagnostics.gradient_noise={every}",)
    settings += ("lbsgd.augmentation.resolution=32", "lbsgd.batch_norm.per_worker_batch=2", "steps_per_print=1")
    settings += ("lbsgd.linear_scaling.base_batch=16", "lbsgd.warmup=" + '{"kind": "none", "epochs": 0}')
    return generate(Overrides(16, 4, precision="fp32", zero_stage=stage, num_images=64, settings=settings), gpus=2)


def measured(stage):
    """What a process measures in one update of a linear network, and what follows from its images' own gradients.

    The network has a parameter that its loss does not use, and a frozen one.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 2)))
    model.register_parameter("frozen", torch.nn.Parameter(torch.ones(2, 2), requires_grad=False))
    images, labels = torch.randn(16, 3, 2, 2), torch.arange(16) % 5
    chunks, initial = [], model[1].weight.detach().norm().item()
    for part in range(4):
        loss = torch.nn.functional.cross_entropy(
            model(images[4 * part : 4 * part + 4]), labels[4 * part : 4 * part + 4]
        )
        chunks.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model[1].parameters()))]).double())
    expected = noise(
        torch.stack([(chunk**2).sum() for chunk in chunks]).mean().item(),
        (torch.stack(chunks).mean(0) ** 2).sum().item(),
        4,
        16,
    )
    engine, plan = lbsgd.initialize(model, config(stage))
    diagnostic, rank = GradientNoise(engine, plan), torch.distributed.get_rank()
    for number in range(plan.accumulation_steps):
        first = 4 * (plan.accumulation_steps * rank + number)
        loss = torch.nn.functional.cross_entropy(engine(images[first : first + 4]), labels[first : first + 4])
        with diagnostic.watching(0):
            engine.backward(loss)
        engine.step()
    found = diagnostic.take()
    gradient = torch.stack(chunks).mean(0)[:60]  # the weights come before the biases
    assert found.pop("batch_norm_spread") == {}
    assert found.pop("weight_to_gradient") == pytest.approx({"1.weight": initial / gradient.norm().item()}, rel=1e-4)
    return found, expected


@pytest.mark.parametrize("processes, stage", [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_an_engine_s_chunks_give_the_same_numbers_on_any_processes(processes, stage):
    for found, expected in in_processes(processes, measured, stage):
        assert found == pytest.approx(expected, rel=1e-4)


def spread_of(first, last):
    """The spread after 2 passes with the images first ... last, in workers of 4."""
    layer = lbsgd.convert_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), 4, passes=2)
    images = (
        torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3])[:, None, None]
    )
    assert batch_norm_spread(layer) == {}
    for half in images[first:last].chunk(2):
        layer(half)
    workers = images.reshape(4, 4, 3, 4).transpose(1, 2).flatten(2).double().numpy()  # worker, channel, value
    between, within = workers.mean(2).var(0, ddof=1).mean(), workers.var(2, ddof=1).mean()
    return batch_norm_spread(layer), {"0": pytest.approx((between / within) ** 0.5, rel=1e-5)}


def spread_of_this_process():
    start_processes()
    return spread_of(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)


def test_the_spread_of_batch_norm_over_workers_whatever_the_processes():
    for found, expected in (spread_of(0, 16), *in_processes(2, spread_of_this_process)):
        assert found == expected


def test_equal_workers_have_no_spread():
    mean = torch.full((3, 1), 0.1, dtype=torch.float64)  # three, whose Σμ² - (Σμ)²/k rounds to a little below 0
    assert spread(torch.stack([torch.ones_like(mean), mean, mean.square(), torch.ones_like(mean)]).sum(1)) == 0


def test_a_plan_with_a_single_chunk_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"16 images in one pass are one chunk; micro .* several: 2, 4, 8 \[F09\]"):
        Plan.read(config(0), 1, overrides=Overrides(micro_batch=16))
    in_one_pass = config(0) | {"train_micro_batch_size_per_gpu": 16}
    assert Plan.read(in_one_pass, 1, overrides=Overrides(micro_batch=8)).accumulation_steps == 2
    with pytest.raises(ConfigError, match=r"2 images .* one chunk; use a larger train_batch_size"):
        Plan.read(config(0), 1, overrides=Overrides(global_batch=2, micro_batch=2))


def test_what_is_measured_is_of_one_iteration_and_taken_once(monkeypatch):
    monkeypatch.setattr("lbsgd.train.gradient_noise.full_gradient", lambda engine, parameter: parameter.grad)
    layer, images, found = torch.nn.Linear(3, 2), torch.randn(16, 3), []
    plan = Plan.read(config(0, every=2), 1, overrides=Overrides(micro_batch=4))
    diagnostic = GradientNoise(SimpleNamespace(module=layer, device="cpu"), plan)
    for iteration in range(3):
        layer.zero_grad()
        for part in images.chunk(plan.accumulation_steps):
            with diagnostic.watching(iteration):
                (layer(part).square().mean() / plan.accumulation_steps).backward()
        found.append(diagnostic.take())
    assert found == [found[0], {}, found[0]] and found[0]["gradient_variance"] > 0
