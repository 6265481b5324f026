"""`initialize` in a program whose processes have met, have parted again, or know only a part of their place."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from commands import LAUNCHERS, script
from small_engine import recipe

import lbsgd
from lbsgd.errors import ConfigError

NETWORK = """
import deepspeed, torch, lbsgd
from small_engine import recipe
def train():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    engine, plan = lbsgd.initialize(network, recipe(stage=STAGE))
    before = network[0].weight.clone()
    for _ in range(plan.accumulation_steps):
        engine.backward(engine(torch.randn(plan.micro_batch, 3, 4, 4)).square().mean())
        engine.step()
    assert not torch.equal(network[0].weight, before)
"""


@pytest.fixture
def done(tmp_path):
    """Return a function that runs a program without a launcher."""

    def run(code, stage=0, **environment):
        (tmp_path / "program.py").write_text(NETWORK.replace("STAGE", str(stage)) + code)
        return script(tmp_path / "program.py", **environment)

    return run


@pytest.mark.parametrize("stage", [0, 1])
def test_a_program_that_has_initialised_torch_distributed_by_itself_trains_and_compiles_nothing(done, stage, tmp_path):
    group = "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)\n"
    ran = done(group + "train()", stage, TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize("stage", [0, 1])
def test_processes_that_have_parted_meet_again(done, stage):
    ran = done("train(); torch.distributed.destroy_process_group(); train()", stage)
    assert ran.returncode == 0, ran.stderr


def test_without_an_address_to_meet_at_the_variable_is_named(done):
    ran = done("train()", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert "ConfigError: MASTER_ADDR is not set, but RANK is 0" in ran.stderr.splitlines()[-1]


def initialize(rank, file, said):
    """Meet by a file, and return the error of `initialize`."""
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    with pytest.raises(ConfigError) as caught:
        lbsgd.initialize(torch.nn.Linear(2, 2), recipe())
    Path(said, str(rank)).write_text(str(caught.value))


def test_processes_that_a_program_has_spawned_are_asked_for_their_place():
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        said.mkdir()
        torch.multiprocessing.start_processes(
            initialize, (f"{folder}/meeting", str(said)), 2, start_method="forkserver"
        )
        for rank in ("0", "1"):
            words = (said / rank).read_text()
            assert words.startswith("torch.distributed has 2 processes, and this one's environment tells of 1; start")
