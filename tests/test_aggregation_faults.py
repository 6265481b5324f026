"""Aggregation under faults, the order in which it starts, and checkpoints that are older than it."""

import itertools
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from aggregating import OURS, RING, TREE, config, going_on, noise, one_iteration, parameters, run, same_bits
from crash import PATIENCE_SECONDS
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from oracle import network
from processes import in_processes
from small_engine import recipe, train
from test_batchnorm import Calls
from torch.nn import functional as F

import lbsgd
from lbsgd.config.aggregation import Choice
from lbsgd.config.keypath import put
from lbsgd.config.plan import Plan
from lbsgd.config.schema import Recipe
from lbsgd.errors import CheckpointError, ConfigError, TrainingError
from lbsgd.processes.ports import free_port
from lbsgd.report.recipe import with_defaults
from lbsgd.train import checkpoint
from lbsgd.train.aggregation import phases, resume
from lbsgd.train.aggregation.aggregation import Aggregation, AggregationSettings, attach
from lbsgd.train.aggregation.buckets import fill
from lbsgd.train.aggregation.phases import Job, Threads, phases_of
from lbsgd.train.aggregation.placement import Placement
from lbsgd.train.aggregation.resume import same_order, saved_choice, say_other_sums, tell_of_another_order
from lbsgd.train.engine import start_processes
from lbsgd.train.engine_state import gather_state
from lbsgd.train.identity import require_same_run
from lbsgd.train.saver import Saver

ALONE, FLAT = Placement(((0,),)), Choice("flat", RING, RING)
OLD = Path(__file__).parent / "fixtures/before_aggregation"


# --- order, without clocks --------------------------------------------------------------------------------------------


def alone(model, bucket=500, boundary=True):
    """Aggregation on one process, and the buckets that it starts."""
    start_processes()
    engine = SimpleNamespace(
        module=model,
        inside_no_sync_ctxt=False,
        _running_engine_backward=True,
        micro_steps=0,
        global_steps=7,
        is_gradient_accumulation_boundary=lambda: boundary,
    )
    aggregation = Aggregation(engine, AggregationSettings(bucket, True, 1.0, 1.0), ALONE, FLAT)
    started = []
    start = aggregation.runner.start
    aggregation.runner.start = lambda buffer: (started.append(buffer.data_ptr()), start(buffer))[1]
    return aggregation, started


@pytest.mark.parametrize("seed", range(5))
def test_buckets_start_in_one_order_however_gradients_come(seed):
    model = network()
    aggregation, started = alone(model)
    parameters = [*model.parameters()]
    random.Random(seed).shuffle(parameters)
    come = set()
    for number, parameter in enumerate(parameters, start=1):
        come.add(parameter)
        parameter.grad = torch.full_like(parameter, number)
        aggregation.arrived(parameter)
        complete = itertools.takewhile(come.issuperset, (bucket.parameters for bucket in aggregation.buckets))
        assert len(started) == len([*complete])
    assert started == [bucket.buffer.data_ptr() for bucket in aggregation.buckets] and len(started) > 4
    aggregation.finish()
    assert [float(parameter.grad.mean()) for parameter in parameters] == pytest.approx(range(1, len(parameters) + 1))


def test_the_order_is_that_of_registration_from_the_last():
    model = network()
    aggregation, _ = alone(model)
    in_buckets = [parameter for bucket in aggregation.buckets for parameter in bucket.parameters]
    assert [id(each) for each in in_buckets] == [id(each) for each in reversed([*model.parameters()])]
    assert all(bucket.buffer.numel() <= 500 or len(bucket.parameters) == 1 for bucket in aggregation.buckets)


def test_a_bucket_is_filled_to_the_last_element_and_a_larger_parameter_has_its_own():
    lengths = [9, 4, 4, 5, 3]  # the last of the network come first
    buckets = fill([torch.nn.Parameter(torch.ones(length)) for length in lengths], 8, multiple=1)
    assert [[each.numel() for each in bucket.parameters] for bucket in buckets] == [[3, 5], [4, 4], [9]]


def test_one_call_copies_all_gradients_of_a_bucket():
    """A GPU would be done with each before the host has launched the next copy."""
    used, frozen, unused = parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    [bucket] = fill(parameters, 100, multiple=4)
    bucket.buffer.fill_(9.0)  # of the last iteration
    used.grad, frozen.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    frozen.requires_grad_(False)
    with Calls() as calls:
        bucket.take()
    assert {name: count for name, count in calls.count.items() if "copy" in name} == {"_foreach_copy_": 1}
    assert bucket.buffer.tolist() == [0.0, 0.0, 3.0, 4.0, 1.0, 2.0, 9.0, 9.0]
    assert used.grad.tolist() == [1.0, 2.0] and frozen.grad is None and unused.grad.tolist() == [0.0, 0.0]


