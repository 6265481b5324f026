"""The environment's variables, the launcher's own arguments, and one line for an error."""

import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from commands import refused, script, scripts
from crash import PATIENCE_SECONDS
from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args
from torch.distributed import TCPStore

from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments.launch import end_with_grid
from lbsgd.output import OutputError
from lbsgd.processes import ending
from lbsgd.processes import launcher as launcher_module
from lbsgd.processes.ending import end_before_joining
from lbsgd.processes.environment import Processes, master
from lbsgd.processes.launcher import (
    command_line,
    end_with_launcher,
    is_launcher,
    named_hostfile,
    require_hosts,
    require_no_hostfile,
)
from lbsgd.processes.meeting import is_of_same_run, read
from lbsgd.processes.ports import free_port
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.train.deepspeed_setup import require_device

ROOT = Path(__file__).parent.parent
DEEPSPEED = ["/usr/bin/python3", "/venv/bin/deepspeed"]
# Variables that launchers set, or that an earlier test set in this process.
LAUNCHERS = ("SLURM_", "OMPI_", "MV2_", "TORCHELASTIC_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


SCRIPT = ["recipes/resnet50.py", "--fake_data"]


@pytest.mark.parametrize(
    "given, hostfile",
    [
        (["--hostfile", "hosts"], "hosts"),
        (["--hostfile=hosts"], "hosts"),
        (["-H", "hosts"], "hosts"),
        (["-Hhosts"], "hosts"),
        (["-qHhosts"], "hosts"),
        (["--hostf", "hosts"], "hosts"),
        (["--ho=hosts"], "hosts"),
        (["-H", "others", "--num_nodes", "2", "-H", "hosts"], "hosts"),
        (["--num_gpus", "2"], None),
        (["--launcher_args=-H others", "-i", "a:0", "--hostfile", "hosts", "--num_acc", "2", "--no_ssh"], "hosts"),
        (["--log_level", "info", "-H", "hosts", "--bind_cores", "--save_pid", "--venv", "v.sh", "--module"], "hosts"),
    ],
)
@pytest.mark.parametrize(
    "launcher",
    [
        DEEPSPEED,
        ["/usr/bin/python3", "/venv/bin/ds"],
        ["/usr/bin/python3", "/venv/bin/deepspeed.pt"],
        ["python", "-u", "-X", "faulthandler", "-m", "deepspeed.launcher.runner"],
    ],
)
def test_the_launchers_hostfile_is_found_among_its_own_arguments_as_deepspeed_finds_it(launcher, given, hostfile):
    assert is_launcher([*launcher, *given, *SCRIPT]) and named_hostfile([*launcher, *given, *SCRIPT]) == hostfile
    assert parse_args([*given, *SCRIPT]).hostfile == (hostfile or DLTS_HOSTFILE)


@pytest.mark.parametrize(
    "arguments",
    [
        [*DEEPSPEED, *SCRIPT, "--hostfile", "hosts"],  # the script's own flag
        [*DEEPSPEED, "--h", "hosts", *SCRIPT],  # DeepSpeed refuses it
        [*DEEPSPEED, "--hostfile", *SCRIPT],
        [*DEEPSPEED, "--module", "my.train", "--host", "alpha", "-Hx", "--quiet=1"],  # the module's own
        ["vim", "--hostfile", "hosts"],
        ["python", "-u"],
    ],
)
def test_where_the_launcher_reads_no_hostfile_none_is_found(arguments):
    assert named_hostfile(arguments) is None


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of one launcher, and remove those of all others."""

    def set_to(variables):
        for name in list(os.environ):
            if re.match("(SLURM|OMPI|MV2|PMI|MASTER|TORCHELASTIC)_|(LOCAL_)?(RANK|SIZE)$|(LOCAL_)?WORLD_SIZE$", name):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_process_alone_is_rank_0_of_1(environment):
    environment({})
    processes = Processes.from_environment()
    assert processes == Processes(rank=0, world_size=1, local_rank=0, local_world_size=1) and processes.alone


@pytest.mark.parametrize("local", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])  # DeepSpeed's launcher, torchrun
def test_the_launchers_variables_are_read(environment, local):
    environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local: "4"})
    assert Processes.from_environment() == Processes(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_processes_with_no_more_than_their_ranks_are_on_one_host(environment):
    environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"})
    assert Processes.from_environment() == Processes(rank=5, world_size=8, local_rank=5, local_world_size=8)


@pytest.mark.parametrize(
    "variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"]
)
def test_several_processes_that_would_each_train_alone_are_refused(environment, variable):
    environment({"SLURM_STEP_ID": "0", variable: "4"})
    with pytest.raises(ConfigError, match=f"{variable} is 4, but RANK is not set, so each process would train alone"):
        Processes.from_environment()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4"},  # salloc -n 4
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of sbatch -n 4
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1"},  # srun -n 1 inside it
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_a_single_process_in_an_allocation_of_several_tasks_runs(environment, variables):
    environment(variables)
    assert Processes.from_environment() == Processes(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_a_step_of_several_tasks_is_refused_by_its_own_number(environment):
    environment({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS is 4, but RANK is not set"):
        Processes.from_environment()


ALL, MINE = frozenset(range(64)), frozenset(range(8))


@pytest.mark.parametrize(
    "variables, mine, of_parent, cores",
    [
        ({}, ALL, ALL, 8),  # DeepSpeed's launcher: the processes share the host
        ({}, MINE, MINE, 1),  # all of them under taskset
        ({}, MINE, ALL, 8),  # deepspeed --bind_cores_to_rank
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"}, MINE, ALL, 8),  # srun, one task per GPU
        ({"SLURM_STEP_ID": "0"}, MINE, ALL, 1),  # the tasks of the step share the job's cores
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"}, ALL, ALL, 8),  # given, but not bound
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "8"}, MINE, ALL, 8),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "64"}, ALL, ALL, 8),  # torchrun
        (
            {  # eight tasks, each a torchrun that starts one or more of the eight processes
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_CPUS_PER_TASK": "64",
                "TORCHELASTIC_RUN_ID": "none",
            },
            ALL,
            ALL,
            8,
        ),
    ],
)
def test_cores_that_are_bound_to_a_process_are_not_divided_again(
    environment, monkeypatch, variables, mine, of_parent, cores
):
    environment({"WORLD_SIZE": "8", **variables})
    monkeypatch.setattr("os.sched_getaffinity", lambda process: of_parent if process else mine)
    monkeypatch.setattr("lbsgd.processes.environment.quota_of_cores", lambda: math.inf)
    assert Processes(rank=1, world_size=8, local_rank=1, local_world_size=8).cores == cores


@pytest.mark.parametrize(
    "mine, of_parent, quota, cores",
    [(ALL, ALL, 16, 2), (MINE, ALL, 16, 2), (MINE, ALL, 640, 8), (ALL, ALL, 640, 8), (ALL, ALL, 3, 1)],
)
def test_all_processes_of_a_container_share_its_quota(environment, monkeypatch, mine, of_parent, quota, cores):
    environment({"WORLD_SIZE": "8"})
    monkeypatch.setattr("os.sched_getaffinity", lambda process: of_parent if process else mine)
    monkeypatch.setattr("lbsgd.processes.environment.quota_of_cores", lambda: quota)
    assert Processes(rank=1, world_size=8, local_rank=1, local_world_size=8).cores == cores


def test_one_process_within_a_launched_one_and_gpus_in_another_order_are_taken(environment):
    environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "8", "MASTER_ADDR": "alpha"})
    assert Processes.from_environment() == Processes(0, 1, 0, 8)
    os.environ["MASTER_PORT"] = "0"
    assert master() == ("alpha", 0)
    environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert Processes.from_environment() == Processes(0, 2, 1, 2)


FOUR = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    "variables, told",
    [
        ({"SLURM_NTASKS": "4(x2)"}, "SLURM_NTASKS is '4(x2)', not a whole number of at least 1; unset or correct it"),
        ({"PMI_SIZE": "two"}, "PMI_SIZE is 'two', not a whole number"),
        (
            {"RANK": "0"},
            "WORLD_SIZE is not set, but RANK is 0; start the recipe with deepspeed or torchrun, or set RANK",
        ),
        (FOUR | {"RANK": "zero"}, "RANK is 'zero', not a whole number of at least 0"),
        (FOUR | {"RANK": "-1"}, "RANK is '-1', not a whole number of at least 0"),
        (FOUR | {"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4, so it can be 3 at most"),
        (FOUR | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a whole number of at least 1"),
        (FOUR | {"WORLD_SIZE": "4.0"}, "WORLD_SIZE is '4.0', not a whole number"),
        (FOUR | {"LOCAL_RANK": ""}, "LOCAL_RANK is not set, but RANK is 1; start the recipe with"),
        (FOUR | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but this host has 2 processes, so it can be 1 at most"),
        (FOUR | {"LOCAL_SIZE": "8"}, "LOCAL_SIZE is 8, but WORLD_SIZE is 4, so it can be 4 at most"),
        (FOUR | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but WORLD_SIZE is 4, so it can be 4 at most"),
        (FOUR | {"LOCAL_SIZE": "many"}, "LOCAL_SIZE is 'many', not a whole number"),
        (
            {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"},
            "LOCAL_WORLD_SIZE is not set, but RANK is 8 and LOCAL_RANK 0, so there are several hosts; start the recipe",
        ),
    ],
)
def test_variables_that_make_no_sense_are_named_with_their_value(environment, variables, told):
    environment(variables)
    with pytest.raises(ConfigError) as refused:
        Processes.from_environment()
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "variables, told",
    [
        ({"MASTER_PORT": "29500"}, "MASTER_ADDR is not set, but RANK is 1"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT is not set, but RANK is 1"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a whole number"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, "MASTER_PORT is '0', not a whole number of at least 1"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but a port has 16 bits"),
    ],
)
def test_a_meeting_point_that_makes_no_sense_is_named(environment, variables, told):
    environment(FOUR | variables)
    with pytest.raises(ConfigError, match=told):
        master()


def test_a_port_that_another_address_of_the_host_has_is_not_free(monkeypatch):
    """Rank 0 listens on all addresses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        ports = [taken.getsockname()[1], free_port()]
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: ports)
        assert free_port() == ports[1]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([*DEEPSPEED, "recipes/resnet50.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], True),
        (["/usr/bin/python3", "/venv/bin/torchrun", "--nproc_per_node", "2"], True),
        (["python", "-m", "torch.distributed.run", "recipes/resnet50.py"], True),
        (["python", "recipes/resnet50.py", "--deepspeed_config", "ds_configs/8k.json"], False),
        (["bash", "-c", "deepspeed recipes/resnet50.py"], False),
        (["bash", "run.sh", "deepspeed"], False),
        (["python", "recipes/resnet50.py", "--data_dir", "/data/ds"], False),
        (["python3.11", "-X", "faulthandler", "-m", "torch.distributed.run", "recipes/resnet50.py"], True),
        (["/venv/bin/torchrun", "--nproc_per_node", "2"], True),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command_lines(arguments, expected):
    assert is_launcher(arguments) is expected


def test_a_process_whose_command_line_is_hidden_is_no_launcher():
    """As those of other users are, if /proc is mounted with hidepid."""

    def hidden():
        raise psutil.AccessDenied

    assert command_line(SimpleNamespace(cmdline=hidden)) == []


def test_only_the_launcher_that_is_the_parent_takes_its_process_along(monkeypatch):
    """A shell or numactl may be between them; then the guard watches the launcher."""
    asked, parent = [], os.getppid()
    monkeypatch.setattr(launcher_module, "end_with", asked.append)
    for pids in ([], [parent + 1, parent], [parent]):
        end_with_launcher([SimpleNamespace(pid=pid) for pid in pids])
    assert asked == [parent]


def test_the_training_before_torchrun_has_restarted_a_process_is_no_part_of_its_start(environment):
    launcher = SimpleNamespace(create_time=lambda: psutil.Process().create_time() - 500)
    environment({})
    assert "launcher 500.0" in Stopwatch([launcher]).line()
    environment({"TORCHELASTIC_RUN_ID": "none"})
    assert [part for part, _ in Stopwatch([launcher]).parts] == ["Python"]


def test_an_unexpected_world_size_is_refused():
    require_hosts(Processes(0, 4, 0, 4), expect_world_size=4)
    with pytest.raises(ConfigError, match="--expect_world_size is 256, but the world size is 4"):
        require_hosts(Processes(0, 4, 0, 4), expect_world_size=256)


class Launcher:
    """DeepSpeed's command, started in a folder with `--hostfile hosts`."""

    def __init__(self, folder):
        self.folder = folder

    def cmdline(self):
        return [*DEEPSPEED, "--hostfile", "hosts", "recipes/resnet50.py"]

    def cwd(self):
        return str(self.folder)


@pytest.mark.parametrize(
    "hostfile, told",
    [
        (b"alpha slots=1\n", None),
        (None, "the hostfile hosts does not exist, and DeepSpeed would train on this host alone"),
        (
            b"\xef\xbb\xbfalpha slots=1\n",
            "the hostfile hosts begins with a byte order mark (BOM), which DeepSpeed reads as",
        ),
    ],
)
def test_a_hostfile_that_names_other_hosts_than_it_seems_to_is_refused(monkeypatch, tmp_path, hostfile, told):
    if hostfile:
        (tmp_path / "hosts").write_bytes(hostfile)
    nearer = SimpleNamespace(cmdline=lambda: ["python", "-m", "deepspeed.launcher.launch", "recipes/resnet50.py"])
    monkeypatch.setattr(launcher_module, "launchers", lambda: [nearer, Launcher(tmp_path)])
    with pytest.raises(ConfigError, match=re.escape(told)) if told else nullcontext():
        require_hosts(Processes(0, 1, 0, 1), None)


@pytest.mark.parametrize("flags", [["--hostfile", "hosts"], ["--hostfile=hosts"], ["--fake_data", "-H", "hosts"]])
def test_a_hostfile_among_the_recipe_s_flags_is_refused(flags):
    with pytest.raises(ConfigError, match="--hostfile hosts stands after my.py"):
        require_no_hostfile(["my.py", *flags])
    require_no_hostfile(["my.py", "--fake_data", "--host", "alpha", "-Hello", "--hostfile"])


# --- as a user meets it ----------------------------------------------------------------------------------------------


def recipe(*arguments, **variables):
    """Run a recipe that would train."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    command = ["recipes/resnet50.py", "--deepspeed_config", "ds_configs/64.json", "--fake_data", *arguments]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept | variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "variables, told",
    [
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2, but RANK is not set"),
        ({"SLURM_NTASKS": "4(x2)"}, "SLURM_NTASKS is '4(x2)'"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_what_is_wrong_with_the_environment_is_one_line(variables, told):
    done = recipe(**variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_a_hostfile_after_the_script_is_pointed_out_in_one_line():
    done = recipe("--hostfile", "hosts")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --hostfile hosts stands after recipes/resnet50.py, so the launcher does not")
    assert done.stderr.endswith("put it before the script: deepspeed --hostfile hosts recipes/resnet50.py ...\n")


ENDS_WITH_TWO_LINES = """
import os, time
from lbsgd.processes.ending import end_with_error
from lbsgd.errors import DataError
print("before it")
end_with_error(DataError("first line", "second line"))
"""


def test_an_error_is_its_lines_on_stderr_and_the_exit_code():
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", ENDS_WITH_TWO_LINES], env=buffered, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "before it\n", "error: first line\nerror: second line\n")


ENDS_BY_ANOTHERS_HAND = """
import signal, time
from lbsgd.errors import DataError
from lbsgd.processes.ending import end_at_a_signal, end_before_joining
time.sleep = lambda seconds: signal.raise_signal(signal.SIGTERM)
end_at_a_signal(" at the start")
end_before_joining(DataError("no file"))
"""


def test_a_process_that_is_ended_while_another_one_tells_their_error_has_its_exit_code():
    """srun ends all once one has ended, and returns their highest exit code; 75 would restart the job."""
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    words = [sys.executable, "-c", ENDS_BY_ANOTHERS_HAND]
    done = subprocess.run(words, env={**os.environ, **place}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def ended(monkeypatch):
    """The exit code of an error that would end this process, its text and whether it is quiet."""
    told = []

    def end(error, quiet=False):
        told.append((error.exit_code, str(error), quiet))
        raise Ended

    monkeypatch.setattr(ending, "end_with_error", end)
    return told


@pytest.mark.parametrize(
    "place, of_rank_0, launched, waits, tells",
    [
        ((0, 1, 0, 1), True, False, False, False),
        ((0, 2, 0, 2), False, False, False, False),  # all find it by themselves
        ((0, 2, 0, 2), True, False, False, True),  # srun --wait=0 ends no other process
        ((0, 2, 0, 2), True, True, False, False),
        ((1, 2, 1, 2), False, True, True, False),
        ((2, 4, 0, 2), False, True, False, True),  # no launcher ends those of the other host
        ((3, 4, 1, 2), False, True, True, True),
    ],
)
def test_who_waits_and_who_tells_others_of_an_error_before_the_processes_meet(
    environment, monkeypatch, ended, place, of_rank_0, launched, waits, tells
):
    environment(dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"), map(str, place), strict=True)))
    did, error = [], DataError("no file")
    error.of_rank_0 = of_rank_0
    monkeypatch.setattr(ending, "at_a_signal", lambda do: None)
    monkeypatch.setattr(ending, "launchers", lambda: ["deepspeed"] * launched)
    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=lambda seconds: did.append("waits")))
    monkeypatch.setattr(ending, "another_tells", lambda error: False)
    monkeypatch.setattr(ending, "print_error", lambda error: did.append("prints"))
    monkeypatch.setattr("lbsgd.processes.peers.tell_before_joining", lambda *_: did.append("tells"))
    with pytest.raises(Ended):
        end_before_joining(error)
    assert did == ["waits"] * waits + ["prints"] + ["waits"] * waits + ["tells"] * tells
    assert ended == [(2, "no file", True)]


def test_of_the_processes_of_a_host_that_find_the_same_error_one_tells_it(environment, monkeypatch):
    """The others end once it has told the other hosts, as a launcher ends all when the first one ends."""
    environment({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    held = []
    monkeypatch.setattr(ending, "HELD", held)
    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=lambda seconds: held.pop(0).close()))
    error = DataError(f"no file {os.getpid()}")
    try:
        assert not ending.another_tells(error) and not ending.another_tells(DataError(f"{error}, another"))
        assert ending.another_tells(error)
        monkeypatch.setattr("os.getppid", lambda: 1)
        assert not ending.another_tells(error)  # of another run at the same port
        environment({"MASTER_ADDR": "node1", "MASTER_PORT": "29501"})
        assert not ending.another_tells(error)
    finally:
        for name in held:
            name.close()


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_process_whose_error_another_tells_ends_quietly_unless_it_is_alone(
    environment, monkeypatch, ended, world_size, capsys
):
    environment({"RANK": "0", "WORLD_SIZE": world_size, "LOCAL_RANK": "0", "LOCAL_SIZE": world_size})
    monkeypatch.setattr(ending, "at_a_signal", lambda do: None)
    monkeypatch.setattr(ending, "another_tells", lambda error: True)
    with pytest.raises(Ended):
        end_before_joining(DataError("no file"))
    assert ended == [(2, "no file", True)] and capsys.readouterr().err == "error: no file\n" * (world_size == "1")


@pytest.mark.parametrize("script", ["resnet50.py", "mask_rcnn.py"])
def test_a_mistyped_flag_is_told_to_the_other_hosts_as_every_error_is(script):
    """It was one line per process, and hosts with the right flags waited for those with the wrong one."""
    place = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    is_of_same_run(store, Processes(0, 4, 0, 2))
    [done] = scripts([{**place, "MASTER_PORT": port}], f"recipes/{script}", "--deepspeed_config", "x", "--epoks", "1")
    refused(done, "unrecognized arguments: --epoks 1; --help lists the flags")
    assert "--epoks 1" in json.loads(read(store, "failure"))["error"]


def test_an_output_that_is_full_before_the_processes_meet_is_told_to_those_that_print_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(ending, "end_before_joining", told.append)
    with ending.before_joining():
        raise OutputError(OSError(28, "No space left on device"))
    assert [(error.exit_code, error.of_rank_0) for error in told] == [(2, True)]


@pytest.mark.parametrize(
    "rank, told, quiet", [("0", False, False), ("1", False, True), ("0", True, True), ("", False, False)]
)
def test_one_process_of_a_host_says_that_a_signal_has_ended_it_unless_its_launcher_does(
    monkeypatch, ended, rank, told, quiet
):
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(ending, "at_a_signal", lambda do: do(signal.SIGTERM))
    with pytest.raises(Ended):
        ending.end_at_a_signal(" at the start", told)
    assert ended == [(75, "SIGTERM at the start", quiet)]


def test_an_end_shows_the_cursor_that_a_progress_bar_has_hidden(monkeypatch):
    def end(code):
        raise Ended

    console = io.StringIO()
    console.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", console)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("threading.Timer", lambda *_: SimpleNamespace(start=lambda: None))
    with pytest.raises(Ended):
        ending.end_with_error(DataError("no file"), quiet=True)
    assert console.getvalue() == "\033[?25h"


ALONE_AND_ITS_CHILD = """
import os, subprocess, sys
from lbsgd.train.engine import start_processes
assert start_processes().alone
child = "from lbsgd.processes.environment import Processes; print(Processes.from_environment().alone)"
subprocess.run([sys.executable, "-c", child], check=True)
assert start_processes().alone
"""


def test_the_children_of_a_process_alone_are_alone_too(tmp_path):
    """A notebook sets variables in its environment that a recipe started by it would take for a launcher's."""
    (tmp_path / "alone.py").write_text(ALONE_AND_ITS_CHILD)
    done = script(tmp_path / "alone.py")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["True"]), done.stderr


def test_a_host_with_fewer_gpus_than_processes_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    require_device(Processes(rank=8, world_size=16, local_rank=0, local_world_size=2), "cuda")
    with pytest.raises(ConfigError, match="local rank 1 finds 1 GPUs on its host; give the host fewer slots"):
        require_device(Processes(rank=9, world_size=16, local_rank=1, local_world_size=2), "cuda")


def test_a_run_whose_grid_has_died_before_it_asks_ends_at_once():
    """Even though the grid has its own handler, which a fork inherits until the recipe sets its own."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        run = subprocess.Popen(["sleep", "20"], preexec_fn=partial(end_with_grid, 1))
        assert run.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as taken, socket.socket() as other:
        for each in (taken, other):
            each.bind(("", 0))
        ports = [each.getsockname()[1] for each in (taken, other)]
        monkeypatch.setattr("random.SystemRandom", lambda: SimpleNamespace(sample=lambda *_: ports))
        with pytest.raises(ConfigError, match="no port is free among 100"):
            free_port()
        other.close()
        assert free_port() == ports[1]
