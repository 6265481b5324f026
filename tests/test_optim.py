"""Remark 2: momentum when the learning rate changes. Sec. 5.1: no weight decay on batch norm."""

import copy
import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups

WARMUP = [0.1, 0.1, 0.72, 1.34, 1.96, 2.58, 3.2, 3.2]  # a ramp to η = 3.2 as at 8k, in five iterations
SCHEDULE = WARMUP + [0.32, 0.32, 0.032]


def gradient(w, t):
    """Return the gradient of a bowl that is steeper in some directions and perturbed differently in each iteration."""
    curvature = torch.linspace(0.05, 0.5, w.numel(), dtype=w.dtype)
    return curvature * w + torch.cos(t + torch.arange(w.numel(), dtype=w.dtype))


def descend(optimizer_class, learning_rates, dtype=torch.float64, **options):
    w = torch.linspace(-1, 1, 6, dtype=dtype).requires_grad_()
    optimizer = optimizer_class([w], **{"lr": learning_rates[0], "momentum": 0.9, "weight_decay": 1e-2, **options})
    for t, lr in enumerate(learning_rates):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = gradient(w.detach(), t)
        optimizer.step()
    return w.detach()


# --- the two forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, by_hand",
    [
        # g = 1 and m = 0.5 throughout, η = 0.1 and then 0.2, from w = 1
        (dict(form="lr_outside"), [1 - 0.1 * 1, 0.9 - 0.2 * 1.5]),
        (dict(form="lr_inside"), [1 - 0.1, 0.9 - (0.5 * 2 * 0.1 + 0.2)]),
        (dict(form="lr_inside", correction=False), [1 - 0.1, 0.9 - (0.5 * 0.1 + 0.2)]),
        (dict(form="lr_outside", nesterov=True), [1 - 0.1 * 1.5, 0.85 - 0.2 * (0.5 * 1.5 + 1)]),
        (dict(form="lr_inside", nesterov=True), [1 - (0.5 * 0.1 + 0.1), 0.85 - (0.5 * 0.3 + 0.2)]),
    ],
)
def test_two_steps_worked_by_hand(options, by_hand):
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = MomentumCorrectedSGD([w], lr=0.1, momentum=0.5, **{"nesterov": False, **options})
    for lr, expected in zip((0.1, 0.2), by_hand, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert w.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("kernels", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_the_papers_form_is_torch_sgd_bit_for_bit(kernels, nesterov):
    options = dict(nesterov=nesterov, dtype=torch.float32, **kernels)
    ours, torchs = (descend(kind, SCHEDULE, **options) for kind in (MomentumCorrectedSGD, torch.optim.SGD))
    assert torch.equal(ours, torchs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.just(0.0) | st.floats(1e-3, 4), min_size=1, max_size=12), st.booleans())
@example([0.1, 0.1, 0.0, 0.1], False)
@example([0.0, 0.0, 0.1], True)
def test_remark_2_makes_both_forms_equal_whatever_the_learning_rate_does(learning_rates, nesterov):
    outside, inside = (
        descend(MomentumCorrectedSGD, learning_rates, form=form, nesterov=nesterov)
        for form in ("lr_outside", "lr_inside")
    )
    torch.testing.assert_close(inside, outside, rtol=1e-10, atol=1e-10)


def test_without_correction_the_forms_part_when_the_learning_rate_changes_and_only_then():
    for learning_rates, parted in (([3.2] * 8, False), (WARMUP, True)):
        outside, uncorrected = (
            descend(MomentumCorrectedSGD, learning_rates, form=form, correction=correction)
            for form, correction in (("lr_outside", True), ("lr_inside", False))
        )
        distance = (uncorrected - outside).abs().max()
        assert distance > 1 if parted else distance < 1e-12


class CorrectedTwice(torch.optim.SGD):
    """The known bug: Caffe2's correction, made for form (10), applied to torch's form (9)."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" in state:
                    state["momentum_buffer"] *= group["lr"] / state["last_lr"]
                state["last_lr"] = group["lr"]
        super().step()


def test_the_correction_of_form_10_on_form_9_is_a_bug_that_shows():
    right, wrong = (descend(kind, WARMUP, nesterov=True) for kind in (MomentumCorrectedSGD, CorrectedTwice))
    assert (right - wrong).abs().max() > 1
    constant = [descend(kind, [3.2] * 8, nesterov=True) for kind in (MomentumCorrectedSGD, CorrectedTwice)]
    torch.testing.assert_close(*constant)  # it does not show while η is constant


def test_a_learning_rate_of_zero_gathers_momentum_and_moves_nothing():
    """m = 0.9 and g = 1: the steps are 0.1, 0.1 · 1.9, 0 and 0.1 · 3.439."""
    for form in ("lr_outside", "lr_inside"):
        w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = MomentumCorrectedSGD([w], lr=0.1, nesterov=False, form=form)
        for lr, moved in ((0.1, 0.1), (0.1, 0.29), (0.0, 0.29), (0.1, 0.6339)):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.ones_like(w)
            optimizer.step()
            assert -w.item() == pytest.approx(moved, rel=1e-12), form


def test_before_any_learning_rate_momentum_has_the_unit_of_its_group():
    """A checkpoint keeps one last learning rate for all groups, without their factors."""
    w, bias = (torch.ones(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [w]}, {"params": [bias], "lr_factor": 2.0}]
    optimizer = MomentumCorrectedSGD(groups, lr=0.0, form="lr_inside")
    w.grad = bias.grad = torch.ones(1)
    optimizer.step()
    assert (optimizer.state[w]["last_lr"], optimizer.state[bias]["last_lr"]) == (1.0, 2.0)
    assert optimizer.state[bias]["momentum_buffer"] == 2 * optimizer.state[w]["momentum_buffer"]


@pytest.mark.parametrize("saved, built", [("lr_outside", "lr_inside"), ("lr_inside", "lr_outside")])
def test_momentum_of_the_other_form_is_refused(saved, built):
    """v = η·u: if one were taken for the other, momentum would be wrong by a factor of η."""
    w = torch.ones(2, requires_grad=True)
    first, second = (MomentumCorrectedSGD([w], lr=0.1, form=form) for form in (saved, built))
    second.load_state_dict(first.state_dict())  # without momentum so far
    w.grad = torch.ones(2)
    first.step()
    with pytest.raises(ValueError, match=f"momentum of form '{saved}', and the optimizer has form '{built}'"):
        second.load_state_dict(first.state_dict())
    assert not second.state


@pytest.mark.parametrize("correction", [True, False])
def test_a_first_learning_rate_of_zero_divides_nothing(correction):
    options = dict(form="lr_inside", correction=correction)
    zero_first = descend(MomentumCorrectedSGD, [0.0, 0.1], **options)
    assert zero_first.isfinite().all() and not torch.equal(zero_first, descend(MomentumCorrectedSGD, [0.0], **options))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"form": "nesterov"}, "'nesterov' must be one of"),
        ({"correction": False}, "corrected by construction"),
        ({"form": "lr_inside", "fused": True}, "foreach kernels only"),
        ({"form": "lr_inside", "foreach": False}, "foreach kernels only"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MomentumCorrectedSGD([torch.zeros(1, requires_grad=True)], lr=0.1, **wrong)


# --- what DeepSpeed does to an optimizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lr_outside", "lr_inside"])
def test_zero_may_step_flat_slices_one_group_at_a_time(form):
    """Slices may end inside a parameter, groups may be empty, and parameters may have no gradient."""
    whole = [torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    slices = [w.detach().clone()[part].requires_grad_() for w in whole for part in (slice(0, 2), slice(2, 6))]
    unused = torch.ones(3, requires_grad=True)

    def optimizer_of(*groups):
        return MomentumCorrectedSGD([{"params": params} for params in groups], lr=0.1, weight_decay=1e-2, form=form)

    at_once, as_zero = optimizer_of(whole), optimizer_of(slices[:2], slices[2:], [unused], [])
    for t, lr in enumerate(SCHEDULE):
        for w, its_slices in zip(whole, (slices[:2], slices[2:]), strict=True):
            w.grad = gradient(w.detach(), t)
            its_slices[0].grad, its_slices[1].grad = w.grad[:2].clone(), w.grad[2:].clone()
        at_once.param_groups[0]["lr"] = lr
        at_once.step()
        groups = as_zero.param_groups
        for group in groups:
            group["lr"] = lr
            as_zero.param_groups = [group]
            as_zero.step()
        as_zero.param_groups = groups
    torch.testing.assert_close(torch.cat(slices), torch.cat(whole), rtol=1e-14, atol=0)
    assert unused.eq(1).all() and unused not in as_zero.state


@pytest.mark.parametrize("form", ["lr_outside", "lr_inside"])
@pytest.mark.parametrize("how", ["checkpoint", "deepcopy"])
def test_momentum_survives_a_restart_in_the_middle_of_the_ramp(form, how):
    def continued(w, optimizer, learning_rates):
        for t, lr in learning_rates:
            optimizer.param_groups[0]["lr"] = lr
            w.grad = gradient(w.detach(), t)
            optimizer.step()
        return w.detach()

    w = torch.linspace(-1, 1, 6).requires_grad_()
    optimizer = MomentumCorrectedSGD([w], lr=0.1, form=form)
    steps = list(enumerate(WARMUP))
    continued(w, optimizer, steps[:4])
    if how == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = w.detach().clone().requires_grad_()
        restarted = MomentumCorrectedSGD([again], lr=0.1, form=form)
        restarted.load_state_dict(torch.load(file))
    else:
        again, restarted = copy.deepcopy((w, optimizer))
    assert torch.equal(continued(again, restarted, steps[4:]), continued(w, optimizer, steps[4:]))


def test_the_last_learning_rate_is_a_plain_number_beside_the_momentum():
    w = torch.ones(2, requires_grad=True)
    optimizer = MomentumCorrectedSGD([w], lr=0.1, form="lr_inside")
    w.grad = torch.ones(2)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert set(optimizer.state[w]) == {"momentum_buffer", "last_lr"} and type(optimizer.state[w]["last_lr"]) is float


@pytest.mark.parametrize("form", ["lr_outside", "lr_inside"])
def test_step_hooks_run_once_per_step_whoever_built_a_plain_sgd_before(form):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on SGD.step itself runs hooks
    w, called = nn.Parameter(torch.ones(1)), []
    optimizer = MomentumCorrectedSGD([w], lr=0.1, form=form)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("of all optimizers"))
    w.grad = torch.ones(1)
    optimizer.step()
    everywhere.remove()
    assert called == ["before", "after", "of all optimizers"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_and_momentum_of_another_layout_meet_their_own_weights(nesterov):
    """torch's fused kernel on a CPU walks through memory and ignores strides (test_upstream.py)."""
    weight = torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    gradients, buffer, found = torch.randn(2, 4, 3, 2, 2), torch.randn(4, 3, 2, 2), []
    for fused in (True, False):
        p = torch.nn.Parameter(weight.clone())
        sgd = MomentumCorrectedSGD([p], 0.1, nesterov=nesterov, fused=fused)
        sgd.state[p]["momentum_buffer"] = buffer.clone()  # as if loaded from a file
        for gradient in gradients:
            p.grad = gradient.clone()
            sgd.step()
        found += [p.detach(), sgd.state[p]["momentum_buffer"]]
    torch.testing.assert_close(found[:2], found[2:])


def test_a_closure_and_an_empty_group_meet_the_same_layouts():
    torch.manual_seed(0)
    weight, gradient, found = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), []
    for fused in (True, False):
        p = torch.nn.Parameter(weight.to(memory_format=torch.channels_last, copy=True))
        sgd = MomentumCorrectedSGD([{"params": []}, {"params": [p]}], 0.1, fused=fused)

        def closure(p=p):
            p.grad = gradient.clone()
            return 3.0

        assert sgd.step(closure) == 3.0
        found.append(p.detach())
    torch.testing.assert_close(*found)


