"""--compile: blocks compiled one by one equal the plain step within the oracle's bound; gradients come as before."""

from functools import cache
from types import SimpleNamespace

import oracle
import pytest
import torch
from crash import completed, config
from deepspeed.accelerator import get_accelerator
from oracle import BOUND, ITERATIONS, K, N, distance
from small_engine import in_precision, recipe, train
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

import lbsgd
import lbsgd.train.session
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.commands.detect import DetectionRequest
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.report.run_log import read_run
from lbsgd.train.compiled import as_it_is, compile_blocks
from lbsgd.train.device_rules import lay_out
from lbsgd.train.engine_state import gather_state, restore_state
from lbsgd.train.evaluation import evaluate

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
MULTIPLE = 3  # times the plain run's own distance in half precision, to which compilation adds its own rounding


@pytest.fixture(autouse=True)
def graphs():
    """Count the graphs of a test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def network(seed=0):
    """Two of torchvision's blocks, of different sizes, with GELU (oracle.Residual says why)."""
    torch.manual_seed(seed)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    blocks = BasicBlock(8, 8), BasicBlock(8, 16, downsample=shortcut)
    for block in blocks:
        block.relu = nn.GELU()
        nn.init.zeros_(block.bn2.weight)
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def engine_of(config, backend=None, seed=0):
    engine, plan = lbsgd.initialize(network(seed), config)
    if backend:
        assert compile_blocks(engine.module, backend) == 2
    return engine, plan


def trained(config, backend=None, last=ITERATIONS):
    engine, plan = engine_of(config, backend)
    lrs = train(engine, plan, last=last)
    lbsgd.agree_statistics(engine.module)
    return gather_state(engine), lrs


@pytest.fixture(scope="module")
def expected():
    return oracle.train(network())


