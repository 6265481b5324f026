"""What else must be right on a GPU: batch norm in half precision and channels_last, repeated bits, kill and resume.

The variants on a CPU show that the tests themselves are right.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crash import SMALL, config
from crash_runs import assert_same_log, weights
from deepspeed.accelerator import get_accelerator
from oracle import N, distance, network
from small_engine import in_precision, recipe, trained

from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm2d

ROOT = Path(__file__).parent.parent
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    assert get_accelerator().device_name() == request.param
    return request.param


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_batch_norm_in_each_type_and_layout_is_that_of_float64(device, dtype, layout):
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N).to(device)
    torch.nn.init.normal_(layer.weight, 1, 0.3), torch.nn.init.normal_(layer.bias)
    x, grad_y = (torch.randn(4 * N, 5, 6, 6, device=device).to(dtype, memory_format=FORMATS[layout]) for _ in "12")
    exact = PerWorkerBatchNorm2d(5, per_worker_batch=N, dtype=torch.float64, device=device)
    exact.load_state_dict(layer.state_dict())
    results = []
    for each, images in ((layer, x), (exact, x.double())):
        images = images.detach().requires_grad_()
        y = each(images)
        grads = torch.autograd.grad(y, (images, each.weight, each.bias), grad_y.to(y.dtype))
        results.append([y, *grads, each.running_mean, each.running_var])
    assert results[0][0].dtype is dtype and results[0][0].is_contiguous(memory_format=FORMATS[layout])
    for found, right in zip(*results, strict=True):
        assert (found.double() - right).abs().max() < BOUNDS[dtype] * right.abs().max()


@pytest.mark.parametrize("precision, stage", [("fp32", 0), ("bf16", 0), ("fp16", 1)])
def test_two_runs_have_the_same_bits(device, monkeypatch, precision, stage):
    """With cuDNN's deterministic algorithms; ours always are."""
    if device == "cpu":
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = recipe(stage) if precision == "fp32" else in_precision(precision, stage)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        first, second = (trained(config, last=6)[0].weights for _ in "12")
    assert [name for name, w in first.items() if not torch.equal(w, second[name])] == []
    assert distance(first, dict(network().named_parameters())) > 0.01  # they have learned


ON_A_CPU = pytest.param("cpu", marks=pytest.mark.slow)  # test_crash.py checks it there, to the bit and faster


@pytest.mark.parametrize("where", [ON_A_CPU, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_run_goes_on_from_its_checkpoint(where, tmp_path):
    json = config(tmp_path)
    assert start(json, tmp_path / "whole").wait() == 0, printed(tmp_path / "whole")
    killed = start(json, tmp_path / "killed")
    wait_for(tmp_path / "killed", '"iteration": 12', killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start(json, tmp_path / "killed", "--resume").wait() == 0, printed(tmp_path / "killed")
    resumed, whole = (weights(tmp_path / name) for name in ("killed", "whole"))
    assert_same_log(tmp_path / "killed", tmp_path / "whole")
    assert [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)] == []


def start(json, folder, *flags):
    command = [sys.executable, SMALL, "--deepspeed_config", json, "--output_dir", folder, "--fake_data"]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    with open(f"{folder}.txt", "ab") as output:
        return subprocess.Popen(
            [*map(str, command), "--checkpoint_every", "7", "--deterministic", *flags],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def printed(folder):
    return Path(f"{folder}.txt").read_text()


def wait_for(folder, text, process):
    log = folder / "log.jsonl"
    for _ in range(12_000):
        if log.exists() and text in log.read_text():
            return
        assert process.poll() is None, f"ended before {text}: {printed(folder)}"
        time.sleep(0.01)
    raise AssertionError(f"no {text}")
