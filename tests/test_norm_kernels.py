"""The Triton kernels of batch norm: right in Triton's interpreter, and compiled for two kinds of GPU."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from norm_cases import CASES, LARGE
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck

import lbsgd
from lbsgd.algorithm import fused_norm, norm_rule
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.fused_blocks import FusedBottleneck, can_fuse, fuse_blocks
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm2d
from lbsgd.errors import ConfigError
from lbsgd.train.device_rules import kind_in_rule

HERE = Path(__file__).parent
BOUNDS = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 8e-3}  # of the largest value; about twice the types' own rounding
FAR = 2e-4  # float32 holds 1000 to 6e-5, and the deviation is about 1


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def found(request):
    """The output of tests/norm_cases.py."""
    interpreting = {"TRITON_INTERPRET": "1"} if request.param == "cpu" else {}
    command = [sys.executable, str(HERE / "norm_cases.py"), request.param]
    environment = {**os.environ, **interpreting, "PYTHONPATH": str(HERE.parent)}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("name", CASES | LARGE)
def test_output_gradients_and_moments_are_those_of_float64(found, name):
    *_, dtype, _, follows = (CASES | LARGE)[name]
    case = found["cases"][name]
    assert case["images"] < (FAR if follows == "far" else BOUNDS[dtype]) and case["moments"] < 1e-5
    assert case["form kept"] and case["repeats"]


def test_a_workers_bits_do_not_know_how_many_others_the_micro_batch_holds(found):
    assert found["same bits alone"]


def test_nan_passes_the_relu_as_it_passes_torchs(found):
    assert found["nan passes"] and F.relu(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_a_fused_block_is_torchvisions(found, kind):
    assert found["blocks"][kind]["fused"] and found["blocks"][kind]["error"] < 1e-5


# --- machine code -----------------------------------------------------------------------------------------------------

TILES = {"OUTER": 64, "CHANNELS": 64, "INNER": 1, "inner": 1}  # channels_last: inner is 1, and Triton knows that
PLANES = {"OUTER": 4, "CHANNELS": 1, "INNER": 1024}
FUSED, PLAIN = {"RELU": True}, {"RELU": False, "weight": None, "bias": None, "residual": None, "y": None}
POOLS = {"SPLITS": 512, "CHANNELS": 8}
FLOATS = {"parts", "stats", "sums", "weight", "bias"}
TENSORS = {"x", "y", "residual", "grad_y", "grad_z", "grad_x"}


def compiled(kernel, arch, constants, dtype):
    """Compile a kernel to machine code as its launch does: sizes and addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        return "*fp32" if name in FLOATS else f"*{dtype}" if name in TENSORS else "fp32" if name == "eps" else "i32"

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if kernel.__name__ == "normalise" and "y" in constants:
        del constants["y"]
    signature = {name: type_of(name) for name in kernel.arg_names}
    multiples = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if signature[name][0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_to_machine_code(arch, tmp_path, monkeypatch):
    from triton import knobs

    from lbsgd.algorithm import norm_kernels as kernels

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for kernel in (kernels.partial_moments, kernels.normalise, kernels.partial_gradients, kernels.input_gradient):
        fused = compiled(kernel, arch, TILES | FUSED, "fp16")
        assert fused.asm["cubin"][:4] == b"\x7fELF"
        # channels_last: a thread reads and writes several values at once
        assert "ld.global.v" in fused.asm["ptx"]
        assert compiled(kernel, arch, PLANES | PLAIN, "bf16").asm["cubin"]
    for kernel in (kernels.pool_moments, kernels.pool_gradients):
        assert compiled(kernel, arch, POOLS, "fp32").asm["cubin"]


def test_a_launch_without_tritons_search_is_tritons_own_to_the_byte(tmp_path):
    """`KernelLaunch` calls what Triton keeps to itself, so each version of Triton may want other arguments."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "launched" / "cuda.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)  # the name under which Triton before 3.6 links it
    folders = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "TRITON_CACHE_DIR"), str(tmp_path))
    environment = {**os.environ, **folders, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "launched" / "by_both.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(run.stdout)
    assert len(found) == 12 and all(each == {"alike": True, "addresses": True} for each in found.values()), found


# --- blocks and the rule, where no kernel runs ------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    blocks = nn.Sequential(BasicBlock(8, 8), nn.Sequential(Bottleneck(8, 2)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), blocks)


def fused(model):
    return fuse_blocks(convert_batch_norm(model, 2, implementation="triton"))


def test_on_a_cpu_a_fused_network_is_torchvisions_to_the_bit():
    plain, ours = convert_batch_norm(network(), 2), fused(network())
    x = torch.randn(4, 3, 6, 6)
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(x), ours.train(mode)(x))
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert type(ours[1][1][0]) is FusedBottleneck and isinstance(ours[1][1][0], Bottleneck)


def test_a_fused_network_is_pickled_copied_and_taken_apart_as_before():
    ours, x = fused(network()).eval(), torch.randn(4, 3, 6, 6)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert torch.equal(again(x), ours(x)) and type(again[1][1][0]) is FusedBottleneck
    whole = fuse_blocks(convert_batch_norm(torchvision.models.resnet18(), 2, implementation="triton"))
    extract = create_feature_extractor(whole, {"layer1.1.bn1": "first", "layer1.1.relu_1": "last"})
    assert set(extract(torch.randn(2, 3, 16, 16))) == {"first", "last"}


def test_what_would_show_that_a_block_is_fused_keeps_it_from_it(monkeypatch):
    monkeypatch.setattr("lbsgd.algorithm.fused_blocks.triton_takes", lambda x: True)
    x = torch.randn(4, 8, 6, 6)

    def fusable(change):
        block = fused(BasicBlock(8, 8))
        change(block)
        return can_fuse(block, x, block.bn1, block.bn2)

    assert fusable(lambda block: None)
    for change in (
        lambda block: block.eval(),
        lambda block: block.bn1.eval(),
        lambda block: block.bn2.register_forward_hook(print),
        lambda block: block.relu.register_forward_pre_hook(print),
        lambda block: setattr(block, "bn2", nn.BatchNorm2d(8)),
        lambda block: setattr(block, "relu", nn.GELU()),
        lambda block: setattr(block.relu, "forward", torch.tanh),
        lambda block: setattr(block.bn1, "implementation", "loop"),
    ):
        assert not fusable(change)


def test_a_class_of_somebody_elses_is_left_alone():
    class Mine(BasicBlock):
        pass

    assert type(fuse_blocks(Mine(8, 8))) is Mine


@pytest.mark.parametrize(
    "asked, device, layout, how, why",
    [
        ("rule", "cuda", torch.channels_last, "triton", "the rule for cuda, channels_last"),
        ("rule", "cuda", torch.contiguous_format, "loop", "the rule for cuda, contiguous_format"),
        ("rule", "cpu", torch.channels_last, "loop", "the rule for cpu, channels_last"),
        (
            "rule",
            "a GPU of another kind",
            torch.channels_last,
            "loop",
            "the rule for a GPU of another kind, channels_last",
        ),
        ("triton", "a GPU of another kind", torch.channels_last, "triton", "the JSON"),
        ("loop", "cuda", torch.channels_last, "loop", "the JSON"),
    ],
)
def test_the_rule_is_by_device_and_layout_and_the_json_overrides_it(monkeypatch, asked, device, layout, how, why):
    monkeypatch.setattr(norm_rule, "triton_version", lambda: norm_rule.TRIED)
    assert norm_rule.implementation_for(asked, device, layout) == (how, why)


@pytest.mark.parametrize(
    "capability, cuda, kind", [((9, 0), "13.0", "cuda"), ((7, 5), "12.8", None), ((9, 4), None, None)]
)
def test_a_gpu_that_is_not_like_those_of_the_rule_is_of_another_kind(monkeypatch, capability, cuda, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert kind_in_rule(torch.device("cuda")) == (kind or "a GPU of another kind")
    assert kind_in_rule(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    "layout, size, taken",
    [
        (torch.contiguous_format, (1024, 1024), True),
        (torch.contiguous_format, (1024, 1025), False),  # more splits than one program adds up
        (torch.contiguous_format, (16, 32), True),
        (torch.contiguous_format, (16, 31), False),  # slower than the loop
        (torch.channels_last, (16, 31), True),
        (torch.contiguous_format, (1, 1), True),
    ],
)
def test_maps_too_large_or_too_small_are_left_to_the_loop(monkeypatch, layout, size, taken):
    monkeypatch.setattr(fused_norm.kernels, "INTERPRETED", True)
    assert fused_norm.can_take(torch.empty(2, 3, *size, device="cpu").to(memory_format=layout)) is taken


def test_triton_without_a_gpu_is_refused_in_one_line():
    from small_engine import recipe

    config = recipe(implementation="triton")
    with pytest.raises(ConfigError, match="implementation triton needs a GPU, and this device is cpu"):
        lbsgd.initialize(network(), config)


def test_without_triton_the_kernels_are_refused_and_all_else_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lbsgd\n"
        "from lbsgd.algorithm import fused_blocks, norm_rule, per_worker_batch_norm\n"
        "per_worker_batch_norm.PerWorkerBatchNorm2d(3, per_worker_batch=2)(torch.randn(4, 3, 2, 2))\n"
        "norm_rule.triton_version = lambda: ()\n"
        "try: norm_rule.implementation_for('triton', 'cuda', torch.channels_last)\n"
        "except ValueError as error: print(error)\n"
        "print(norm_rule.implementation_for('rule', 'cuda', torch.channels_last))\n"
        "norm_rule.triton_version = lambda: (3, 2)\n"
        "print(norm_rule.implementation_for('rule', 'cuda', torch.channels_last))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=HERE.parent)
    assert "needs the package triton, which is not installed" in run.stdout
    assert "('loop', 'the rule for cuda, channels_last, without the package triton')" in run.stdout
    assert "('loop', 'the rule for cuda, channels_last, with triton 3.2, which was not tried')" in run.stdout


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation 'cudnn' must be one of"):
        PerWorkerBatchNorm2d(5, per_worker_batch=2, implementation="cudnn")
