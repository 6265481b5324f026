"""Schedules in iterations next to those in epochs, and biases with their own learning rate (Sec. 5.4)."""

import copy
from pathlib import Path

import pytest
import torch
from oracle import BOUND, ITERATIONS, K, N, distance, global_batch, network
from processes import in_processes
from small_engine import recipe, train
from torch.nn import functional as F
from trainers import trainer

import lbsgd
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.algorithm.sgd import decay_groups
from lbsgd.config.checks import fit
from lbsgd.config.checks.rule import findings_by
from lbsgd.config.checks.subject import Planned
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train.engine_state import gather_state, restore_state
from lbsgd.train.run import last_iteration

CONFIGS = Path(__file__).parent.parent / "ds_configs"
OF_16 = {  # Mask R-CNN's 2x schedule, as in Detectron
    "iterations": 160_000,
    "num_images": 117_266,
    "linear_scaling": {"base_lr": 0.02, "base_batch": 16},
    "warmup": {"kind": "gradual", "iterations": 500, "start_fraction": 0.25},
    "decay": {"iterations": [120_000], "factor": 0.1},
    "batch_norm": {"per_worker_batch": 2},
}


def counted(kn, **block):
    """A plan with kn images per update whose lengths are in iterations of 16 images."""
    config = recipe()
    config["lbsgd"] = {**copy.deepcopy(OF_16), **block}
    config["train_batch_size"], config["train_micro_batch_size_per_gpu"] = 16, 2
    params = {"warmup_min_lr": 0.005, "warmup_max_lr": 0.02, "warmup_num_steps": 500, "warmup_type": "linear"}
    config["optimizer"]["params"]["lr"], config["scheduler"]["params"] = 0.02, params
    return Plan.read(config, 1, overrides=Overrides(global_batch=kn))


