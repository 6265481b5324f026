"""lbsgd inside DeepSpeed: its learning rates, and a state that moves between world sizes and ZeRO stages."""

import copy
import logging
import sys

import deepspeed
import oracle
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from oracle import BOUND, ITERATIONS, K, N, distance, global_batch, network
from processes import in_processes
from small_engine import aggregated, in_precision, recipe, train, trained
from torch.nn import functional as F

import lbsgd
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.config.keypath import put
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.config.precision import set_precision
from lbsgd.errors import ConfigError, TrainingError
from lbsgd.train.deepspeed_setup import require_real
from lbsgd.train.engine import start_processes
from lbsgd.train.engine_state import SCALER_FIELDS, gather_state, restore_state, to_host
from lbsgd.train.parts import require_network
from lbsgd.train.trained import every_parameter


@pytest.fixture(scope="module")
def expected():
    return oracle.train(network())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_update_takes_the_lr_of_its_iteration_in_every_group(stage):
    _, lrs = trained(recipe(stage))
    assert lrs == [[learning_rate(t, Plan.read(recipe(), 1).schedule)] * 2 for t in range(ITERATIONS)]
    assert [lr for lr, _ in lrs] == pytest.approx([oracle.learning_rate(t) for t in range(ITERATIONS)], rel=1e-15)
    assert lrs[0][0] == 0.05 and lrs[10][0] == 0.4 and lrs[15][0] == pytest.approx(0.04)


def test_an_update_that_overflow_skips_shifts_no_later_learning_rate():
    config = recipe(stage=1, micro_batch=K * N)
    config["zero_optimization"]["compute_grad_norm"] = True  # in fp32 ZeRO checks only the norm
    engine, plan = lbsgd.initialize(network(), config)
    infinite = float("inf")
    lrs = train(
        engine,
        plan,
        backward=lambda engine, loss: engine.backward(loss * infinite if engine.global_steps in (0, 3) else loss),
    )
    assert engine.skipped_steps == 2
    assert lrs == [[learning_rate(t, plan.schedule)] * 2 for t in range(ITERATIONS)]


def test_a_state_before_the_first_update_that_overflow_does_not_skip_has_no_momentum():
    config = recipe(stage=1, micro_batch=K * N)
    config["zero_optimization"]["compute_grad_norm"] = True  # in fp32 ZeRO checks only the norm
    engine, plan = lbsgd.initialize(network(), config)
    train(engine, plan, last=1, backward=lambda engine, loss: engine.backward(loss * float("inf")))
    state = gather_state(engine)
    assert (engine.global_steps, engine.skipped_steps, state.momentum) == (1, 1, {})
    again, _ = lbsgd.initialize(network(seed=1), config)
    restore_state(again, state)
    assert all(torch.equal(tensor, state.weights[name]) for name, tensor in gather_state(again).weights.items())