def test_a_gradient_that_was_moved_elsewhere_does_not_take_its_bucket_along():
    """Setting .grad.data moves that view. Were it the bucket's own, later gradients would never be aggregated."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    [bucket] = fill([parameter], 100, multiple=1)
    for number in (1.0, 2.0):
        parameter.grad = torch.full((2,), number)
        bucket.take()
        assert bucket.buffer.tolist() == [number, number]
        parameter.grad.data = parameter.grad * 3


def test_a_gradient_of_another_stream_is_waited_for_and_its_memory_kept(monkeypatch):
    here, other = Mock(name="here"), Mock(name="other")
    gradients = [Mock(), Mock()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    [bucket] = fill([torch.nn.Parameter(torch.zeros(2))], 100, multiple=1)
    bucket.streams = {here}
    bucket.wait_for_streams(gradients)
    assert not here.mock_calls and not any(gradient.mock_calls for gradient in gradients)
    bucket.streams = {here, other}
    bucket.wait_for_streams(gradients)
    assert here.mock_calls == [call.wait_stream(other)]
    assert all(gradient.mock_calls == [call.record_stream(here)] for gradient in gradients)


def test_before_the_last_pass_nothing_starts():
    model = network()
    aggregation, started = alone(model, boundary=False)
    for parameter in model.parameters():
        aggregation.arrived(parameter)
    assert started == []


# --- phases -----------------------------------------------------------------------------------------------------------


SERVER, COLUMN, ALL = (0, 1), (0, 2), (0, 1, 2, 3)  # of rank 0 on two servers of two processes


@pytest.mark.parametrize(
    "choice, expected",
    [
        (("flat", RING, RING), [("all_reduce", ALL, 1)]),
        (("flat", TREE, TREE), [("reduce_scatter", ALL, 2), ("all_gather", ALL, 2)]),
        (
            ("servers", RING, RING),
            [("reduce_scatter", SERVER, 1), ("all_reduce", COLUMN, 1), ("all_gather", SERVER, 1)],
        ),
        (
            ("servers", TREE, TREE),
            [
                ("reduce_scatter", SERVER, 2),
                ("reduce_scatter", COLUMN, 2),
                ("all_gather", COLUMN, 2),
                ("all_gather", SERVER, 2),
            ],
        ),
    ],
)
def test_each_phase_has_groups_that_no_other_phase_uses(monkeypatch, choice, expected):
    """Or calls for different buckets would meet. Halving/doubling has two, because gloo is slow both ways at once."""
    called = []

    class Recorded:
        def __init__(self, ranks, group, rank, back=None):
            self.ranks, self.groups = ranks, {group, back} - {None}

        def __getattr__(self, name):
            return lambda buffer: (called.append((name, self.ranks, self.groups)), buffer)[1]

    monkeypatch.setattr(phases, "Backend", Recorded)
    monkeypatch.setattr(phases, "HalvingDoubling", Recorded)
    monkeypatch.setattr(phases, "groups", lambda *_: object())
    monkeypatch.setattr(phases, "timeout_of", lambda device: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    job, servers = Job(torch.ones(4)), Placement(((0, 1), (2, 3)))
    for phase in phases_of(Choice(*choice), servers, torch.device("cpu"), 4.0):
        phase(job)
    assert [(name, ranks, len(groups)) for name, ranks, groups in called] == expected
    assert len(set().union(*(groups for *_, groups in called))) == sum(number for *_, number in expected)
    assert job.buffer.tolist() == [0.25] * 4


def test_the_threads_of_phases_end_with_their_object_and_before_the_interpreter():
    """A loop of one's own need not close them."""
    code = (
        "import atexit, threading\n"
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))\n"  # the last, as the first
        "import torch\n"
        "from lbsgd.train.aggregation.phases import Threads\n"
        "runner = Threads([lambda job: None, lambda job: None])\n"
        "runner.wait(runner.start(torch.ones(1)))\n"
        "print(threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0 and done.stdout == "3\n['MainThread']\n", done.stderr
    runner = Threads([lambda job: None])
    [thread], runner = runner.threads, None
    assert not thread.is_alive()


