"""The paper's four remarks and the other known pitfalls, each with right and wrong side by side.

The right version stays within BOUND of oracle.py, the wrong one exceeds 100 times that. Data and counts are compared
as sets and whole numbers. Each wrong version is written here: a user's loop, a configuration, or the usual mistake in
place of a part of lbsgd. Padded evaluation, which counts images twice, is in test_evaluation.py.
"""

import deepspeed
import numpy as np
import oracle
import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from oracle import BOUND, ITERATIONS, K, N, distance, network
from small_engine import recipe, train
from torch import nn
from torchvision.models import resnet50

import lbsgd
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups
from lbsgd.algorithm.shuffle import epoch_order, rank_batches
from lbsgd.config.plan import Plan
from lbsgd.train.deepspeed_setup import deepspeed_config
from lbsgd.train.engine import LinearScalingWarmupLR
from lbsgd.train.engine_state import gather_state
from lbsgd.train.parts import build_optimizer

SCHEDULE = Plan.read(recipe(), 1).schedule


@pytest.fixture(scope="module")
def expected():
    return oracle.train(network())[0]


def weights(config, **loop):
    """Return weights and statistics after a user's loop through the engine."""
    engine, plan = lbsgd.initialize(network(), config)
    train(engine, plan, **loop)
    return gather_state(engine).weights


def split(tensors):
    """Separate the weights from the running statistics, which only evaluation uses."""
    return (
        {name: tensor for name, tensor in tensors.items() if ("running" in name) is running and "batches" not in name}
        for running in (False, True)
    )


# --- Remark 1 and Remark 3: what the loss is divided by ---------------------------------------------------------------


def k_times_the_loss(engine, loss):
    engine.backward(K * loss)


def normalised_by_n(engine, loss):
    """Sum the k gradients without dividing by k. Each pass is one worker, whose loss is a mean over n."""
    engine.backward(loss, scale_wrt_gas=False)


@pytest.mark.parametrize(
    "micro_batch, backward",
    [(K * N, k_times_the_loss), (N, normalised_by_n)],
    ids=["Remark 1, the loss scaled by k", "Remark 3, k cancelled"],
)
def test_a_loss_k_times_as_large_is_no_learning_rate_k_times_as_large(monkeypatch, expected, micro_batch, backward):
    """η/k · (k·∇L + λ·w) is not η · (∇L + λ·w): the weights decay k times too slowly. Without λ it would not show."""
    right = recipe(micro_batch=micro_batch)
    without_decay = recipe(micro_batch=micro_batch)
    without_decay["optimizer"]["params"]["weight_decay"] = 0.0
    assert distance(weights(right), expected) < BOUND
    undecayed = {name: tensor for part in split(weights(without_decay)) for name, tensor in part.items()}
    monkeypatch.setattr("lbsgd.train.engine.learning_rate", lambda t, schedule: learning_rate(t, schedule) / K)
    assert distance(weights(right, backward=backward), expected) > 100 * BOUND
    assert distance(weights(without_decay, backward=backward), undecayed) < BOUND


def test_remark_3_a_loss_normalised_by_n_makes_gradients_k_times_too_large(expected):
    assert distance(weights(recipe()), expected) < BOUND
    assert distance(weights(recipe(), backward=normalised_by_n), expected) > 100 * BOUND


# --- Remark 2: momentum while the learning rate changes ---------------------------------------------------------------


def test_remark_2_form_10_needs_its_correction_across_the_ramp(expected):
    corrected, uncorrected = ({"form": "lr_inside", "correction": correction} for correction in (True, False))
    wrong = weights(recipe(momentum=uncorrected))
    assert distance(weights(recipe(momentum=corrected)), expected) < BOUND
    assert distance(wrong, expected) > 100 * BOUND
    uncorrected_oracle, _ = oracle.train(network(), form=10, correction=False)
    assert distance(wrong, uncorrected_oracle) < BOUND  # the version kept for comparison is exact, too