@pytest.mark.parametrize("kn, iterations", [(2, 1_280_000), (4, 640_000), (8, 320_000), (16, 160_000), (128, 20_000)])
def test_every_global_batch_sees_as_many_images(kn, iterations):
    """Table 3b: 1.28 million iterations of 2 images, 160 thousand of 16."""
    schedule, eta = counted(kn).schedule, 0.02 * kn / 16
    assert counted(kn).num_iterations == iterations
    assert schedule.decay_iterations == (iterations * 3 // 4,) and schedule.reference_lr == pytest.approx(eta)
    assert schedule.warmup_iterations == 500  # for any global batch
    lrs = [learning_rate(t, schedule) for t in (0, 250, 500, iterations * 3 // 4 - 1, iterations * 3 // 4)]
    assert lrs == pytest.approx([eta / 4, eta * 5 / 8, eta, eta, eta / 10])


def test_a_warmup_that_is_scaled_takes_as_many_images_too():
    warmup = {**OF_16["warmup"], "scaled": True}
    found = [counted(kn, warmup=warmup).schedule.warmup_iterations for kn in (2, 16, 32)]
    assert found == [4000, 500, 250]


def test_lengths_are_rounded_to_the_nearest_update_and_a_run_has_one_at_least():
    plan = counted(28)  # 160,000 · 16 / 28 = 91,428.6 and 120,000 · 16 / 28 = 68,571.4
    assert (plan.num_iterations, plan.schedule.decay_iterations) == (91_429, (68_571,))
    assert counted(128, iterations=1, decay={"iterations": []}).num_iterations == 1
    settings = ("lbsgd.warmup.epochs=0.3", "lbsgd.decay.epochs=[30.3, 60]")
    plan = Plan.read(CONFIGS / "8k.json", 8, 39 * 8192, Overrides(settings=settings))  # 11.7 and 1,181.7
    assert plan.schedule.warmup_iterations == 12 and plan.schedule.decay_iterations == (1182, 2340)


def test_deepspeeds_own_blocks_have_the_numbers():
    plan = counted(32)
    assert plan.config["scheduler"]["params"] == {
        "warmup_min_lr": 0.01,
        "warmup_max_lr": 0.04,
        "warmup_num_steps": 500,
        "warmup_type": "linear",
    }
    assert "160,000 -> " not in str(plan.changes) and plan.recipe.iterations == 160_000
    assert plan.num_epochs == pytest.approx(80_000 / (117_266 // 32))


@pytest.mark.parametrize(
    "block, words",
    [
        ({"epochs": 12}, "two lengths: give one"),
        ({"iterations": None}, "lbsgd.epochs is missing"),
        ({"warmup": {"kind": "gradual", "epochs": 1}}, "has its warmup in iterations"),
        ({"warmup": {"kind": "gradual"}}, "lbsgd.warmup.epochs is missing"),
        ({"warmup": {"kind": "none", "iterations": 5}}, "does not go with 5 iterations"),
        ({"warmup": {"kind": "gradual", "epochs": 1, "scaled": True}}, "scaled is about iterations"),
        ({"decay": {"epochs": [9]}}, "has its decay in iterations"),
        ({"decay": {"epochs": [9], "iterations": [9]}}, "two lists of decay points"),
        ({"decay": {"iterations": [9, 3]}}, "must ascend"),
    ],
)
def test_lengths_that_cannot_go_together_are_refused(block, words):
    with pytest.raises(ConfigError, match=words):
        counted(16, **block)


def test_a_warmup_or_a_decay_beyond_the_end_is_warned_of():
    def findings(kn, **block):
        plan = counted(kn, **block)
        found = findings_by(fit.RULES, Planned(plan.config, plan.recipe))
        assert all("epochs" not in str(each) for each in found)
        return [(finding.code, finding.key) for finding in found]

    assert findings(16) == []
    assert findings(16, decay={"iterations": [120_000, 160_000]}) == [("F06", "lbsgd.decay.iterations")]
    assert findings(16 * 300) == [("F06", "lbsgd.warmup.iterations")]  # 533 iterations, with the decay at 400


def test_a_loop_over_epochs_is_told_where_a_plan_has_none():
    plan = Plan.read(recipe(), 1)
    assert list(range(plan.epochs)) == list(range(10))
    with pytest.raises(ConfigError, match="is counted in iterations; end your loop after plan.num_iterations updates$"):
        range(counted(16).epochs)


def test_a_run_ends_with_its_iterations_or_earlier():
    plan = counted(16)
    assert last_iteration(plan, None, None) == 160_000
    assert last_iteration(plan, 3, None) == 3 * (117_266 // 16)
    assert last_iteration(plan, 22, None) == 160_000  # its last epoch is incomplete
    with pytest.raises(ConfigError, match="--epochs 23 is more than the 22"):
        last_iteration(plan, 23, None)


def five_iterations(folder, **options):
    """A trainer with 2 iterations per epoch whose run is 5 iterations long, and so ends inside an epoch."""
    ours = trainer(folder, **options)
    header = {"model": "small", **ours.plan.as_dict()} | {"num_iterations": 5}
    header["recipe"] = {**header["recipe"], "epochs": None, "iterations": 5}
    object.__setattr__(ours.plan, "num_iterations", 5)
    return ours, header


def test_a_run_that_ends_inside_an_epoch_is_evaluated_there_also_after_a_resume(tmp_path):
    whole, header = five_iterations(tmp_path)
    whole.train(last_iteration=5), whole.saver.wait()
    assert [record["epoch"] for record in whole.reporter.log.epochs] == [1, 2, 2.5]
    again, _ = five_iterations(tmp_path, resume=True)
    again.train(last_iteration=5)
    [last] = again.reporter.log.epochs
    kept = {key: value for key, value in last.items() if not key.endswith(("seconds", "second"))}
    assert kept.items() <= whole.reporter.log.epochs[-1].items() and last["epoch"] == 2.5
    with RunLog(tmp_path, header) as log:
        for record in whole.reporter.log.epochs:
            log.epoch(record)
    with RunLog(tmp_path, header, resume_iteration=5) as log:
        assert [record["epoch"] for record in log.epochs] == [1, 2]  # the last one is evaluated again
    run = read_run(tmp_path)
    assert (run.epochs_done, run.planned_epochs) == (2, 2.5)


# --- biases -----------------------------------------------------------------------------------------------------------


def with_biases(stage=0, momentum=None, **options):
    config = recipe(stage, momentum, **options)
    config["lbsgd"]["biases"] = {"lr_factor": 2.0, "weight_decay": False}
    return config


def by_hand():
    """The same updates by torch.optim.SGD with a group of biases, one worker after another."""
    model, plan = network(), Plan.read(with_biases(), 1)
    lbsgd.convert_batch_norm(model, N)
    norms = {p for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    named = dict(model.named_parameters())
    biases = {p for name, p in named.items() if name.endswith("bias")} - norms
    assert biases
    weights = [p for p in named.values() if p not in norms | biases]
    groups = [
        {"params": weights, "weight_decay": 0.01, "times": 1},
        {"params": [p for p in named.values() if p in norms], "weight_decay": 0.0, "times": 1},
        {"params": [p for p in named.values() if p in biases], "weight_decay": 0.0, "times": 2},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for iteration in range(ITERATIONS):
        for group in sgd.param_groups:
            group["lr"] = group["times"] * learning_rate(iteration, plan.schedule)
        images, labels = global_batch(iteration)
        for x, y in zip(images.split(N), labels.split(N), strict=True):
            (F.cross_entropy(model(x), y) / K).backward()
        sgd.step(), sgd.zero_grad()
    return {name: tensor for name, tensor in model.state_dict().items() if "running" not in name}


@pytest.fixture(scope="module")
def expected():
    return by_hand()


def trained(config, last=ITERATIONS, state=None):
    engine, plan = lbsgd.initialize(network(0 if state is None else 1), config)
    if state is not None:
        restore_state(engine, state)
    lrs = train(engine, plan, engine.global_steps, last)
    return gather_state(engine), lrs


def weights_of(state, like):
    return {name: state.weights[name] for name in like if "num_batches" not in name}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_biases_take_twice_the_lr_without_decay(stage, expected):
    state, lrs = trained(with_biases(stage))
    assert all(biases == 2 * lr == 2 * norms for lr, norms, biases in lrs)
    assert distance(weights_of(state, expected), {k: v for k, v in expected.items() if "num_batches" not in k}) < BOUND
    plain, _ = trained(recipe(stage))
    assert distance(weights_of(plain, expected), weights_of(state, expected)) > 100 * BOUND


FORM_10 = {"form": "lr_inside", "correction": True}


def resumed_on_two(states):
    return [trained(with_biases(stage, FORM_10), state=state)[0] for stage, state in states]


def test_factors_survive_a_checkpoint_and_another_world_size_in_form_10(expected):
    """In the middle of the ramp, where form (10) needs the lr that each group applied last."""
    halves = {stage: trained(with_biases(stage, FORM_10), last=3)[0] for stage in (0, 1)}
    assert all(state.counters["last_lr"] == pytest.approx(0.05 + 0.35 * 2 / 10) for state in halves.values())
    kept = {k: v for k, v in expected.items() if "num_batches" not in k}
    for state in in_processes(2, resumed_on_two, [(0, halves[1]), (1, halves[0])])[0]:
        assert distance(weights_of(state, expected), kept) < BOUND


def test_biases_are_found_by_their_name_in_a_layer_and_frozen_ones_left_out():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.biased = torch.nn.Linear(2, 2)  # its weight is called biased.weight
            self.norm = torch.nn.BatchNorm1d(2)
            self.frozen = torch.nn.Linear(2, 2)
            self.frozen.requires_grad_(False)
            self.tokens = torch.nn.MultiheadAttention(2, 1, add_bias_kv=True)  # two biases, and two tokens called so
            self.per_channel = torch.nn.Module()
            self.per_channel.bias = torch.nn.Parameter(torch.zeros(1, 2, 1, 1))
            self.per_channel.position_bias_table = torch.nn.Parameter(torch.zeros(2))  # flattened, as by FSDP
            self.per_channel.pos_bias = torch.nn.Parameter(torch.zeros(2, 2))  # a matrix

    odd = Odd()
    groups = {group["name"]: group for group in decay_groups(odd, 0.1, on_biases=False, bias_lr_factor=2.0)}
    biases = [odd.biased.bias, odd.tokens.in_proj_bias, odd.tokens.out_proj.bias, odd.per_channel.bias]
    assert groups["biases"]["params"] == biases and groups["biases"]["lr_factor"] == 2.0
    tokens = [odd.tokens.in_proj_weight, odd.tokens.bias_k, odd.tokens.bias_v, odd.tokens.out_proj.weight]
    others = [odd.biased.weight, *tokens, odd.per_channel.position_bias_table, odd.per_channel.pos_bias]
    assert groups["decay"]["params"] == others and groups["biases"]["weight_decay"] == 0.0
    assert groups["batch_norm"]["params"] == [odd.norm.weight, odd.norm.bias]
    assert [group["name"] for group in decay_groups(odd, 0.1)] == ["decay", "batch_norm"]  # as usual