@cache
def compiled_run(backend):
    """Return the states in the middle and at the end of a compiled run with stage 0 and one pass, and its graphs."""
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    engine, plan = engine_of(recipe(micro_batch=K * N), backend)
    train(engine, plan, last=ITERATIONS // 2)
    half = gather_state(engine)
    train(engine, plan, ITERATIONS // 2)
    return half, gather_state(engine), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_the_oracles(state, expected):
    assert distance(state.weights, expected[0]) < BOUND and distance(state.momentum, expected[1]) < BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_run_of_one_pass_is_the_oracles(backend, expected):
    _, state, num_graphs = compiled_run(backend)
    assert_the_oracles(state, expected)
    assert num_graphs == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage, micro_batch", [(1, N), (2, K * N)])
def test_a_compiled_run_is_the_oracles(graphs, backend, stage, micro_batch, expected):
    state, _ = trained(recipe(stage, micro_batch=micro_batch), backend)
    assert_the_oracles(state, expected)
    assert graphs() == 2  # one per block, for all passes and iterations


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bf16_a_compiled_run_is_as_near_as_the_plain_one(backend, expected):
    bf16 = in_precision("bf16", 0, K * N)
    plain, compiled = (distance(trained(bf16, how)[0].weights, expected[0]) for how in (None, backend))
    assert compiled < MULTIPLE * plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_skips_the_same_updates_and_shifts_no_learning_rate(monkeypatch, backend, expected):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    fp16 = in_precision("fp16", 1, N, initial_scale_power=24, hysteresis=1)
    (plain, lrs), (compiled, compiled_lrs) = trained(fp16), trained(fp16, backend)
    assert 0 < plain.counters["skipped_iterations"] == compiled.counters["skipped_iterations"] < 10
    assert lrs == compiled_lrs
    ours, theirs = (distance(state.weights, expected[0]) for state in (compiled, plain))
    assert ours < MULTIPLE * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_run_goes_on_from_its_state_to_the_bit(backend):
    half, whole, _ = compiled_run(backend)
    torch._dynamo.reset()  # as in a new process
    engine, plan = engine_of(recipe(micro_batch=K * N), backend, seed=1)
    restore_state(engine, half)
    train(engine, plan, ITERATIONS // 2)
    resumed = gather_state(engine)
    assert [name for name, w in whole.weights.items() if not torch.equal(w, resumed.weights[name])] == []


# --- the flag -----------------------------------------------------------------------------------------------------

RECIPE = """
from cluster.small import Small
from torch import nn
from torchvision.models.resnet import BasicBlock
from lbsgd.commands.train import main

class OneBlock(Small):
    def network(self, num_classes, plan):
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        return nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), *head)

main(OneBlock(), "")
"""


def compile_without_machine_code():
    lbsgd.train.session.compile_blocks = lambda model: compile_blocks(model, "aot_eager")


@pytest.mark.parametrize("fault", [compile_without_machine_code, pytest.param(None, marks=pytest.mark.slow)])
def test_the_flag_compiles_a_recipe_which_is_resumed_and_logged(tmp_path, fault):
    json = config(tmp_path, iterations=4)
    (tmp_path / "recipe.py").write_text(RECIPE)
    options = {"world_size": 1, "recipe": str(tmp_path / "recipe.py"), "fault": fault}
    completed(json, tmp_path / "run", "--compile", "--max_iterations", 3, **options)
    completed(json, tmp_path / "run", "--compile", "--resume", **options)
    run = read_run(tmp_path / "run")
    assert run.header["compiled"] == "each residual block"
    assert [record["iteration"] for record in run.iterations] == [*range(8)] and run.result


@pytest.mark.parametrize("flag", ["compile", "cuda_graphs", "deterministic"])
def test_a_detector_is_refused_in_one_line(flag):
    plan = Plan.read(generate(Overrides(4, num_images=24), detection=True, gpus=1), 1)
    given = {"resolution": None, "compile": False, "cuda_graphs": False, "deterministic": False, flag: True}
    request = SimpleNamespace(flags=SimpleNamespace(**given), plan=plan)
    with pytest.raises(ConfigError, match=f"--{flag} is for classifiers"):
        DetectionRequest.open_data(request)


# --- when gradients come ----------------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Notes each convolution of the backward."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.events.append("convolution")
        return function(*args, **(kwargs or {}))


def order_of_gradients(compiled):
    """Return the events of one backward in order: convolutions, and gradients of the blocks' parameters."""
    events, model = [], convert_batch_norm(network(), N)
    for name, block in zip(("first", "second"), (each for each in model if isinstance(each, BasicBlock)), strict=True):
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    forward, x = compiled(model), torch.randn(2 * N, 3, 6, 6)
    forward(x).square().mean().backward()  # compiles
    events.clear()
    loss = forward(x).square().mean()
    with Convolutions(events):
        loss.backward()
    return events


def by_block(model):
    compile_blocks(model, "aot_eager")
    return model


def as_a_whole(model):
    return torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)


def test_gradients_arrive_block_by_block():
    """So the last block's aggregation begins while the first blocks' gradients are computed (Sec. 4)."""
    second, first, stem = 3 * ["convolution"] + 9 * ["second"], 2 * ["convolution"] + 6 * ["first"], ["convolution"]
    assert order_of_gradients(by_block) == second + first + stem
    torch._dynamo.reset()
    assert order_of_gradients(as_a_whole)[:6] == 6 * ["convolution"]  # and no gradient before


# --- evaluation, and what cannot be compiled --------------------------------------------------------------------------


class Task:
    counts = judged_by = ()

    def evaluate(self, network, batches):
        return {"outputs": len([network(batch) for batch in batches])}


def test_evaluation_compiles_nothing_and_is_the_plain_networks(graphs):
    engine, plan = engine_of(recipe(), "aot_eager")
    train(engine, plan, last=2)
    compiled, batches = graphs(), [torch.randn(size, 3, 6, 6) for size in (16, 7, 1)]
    found = evaluate(engine, Task(), batches, lambda position: None)
    with torch.no_grad(), lbsgd.recomputing_statistics(engine.module.train()), as_it_is(engine.module):
        engine.module(batches[0])
    plain = network()
    convert_batch_norm(plain, N).load_state_dict(engine.module.state_dict())
    lay_out(plain)
    engine.eval()
    with as_it_is(engine.module), torch.no_grad():
        again = [engine(batch) for batch in batches]
    assert graphs() == compiled == 2
    assert all(torch.equal(a, plain.eval()(batch)) for a, batch in zip(again, batches, strict=True))
    assert found == {"outputs": 3}
    engine.train()
    train(engine, plan, 2, 3)
    assert graphs() == 2  # training goes on with the graphs that it has


def test_a_fused_network_compiles_too(graphs):
    models = [convert_batch_norm(network(), N, implementation="triton") for _ in "12"]
    compile_blocks(fuse_blocks(models[0]), "aot_eager")
    x = torch.randn(2 * N, 3, 6, 6)
    for model in models:
        F.cross_entropy(model(x), torch.arange(2 * N) % 5).backward()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in pairs) and graphs() == 2


def test_a_network_without_blocks_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="--compile: this network has no residual blocks"):
        compile_blocks(oracle.network())


def test_all_blocks_of_a_deep_network_are_compiled(graphs):
    """torch stops compiling the code of a class after 8 graphs by default."""
    blocks = nn.Sequential(*(BasicBlock(2, 2 + i, downsample=nn.Conv2d(2, 2 + i, 1)) for i in range(4)))
    with torch._dynamo.config.patch(recompile_limit=2):  # pytest's own would hide it from all later tests
        compile_blocks(convert_batch_norm(blocks, 2), "aot_eager")
        for block in blocks:
            block(torch.randn(2, 2, 3, 3))
    assert graphs() == 4
