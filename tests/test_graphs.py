"""--cuda_graphs: replayed blocks equal the plain step, on a GPU to the bit, and gradients come as before.

Without a GPU a recording calls its function again and copies the values into place. Only the graphs are missing.
"""

import copy
import gc
import pickle

import oracle
import pytest
import torch
from commands import ROOT
from crash import Command, config
from deepspeed.accelerator import get_accelerator
from oracle import BOUND, ITERATIONS, K, N, distance, global_batch
from processes import in_processes
from small_engine import aggregated, end_aggregation, in_precision, recipe, train
from test_compiled import network
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import lbsgd
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.errors import ConfigError
from lbsgd.train.engine_state import gather_state, restore_state
from lbsgd.train.graphs import by_rule, graph_blocks
from lbsgd.train.recording import CudaRecorder, Recording

WARM_UP = 2  # passes before recording


class CallsAgain:
    """Replaces CUDA graphs on a CPU, counts, and checks that replays follow each other in the order of the recordings.

    On a GPU they share memory, so a replay out of order would overwrite what a later one needs.
    """

    def __init__(self):
        self.recordings, self.replays, self.last = 0, 0, (0, True)

    def record(self, function):
        self.recordings += 1
        number, kept, is_backward = self.recordings, function(), "backward" in function.__qualname__

        def replay():
            self.replays += 1
            before, was_backward = self.last
            assert number > before or was_backward and not is_backward, f"recording {number} after {before}"
            self.last = number, is_backward
            with torch.enable_grad():
                again = function()
            for tensor, anew in zip(kept, again, strict=True):
                tensor.data.copy_(anew.data)

        return kept, replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def recorder(request, monkeypatch):
    assert get_accelerator().device_name() == request.param
    if request.param == "cpu":
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        return CallsAgain
    return lambda: CudaRecorder(torch.cuda.Stream())


@pytest.fixture(autouse=True)
def repeatable():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def forwards(monkeypatch):
    """Note the replayed forwards, and check that an output is unchanged until its backward, which may read it."""
    forward, backward, calls = Recording.forward, Recording.backward, []

    def note(self, *arguments):
        calls.append(self)
        y = forward(self, *arguments)
        self.seen = self.y.clone()
        return y

    def compare(self, *arguments):
        assert torch.equal(self.seen, self.y)
        return backward(self, *arguments)

    monkeypatch.setattr(Recording, "forward", note)
    monkeypatch.setattr(Recording, "backward", compare)
    return calls


def engine_of(config, recorder=None, seed=0):
    engine, plan = lbsgd.initialize(network(seed), config)
    if recorder:
        assert graph_blocks(engine.module, plan.accumulation_steps, recorder()) == 2
    return engine, plan


def trained(config, recorder=None, last=ITERATIONS):
    engine, plan = engine_of(config, recorder)
    lrs = train(engine, plan, last=last)
    lbsgd.agree_statistics(engine.module)
    return gather_state(engine), lrs


def assert_same(ours, theirs):
    assert [name for name, w in theirs.weights.items() if not torch.equal(w, ours.weights[name])] == []
    assert [name for name, u in theirs.momentum.items() if not torch.equal(u, ours.momentum[name])] == []


