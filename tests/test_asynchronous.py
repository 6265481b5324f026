"""The simulated workers: the order of their gradients, the age of the weights, and the two steps that are compared."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from asynchronous import MOST_SPREAD
from commands import ROOT, environment_with, refused, script
from update_magnitude import steps

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import TrainingError
from lbsgd.experiments.studies.update_magnitude import mean_of, relative
from lbsgd.train.parts import build_optimizer
from lbsgd.train.simulated import Server


def plan(workers, base_lr=0.1, *more):
    """A plan of `workers` workers of 4 images each, by the linear rule without warmup."""
    settings = ("lbsgd.batch_norm.per_worker_batch=4", "lbsgd.linear_scaling.base_batch=4", "lbsgd.decay.epochs=[]")
    settings += (f"lbsgd.linear_scaling.base_lr={base_lr}", 'lbsgd.warmup={"kind": "none", "epochs": 0}')
    settings += more
    overrides = Overrides(4 * workers, 4, precision="fp32", num_images=96, epochs=2, settings=settings)
    config = generate(overrides, gpus=1)
    return Plan.read(config, 1)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.GELU(), torch.nn.Linear(8, 3))


def server(workers, updates, spread=0.0, base_lr=0.1, *more):
    return Server(network(), plan(workers, base_lr, *more), updates == "async", spread)


def batches(count):
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=random), torch.randint(3, (4,), generator=random)) for _ in range(count)]


def weights(server):
    return torch.cat([weight.detach().flatten() for weight in server.weights])


def test_one_worker_is_never_late():
    found = [server(1, updates) for updates in ("sync", "async")]
    records = [each.train(batches(10)) for each in found]
    assert torch.equal(weights(found[0]), weights(found[1]))
    assert records[0] == pytest.approx(records[1]) and records[1]["staleness"] == 0


def test_biases_have_a_learning_rate_of_their_own():
    moves = []
    for factor in (1.0, 2.0):
        found = server(1, "async", 0.0, 0.1, f'lbsgd.biases={{"lr_factor": {factor}, "weight_decay": false}}')
        before = [weight.detach().clone() for weight in found.weights]
        found.train(batches(1))
        moves.append([weight.detach() - old for weight, old in zip(found.weights, before, strict=True)])
    expected = [1, 2, 1, 1, 1, 2]  # batch norm's β does not count as a bias here
    for one, two, factor in zip(*moves, expected, strict=True):
        assert torch.allclose(two, factor * one, atol=1e-7)
    assert moves[0][-1].abs().max() > 1e-3


def test_workers_of_one_speed_are_k_minus_1_updates_late():
    found = server(4, "async")
    assert [found.asynchronously(batch)[2] for batch in batches(12)] == [0, 1, 2, *[3] * 9]
    assert found.time == 3  # 12 gradients of 4 workers that take 1 each


def test_the_synchronous_update_waits_for_the_slowest_worker():
    found = server(4, "sync", spread=0.5)
    found.train(batches(400))
    assert found.num_moves == 100
    assert found.time / found.num_moves == pytest.approx(1.58, abs=0.15)  # the mean of the maximum of 4
    other = server(4, "async", spread=0.5)
    other.train(batches(400))
    assert other.num_moves == 400 and other.time == pytest.approx(100, rel=0.1)  # no worker waits


def test_the_synchronous_update_is_one_of_kn_images():
    found, plain = server(4, "sync"), network()
    images = batches(4)
    found.train(images)
    convert_batch_norm(plain, 4)
    optimizer = build_optimizer(plain, found.plan)
    inputs, labels = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])
    torch.nn.functional.cross_entropy(plain(inputs), labels).backward()
    optimizer.step()
    assert torch.allclose(weights(found), torch.cat([p.detach().flatten() for p in plain.parameters()]), atol=1e-6)
    for one, other in zip(found.network.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)  # the running statistics moved once


def test_small_steps_go_where_the_large_one_goes_while_the_learning_rate_is_small():
    apart = []
    for base_lr in (1e-3, 1e-1):
        each = server(4, "sync", base_lr=base_lr)
        before, buffers = weights(each).clone(), [buffer.clone() for buffer in each.network.buffers()]
        found = steps(each, batches(4))
        apart.append(found["apart_sq"] / found["small_sq"])
        assert torch.equal(weights(each), before)
        assert all(torch.equal(a, b) for a, b in zip(each.network.buffers(), buffers, strict=True))
        large, small = found["large_sq"], found["small_sq"]
        # |Δ - Δ'|² = |Δ|² + |Δ'|² - 2·cos·|Δ||Δ'|
        assert found["apart_sq"] == pytest.approx(
            large + small - 2 * found["cosine"] * (large * small) ** 0.5, rel=1e-2
        )
    assert 1000 * apart[0] < apart[1] < 0.1  # the distance grows with the square of the learning rate, 10,000 times


def test_two_steps_at_a_learning_rate_of_0_have_no_cosine():
    found = server(4, "sync")
    found.lr = lambda: 0.0
    assert steps(found, batches(4)) == {"lr": 0, "large_sq": 0, "small_sq": 0, "apart_sq": 0, "cosine": None}


def test_steps_that_are_no_numbers_for_one_seed_are_left_out_of_the_mean():
    near = {"apart_sq": 1.0, "small_sq": 2.0}
    found = [near, {"apart_sq": None, "small_sq": None}, {"apart_sq": 1.0, "small_sq": 0.0}, near]
    runs = [
        SimpleNamespace(iterations=[{"epoch": epoch, **record} for epoch, record in enumerate(each)])
        for each in (found, 4 * [near])
    ]
    series = mean_of("steps", SimpleNamespace(shown=runs), relative)
    assert (series.x, series.y) == ([0, 3], [0.5, 0.5])


@pytest.mark.parametrize("updates", ["sync", "async"])
def test_a_run_whose_loss_is_not_a_number_ends(updates):
    found, images = server(2, updates), batches(6)
    images[4][0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="after 2 iterations the loss is not a number"):
        found.train(images)


def test_weights_that_the_last_update_has_lost_are_not_evaluated():
    found = server(2, "sync")
    found.weights[0].data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="after 0 iterations"):
        found.evaluate(batches(1))


def test_flags_that_a_simulation_does_not_read_are_refused():
    """The recipes share a parser, so it also takes flags that only the trainer reads."""
    given = [
        "--cuda_graphs",
        "--max_iterations",
        "3",
        "--checkpoint_every",
        "10m",
        "--evaluate_every",
        "2",
        "--hang_timeout",
        "60",
    ]
    arguments = ["--fake_data", "--updates", "sync", "--deepspeed_config", ROOT / "ds_configs/digits/256.json", *given]
    done = script("recipes/asynchronous.py", *arguments)
    refused(done, "--max_iterations, --checkpoint_every, --evaluate_every, --hang_timeout, --cuda_graphs", "leave")


@pytest.mark.parametrize("spread", ["1e155", "2.1", "-1", "nan"])
def test_a_spread_whose_times_would_have_no_mean_is_refused(tmp_path, spread):
    done = script(*SYNC, *DIGITS, *SMALL, "--spread", spread, "--output_dir", tmp_path / "run")
    refused(done, f"argument --spread: '{spread}' is")
    assert not (tmp_path / "run").exists()


def test_the_times_have_mean_1_up_to_the_largest_spread():
    found = server(1, "async", MOST_SPREAD)
    assert sum(found.draw() for _ in range(100_000)) / 100_000 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("recipe, flags", [("asynchronous", ("--updates", "sync")), ("update_magnitude", ())])
def test_an_output_folder_that_cannot_be_written_is_one_line(recipe, flags):
    config = ROOT / "ds_configs/digits/256.json"
    arguments = [*flags, "--fake_data", "--deepspeed_config", config, "--output_dir", "/proc/x"]
    refused(script(f"recipes/{recipe}.py", *arguments), "/proc/x", "choose another --output_dir")


DIGITS = ("--fake_data", "--deepspeed_config", ROOT / "ds_configs/digits/256.json")
SYNC = ("recipes/asynchronous.py", "--updates", "sync")
SMALL = ("--set", "lbsgd.num_images=512", "--epochs", "1")


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("held", ["another", "finished", "checkpoints"])
def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path, resume, held):
    """--resume used to replace the log of any other run."""
    if held == "checkpoints":
        (tmp_path / "checkpoints").mkdir()
    else:
        settings = ("--seed", "1") if held == "another" else ()
        assert script(*SYNC, *DIGITS, *SMALL, *settings, "--output_dir", tmp_path).returncode == 0
        if held == "another":
            interrupt(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    done = script(*SYNC, *DIGITS, *SMALL, "--output_dir", tmp_path, *resume)
    refused(done, tmp_path, "holds a run", "choose another --output_dir")
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}


def interrupt(folder):
    """Remove the end of a log."""
    *lines, last = (folder / "log.jsonl").read_text().splitlines()
    assert json.loads(last)["kind"] == "result"
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def test_an_interrupted_simulation_begins_anew_and_says_what_it_does(tmp_path):
    arguments = (*SYNC, *DIGITS, *SMALL, "--output_dir", tmp_path)
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "kn = 256" in done.stdout and "epoch 1/1  error: train" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["log", f"{tmp_path}/log.jsonl"]
    interrupt(tmp_path)
    again = script(*arguments, "--resume")
    assert again.returncode == 0 and "starting it again" in again.stdout, again.stderr
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kinds == ["run", "resume", "epoch", "result"]


@pytest.mark.parametrize(
    "key, values",
    [
        ("lbsgd.batch_norm.scope", ["all"]),
        ("lbsgd.batch_norm.statistics", ["recomputed", "lbsgd.batch_norm.statistics_images=64"]),
        ("lbsgd.batch_norm.statistics", ["first_worker"]),
        ("lbsgd.batch_norm.implementation", ["triton"]),
        ("lbsgd.diagnostics.gradient_noise", ["10"]),
    ],
)
def test_keys_that_a_simulation_does_not_read_are_refused(tmp_path, key, values):
    """The log would list them as if they had been used."""
    first, *more = values
    settings = [part for setting in (f"{key}={first}", *more) for part in ("--set", setting)]
    done = script(*SYNC, *DIGITS, *settings, "--output_dir", tmp_path / "run")
    refused(done, key, first, "not simulated", f"set {key}=")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [(), ("--epochs", 1)])
def test_a_schedule_that_ends_inside_an_epoch_is_refused(tmp_path, flags):
    """Its last part, or what lies beyond its end, would be simulated wrongly."""
    lengths = ("lbsgd.epochs=null", "lbsgd.iterations=9", 'lbsgd.decay={"iterations": []}')
    settings = [*lengths, 'lbsgd.warmup={"kind": "none", "epochs": 0}', "lbsgd.num_images=1536"]
    done = script(
        *SYNC, *DIGITS, *(part for each in settings for part in ("--set", each)), *flags, "--output_dir", tmp_path
    )
    refused(done, "whole epochs", "0.166667", "give fewer with --epochs, or change lbsgd.epochs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("recipe", [SYNC, ("recipes/update_magnitude.py",)])
def test_a_simulation_that_is_told_to_stop_ends_with_75_and_one_line(tmp_path, recipe, number):
    process = subprocess.Popen(
        [sys.executable, *map(str, (*recipe, *DIGITS, "--output_dir", tmp_path))],
        cwd=ROOT,
        env=environment_with({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()  # the plan
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines() == [
        f"stopped: {number.name}; a simulation saves nothing: the same command with --resume starts it again"
    ]


@pytest.mark.parametrize("recipe", [SYNC[:1], ("recipes/update_magnitude.py",)])
def test_help_is_told_where_the_terminal_lacks_greek(recipe):
    done = script(*recipe, "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Sec. " in done.stdout, done.stderr
