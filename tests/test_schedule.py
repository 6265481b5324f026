"""The learning rate of each update, compared with values worked out by hand from Sec. 2.1, 2.2 and 5.1."""

import math

import numpy as np
import pytest

import lbsgd
from lbsgd.algorithm.schedule import Schedule, learning_rate, scaled_lr

EIGHT_K = Schedule(
    base_lr=0.1, reference_lr=3.2, warmup_kind="gradual", warmup_iterations=780, decay_iterations=(4680, 9360, 12480)
)


def test_linear_rule_multiplies_the_lr_by_kn_over_256():
    assert scaled_lr(8192, 0.1, 256) == pytest.approx(3.2)
    assert scaled_lr(256, 0.1, 256) == 0.1
    assert scaled_lr(64, 0.1, 256) == 0.025  # also below 256; tensorpack's integer division makes this 0


def test_table_2a_rules_give_the_papers_learning_rates():
    assert scaled_lr(8192, 0.1, 256, "sqrt") == pytest.approx(0.1 * 32**0.5)
    assert scaled_lr(8192, 0.1, 256, "fixed") == 0.1
    with pytest.raises(ValueError, match="linear, sqrt, fixed"):
        scaled_lr(8192, 0.1, 256, "cubic")


@pytest.mark.parametrize(
    "iteration, expected",
    [
        (0, 0.1),
        (1, 0.1 + 3.1 / 780),
        (390, 1.65),
        (779, 3.2 - 3.1 / 780),
        (780, 3.2),
        (4679, 3.2),
        (4680, 0.32),
        (9359, 0.32),
        (9360, 0.032),
        (12479, 0.032),
        (12480, 0.0032),
        (14039, 0.0032),
    ],
)
def test_8k_schedule_follows_section_5_1(iteration, expected):
    assert learning_rate(iteration, EIGHT_K) == pytest.approx(expected, rel=1e-12)


def test_gradual_warmup_starts_at_base_lr_and_ends_at_the_reference_lr_exactly():
    assert learning_rate(0, EIGHT_K) == 0.1
    assert learning_rate(780, EIGHT_K) == 3.2


def test_gradual_warmup_adds_the_same_amount_every_iteration():
    steps = [learning_rate(t + 1, EIGHT_K) - learning_rate(t, EIGHT_K) for t in range(780)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-9)
    assert steps[0] == pytest.approx(0.00397, abs=5e-6)  # the paper's derived value


def test_constant_warmup_holds_base_lr_and_then_jumps():
    schedule = Schedule(0.1, 3.2, "constant", 780, (4680,))
    assert [learning_rate(t, schedule) for t in (0, 779, 780, 4680)] == [0.1, 0.1, 3.2, pytest.approx(0.32)]


def test_without_warmup_the_first_update_takes_the_reference_lr():
    assert learning_rate(0, Schedule(0.1, 3.2)) == 3.2


@pytest.mark.parametrize(
    "kind, message", [("linear", "must be one of gradual, constant, none"), ("none", "use gradual")]
)
def test_a_warmup_that_would_silently_be_another_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        Schedule(0.1, 3.2, kind, 780)


def test_a_decay_that_would_raise_the_learning_rate_is_refused():
    for make in (lambda: Schedule(0.1, 3.2, decay_factor=10), lambda: lbsgd.LargeMinibatchSGD(decay_factor=10)):
        with pytest.raises(ValueError, match="decay_factor is 10, and would raise the learning rate: give 0.1"):
            make()
    assert learning_rate(9, Schedule(0.1, 3.2, decay_iterations=(5,), decay_factor=1)) == 3.2


def test_a_decay_inside_the_warmup_is_refused():
    for decays in [(30, 60), [60, 30]]:
        with pytest.raises(ValueError, match="^the decay at epoch 30 is inside the 50 of warmup$"):
            lbsgd.LargeMinibatchSGD(warmup_epochs=50, decay_epochs=decays)
    lbsgd.LargeMinibatchSGD(warmup_epochs=30), lbsgd.LargeMinibatchSGD(warmup_epochs=5, decay_epochs=())
    lbsgd.LargeMinibatchSGD(warmup_epochs=50, target_batch_size=256)  # has no warmup
    for points in (range(30, 90, 30), [30, 60], np.array([30, 60])):
        assert lbsgd.LargeMinibatchSGD(decay_epochs=points).schedule(10).decay_iterations == (300, 600)
    for wrong in (math.nan, math.inf, "30", -1):
        with pytest.raises(ValueError, match="^a point of decay_epochs is "):
            lbsgd.LargeMinibatchSGD(decay_epochs=(30, wrong))


def test_a_decay_point_and_a_warmup_inside_an_epoch_are_the_nearest_iteration():
    rule = lbsgd.LargeMinibatchSGD(0.1, 256, 512, warmup_epochs=0.29, decay_epochs=(0.57, 2.3))
    schedule = rule.schedule(100)  # 0.57 * 100 = 56.99999999999999 and 0.29 * 100 = 28.999999999999996
    assert (schedule.warmup_iterations, schedule.decay_iterations) == (29, (57, 230))