def test_the_loss_scale_falls_and_grows_as_deepspeed_s(monkeypatch):
    """Here it halves at the second overflow in a row, and doubles in the third update after an overflow."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = in_precision("fp16", 1, K * N, loss_scale_window=2, hysteresis=2, consecutive_hysteresis=True)
    engine, plan = lbsgd.initialize(network(), config)
    scales = []
    for number, factor in enumerate([float("inf")] * 2 + [1] * 3):
        train(engine, plan, number, number + 1, lambda engine, loss: engine.backward(loss * factor))  # noqa: B023
        scales.append(engine.optimizer.loss_scale)
    assert engine.skipped_steps == 2 and scales == [1024, 512, 512, 512, 1024]


def test_all_that_an_update_changes_in_the_loss_scaler_is_part_of_the_state():
    start_processes()  # whose rank DeepSpeed asks for
    scaler, changed = DynamicLossScaler(1024, 2, 1, delayed_shift=2, consecutive_hysteresis=True), set()
    for overflow in [True] * 2 + [False] * 3:
        before = dict(vars(scaler))
        scaler.update_scale(overflow)
        changed |= {name for name, value in vars(scaler).items() if value != before[name]}
    assert changed == {*SCALER_FIELDS}


def test_a_fixed_loss_scale_has_no_state(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    engine, _ = lbsgd.initialize(network(), in_precision("fp16", 1, K * N, loss_scale=128))
    state = gather_state(engine)
    restore_state(engine, state)
    assert "loss_scaler" not in state.counters and engine.optimizer.loss_scale == 128


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.float32), (torch.float64,) * 2, (torch.int64,) * 2])
def test_the_state_is_a_copy_in_at_least_float32(dtype, kept):
    tensor = torch.ones(2, dtype=dtype)
    copied = to_host(tensor)
    tensor.zero_()
    assert copied.dtype is kept and copied.tolist() == [1, 1]


@pytest.mark.parametrize("stage", [0, 1])
def test_in_fp32_no_update_is_skipped_unsaid(stage):
    """The trainer ends a run whose loss is not a number. With its norm of gradients ZeRO would skip updates forever."""
    engine, plan = lbsgd.initialize(network(), recipe(stage=stage, micro_batch=K * N))
    train(engine, plan, last=2, backward=lambda engine, loss: engine.backward(loss * float("inf")))
    assert engine.skipped_steps == 0 and not all(weight.isfinite().all() for weight in engine.module.parameters())


def restore_on_two_processes(states):
    return {stage: trained(recipe(stage), state=state, seed=1)[0] for stage, state in states.items()}


def test_a_state_moves_between_world_sizes_and_zero_stages(expected):
    weights, momentum = expected
    halves = {stage: trained(recipe(stage), last=ITERATIONS // 2)[0] for stage in (0, 1, 2)}
    there = in_processes(2, restore_on_two_processes, {0: halves[2], 1: halves[0], 2: halves[1]})[0]
    for stage in (0, 1, 2):
        assert there[stage].counters["iteration"] == ITERATIONS
        assert distance(there[stage].weights, weights) < BOUND
        assert distance(there[stage].momentum, momentum) < BOUND


def test_a_process_that_only_takes_part_keeps_nothing_of_the_state():
    engine, plan = lbsgd.initialize(network(), recipe(1))
    train(engine, plan, last=1)
    only_counted, whole = gather_state(engine, keep=False), gather_state(engine)
    assert (only_counted.weights, only_counted.momentum, only_counted.counters) == ({}, {}, whole.counters)
    assert list(whole.weights) == list(engine.module.state_dict()) and len(whole.momentum) > 0


def test_momentum_and_counters_are_part_of_the_state():
    """The check can fail: without the momentum, or an iteration off, the resumed run ends elsewhere."""
    half, _ = trained(recipe(), last=ITERATIONS // 2)
    whole, _ = trained(recipe())
    resumed, _ = trained(recipe(), state=half, seed=1)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
    weights = {name: tensor for name, tensor in whole.weights.items() if "num_batches_tracked" not in name}
    broken = copy.deepcopy(half)
    for tensor in broken.momentum.values():
        tensor.zero_()
    assert distance(trained(recipe(), state=broken)[0].weights, weights) > 100 * BOUND
    broken = copy.deepcopy(half)
    broken.counters["iteration"] += 1
    assert distance(trained(recipe(), state=broken)[0].weights, weights) > 100 * BOUND


def test_a_restored_engine_counts_and_schedules_from_where_the_state_was_taken():
    engines = [lbsgd.initialize(network(), recipe())[0] for _ in range(2)]
    train(engines[0], Plan.read(recipe(), 1), last=3)
    restore_state(engines[1], gather_state(engines[0]))
    there, here = (
        (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps, engine.get_lr())
        for engine in engines
    )
    assert there == here and here[0] == 3


def test_form_10_keeps_the_last_lr_in_the_state(expected):
    config = recipe(momentum={"form": "lr_inside", "correction": True})
    half, _ = trained(config, last=2)  # in the middle of the ramp
    assert half.counters["last_lr"] == pytest.approx(0.05 + 0.35 / 10)
    resumed, _ = trained(config, state=half, seed=1)
    assert distance(resumed.weights, expected[0]) < BOUND  # corrected, (10) is (9)
    half.counters["last_lr"] *= 2
    assert distance(trained(config, state=half)[0].weights, expected[0]) > 100 * BOUND


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_parameter_is_part_of_the_state(stage, shape):
    """As of a layer without outputs."""
    engines = []
    for seed in range(2):
        model = network(seed)
        model.empty = torch.nn.Parameter(torch.zeros(shape))
        engines.append(lbsgd.initialize(model, recipe(stage))[0])
    train(engines[0], Plan.read(recipe(stage), 1), last=1)
    state = gather_state(engines[0])
    assert state.weights["empty"].shape == state.momentum["empty"].shape == shape
    restore_state(engines[1], state)
    found = gather_state(engines[1])
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in state.weights.items())
    assert all(torch.equal(tensor, found.momentum[name]) for name, tensor in state.momentum.items())


def test_one_process_reduces_nothing():
    engine, _ = lbsgd.initialize(network(), recipe())
    assert engine.enable_backward_allreduce is False


@pytest.mark.parametrize("micro_batch", [K * N, N])
def test_zero_1_takes_the_gradients_of_one_process_where_they_lie(monkeypatch, expected, micro_batch):
    """Without a hook or a copy of each. In fp16 the bits are those of DeepSpeed's copies, including overflows."""
    engine, _ = lbsgd.initialize(network(), aggregated(recipe(1, micro_batch=micro_batch)))
    assert engine.optimizer._grad_acc_hooks == []
    with pytest.raises(RuntimeError, match=r"use engine.backward\(loss\)"):
        engine(global_batch(0)[0][:micro_batch].to(engine.device)).mean().backward()
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedZeroOptimizer, "reduce_ready_partitions_and_remove_grads", None)  # which copies
        state, _ = trained(aggregated(recipe(1, micro_batch=micro_batch)))
    assert distance(state.weights, expected[0]) < BOUND and distance(state.momentum, expected[1]) < BOUND

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    fp16 = recipe(1, micro_batch=micro_batch)
    set_precision(fp16, "fp16")
    fp16["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    copied, _ = trained(fp16)
    in_place, _ = trained(aggregated(fp16))
    assert 0 < copied.counters["skipped_iterations"] == in_place.counters["skipped_iterations"]
    assert all(torch.equal(weight, in_place.weights[name]) for name, weight in copied.weights.items())


def test_gradients_that_wait_for_the_update_are_copied_before_another_forward():
    """A pass of CUDA graphs writes its gradients to where those of the pass before lie."""
    engine, _ = lbsgd.initialize(network(), aggregated(recipe(1, micro_batch=K * N)))
    images, labels = (part.to(engine.device) for part in global_batch(0))
    engine.backward(F.cross_entropy(engine(images), labels))
    waiting = [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group]
    before = [(gradient.data_ptr(), gradient.clone()) for gradient in waiting]
    engine(images)
    assert len(waiting) >= len(list(engine.module.parameters()))  # ZeRO also keeps its padding
    for gradient, (place, values) in zip(waiting, before, strict=True):
        assert gradient.data_ptr() != place and torch.equal(gradient, values)


@pytest.mark.parametrize("stage, aggregation", [(0, None), (1, None), (2, None), (1, {}), (0, {})])
@pytest.mark.parametrize("passes", [1, K])  # in the unfinished iteration, whose update never comes
def test_a_restored_state_forgets_the_gradients_of_an_unfinished_iteration(stage, aggregation, passes):
    config = recipe(stage)
    config["lbsgd"]["aggregation"] = aggregation
    state, _ = trained(config, last=2)
    expected, _ = trained(config, last=4, state=state)
    engine, plan = lbsgd.initialize(network(), config)
    images, labels = (part.to(engine.device) for part in global_batch(9))
    for number, (x, y) in enumerate(zip(images.split(N)[:passes], labels.split(N)[:passes], strict=True)):
        if number:
            engine.step()
        engine.backward(F.cross_entropy(engine(x), y))
    restore_state(engine, state)
    train(engine, plan, engine.global_steps, 4)
    lbsgd.agree_statistics(engine.module)
    found = gather_state(engine)
    assert [name for name, weight in expected.weights.items() if not torch.equal(weight, found.weights[name])] == []


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("zero_optimization.cpu_offload", True, "ZeRORuntimeException: You are using ZeRO-Offload"),
        ("zero_optimization.zenflow", {}, "ValueError: .* does not support ZenFlow"),
        ("bf16", {"bf16_optimizer_states": True}, "AssertionError: bf16_optimizer_states requires"),
        ("tensor_parallel.dtype", "fp16", "dtype in its TPTrainingConfig: Input should be an instance"),
        ("elasticity", {}, "DeepSpeedConfigError: Elastic training has been removed"),
        ("csv_monitor", {"enabled": True, "output_path": "/proc/x"}, "FileNotFoundError: .*/proc/x"),
    ],
)
def test_what_deepspeed_refuses_when_it_starts_is_one_line(key, value, words):
    """For a plan that no rule has checked, as if a rule were missing."""
    plan = Plan.read(recipe(stage=1), 1)
    put(plan.config, key, value)
    with pytest.raises(ConfigError, match=words) as refused:
        lbsgd.initialize(network(), plan)
    assert "\n" not in str(refused.value) and "correct or delete" in str(refused.value)


