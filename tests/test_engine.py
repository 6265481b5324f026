"""lbsgd inside DeepSpeed: the learning rates that updates really take, the same weights as a plain PyTorch loop on any
number of processes and ZeRO stage, and a state that moves between them."""

import copy

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.nn import functional as F

import lbsgd
from lbsgd.config import Overrides
from lbsgd.engine import gather_state, restore_state
from lbsgd.errors import ConfigError
from lbsgd.plan import Plan
from lbsgd.schedule import learning_rate

K, N, ITERATIONS = 4, 8, 12  # workers of N images; warmup is over after 4 iterations, a decay comes after 8


def recipe(stage=0, momentum=None, micro_batch=N, **batch_norm):
    """32 images an update, lr 0.05 -> 0.2 over 4 iterations, a decay at iteration 8."""
    return {
        "train_batch_size": K * N, "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.05, "warmup_max_lr": 0.2, "warmup_num_steps": 4,
                                                     "warmup_type": "linear"}},
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 6_000_000},
        "lbsgd": {"epochs": 6, "num_images": 2 * K * N, "linear_scaling": {"base_lr": 0.05, "base_batch": N},
                  "warmup": {"kind": "gradual", "epochs": 2}, "decay": {"epochs": [4], "factor": 0.1},
                  "momentum": momentum or {}, "batch_norm": {"per_worker_batch": N, **batch_norm}}}


class Residual(nn.Module):
    """Small, with a batch norm in a shortcut whose name has no "bn" in it; GELU, since ReLU amplifies rounding."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.gelu(self.bn(self.conv(x)) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))


def network(seed=0):
    torch.manual_seed(seed)
    return Residual()


def global_batch(iteration):
    generator = torch.Generator().manual_seed(iteration)
    return torch.randn(K * N, 3, 6, 6, generator=generator), torch.randint(0, 5, (K * N,), generator=generator)


def train(engine, plan, first=0, last=ITERATIONS):
    """A user's own loop: this rank's passes over its part of each global batch; the lr that each update took."""
    rank, lrs = torch.distributed.get_rank(), []
    for iteration in range(first, last):
        images, labels = (part.chunk(plan.world_size)[rank] for part in global_batch(iteration))
        for x, y in zip(images.split(plan.micro_batch), labels.split(plan.micro_batch)):
            engine.backward(F.cross_entropy(engine(x), y))
            lrs_before_step = [group["lr"] for group in engine.basic_optimizer.param_groups]
            engine.step()
        lrs.append(lrs_before_step)
    return lrs


def trained(config, last=ITERATIONS, state=None, seed=0):
    """State after training in this process's group; from a gathered state if one is given."""
    engine, plan = lbsgd.initialize(network(seed), config)
    if state is not None:
        restore_state(engine, state)
    lrs = train(engine, plan, engine.global_steps, last)
    lbsgd.agree_statistics(engine.module)
    return gather_state(engine), lrs


