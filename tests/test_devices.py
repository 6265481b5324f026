"""A run warns of a GPU that torch cannot use before anything slow begins. --deterministic reaches cuDNN and NCCL."""

import os
import resource
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import in_processes
from torch import nn
from torchvision.models.resnet import BasicBlock

import lbsgd.train.session as session
from lbsgd.commands import train as command
from lbsgd.commands.recipe_flags import parser
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError, DataError
from lbsgd.processes.environment import Processes
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.train.deepspeed_setup import allow_sockets, require_device
from lbsgd.train.device_rules import emulated_bf16
from lbsgd.train.engine import start_processes
from lbsgd.train.facts import accelerator_kind, unused_gpu
from lbsgd.train.graphs import graph_blocks
from lbsgd.train.header import of_the_device

ROOT = Path(__file__).parent.parent
OPEN_550 = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version:  gcc 12.2.0\n"
)
CLOSED_580 = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n"
TOO_OLD = "with driver 550.54.15, but torch 2.11.0 needs driver 580 or newer, so the CPU computes; `make setup CUDA=12`"


@pytest.fixture
def why(tmp_path, monkeypatch):
    """A function of the driver's own words and of torch's CUDA, on a host with a GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").touch()

    def asked(driver=OPEN_550, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (tmp_path / "version").unlink(missing_ok=True)
        if driver:
            (tmp_path / "version").write_text(driver)
        return unused_gpu(tmp_path / "version", tmp_path)

    return asked


def test_a_driver_before_580_is_named_with_the_set_up_that_serves_it(why):
    assert TOO_OLD in why()
    for driver, cuda in ((CLOSED_580, "13.0"), (OPEN_550, "12.8"), ("", "13.0"), ("other words\n", "13.0")):
        said = why(driver, cuda)
        assert "cannot use it, so the CPU computes" in said and "CUDA=12" not in said
    assert "with driver 580.65.06, but" in why(CLOSED_580)


def test_a_torch_without_cuda_is_named(why):
    assert "but torch 2.11.0 is built without CUDA, so the CPU computes" in why(cuda=None)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_or_used_or_that_no_container_was_given_is_not_told(why, hidden, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert why() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # DeepSpeed's launcher sets it
    assert TOO_OLD in why()
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        assert why() == ""
    (tmp_path / "nvidia0").rename(tmp_path / "nvidiactl")
    assert why() == ""


@pytest.mark.parametrize("rank, told", [(0, "warning: no driver\n"), (1, "")])
def test_a_run_warns_once_the_processes_have_met(rank, told, monkeypatch, capsys):
    def refuse(*_):
        raise DataError("the folder is taken")

    monkeypatch.setattr(session, "Guard", lambda *_: nullcontext())
    monkeypatch.setattr(session, "meet", lambda *_: None)
    monkeypatch.setattr(session, "unused_gpu", lambda: "no driver")
    monkeypatch.setattr(session, "from_rank_0", refuse)
    with pytest.raises(DataError, match="taken"):
        run = SimpleNamespace(deterministic=False)
        session.train(run, SimpleNamespace(is_rank_0=rank == 0), [], 60, {}, Stopwatch([]))
    assert capsys.readouterr().out == told


def test_a_run_that_is_to_compute_on_the_cpu_takes_a_host_s_gpus_for_nothing(why, monkeypatch):
    """As DeepSpeed does; else hosts with and without the variable would wait for each other in other backends."""
    for name, here in (("is_available", True), ("current_accelerator", torch.device("cuda"))):
        monkeypatch.setattr(torch.accelerator, name, lambda here=here: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert accelerator_kind() == get_accelerator().device_name() == "cpu"
    assert [of_the_device(torch.device(kind))["device"] for kind in ("cpu", "cuda")] == ["cpu", "H100"]
    second = Processes(rank=1, world_size=2, local_rank=1, local_world_size=2)
    require_device(second, get_accelerator().device_name())
    with pytest.raises(ConfigError, match="--cuda_graphs: no GPU computes here"):  # the graphs would be empty
        graph_blocks(nn.Sequential(BasicBlock(4, 4)), 1)
    assert why() == ""  # torch can use the GPU
    monkeypatch.delenv("DS_ACCELERATOR")
    assert accelerator_kind() == "cuda"
    with pytest.raises(ConfigError, match="local rank 1 finds 1 GPUs"):
        require_device(second, "cuda")


# --- bf16 -------------------------------------------------------------------------------------------------------------

V100 = "V100 (compute capability 7.0) only emulates bf16: results are right, but slow; use --precision fp16"


@pytest.mark.parametrize(
    "precision, capability, cuda, said",
    [
        ("bf16", (7, 0), "12.8", V100),
        ("bf16", (8, 0), "12.8", ""),
        ("fp16", (7, 0), "12.8", ""),
        ("bf16", (7, 0), None, ""),  # AMD's, which are numbered differently
    ],
)
def test_a_gpu_that_emulates_bf16_is_told_with_what_is_faster(precision, capability, cuda, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    plan = Plan.read(ROOT / "ds_configs/8k.json", 8, overrides=Overrides(precision=precision))
    found = emulated_bf16(plan, torch.device("cuda"))
    assert found.startswith(said) and bool(found) == bool(said)
    assert emulated_bf16(plan, torch.device("cpu")) == ""


def test_a_detector_is_not_sent_to_fp16_which_it_refuses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    plan = Plan.read(generate(Overrides(16, precision="bf16"), detection=True), 1)
    assert "use --precision fp32" in emulated_bf16(plan, torch.device("cuda"))


@pytest.mark.parametrize("rank, told", [(0, "warning: it emulates bf16\n"), (1, "")])
def test_a_run_warns_of_it_once_the_engine_stands(rank, told, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise DataError("enough")

    monkeypatch.setattr(session, "Guard", lambda *_: nullcontext())
    for name in ("meet", "from_rank_0", "limit_threads", "seed_random_numbers"):
        monkeypatch.setattr(session, name, lambda *_: None)
    monkeypatch.setattr(session, "unused_gpu", lambda: "")
    monkeypatch.setattr(session, "build_engine", lambda run: (SimpleNamespace(device=torch.device("cpu")), None))
    monkeypatch.setattr(session, "emulated_bf16", lambda plan, device: "it emulates bf16")
    monkeypatch.setattr(session, "Progress", stop)
    with pytest.raises(DataError, match="enough"):
        plan = SimpleNamespace(iterations_per_epoch=1, global_batch=1, recipe=SimpleNamespace(seed=0))
        task = SimpleNamespace(judged_by=())
        run = SimpleNamespace(plan=plan, deterministic=False, last_iteration=1, task=task)
        session.train(run, SimpleNamespace(is_rank_0=rank == 0), [], 60, {}, Stopwatch([]))
    assert capsys.readouterr().out == told


# --- --deterministic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, "1"])
@pytest.mark.parametrize("flags, wanted", [([], False), (["--deterministic"], True)])
def test_cudnn_and_nccl_repeat_their_bits_where_the_flag_says_so(flags, wanted, own, tmp_path, monkeypatch):
    """NCCL reads its variable when the processes meet, and a user's own value stays."""
    found = []

    def stop(*_):
        found.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        found.append(os.environ.get("NCCL_NVLS_ENABLE"))
        raise DataError("enough")

    monkeypatch.setenv("NCCL_NVLS_ENABLE", "to be restored")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", own) if own else monkeypatch.delenv("NCCL_NVLS_ENABLE")
    monkeypatch.setattr(session, "Guard", lambda *_: nullcontext())
    monkeypatch.setattr(session, "meet", stop)
    config = ["--deepspeed_config", str(ROOT / "ds_configs/digits.json"), "--output_dir", str(tmp_path)]
    request = command.Request(parser("").parse_args([*config, "--fake_data", *flags]))
    with torch.backends.cudnn.flags(deterministic=False, benchmark=True), pytest.raises(DataError, match="enough"):
        command.start(SimpleNamespace(), request, [], Stopwatch([]))
    assert found == [(wanted, not wanted), own or ("0" if wanted else None)]


def test_where_cpus_compute_a_process_may_open_the_sockets_to_all_others(monkeypatch):
    limits = [(1024, 8192)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    for world_size, kind in ((1, "cpu"), (32, "cpu"), (2048, "cuda"), (256, "cpu"), (2048, "cpu")):
        allow_sockets(Processes(1 % world_size, world_size, 0, 1), kind)
    assert limits[1:] == [(3584, 8192), (8192, 8192)]  # the last as far as the host allows


def joins_with_few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    start_processes()
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_each_of_several_processes_raises_its_limit_of_open_files():
    assert min(in_processes(2, joins_with_few_files)) > 512