class CorrectedTwice(MomentumCorrectedSGD):
    """Caffe2's correction, made for form (10), on PyTorch's form (9)."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"] *= group["lr"] / state["before"]
                state["before"] = group["lr"]
        return super().step(closure)


def test_remark_2_form_9_has_its_correction_built_in(monkeypatch, expected):
    assert distance(weights(recipe()), expected) < BOUND
    monkeypatch.setattr("lbsgd.train.parts.MomentumCorrectedSGD", CorrectedTwice)
    assert distance(weights(recipe()), expected) > 100 * BOUND


# --- Remark 4: which images -------------------------------------------------------------------------------------------


def test_remark_4_a_seed_for_each_rank_misses_images_and_repeats_others():
    """With separate shuffles, 8 ranks miss (7/8)⁸ = 34 % of an epoch's images and repeat others."""
    num_images, ranks = 8192, 8
    sizes = dict(global_batch=256, world_size=ranks, micro_batch=32)
    shared = [rank_batches(epoch_order(num_images, 0, 0), rank=rank, **sizes) for rank in range(ranks)]
    own = [rank_batches(epoch_order(num_images, seed, 0), rank=seed, **sizes) for seed in range(ranks)]
    right, wrong = (np.bincount(np.ravel(images), minlength=num_images) for images in (shared, own))
    assert (right == 1).all()
    assert (wrong == 0).mean() == pytest.approx((7 / 8) ** 8, abs=0.02) and wrong.max() > 3


# --- Sec. 5.1: no weight decay on batch norm --------------------------------------------------------------------------


def groups_by_name(model, weight_decay, *_):
    """The usual search, which misses torchvision's shortcuts, whose batch norms are called downsample.1."""
    named = dict(model.named_parameters())
    return [
        {"params": [p for name, p in named.items() if "bn" not in name], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if "bn" in name], "weight_decay": 0.0},
    ]


def test_batch_norm_found_by_its_name_decays_in_the_shortcuts(monkeypatch, expected):
    model = resnet50()
    decaying = [
        {p for group in groups(model, 1e-4) if group["weight_decay"] for p in group["params"]}
        for groups in (decay_groups, groups_by_name)
    ]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [sum(norm.weight in those and norm.bias in those for norm in norms) for those in decaying] == [0, 4]
    assert len(norms) == 53
    assert distance(weights(recipe()), expected) < BOUND
    monkeypatch.setattr("lbsgd.train.parts.decay_groups", groups_by_name)
    assert distance(weights(recipe()), expected) > 100 * BOUND


def test_gamma_and_beta_do_not_decay_and_everything_else_does(expected):
    decayed, undecayed = recipe(), recipe()
    decayed["lbsgd"]["weight_decay"] = {"on_batch_norm": True}
    undecayed["optimizer"]["params"]["weight_decay"] = 0.0
    assert distance(weights(recipe()), expected) < BOUND
    assert distance(weights(decayed), expected) > 100 * BOUND
    assert distance(weights(undecayed), expected) > 100 * BOUND


# --- Sec. 2.3: n images per worker, and statistics that move once per iteration ---------------------------------------


def test_statistics_across_workers_are_another_network(monkeypatch, expected):
    assert distance(weights(recipe(micro_batch=K * N)), expected) < BOUND
    assert distance(weights(recipe(micro_batch=K * N, scope="all")), expected) > 100 * BOUND
    monkeypatch.setattr("lbsgd.train.parts.convert_batch_norm", torchs_own)  # over the whole micro batch
    assert distance(weights(recipe(micro_batch=K * N)), expected) > 100 * BOUND


def moving_at_every_pass(model, per_worker_batch, passes, *options):
    return convert_batch_norm(model, per_worker_batch, 1, *options)