class TwoPaths(torch.nn.Module):
    """A network whose last layer is used in only some iterations."""

    def __init__(self):
        super().__init__()
        self.body, self.last, self.used = network(), torch.nn.Linear(5, 5), True

    def forward(self, x):
        return self.last(self.body(x)) if self.used else self.body(x)


def trained_on_two_paths(config):
    torch.manual_seed(0)
    engine, plan = lbsgd.initialize(TwoPaths(), config)
    for iteration in range(4):
        engine.module.used = iteration % 2 == 0
        train(engine, plan, iteration, iteration + 1)
    lbsgd.agree_statistics(engine.module)
    return gather_state(engine)


@pytest.mark.parametrize("momentum", [{}, {"form": "lr_inside"}])
def test_a_parameter_that_a_loss_does_not_use_counts_as_zeros_everywhere(momentum):
    [expected, _] = in_processes(2, trained_on_two_paths, recipe(0, momentum))
    configs = [recipe(0, momentum), recipe(1, momentum), recipe(2, momentum), aggregated(recipe(1, momentum))]
    for config in configs:
        state = trained_on_two_paths(config)
        assert distance(state.weights, expected.weights) < 1e-5 and distance(state.momentum, expected.momentum) < 1e-5


@pytest.mark.parametrize("stage, was, words", [(0, False, "conv.weight was unfrozen .* not be trained"), (0, True, "")]
    + [(stage, True, "conv.weight was frozen .* moving it by its momentum") for stage in (1, 2)])  # fmt: skip