# --- what decays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True])
def test_the_106_batch_norm_parameters_of_resnet50_do_not_decay(converted):
    from torchvision.models import resnet50

    model = convert_batch_norm(resnet50(), 32) if converted else resnet50()
    decay, batch_norm = decay_groups(model, 1e-4)
    assert (decay["name"], decay["weight_decay"], len(decay["params"])) == ("decay", 1e-4, 55)  # 53 convolutions and fc
    assert (batch_norm["name"], batch_norm["weight_decay"], len(batch_norm["params"])) == ("batch_norm", 0.0, 2 * 53)
    assert any(p is model.fc.bias for p in decay["params"])
    by_name = [name for name, _ in model.named_parameters() if "bn" in name]
    assert len(by_name) == 2 * 49  # a search for "bn" misses the four shortcuts


def test_batch_norm_decays_when_asked_to():
    groups = decay_groups(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 1e-4, on_batch_norm=True)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 1e-4), ("batch_norm", 1e-4)]


def test_frozen_parameters_are_left_out_shared_ones_stand_once_and_no_group_is_empty():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    (decay,) = decay_groups(model, 1e-4)
    assert [id(p) for p in decay["params"]] == [id(model[0].weight), id(model[1].bias)]


def test_gamma_inside_another_parameter_is_refused_because_it_would_decay():
    """FSDP flattens all parameters of a module into one, and leaves views of it, unless use_orig_params is set."""
    flat = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    flat.flat_parameter = nn.Parameter(torch.ones(4))
    del flat[1].weight, flat[1].bias
    flat[1].weight, flat[1].bias = flat.flat_parameter.split(2)
    with pytest.raises(ValueError, match=r"^weight of the batch norm 1 is part of another .* use_orig_params=True$"):
        decay_groups(flat, 1e-4)
    fixed = nn.BatchNorm1d(2)
    for name in ("weight", "bias"):
        delattr(fixed, name)
        fixed.register_buffer(name, torch.ones(2))
    assert decay_groups(fixed, 1e-4) == []