def moving_at_every_group(model, *options):
    def record(norm, moments, count):
        for mean, var in moments.unbind(1):
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var, norm.momentum)

    for module in convert_batch_norm(model, *options).modules():
        if isinstance(module, PerWorkerBatchNorm):
            module._record = record.__get__(module)
    return model


def torchs_own(model, *_):
    return model


@pytest.mark.parametrize(
    "micro_batch, mistake", [(2 * N, moving_at_every_pass), (K * N, moving_at_every_group), (N, torchs_own)]
)
def test_statistics_move_once_an_iteration(monkeypatch, expected, micro_batch, mistake):
    """Statistics moved more often forget faster. Training does not use them, so only evaluation suffers."""
    assert distance(weights(recipe(micro_batch=micro_batch)), expected) < BOUND
    monkeypatch.setattr("lbsgd.train.parts.convert_batch_norm", mistake)
    wrong = weights(recipe(micro_batch=micro_batch))
    (same, moved), (right_weights, right_statistics) = split(wrong), split(expected)
    assert distance(same, right_weights) < BOUND
    assert distance(moved, right_statistics) > 100 * BOUND


# --- Sec. 2.2 and 5.1: the learning rate of every iteration -----------------------------------------------------------


def in_plain_deepspeed(config, lr_scheduler=None, **ramp):
    """Return an engine with lbsgd's batch norm and optimizer. DeepSpeed steps its scheduler, by default the JSON's."""
    plan = Plan.read(config, 1)
    model = convert_batch_norm(network(), N, plan.accumulation_steps)
    config = deepspeed_config(plan)
    config["scheduler"] = {"type": "WarmupLR", "params": config["scheduler"]["params"] | ramp}
    return deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, plan), config=config, lr_scheduler=lr_scheduler
    )[0], plan


def test_warmup_lr_is_one_iteration_late_and_by_default_logarithmic():
    """Compare the first 15 iterations. After them WarmupLR would also miss the decay."""
    expected, _ = oracle.train(network(), iterations=15)
    engine, plan = lbsgd.initialize(network(), recipe())
    right = [lr for lr, _ in train(engine, plan, last=15)]
    assert distance(gather_state(engine).weights, expected) < BOUND
    for kind in ("linear", "log"):
        engine, plan = in_plain_deepspeed(recipe(), warmup_type=kind)
        wrong = [lr for lr, _ in train(engine, plan, last=15)]
        assert distance(gather_state(engine).weights, expected) > 100 * BOUND
        assert wrong[:2] == [0.05, 0.05]
        if kind == "linear":
            assert wrong[1:] == pytest.approx(right[:-1])
        else:
            assert wrong[2] - wrong[1] > 3 * (right[2] - right[1])  # a logarithm's first step is its largest
    assert WarmupLR(torch.optim.SGD([torch.zeros(1)], lr=1)).warmup_type == "log"


def test_overflow_makes_a_scheduler_that_is_stepped_after_updates_fall_behind():
    """After two skipped updates everything, including the decay, comes two iterations late."""

    def overflow(engine, loss):
        overflows = engine.global_steps in (2, 5) and engine.is_gradient_accumulation_boundary()
        engine.backward(loss * float("inf") if overflows else loss)

    config = recipe(stage=1)
    config["zero_optimization"]["compute_grad_norm"] = True  # in fp32 ZeRO checks only the norm
    engines = [
        lbsgd.initialize(network(), config),
        in_plain_deepspeed(config, lr_scheduler=lambda optimizer: LinearScalingWarmupLR(optimizer, SCHEDULE)),
    ]
    right, wrong = ([lr for lr, _ in train(engine, plan, backward=overflow)] for engine, plan in engines)
    assert [engine.skipped_steps for engine, _ in engines] == [2, 2]
    assert right == [learning_rate(t, SCHEDULE) for t in range(ITERATIONS)]
    assert wrong == [learning_rate(t - (t > 2) - (t > 5), SCHEDULE) for t in range(ITERATIONS)] != right