def test_what_is_trained_is_what_was_when_the_engine_was_made(stage, was, words):
    model = network()
    model.conv.weight.requires_grad_(was)
    engine, plan = lbsgd.initialize(model, recipe(stage))
    train(engine, plan, last=1)
    before, state = engine.module.conv.weight.clone(), gather_state(engine)
    engine.module.conv.weight.requires_grad_(not was)
    if words:
        with pytest.raises(TrainingError, match=words):
            train(engine, plan, 1, 2)
        engine.eval()
        engine(global_batch(1)[0].to(engine.device))  # evaluation may still run
        return
    train(engine, plan, 1, 2)
    assert torch.equal(before, engine.module.conv.weight)
    restore_state(engine, state)
    assert torch.equal(gather_state(engine).weights["conv.weight"], before.float().cpu())


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["added", "fc"])
def test_a_layer_that_came_after_the_engine_was_made_is_refused_at_the_first_update(stage, name):
    engine, plan = lbsgd.initialize(network(), recipe(stage))
    setattr(engine.module, name, torch.nn.Linear(16, 5, device=engine.device))
    with pytest.raises(TrainingError, match=f"{name}.weight was added or replaced after .* would not be trained"):
        train(engine, plan, last=1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_engine_may_be_frozen_in_the_pass_of_another_as_in_a_gan(stage):
    torch.manual_seed(0)
    judge, plan = lbsgd.initialize(network(), recipe(stage, micro_batch=K * N))
    maker, _ = lbsgd.initialize(torch.nn.Conv2d(3, 3, 1), recipe(stage, micro_batch=K * N))
    for iteration in range(3):
        judge.module.requires_grad_(True)
        train(judge, plan, iteration, iteration + 1)
        judge.module.requires_grad_(False)
        before = [gather_state(each).weights["conv.weight" if each is judge else "weight"] for each in (judge, maker)]
        images, labels = (part.to(judge.device) for part in global_batch(iteration))
        maker.backward(F.cross_entropy(judge.module(maker(images)), labels))
        maker.step()
        after = [gather_state(each).weights["conv.weight" if each is judge else "weight"] for each in (judge, maker)]
        assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("stage", [0, 1])
def test_two_engines_may_train_the_parts_of_one_network(stage):
    model, engines = network(), []
    parts = [model.conv, model.fc]
    for part in parts:
        model.requires_grad_(False)
        part.requires_grad_(True)
        engines.append(lbsgd.initialize(model, recipe(stage, micro_batch=K * N)))
    for iteration, ((engine, plan), part) in enumerate(zip(engines, parts, strict=True)):
        model.requires_grad_(False)
        part.requires_grad_(True)
        before = [each.weight.detach().clone() for each in parts]
        train(engine, plan, iteration, iteration + 1)
        moved = [not torch.equal(old, each.weight) for old, each in zip(before, parts, strict=True)]
        assert moved == [each is part for each in parts]


def test_another_batch_is_refused_where_learning_rate_and_batch_norm_would_not_follow():
    engine, plan = lbsgd.initialize(network(), recipe())
    for change in (engine.set_train_batch_size, engine.set_train_micro_batch_size):
        with pytest.raises(ConfigError, match="initialize again with a plan of another batch"):
            change(2 * K * N)
    with pytest.raises(ConfigError, match="a plan has its num_images and overrides; give them to Plan.read"):
        lbsgd.initialize(network(), plan, num_images=640)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_optimizer_s_own_step_is_refused_because_it_passes_the_engine_by(stage):
    engine, plan = lbsgd.initialize(network(), recipe(stage, micro_batch=K * N))
    train(engine, plan, last=1)
    before = [p.detach().clone() for p in engine.module.parameters()]
    images, labels = global_batch(1)
    engine.backward(F.cross_entropy(engine(images), labels))
    with pytest.raises(ConfigError, match=r"^engine.optimizer.step\(\) [^\n]* call engine.step\(\)[^\n]*$"):
        engine.optimizer.step()
    assert all(map(torch.equal, before, engine.module.parameters()))


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_in_any_dense_layout_are_taken(stage):
    volumes = torch.nn.Unflatten(1, (4, 1, 1, 1)), torch.nn.Conv3d(4, 5, 1), torch.nn.Flatten()
    model = torch.nn.Sequential(network(), torch.nn.Linear(5, 4), *volumes)
    model[1].weight = torch.nn.Parameter(torch.randn(5, 4).t())
    model[3].to(memory_format=torch.channels_last_3d)
    engine, plan = lbsgd.initialize(model, recipe(stage))
    train(engine, plan, last=1)


def test_a_network_that_is_all_frozen_is_refused():
    with pytest.raises(ConfigError, match="no parameter to train; all are frozen"):
        lbsgd.initialize(network().requires_grad_(False), recipe())


@pytest.mark.parametrize("first", [torch.nn.LazyLinear(4), torch.nn.Linear(4, 4, device="meta")])
def test_weights_that_have_no_values_yet_are_refused_before_an_optimizer_takes_them(first):
    model = torch.nn.Sequential(first, network())
    with pytest.raises(ConfigError, match="0.weight of the network has no values yet: .* to_empty .* one forward"):
        lbsgd.initialize(model, recipe())
    with pytest.raises(ConfigError, match="0.weight of the network has no values yet"):
        lbsgd.parts_for(model, Plan.read(recipe(), 1))


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_a_trained_layer_with_sparse_gradients_is_refused_in_one_line(layer):
    words = torch.nn.Sequential(layer(4, 2, sparse=True))
    with pytest.raises(ConfigError, match=f"^0 is an {layer.__name__} with sparse gradients, .* sparse=False$"):
        require_network(words)
    require_network(words.requires_grad_(False)), require_network(layer(4, 2))


class Own(torch.nn.BatchNorm2d):
    """A subclass that might do more than torch's."""


@pytest.mark.parametrize(
    "norm, words",
    [
        (lambda: Own(3), "0 is a Own, neither torch's own batch norm nor timm's"),
        (lambda: torch.nn.LazyBatchNorm2d(affine=False), "0 is a LazyBatchNorm2d, still without channels"),
        (lambda: torch.jit.script(torch.nn.BatchNorm2d(3)), "0 is a BatchNorm2d in TorchScript"),
    ],
)
def test_a_batch_norm_that_cannot_be_converted_is_the_users_to_mend(norm, words):
    model = torch.nn.Sequential(norm(), network())
    with pytest.raises(ConfigError, match=words):
        lbsgd.initialize(model, recipe())
    with pytest.raises(ConfigError, match=words):
        lbsgd.parts_for(model, Plan.read(recipe(), 1))


class Scaled(torch.nn.Module):
    """The network with a learned temperature, as in contrastive networks."""

    def __init__(self, shape):
        super().__init__()
        self.inner, self.scale = network(), torch.nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x):
        return self.inner(x) * self.scale