def test_phases_that_are_stuck_hold_up_the_end_once(monkeypatch):
    monkeypatch.setattr(phases, "CLOSE_SECONDS", 0.5)
    released = threading.Event()
    runner = Threads([lambda job: released.wait(PATIENCE_SECONDS)] * 4)
    job, began = runner.start(torch.ones(1)), time.monotonic()
    runner.close()
    assert 0.5 <= time.monotonic() - began < 1.5
    released.set()
    runner.wait(job)
    phases.end(queue.SimpleQueue(), [threading.current_thread()])  # in which Python may free the object


def test_after_an_error_no_further_bucket_is_summed_and_each_is_told_at_once():
    """The group is then broken, so every further call would wait for its timeout."""
    ran, released = set(), threading.Event()

    def first(job):
        ran.add(("first", int(job.buffer)))
        if job.buffer == 1:
            raise RuntimeError("a process is gone")

    def second(job):
        ran.add(("second", int(job.buffer)))
        released.wait()

    runner = Threads([first, second])
    whole, *broken = [runner.start(torch.tensor(number)) for number in range(3)]
    assert all(job.done.wait(PATIENCE_SECONDS) for job in broken)  # although the second phase is still busy
    threading.Timer(0.2, released.set).start()
    runner.close()
    assert not any(thread.is_alive() for thread in runner.threads)
    runner.wait(whole)
    for job in broken:
        with pytest.raises(RuntimeError, match="a process is gone"):
            runner.wait(job)
    assert ran == {("first", 0), ("second", 0), ("first", 1)}


def test_the_threads_of_phases_end_with_what_starts_them():
    runner = Threads([lambda job: None] * 2)
    threads = runner.threads
    del runner
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


# --- gradients that come twice, calls that go past --------------------------------------------------------------------


def test_a_gradient_that_comes_twice_raises():
    model = network()
    aggregation, _ = alone(model)
    aggregation.arrived(model.fc.weight)
    with pytest.raises(TrainingError, match="in iteration 7 a gradient came twice.*engine.backward once per pass"):
        aggregation.arrived(model.fc.weight)


def test_a_second_backward_in_the_last_pass_raises():
    model = network()
    aggregation, _ = alone(model)
    aggregation.finish()
    with pytest.raises(TrainingError, match="came twice"):
        aggregation.arrived(model.fc.weight)
    aggregation, _ = alone(network())
    aggregation.finish()
    with pytest.raises(TrainingError, match="came twice"):
        aggregation.finish()
    aggregation.engine.micro_steps += 1  # as after engine.step
    aggregation.finish()


def test_a_new_iteration_waits_for_what_an_abandoned_one_had_started():
    model = network()
    aggregation, _ = alone(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    waited, wait = [], aggregation.runner.wait
    aggregation.runner.wait = lambda job: (waited.append(job), wait(job))
    for parameter in [*model.parameters()][::-1]:
        aggregation.arrived(parameter)
    started = [*aggregation.jobs]
    aggregation.begin()
    assert waited == started != [] and aggregation.jobs == []


def of_two_engines():
    """Gradients of one network in two engines: the first engine's only add up, and so do those of a plain backward."""
    model = network()
    lbsgd.initialize(model, config(2, block=OURS))
    engine, plan = lbsgd.initialize(model, config(2, block=OURS))
    images, labels = noise(0, 0)
    F.cross_entropy(engine.module(images), labels).backward()
    assert not engine.aggregation.jobs
    engine.zero_grad()
    for _ in range(3):
        one_iteration(engine, plan)
    return parameters(engine)


def test_a_plain_backward_and_a_second_engine_start_nothing():
    one, other = in_processes(2, of_two_engines)
    expected = in_processes(2, parameters_after_three)[0]
    assert same_bits(one, other) and same_bits(one, expected)


def parameters_after_three():
    return parameters(run(config(2, block=OURS), iterations=3))


# --- parameters that change after the start ---------------------------------------------------------------------------


def frozen_and_unfrozen():
    model = network()
    model.fc.bias.requires_grad_(False)
    engine, plan = lbsgd.initialize(model, config(2, block=OURS))
    weight, bias = engine.module.conv.weight, engine.module.fc.bias.clone()
    one_iteration(engine, plan)
    weight.requires_grad_(False)
    before = weight.detach().clone()
    one_iteration(engine, plan)
    stays = torch.equal(weight, before) and torch.equal(engine.module.fc.bias, bias)
    engine.module.added = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TrainingError, match="added was unfrozen or added after lbsgd.initialize"):
        one_iteration(engine, plan)
    return stays


