"""Which processes run, what the launcher was told, and one line for an error."""

import subprocess
import sys

import pytest

from lbsgd.errors import ConfigError
from lbsgd.processes.environment import Processes
from lbsgd.processes.launcher import is_launcher, named_hostfile, require_hosts

DEEPSPEED = ["/usr/bin/python3", "/venv/bin/deepspeed"]


@pytest.mark.parametrize(
    "arguments, hostfile",
    [
        ([*DEEPSPEED, "--hostfile", "hosts", "recipes/resnet50.py"], "hosts"),
        ([*DEEPSPEED, "--hostfile=hosts", "recipes/resnet50.py"], "hosts"),
        ([*DEEPSPEED, "-H", "hosts", "recipes/resnet50.py"], "hosts"),
        ([*DEEPSPEED, "--num_gpus", "2", "recipes/resnet50.py"], None),
        ([*DEEPSPEED, "recipes/resnet50.py", "--hostfile", "hosts"], None),  # the script's own flag
        (["vim", "--hostfile", "hosts"], None),
    ],
)
def test_the_launchers_hostfile_is_found_among_its_own_arguments(arguments, hostfile):
    assert named_hostfile(arguments) == hostfile


def test_a_process_alone_is_rank_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes = Processes.from_environment()
    assert processes == Processes(rank=0, world_size=1, local_rank=0, local_world_size=1) and processes.alone


@pytest.mark.parametrize("local", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])  # DeepSpeed's launcher, torchrun
def test_the_launchers_variables_are_read(monkeypatch, local):
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local: "4"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.from_environment() == Processes(rank=5, world_size=8, local_rank=1, local_world_size=4)


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_that_would_each_train_alone_are_refused(monkeypatch, variable):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ConfigError, match=f"{variable} is 4, but RANK is not set, so each process would train alone"):
        Processes.from_environment()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([*DEEPSPEED, "recipes/resnet50.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], True),
        (["/usr/bin/python3", "/venv/bin/torchrun", "--nproc_per_node", "2"], True),
        (["python", "-m", "torch.distributed.run", "recipes/resnet50.py"], True),
        (["python", "recipes/resnet50.py", "--deepspeed_config", "ds_configs/8k.json"], False),
        (["bash", "-c", "deepspeed recipes/resnet50.py"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command_lines(arguments, expected):
    assert is_launcher(arguments) is expected


def test_an_unexpected_world_size_is_refused():
    require_hosts(Processes(0, 4, 0, 4), expect_world_size=4)
    with pytest.raises(ConfigError, match="--expect_world_size is 256, but 4 processes run"):
        require_hosts(Processes(0, 4, 0, 4), expect_world_size=256)


SPEAKER = """
import os, time
from lbsgd.processes.ending import end_with_error
from lbsgd.errors import DataError
end_with_error(DataError("first line\\nsecond line"))
"""


def test_an_error_is_its_lines_on_stderr_and_the_exit_code():
    done = subprocess.run([sys.executable, "-c", SPEAKER], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: first line\nerror: second line\n")