def trained_with_a_scale(stage, shape):
    """Weights after 4 updates, with a state restored in the middle. Ranks begin with different scales."""
    model = Scaled(shape)
    with torch.no_grad():
        model.scale += torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    engine, plan = lbsgd.initialize(model, aggregated(recipe(stage)) if stage < 2 else recipe(stage))
    train(engine, plan, last=2)
    restore_state(engine, gather_state(engine))
    train(engine, plan, first=2, last=4)
    return gather_state(engine).weights


def with_and_without_a_dimension():
    return [[trained_with_a_scale(stage, shape) for shape in ((), (1,))] for stage in (0, 1, 2)]


def test_a_parameter_without_a_dimension_is_sent_and_trained_as_one_with_one():
    ranks = in_processes(2, with_and_without_a_dimension)
    for stage, (without, plain) in enumerate(ranks[0]):
        assert without["scale"].shape == () and abs(without["scale"] - 0.5) > 1e-4
        assert torch.equal(without["scale"].view(1), plain["scale"])
        assert torch.equal(without["scale"], ranks[1][stage][0]["scale"])


class Wide(torch.nn.Module):
    """The network in float64."""

    def __init__(self):
        super().__init__()
        self.inner = network().double()

    def forward(self, x):
        return self.inner(x.double())