def test_a_parameter_frozen_before_or_later_stays_and_one_added_later_is_refused():
    assert in_processes(2, frozen_and_unfrozen) == [True, True]


def walks_by_name():
    engine, plan = lbsgd.initialize(network(), config(2, block=OURS))
    one_iteration(engine, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_parameters", None)
        one_iteration(engine, plan)
    return engine.global_steps


def test_an_update_lists_no_parameters_by_name():
    """The host takes three to four times as long for that as for a list without names, while a GPU waits."""
    assert in_processes(2, walks_by_name) == [2, 2]


def test_experts_are_refused():
    values = config(2, block=OURS)
    plan = Plan.read(values, 2)
    with pytest.raises(ConfigError, match="experts have groups of their own"):
        attach(SimpleNamespace(device="cpu", allreduce_gradients=None, has_moe_layers=True), plan)


def refusals():
    engine = going_on(config(2, stage=1, block=OURS), iterations=1)
    with pytest.raises(ConfigError, match="coalesce_grad_reduction goes past"):
        engine.coalesce_grad_reduction()
    with engine.no_sync():
        images, labels = noise(1, 0)
        engine.backward(F.cross_entropy(engine(images).float(), labels))
        assert engine.aggregation.jobs == []
    return dropped()


def dropped():
    """A pass under no_sync at the boundary, then the last pass: gradients add up and are reduced once."""
    engine, _ = lbsgd.initialize(network(), config(2, block=OURS))
    images, labels = noise(0, 0)
    with engine.no_sync():
        engine.backward(F.cross_entropy(engine(images).float(), labels))
    once = {name: parameter.grad.clone() for name, parameter in engine.module.named_parameters()}
    engine.backward(F.cross_entropy(engine(images).float(), labels))
    torch.distributed.all_reduce(once["conv.weight"])
    return torch.allclose(engine.module.conv.weight.grad, once["conv.weight"], rtol=1e-4, atol=1e-6)


def test_no_sync_is_honoured_and_coalescing_refused():
    assert in_processes(2, refusals) == [True, True]


# --- peers that die or fall silent ------------------------------------------------------------------------------------


def with_a_peer(rank, port, folder, fate):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    start_processes(timeout_seconds=5)
    engine = going_on(config(2, block=OURS), iterations=1)
    if rank == 1:
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    images, labels = noise(1, 0)
    began = time.monotonic()
    try:
        engine.backward(F.cross_entropy(engine(images).float(), labels))
        said = "nothing"
    except RuntimeError as error:
        said = type(error).__name__
    Path(folder, fate).write_bytes(pickle.dumps((said, time.monotonic() - began)))
    os._exit(0)


@pytest.mark.parametrize("fate, least, most", [("killed", 0, 4), ("silent", 3, 40)])
def test_a_peer_that_is_killed_is_noticed_at_once_and_a_silent_one_after_the_timeout(tmp_path, fate, least, most):
    """The timeout is that of start_processes, not torch's half an hour for new groups."""
    arguments = (free_port(), str(tmp_path), fate)
    context = torch.multiprocessing.start_processes(with_a_peer, arguments, 2, join=False, start_method="forkserver")
    first, second = context.processes
    first.join(120)
    second.kill()
    said, seconds = pickle.loads((tmp_path / fate).read_bytes())
    assert said.endswith("Error") and least <= seconds < most, (said, seconds)


def timeouts_of_groups():
    start_processes(timeout_seconds=123)
    lbsgd.initialize(network(), config(2, stage=1))
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_the_group_in_which_deepspeed_reduces_has_the_timeout_of_the_first():
    """NCCL would end a run after 10 minutes, whatever --hang_timeout."""
    assert in_processes(2, timeouts_of_groups) == [[123, 123], [123, 123]]


# --- resuming ---------------------------------------------------------------------------------------------------------


def old_saver(engine, plan, say=lambda _: None):
    network_ = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    identity = {**plan.identity(), "network": network_, "data": "fake"}
    return Saver(engine, OLD, identity, {"plan": plan.as_dict()}, say=say)


def resumed_from_before(block):
    """Return the weights after two more iterations from a checkpoint that old code wrote after three."""
    values = recipe()
    if block is not None:
        values["lbsgd"]["aggregation"] = block
    engine, plan = lbsgd.initialize(network(seed=1), values)
    old_saver(engine, plan).restore()
    train(engine, plan, first=3, last=5)
    return gather_state(engine).weights


def test_a_checkpoint_from_before_aggregation_resumes_in_the_same_bits(monkeypatch):
    """Written in NCHW (fixtures/before_aggregation). The bits that the old code got are of another kind of CPU."""
    monkeypatch.setattr("lbsgd.train.engine.lay_out", lambda model, layout=None: None)
    whole, plan = lbsgd.initialize(network(), recipe())
    train(whole, plan, last=5)
    without = resumed_from_before(None)
    for name, tensor in gather_state(whole).weights.items():
        torch.testing.assert_close(without[name], tensor, rtol=1e-5, atol=1e-6)
    for block in (OURS, {"between": "backend"}):
        found = resumed_from_before(block)
        assert all(torch.equal(tensor, without[name]) for name, tensor in found.items())


def test_aggregation_is_no_part_of_a_runs_identity():
    values = recipe()
    values["lbsgd"]["aggregation"] = {"between": "backend"}
    assert Plan.read(values, 1).identity() == Plan.read(recipe(), 1).identity()


def test_a_key_that_an_older_checkpoint_lacks_has_its_neutral_default(tmp_path):
    saved = Recipe.model_validate(recipe()["lbsgd"]).model_dump()
    del saved["augmentation"]["flip"], saved["decay"], saved["seed"]
    found = with_defaults(saved)
    assert (found["augmentation"]["flip"], found["seed"], found["decay"]["factor"]) == (True, 0, 0.1)
    tensors = {
        "weights": {"w": torch.zeros(1)},
        "momentum": {"w": torch.zeros(1)},
        "random": {"torch.0": torch.zeros(1)},
    }
    now = Plan.read(recipe(), 1).identity()
    older = {**now, "recipe": {**now["recipe"], "augmentation": {"resolution": 224, "crop_scale": [0.08, 1.0]}}}
    checkpoint.save(tmp_path, 1, tensors, {"counters": {}, "identity": older})
    checkpoint.load_newest(tmp_path, now, print)
    changed = recipe()
    changed["lbsgd"]["augmentation"] = {"flip": False}
    with pytest.raises(CheckpointError, match="lbsgd.augmentation.flip is true there and false here"):
        checkpoint.load_newest(tmp_path, Plan.read(changed, 1).identity(), print)


@pytest.mark.parametrize(
    "block, given, key", [("detection", {}, "longer_side"), ("aggregation", {"hierarchy": "flat"}, "between")]
)
def test_a_key_that_an_older_checkpoint_lacks_in_a_block_that_may_be_null_has_its_default(tmp_path, block, given, key):
    values = Recipe.model_validate(recipe()["lbsgd"]).model_dump() | {block: given}
    now, older = (Recipe.model_validate(values).model_dump() for _ in range(2))
    del older[block][key]
    require_same_run(tmp_path, {"identity": {"recipe": older}}, {"recipe": now})


def test_a_required_key_is_not_made_up():
    assert "num_images" not in with_defaults({"epochs": 1, "warmup": {"kind": "none", "epochs": 0}})


def saved(hierarchy="flat", between="halving_doubling", inside="halving_doubling", servers=((0, 1, 2, 3),), bucket=500):
    return {
        "hierarchy": hierarchy,
        "between": between,
        "inside": inside,
        "servers": [list(ranks) for ranks in servers],
        "bucket_elements": bucket,
    }


NCCL = {**saved(between="backend"), "backend": "nccl"}


@pytest.mark.parametrize(
    "one, other, same",
    [
        (saved(), saved("servers", servers=((0, 1), (2, 3))), True),
        (saved(), saved(bucket=9), True),
        (saved(), saved("servers", servers=((0, 2), (1, 3))), False),  # cyclic: another tree
        (saved(), saved(servers=((0, 2), (1, 3))), True),  # a flat one takes the ranks in their order
        (saved(between="backend"), saved(between="backend"), True),
        (saved(between="backend"), saved(between="backend", bucket=9), False),
        (saved(between="backend"), saved(between="backend", servers=((0, 1), (2, 3))), True),
        (NCCL, {**NCCL, "servers": [[0, 1], [2, 3]]}, False),
        (NCCL, saved(between="backend"), False),
        (saved(), saved(between="backend"), False),
        (None, saved(), False),
        (None, None, True),
    ],
)
def test_what_decides_the_order_of_a_sum(one, other, same):
    assert same_order(one, other) is same


def test_a_checkpoint_keeps_what_decides_the_order_of_a_sum(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    servers, settings = ((0, 2), (1, 3)), AggregationSettings(500, True, 1.0, 4.0)
    engine = SimpleNamespace(aggregation=SimpleNamespace(choice=FLAT, placement=Placement(servers), settings=settings))
    kept = saved(between="backend", inside="backend", servers=servers, bucket=500)
    assert saved_choice(engine) == {**kept, "backend": "nccl"}


def test_another_number_of_processes_is_said():
    said = []
    tell_of_another_order(SimpleNamespace(aggregation=None), None, (4, 2), said.append)
    tell_of_another_order(SimpleNamespace(aggregation=None), None, (2, 2), said.append)
    assert said == ["resuming on 2 processes instead of 4: last bits may differ"]


@pytest.mark.parametrize("world_size, told", [(2, 0), (3, 1)])  # a sum of two has only one order
def test_another_aggregation_than_the_checkpoints_is_said(world_size, told):
    said = []
    tell_of_another_order(SimpleNamespace(aggregation=None), saved(), (world_size, world_size), said.append)
    assert said == told * ["gradients are aggregated otherwise than before the restart: last bits may differ"]


def test_another_micro_batch_than_the_checkpoints_is_said():
    said = []
    for micro_batch in (8, 16):
        values = {**recipe(), "train_micro_batch_size_per_gpu": micro_batch}
        engine, plan = lbsgd.initialize(network(seed=1), values)
        old_saver(engine, plan, said.append).restore()
    said = [line for line in said if not line.startswith(("resuming from", "threads"))]
    words = "not as in the checkpoint, so the run goes on, but not to the bit"
    assert said == [f"train_micro_batch_size_per_gpu: {words}"]


@pytest.mark.parametrize(
    "world_size, own, stage, key, said",
    [
        (1, True, 1, "gradient_predivide_factor", False),
        (2, True, 1, "gradient_predivide_factor", True),
        (4, False, 1, "gradient_predivide_factor", True),
        (2, True, 1, "zero_optimization.reduce_bucket_size", False),  # a sum of two has only one order
        (4, True, 1, "zero_optimization.reduce_bucket_size", True),
        (4, True, 0, "zero_optimization.reduce_bucket_size", False),  # DeepSpeed does not read it there
        (4, False, 1, "zero_optimization.reduce_bucket_size", False),
        (4, True, 1, "zero_optimization.allgather_bucket_size", False),
        (1, True, 0, "data_types.grad_accum_dtype", True),
        (2, True, 0, "prescale_gradients", True),
        (2, True, 0, "communication_data_type", True),
        (4, True, 1, "zero_optimization.reduce_scatter", True),
        (4, True, 1, "zero_optimization.contiguous_gradients", True),
        (4, True, 1, "zero_optimization.round_robin_gradients", True),
        (4, True, 1, "zero_optimization.use_multi_rank_bucket_allreduce", True),
    ],
)
def test_other_buckets_and_divisors_than_the_checkpoints_are_said(monkeypatch, world_size, own, stage, key, said):
    monkeypatch.setattr("lbsgd.train.aggregation.resume.dist.get_world_size", lambda: world_size)
    before, now, lines = {"zero_optimization": {"stage": stage}}, {"zero_optimization": {"stage": stage}}, []
    engine = SimpleNamespace(aggregation=None if own else object())
    put(before, "prescale_gradients", False)  # the default
    put(now, key, 4)
    say_other_sums(engine, before, now, lines.append)
    assert [line.partition(":")[0] for line in lines] == said * [key]


def test_a_key_that_only_one_json_names_is_compared_with_deepspeeds_default():
    defaults = resume.ALONE | resume.TOGETHER | resume.BUCKETS
    of_zero = {key: default for key, default in defaults.items() if key.startswith("zero_optimization.")}
    assert of_zero == {key: getattr(DeepSpeedZeroConfig(), key.partition(".")[2]) for key in of_zero}
    assert {key: defaults[key] for key in defaults.keys() - of_zero.keys()} == {
        constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU: constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU_DEFAULT,
        f"{constants.DATA_TYPES}.{constants.GRAD_ACCUM_DTYPE}": constants.GRAD_ACCUM_DTYPE_DEFAULT,
        constants.GRADIENT_PREDIVIDE_FACTOR: constants.GRADIENT_PREDIVIDE_FACTOR_DEFAULT,
        constants.PRESCALE_GRADIENTS: constants.PRESCALE_GRADIENTS_DEFAULT,
        constants.COMMUNICATION_DATA_TYPE: constants.COMMUNICATION_DATA_TYPE_DEFAULT,
    }