def reference(last=ITERATIONS, dtype=torch.float64):
    """Sec. 2.3, 3 and 5.1 in plain PyTorch: k workers after one another, torch's SGD, no lbsgd in the update."""
    plan = Plan.read(recipe(), 1)
    model = network().to(dtype)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    parts = {id(p) for norm in norms for p in norm.parameters()}
    decay = [p for p in model.parameters() if id(p) not in parts]
    rest = [p for p in model.parameters() if id(p) in parts]
    sgd = torch.optim.SGD([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
                          lr=0.1, momentum=0.9, nesterov=True)
    for iteration in range(last):
        images, labels = global_batch(iteration)
        for group in sgd.param_groups:
            group["lr"] = learning_rate(iteration, plan.schedule)
        for norm in norms:
            norm.momentum = 0.1
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        after = [(0, 0) for _ in norms]
        for x, y in zip(images.to(dtype).split(N), labels.split(N)):
            (F.cross_entropy(model(x), y, reduction="sum") / (K * N)).backward()
            for index, norm in enumerate(norms):  # each worker moves its own running statistics; they are averaged
                after[index] = (after[index][0] + norm.running_mean / K, after[index][1] + norm.running_var / K)
                norm.running_mean, norm.running_var = (part.clone() for part in before[index])
        for norm, (mean, var) in zip(norms, after):
            norm.running_mean, norm.running_var = mean, var
        sgd.step()
        sgd.zero_grad()
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def distance(weights, other):
    """max |Δw| / max |w| over all weights and running statistics."""
    names = [name for name in other if not name.endswith("num_batches_tracked")]
    return max(float((weights[name].double() - other[name]).abs().max()) for name in names) / max(
        float(other[name].abs().max()) for name in names)


BOUND = 1e-5
ARRANGEMENTS = [(stage, micro_batch) for stage in (0, 1, 2) for micro_batch in (8, 16)]


def train_all_arrangements():
    return {arrangement: trained(recipe(arrangement[0], micro_batch=arrangement[1]))[0] for arrangement in ARRANGEMENTS}


@pytest.fixture(scope="module")
def on_two_processes():
    return in_processes(2, train_all_arrangements)


def test_the_engine_gives_the_weights_of_a_plain_loop_over_the_workers(on_two_processes):
    expected = reference()
    for arrangement in [(0, 8), (0, 32), (1, 8), (2, 16)]:
        state, _ = trained(recipe(arrangement[0], micro_batch=arrangement[1]))
        assert distance(state.weights, expected) < BOUND, f"1 process, {arrangement}"
    for arrangement in ARRANGEMENTS:
        for rank in (0, 1):
            assert distance(on_two_processes[rank][arrangement].weights, expected) < BOUND, f"2 processes, {arrangement}"


@pytest.mark.parametrize("mistake", ["lr late by one", "decay on batch norm", "one batch norm over the micro batch"])
def test_the_bound_tells_a_mistake_from_rounding(mistake, monkeypatch):
    config = recipe(micro_batch=32)
    if mistake == "lr late by one":
        monkeypatch.setattr("lbsgd.engine.learning_rate", lambda t, schedule: learning_rate(max(0, t - 1), schedule))
    elif mistake == "decay on batch norm":
        config["lbsgd"]["weight_decay"] = {"on_batch_norm": True}
    else:
        config["lbsgd"]["batch_norm"]["scope"] = "all"
    assert distance(trained(config)[0].weights, reference()) > 100 * BOUND


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_update_takes_the_lr_of_its_iteration_in_every_group(stage):
    _, lrs = trained(recipe(stage))
    schedule = Plan.read(recipe(), 1).schedule
    assert lrs == [[learning_rate(t, schedule)] * 2 for t in range(ITERATIONS)]
    assert lrs[0][0] == 0.05 and lrs[4][0] == 0.2 and lrs[8][0] == pytest.approx(0.02)


def test_an_update_that_overflow_skips_shifts_no_later_learning_rate():
    engine, plan = lbsgd.initialize(network(), recipe(stage=1, micro_batch=32))
    lrs = []
    for iteration in range(ITERATIONS):
        images, labels = global_batch(iteration)
        loss = F.cross_entropy(engine(images), labels)
        engine.backward(loss * float("inf") if iteration in (0, 3) else loss)
        lrs.append(engine.basic_optimizer.param_groups[0]["lr"])
        engine.step()
    assert engine.skipped_steps == 2
    assert lrs == [learning_rate(t, plan.schedule) for t in range(ITERATIONS)]


def restore_on_two_processes(states):
    return {stage: trained(recipe(stage), state=state, seed=1)[0] for stage, state in states.items()}


def test_a_state_moves_between_world_sizes_and_zero_stages(on_two_processes):
    uninterrupted = on_two_processes[0]
    halves = {stage: trained(recipe(stage), last=ITERATIONS // 2)[0] for stage in (0, 1, 2)}
    there = in_processes(2, restore_on_two_processes, {0: halves[2], 1: halves[0], 2: halves[1]})[0]
    for stage in (0, 1, 2):
        assert there[stage].counters["iteration"] == ITERATIONS
        assert distance(there[stage].weights, uninterrupted[stage, 8].weights) < BOUND
        assert distance(there[stage].momentum, uninterrupted[stage, 8].momentum) < BOUND


def test_momentum_and_counters_are_part_of_the_state():
    """A check that can fail: without the momentum, or an iteration off, the resumed run ends elsewhere."""
    half, _ = trained(recipe(), last=ITERATIONS // 2)
    whole, _ = trained(recipe())
    resumed, _ = trained(recipe(), state=half, seed=1)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
    broken = copy.deepcopy(half)
    for tensor in broken.momentum.values():
        tensor.zero_()
    assert distance(trained(recipe(), state=broken)[0].weights, whole.weights) > 100 * BOUND
    broken = copy.deepcopy(half)
    broken.counters["iteration"] += 1
    assert distance(trained(recipe(), state=broken)[0].weights, whole.weights) > 100 * BOUND


def test_form_10_keeps_the_last_lr_in_the_state():
    config = recipe(momentum={"form": "lr_inside", "correction": True})
    half, _ = trained(config, last=2)  # in the middle of the ramp
    assert half.counters["last_lr"] == pytest.approx(0.05 + 0.15 / 4)
    resumed, _ = trained(config, state=half, seed=1)
    assert distance(resumed.weights, trained(config)[0].weights) < BOUND
    assert distance(resumed.weights, reference()) < BOUND  # corrected, (10) is (9)
    config["lbsgd"]["momentum"]["correction"] = False
    assert distance(trained(config)[0].weights, reference()) > 100 * BOUND


def test_one_process_reduces_nothing():
    engine, _ = lbsgd.initialize(network(), recipe())
    assert engine.enable_backward_allreduce is False


def test_a_device_without_fp16_names_the_choices(monkeypatch):
    from deepspeed.accelerator import get_accelerator
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="cannot compute in fp16; use --precision bf16 or --precision fp32"):
        lbsgd.initialize(network(), recipe(), overrides=Overrides(precision="fp16"))


def test_bf16_autocast_trains_close_to_fp32_with_float32_weights_and_statistics():
    engine, plan = lbsgd.initialize(network(), recipe(), overrides=Overrides(precision="bf16"))
    train(engine, plan)
    assert {tensor.dtype for tensor in engine.module.state_dict().values()} == {torch.float32, torch.int64}
    assert distance(gather_state(engine).weights, reference()) < 0.02