def test_a_network_in_float64_goes_on_to_the_bit():
    engine, plan = lbsgd.initialize(Wide(), recipe())
    train(engine, plan, last=2)
    half_way = gather_state(engine)
    train(engine, plan, first=2, last=4)
    resumed, plan = lbsgd.initialize(Wide(), recipe())
    restore_state(resumed, half_way)
    train(resumed, plan, first=2, last=4)
    whole, parts = gather_state(engine).weights, gather_state(resumed).weights
    assert whole["inner.fc.weight"].dtype is torch.float64
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_refused_where_no_float32_copy_of_its_weights_is_kept(precision, dtype):
    plan, model = Plan.read(in_precision(precision, stage=int(precision == "fp16")), 1), network()
    model.fc.weight.data = model.fc.weight.data.to(dtype)
    if precision == "fp16":
        lbsgd.parts_for(model, plan)
        return
    for take in lbsgd.initialize, lbsgd.parts_for:
        with pytest.raises(ConfigError, match=f"fc.weight of the network is {str(dtype)[6:]}.* {precision} keeps its"):
            take(model, plan)
        assert type(model.bn) is torch.nn.BatchNorm2d
    lbsgd.parts_for(model, Plan.read(in_precision("fp32", stage=1), 1))  # ZeRO keeps a float32 copy
    model.fc.weight.requires_grad_(False)
    lbsgd.parts_for(model, plan)