class CannotRecord:
    def record(self, function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")


def test_blocks_that_cannot_be_recorded_end_the_run_with_the_flag_that_helps(recorder):
    told = r"cannot be recorded here \(CUDA error: .* is capturing\); train with --no-cuda_graphs"
    with pytest.raises(ConfigError, match=told):
        trained(recipe(), CannotRecord)


HALF = ITERATIONS // 2


@pytest.fixture(scope="module")
def expected():
    return oracle.train(network(), HALF)


CASES = [("fp32", 0, K * N), ("fp32", 0, N), ("fp32", 1, N), ("fp32", 2, K * N), ("bf16", 0, K * N), ("bf16", 0, N)]


@pytest.mark.parametrize("precision, stage, micro_batch", CASES)
def test_a_replayed_run_has_the_bits_of_the_plain_one(recorder, forwards, precision, stage, micro_batch, expected):
    config = (
        in_precision(precision, stage, micro_batch) if precision != "fp32" else recipe(stage, micro_batch=micro_batch)
    )
    plain, replayed = trained(config, last=HALF)[0], trained(config, recorder, HALF)[0]
    assert_same(replayed, plain)
    assert len(forwards) == 2 * (HALF * K * N // micro_batch - WARM_UP)
    if precision == "fp32":
        assert distance(replayed.weights, expected[0]) < BOUND and distance(replayed.momentum, expected[1]) < BOUND


@pytest.mark.parametrize("aggregation", [None, {}])
@pytest.mark.parametrize("passes_of", [N, K * N])
def test_overflow_skips_the_same_updates(recorder, forwards, passes_of, aggregation):
    fp16 = in_precision("fp16", 1, passes_of, initial_scale_power=24, hysteresis=1)
    fp16["lbsgd"]["aggregation"] = aggregation
    (plain, lrs), (replayed, replayed_lrs) = trained(fp16), trained(fp16, recorder)
    assert 0 < plain.counters["skipped_iterations"] == replayed.counters["skipped_iterations"] < 10
    assert lrs == replayed_lrs and len(forwards) == 2 * (ITERATIONS * K * N // passes_of - WARM_UP)
    assert_same(replayed, plain)


def test_a_replayed_run_goes_on_from_its_state_to_the_bit(recorder):
    whole, _ = trained(recipe(), recorder)
    half, _ = trained(recipe(), recorder, last=HALF)
    engine, plan = engine_of(recipe(), recorder, seed=1)
    restore_state(engine, half)
    train(engine, plan, HALF)
    assert_same(gather_state(engine), whole)


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_that_wait_for_the_update_outlast_another_pass(recorder, stage):
    """With one pass per update ZeRO 1 takes them from the graphs' own memory, which another replay overwrites."""
    found = []
    for made in (None, recorder):
        engine, plan = engine_of(aggregated(recipe(stage, micro_batch=K * N)), made)
        for iteration in range(WARM_UP + 2):
            x, y = (part.to(engine.device) for part in global_batch(iteration))
            engine.backward(F.cross_entropy(engine(x), y))
            again = x.clone().requires_grad_()
            torch.autograd.grad(engine.module(again).square().sum(), [again, *engine.module.parameters()])
            engine.step()
        found.append(gather_state(engine))
    assert_same(*found)


OF_TWO = [(precision, stage, passes) for precision, stage in (("bf16", 0), ("fp16", 1)) for passes in (1, 2)]


def on_two_processes():
    """By case, the names of weights that a replayed run with lbsgd's aggregation has otherwise, and its replays."""
    get_accelerator().is_fp16_supported = lambda: True
    found = []
    for precision, stage, passes in OF_TWO:
        config = aggregated(in_precision(precision, stage, K * N // 2 // passes))
        config["zero_optimization"]["reduce_bucket_size"] = 1000
        weights, recorder = [], CallsAgain()
        for made in (None, lambda recorder=recorder: recorder):
            engine, plan = engine_of(config, made)
            train(engine, plan, last=WARM_UP + 2)
            assert len(engine.aggregation.buckets) > 3
            end_aggregation(engine)
            weights.append(gather_state(engine).weights)
        plain, replayed = weights
        learned = [name for name, _ in engine.module.named_parameters()]
        found.append(([name for name in learned if not torch.equal(plain[name], replayed[name])], recorder.replays))
    return found


def test_two_processes_that_replay_have_the_bits_of_two_that_do_not():
    """Gradients lie in the graphs' memory until all of their bucket have come."""
    for found in in_processes(2, on_two_processes):
        assert found == [([], 4 * (passes * (WARM_UP + 2) - WARM_UP)) for _, _, passes in OF_TWO]


# --- when it replays, and when it does not ----------------------------------------------------------------------------


class Network:
    """A network of two replayed blocks, with everything that one step changes."""

    def __init__(self, passes=1):
        self.model, self.recorder = convert_batch_norm(network(), N), CallsAgain()
        graph_blocks(self.model, passes, self.recorder)
        self.plain = convert_batch_norm(network(), N)

    def step(self, x, change=lambda model: None):
        """Whether a forward and backward of both are equal, including gradients and running statistics."""
        found = []
        for model in (self.model, self.plain):
            change(model)
            model.zero_grad()
            y = model(x)
            y.square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append([y, *gradients, *(b.clone() for b in model.buffers())])
        return all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def replays(self):
        count, self.recorder.replays = self.recorder.replays, 0
        return count


@pytest.fixture
def ours():
    ours = Network()
    for number in range(WARM_UP):
        assert ours.step(torch.randn(2 * N, 3, 6, 6)) and ours.replays() == 0, number
    return ours


def images(size=2 * N):
    return torch.randn(size, 3, 6, 6)


def test_each_block_is_replayed_forward_and_backward(ours):
    for _ in range(3):
        assert ours.step(images()) and ours.replays() == 4
    assert ours.recorder.recordings == 4


def test_another_size_runs_as_it_is_and_the_old_size_is_replayed_again(ours):
    assert ours.step(images()) and ours.replays() == 4
    assert ours.step(images(N)) and ours.replays() == 0
    assert ours.step(images()) and ours.replays() == 4
    assert ours.recorder.recordings == 4


def test_evaluation_runs_as_it_is(ours):
    ours.step(images())
    ours.replays()
    x = images(3)
    assert torch.equal(ours.model.eval()(x), ours.plain.eval()(x))
    ours.model.train(), ours.plain.train()
    with torch.no_grad(), lbsgd.recomputing_statistics(ours.model):
        ours.model(images())
    assert ours.replays() == 0


def test_weights_that_lie_elsewhere_are_recorded_again(ours):
    assert ours.step(images()) and ours.replays() == 4

    def move(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    assert ours.step(images(), move) and ours.replays() == 0
    for _ in range(WARM_UP - 1):
        assert ours.step(images()) and ours.replays() == 0
    assert ours.step(images()) and ours.replays() == 4 and ours.recorder.recordings == 8


def test_two_forwards_before_their_backwards_do_not_spoil_each_other(ours):
    first, second = images(), images()
    for model in (ours.model, ours.plain):
        model.zero_grad()
        (model(first).square().mean() + model(second).mean()).backward()
    pairs = zip(ours.model.parameters(), ours.plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs) and ours.replays() == 4
    ours.model(first), ours.plain(first)  # a forward without a backward
    assert ours.replays() == 2
    ours.recorder.last = 0, True
    assert ours.step(second) and ours.replays() == 4


def test_a_block_whose_input_needs_no_gradient_is_replayed_too():
    first, plain = (convert_batch_norm(nn.Sequential(BasicBlock(3, 3)), N) for _ in "12")
    plain.load_state_dict(first.state_dict())
    graph_blocks(first, 1, recorder := CallsAgain())
    for _ in range(WARM_UP + 2):
        x = images()
        for model in (first, plain):
            model.zero_grad()
            model(x).square().mean().backward()
        pairs = zip(first.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert recorder.replays == 4


def test_a_recording_runs_no_hook_of_a_parameter(ours):
    seen = []
    for block in (each for each in ours.model if isinstance(each, BasicBlock)):
        for parameter in block.parameters():
            parameter.register_hook(lambda grad: seen.append(grad))
    ours.step(images())  # records, and replays once
    assert len(seen) == 15 and ours.recorder.recordings == 4


class Chain(nn.Module):
    """Three blocks; `between` is called with the number of each, its input and itself, and returns its output."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(BasicBlock(4, 4) for _ in "123")
        self.first, self.between, self.passes = nn.Conv2d(3, 4, 1), between, 0

    def forward(self, x):
        x = self.first(x)
        self.passes += self.training
        for number, block in enumerate(self.blocks):
            x = self.between(self, number, block, x)
        return x


def mixed_up_later(chain, number, block, x):
    late = chain.passes > WARM_UP + 1 and number == 2
    return block(0.7 * x + 0.3 * x.flip(0) if late else x)


def of_half_the_images(chain, number, block, x):
    return block(x[:N] if number == 2 else x)


def dropped_at_times(chain, number, block, x):
    return x if number == 1 and chain.passes in (1, 4, 7) else block(x)


def without_gradient(chain, number, block, x):
    return x + 0 * block(x).detach() if number == 1 else block(x)


def another_order_later(chain, number, block, x):
    return chain.blocks[2 - number](x) if chain.passes in (4, 6) else block(x)


def twice(chain, number, block, x):
    return block(block(x)) if number == 1 else block(x)


def checkpointed(reentrant):
    return lambda chain, number, block, x: checkpoint(block, x, use_reentrant=reentrant)


WAYS = mixed_up_later, of_half_the_images, dropped_at_times, without_gradient, another_order_later, twice


@pytest.mark.parametrize("between", [*WAYS, checkpointed(True), checkpointed(False)])
def test_a_network_that_uses_its_blocks_in_other_ways_has_the_gradients_of_the_plain_one(recorder, forwards, between):
    device = get_accelerator().device_name()
    ours, plain = (convert_batch_norm(Chain(between), N).to(device) for _ in "12")
    graph_blocks(ours, 1, recorder())
    for _ in range(WARM_UP + 6):
        x = images().to(device)
        for model in (ours, plain):
            model.zero_grad()
            model(x).square().mean().backward()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))
    assert bool(forwards) is (between in WAYS)


def first_of_half_the_images(chain, number, block, x):
    if number or chain.passes != WARM_UP + 2:
        return block(1 * x)  # which is not the output of the block before
    return torch.cat([block(part) for part in x.split(N)])


def test_a_block_does_not_replay_while_later_ones_wait_for_their_backward():
    ours, plain = (convert_batch_norm(Chain(first_of_half_the_images), N) for _ in "12")
    graph_blocks(ours, 1, recorder := CallsAgain())
    for model in (ours, plain):
        torch.manual_seed(1)
        for _ in range(WARM_UP + 1):
            model.zero_grad()
            model(images()).square().mean().backward()
        model.zero_grad()
        (model(images()).square().mean() + model(images()).mean()).backward()
    assert recorder.replays == 6 + 4
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


class Probed(nn.Module):
    """A block whose output two heads read. A loss may leave out the path of either head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 4, 1), BasicBlock(4, 4)
        self.head, self.probe = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.block(self.stem(x))
        return self.head(y).mean(), self.probe(y.detach()).square().mean()


def test_what_saved_a_block_s_output_beyond_the_next_replay_gets_an_error_and_no_wrong_gradient():
    ours = convert_batch_norm(Probed(), N)
    graph_blocks(ours, 1, recorder := CallsAgain())
    for _ in range(WARM_UP + 1):
        sum(ours(images())).backward()
    kept = ours(images())[1]  # one head's path is dropped, so the block waits for no backward
    recorder.last = 0, True
    ours(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


class WithAnUnusedWeight(BasicBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unused = nn.Parameter(torch.zeros(3))


def test_a_weight_that_a_block_does_not_use_has_no_gradient():
    ours, plain = (convert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), WithAnUnusedWeight(4, 4)), N) for _ in "12")
    plain.load_state_dict(ours.state_dict())
    graph_blocks(ours, 1, recorder := CallsAgain())
    for _ in range(WARM_UP + 2):
        x = images()
        for model in (ours, plain):
            model.zero_grad()
            model(x).square().mean().backward()
    assert recorder.replays == 4 and ours[1].unused.grad is None
    trained = [(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True) if b.grad is not None]
    assert len(trained) == 8 and all(torch.equal(a.grad, b.grad) for a, b in trained)


def test_a_hook_on_all_modules_is_called_in_place_of_a_replay(ours):
    assert ours.step(images()) and ours.replays() == 4
    called = []
    handle = register_module_forward_hook(lambda module, inputs, y: called.append(type(module)))
    try:
        assert ours.step(images()) and ours.replays() == 0 and called.count(nn.Conv2d) == 2 * 6
    finally:
        handle.remove()


def test_frozen_blocks_run_as_they_are():
    model = convert_batch_norm(network(), N)
    for part in model[:4]:
        part.requires_grad_(False)
    graph_blocks(model, 1, recorder := CallsAgain())
    for _ in range(WARM_UP + 1):
        model(images()).square().mean().backward()
    assert recorder.recordings == recorder.replays == 2 and model[4].conv1.weight.grad is not None


def set_weights(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def freeze_statistics(model):
    model[3].bn1.eval()


def look(model):
    if not model[3].bn1._forward_hooks:
        model[3].bn1.register_forward_hook(lambda module, inputs, output: 2 * output)


def move_a_later_block(model):
    model[4].conv1.weight.data = model[4].conv1.weight.data.clone()


def freeze_a_weight(model):
    model[4].conv1.requires_grad_(False)


@pytest.mark.parametrize(
    "change, replayed",
    [(set_weights, 4), (freeze_statistics, 4), (look, 2), (move_a_later_block, 4), (freeze_a_weight, 4)],
)
def test_what_changes_after_the_recording_is_seen(ours, change, replayed):
    assert ours.step(images()) and ours.replays() == 4
    assert ours.step(images(), change) and ours.replays() == 0
    assert ours.step(images()) and ours.replays() == 0
    for _ in range(4):
        assert ours.step(images()) and ours.replays() == replayed
    assert ours.recorder.recordings == 4 + replayed


def test_a_weight_that_is_trained_again_gets_its_gradient(ours):
    freeze_a_weight(ours.model), freeze_a_weight(ours.plain)
    for _ in range(WARM_UP + 1):
        assert ours.step(images())
    assert ours.step(images(), lambda model: model[4].conv1.requires_grad_(True))
    assert ours.model[4].conv1.weight.grad is not None


def test_gradients_that_no_update_follows_add_up(ours):
    batches = [images() for _ in range(3)]
    for model in (ours.model, ours.plain):
        model.zero_grad()
        for batch in batches:
            model(batch).square().mean().backward()
    pairs = zip(ours.model.parameters(), ours.plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs) and ours.replays() == 12


def test_a_backward_after_the_weights_have_moved_is_that_of_its_forward(ours):
    x, losses = images(), []
    for model in (ours.model, ours.plain):
        model.zero_grad()
        losses.append(model(x).square().mean())
    move_a_later_block(ours.model)
    with torch.no_grad():
        ours.plain(x)
    ours.model(x)  # notices that the weights have moved
    for loss in losses:
        loss.backward()
    pairs = zip(ours.model.parameters(), ours.plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_short_batch_in_between_is_not_what_is_recorded():
    ours = Network()
    for size in (2 * N, N, 2 * N, 2 * N, 2 * N):
        assert ours.step(images(size))
    assert ours.recorder.recordings == 4 and ours.replays() == 4


def test_nothing_is_recorded_where_no_block_fits(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    model = convert_batch_norm(network(), N)
    model[:5].requires_grad_(False)
    graph_blocks(model, 1, recorder := CallsAgain())
    for _ in range(6):
        model(images()).square().mean().backward()
    assert recorder.recordings == 0 and not collected


def test_copies_of_a_recorded_network_are_recorded_by_themselves(ours):
    ours.step(images())
    for again in (copy.deepcopy(ours.model), pickle.loads(pickle.dumps(ours.model))):
        plain = copy.deepcopy(ours.plain)
        plain.load_state_dict(again.state_dict())
        assert again[3].forward.block is again[3] and again[3].forward.recording is None
        for _ in range(WARM_UP + 1):
            x = images()
            for model in (again, plain):
                model.zero_grad()
                model(x).square().mean().backward()
            pairs = zip(again.parameters(), plain.parameters(), strict=True)
            assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        assert (
            again[3].forward.recording is not None and again[3].forward.recording is not ours.model[3].forward.recording
        )
    ours.replays()
    assert ours.step(images()) and ours.replays() == 4


def test_a_second_backward_is_refused(ours):
    loss = ours.model(images()).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="CUDA graphs: a residual block's backward came twice"):
        loss.backward()


def test_gradients_arrive_block_by_block(ours):
    events = []
    for name, block in zip(("first", "second"), (b for b in ours.model if isinstance(b, BasicBlock)), strict=True):
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: events.append((name, ours.recorder.replays))
            )
    ours.step(images())
    assert events == 9 * [("second", 3)] + 6 * [("first", 4)]


# --- the flag ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="--cuda_graphs: no GPU computes here"):
        graph_blocks(network(), 1)
    with pytest.raises(ConfigError, match="no residual blocks"):
        graph_blocks(oracle.network(), 1, CallsAgain())
    monkeypatch.setattr("lbsgd.train.graphs.world_size", lambda: 2)
    with pytest.raises(ConfigError, match='batch norm of scope "all"'):
        graph_blocks(convert_batch_norm(network(), N, scope="all"), 1, CallsAgain())


def subclass_of_a_block(model):
    class Mine(BasicBlock):
        pass

    model[3].__class__ = Mine


def hook(model):
    model[3].bn1.register_forward_hook(print)


@pytest.mark.parametrize(
    "change, world_size, compiled, kind, why",
    [
        (lambda model: None, 1, False, "cuda", "the rule for one GPU"),
        (lambda model: None, 1, False, "cpu", "the rule for cpu"),
        (lambda model: None, 2, False, "cuda", "the rule for several processes: not measured"),
        (lambda model: None, 1, True, "cuda", "the rule beside --compile"),
        (subclass_of_a_block, 1, False, "cuda", "the rule for a network that is not of torchvision's residual blocks"),
        (hook, 1, False, "cuda", "the rule for a network that is not of torchvision's residual blocks"),
        (lambda model: setattr(model[3].bn1, "scope", "all"), 1, False, "cuda", "the rule for one GPU"),
        (lambda model: setattr(model[3], "forward", print), 1, False, "cuda", "the rule for a network that"),
        (lambda model: model[3].register_module("relu", nn.GELU()), 1, False, "cuda", "the rule for a network that"),
    ],
)
def test_the_rule_graphs_where_it_was_measured(monkeypatch, change, world_size, compiled, kind, why):
    monkeypatch.setattr("lbsgd.train.graphs.kind_in_rule", lambda device: kind)
    blocks = BasicBlock(3, 3), BasicBlock(3, 3)
    model = fuse_blocks(convert_batch_norm(nn.Sequential(*(nn.Identity() for _ in "123"), *blocks), N))
    change(model)
    graphed, reason = by_rule(model, world_size, torch.device(kind), compiled)
    assert reason.startswith(why) and graphed is (why == "the rule for one GPU")


def test_a_block_whose_parts_have_hooks_is_refused():
    model = convert_batch_norm(network(), N)
    hook(model)
    with pytest.raises(ConfigError, match="--cuda_graphs: a residual block or a part of it has hooks"):
        graph_blocks(model, 1, CallsAgain())


def test_without_a_gpu_the_flag_ends_a_run_with_one_line_and_beside_compile_it_is_refused(tmp_path):
    json, cifar10 = config(tmp_path, iterations=4), str(ROOT / "recipes/cifar10.py")
    with Command(json, tmp_path / "run", "--cuda_graphs", world_size=1, recipe=cifar10) as run:
        assert run.exit_codes() == [ConfigError.exit_code]
        assert run.errors == ["error: --cuda_graphs: no GPU computes here; leave the flag out"]
    with Command(json, tmp_path / "both", "--cuda_graphs", "--compile", world_size=1, recipe=cifar10) as run:
        assert run.exit_codes() == [2] and "not allowed with argument" in run.console