def test_one_step_without_a_gradient_shrinks_all_but_batch_norm():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(model)
    optimizer = MomentumCorrectedSGD(decay_groups(model, 0.5), lr=0.1, nesterov=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now, then * (1 if name.startswith("1.") else 1 - 0.1 * 0.5))


@pytest.mark.parametrize("option", ["maximize", "dampening"])
def test_form_10_refuses_options_of_torch_s_that_it_does_not_have(option):
    w = torch.zeros(1, requires_grad=True)
    group = {"params": [w], option: True, "nesterov": False}
    with pytest.raises(ValueError, match=f"form 'lr_inside' has no {option}"):
        MomentumCorrectedSGD([group], lr=0.1, form="lr_inside")
    optimizer = MomentumCorrectedSGD([torch.zeros(1, requires_grad=True)], lr=0.1, form="lr_inside")
    with pytest.raises(ValueError, match=f"form 'lr_inside' has no {option}"):
        optimizer.add_param_group(group)
    assert MomentumCorrectedSGD([group], lr=0.1).param_groups[0][option] is True


def test_the_decay_is_given_by_name_because_its_place_is_not_torch_s():
    with pytest.raises(TypeError, match="positional"):
        MomentumCorrectedSGD([torch.zeros(1, requires_grad=True)], 0.1, 0.9, 0, 1e-4)


def test_biases_with_a_learning_rate_of_their_own_may_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    groups = {group["name"]: group for group in decay_groups(model, 0.1, bias_lr_factor=2.0)}
    assert groups["biases"]["params"] == [model[0].bias] and groups["decay"]["params"] == [model[0].weight]
    assert (groups["biases"]["lr_factor"], groups["biases"]["weight_decay"]) == (2.0, 0.1)


def test_no_momentum_is_taken_for_a_momentum_of_0():
    """As torch's own SGD does, which used to keep None in its state."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = MomentumCorrectedSGD([weight], 0.1, momentum=0.9, nesterov=False, form="lr_inside")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": None}}})
    weight.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