class Complex(torch.nn.Module):
    """A layer with complex weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.weight).abs()


def trained_with_a_complex_weight(config):
    model = torch.nn.Sequential(network(), Complex())
    engine, plan = lbsgd.initialize(model, config)
    train(engine, plan, last=2)
    return model[1].weight.detach()


def test_complex_weights_train_without_zero_to_the_same_on_several_processes():
    alone = trained_with_a_complex_weight(recipe())
    assert alone.is_complex() and not torch.equal(alone, torch.ones_like(alone))
    for weight in in_processes(2, trained_with_a_complex_weight, aggregated(recipe())):
        torch.testing.assert_close(weight, alone)


def test_complex_weights_are_refused_where_deepspeed_loses_their_half_or_cannot_reduce_them():
    model = torch.nn.Sequential(network(), Complex())
    with pytest.raises(ConfigError, match="1.weight of the network is complex, and ZeRO stage 1 would lose"):
        lbsgd.initialize(model, recipe(1))
    lbsgd.parts_for(model, Plan.read(recipe(1), 1))  # for a loop without DeepSpeed
    require_real(model, Plan.read(aggregated(recipe()), 2))
    with pytest.raises(ConfigError, match="DeepSpeed cannot reduce its gradient, .* no lbsgd.aggregation; add that"):
        require_real(model, Plan.read(recipe(), 2))
    require_real(model.requires_grad_(False), Plan.read(recipe(), 2))


def test_deepspeed_does_not_warn_of_our_optimizer_and_still_warns_of_others():
    said = []
    logger, handler = logging.getLogger("DeepSpeed"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        lbsgd.initialize(network(), recipe(1))
        assert not any("untested optimizer" in line for line in said)
        model = network()
        config = {key: value for key, value in recipe(1).items() if key not in ("lbsgd", "optimizer", "scheduler")}
        deepspeed.initialize(model=model, optimizer=torch.optim.RMSprop(model.parameters()), config=config)
        assert any("untested optimizer" in line for line in said)
    finally:
        logger.removeHandler(handler)


def test_a_package_that_a_block_asks_for_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"lacks a package \(.*wandb.*; install it"):
        lbsgd.initialize(network(), recipe() | {"wandb": {"enabled": True}})


def test_another_number_of_passes_than_the_plans_is_refused():
    """Two processes that share a sequence count as one, so DeepSpeed takes twice as many passes."""
    plan = Plan.read(recipe(micro_batch=2 * N), 1)
    plan.config["sequence_parallel_size"] = 2
    passes = plan.accumulation_steps
    with pytest.raises(ConfigError, match=f"after {2 * passes} passes, and the plan after {passes}"):
        lbsgd.initialize(network(), plan)


@pytest.mark.parametrize("timers", [None, {}, {"throughput": {}}, {"throughput": {"synchronized": True}}])
def test_the_throughput_timer_is_off_unless_the_json_says_on(timers):
    config = recipe() if timers is None else recipe() | {"timers": timers}
    engine, _ = lbsgd.initialize(network(), config)
    assert engine.tput_timer.config.enabled is False
    engine, _ = lbsgd.initialize(network(), recipe() | {"timers": {"throughput": {"enabled": True}}})
    assert engine.tput_timer.config.enabled is True


def test_a_device_without_fp16_names_the_choices(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="cannot compute in fp16; use --precision bf16 or --precision fp32"):
        lbsgd.initialize(network(), recipe(), overrides=Overrides(precision="fp16"))


def test_bf16_autocast_keeps_weights_and_statistics_in_float32():
    engine, plan = lbsgd.initialize(network(), recipe(), overrides=Overrides(precision="bf16"))
    train(engine, plan)
    assert {tensor.dtype for tensor in engine.module.state_dict().values()} == {torch.float32, torch.int64}


class Entangled(torch.nn.Module):
    """A network with shared parts, a part that is missing, one that knows the whole, and a parametrised weight."""

    def __init__(self):
        super().__init__()
        self.first, self.missing = network(), None
        self.again, self.last = self.first, torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 5))
        self.last.bias = self.first.fc.bias
        self.register_parameter("none", None)
        self.register_module("none_either", None)
        self.several = torch.nn.ParameterList([torch.zeros(2)])
        self.several.whole = self


def test_every_parameter_is_listed_however_modules_hang_together():
    model = Entangled()
    assert {id(each) for each in every_parameter(model)} == {id(each) for each in model.parameters()}


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_grad_drops_the_gradients_of_parameters_that_are_frozen_or_were_added_later(stage):
    engine, _ = lbsgd.initialize(network(), recipe(stage))
    engine.module.conv.later = torch.nn.Parameter(torch.zeros(2))
    engine.module.fc.bias.requires_grad_(False)
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.zero_grad()
    assert all(parameter.grad is None for parameter in engine.module.parameters())
