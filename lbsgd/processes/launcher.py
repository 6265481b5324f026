"""Find the launcher that started this process, DeepSpeed's or torch's, by its command line. End when it ends."""

from __future__ import annotations

import argparse
import codecs
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import psutil

from lbsgd.errors import ConfigError
from lbsgd.processes.environment import Processes
from lbsgd.processes.signals import end_with

# Flags of DeepSpeed's launcher, except --hostfile and the one-letter flags.
WITH_VALUE = (
    "num_nodes num_gpus num_accelerators master_port master_addr node_rank launcher launcher_args enable_each_rank_log "
    "autotuning bind_core_list ssh_port venv_script log_level"
).split()
SWITCHES = "module no_python no_local_rank no_ssh no_ssh_check force_multi save_pid bind_cores_to_rank".split()
DEEPSPEED = ("deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner")  # names of one command


def launchers() -> list[psutil.Process]:
    """Return the launcher processes (DeepSpeed's or torch's) on this host that started this one, nearest first."""
    return [process for process in psutil.Process().parents() if is_launcher(command_line(process))]


def is_launcher(arguments: Sequence[str]) -> bool:
    """Return whether a command line runs `deepspeed`, `torchrun`, or one of the modules behind them."""
    return program_of(arguments)[0] in (*DEEPSPEED, "torchrun", "deepspeed.launcher.launch", "torch.distributed.run")


def program_of(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name of the program that a command line runs, and the program's arguments.

    The program is the first word or, after Python, the first argument that is not a flag. Other arguments do not count,
    because they may equal a program's name by chance.
    """
    name, rest = os.path.basename(next(iter(arguments), "")), arguments[1:]
    if not name.startswith("python"):
        return name, rest
    for position, (before, given) in enumerate(pairwise([name, *rest]), start=1):
        if before not in ("-X", "-W") and not given.startswith("-"):
            return os.path.basename(given), rest[position:]
    return "", []


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its parent has not yet collected its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # another user's process is not our launcher
        return []


def end_with_launcher(started_by: Sequence[psutil.Process]) -> None:
    """Ask the kernel for SIGTERM when the launcher that started this process dies (Linux), to leave no orphan.

    A launcher that is already dead is no longer the parent. The guard watches all launchers and notices that.
    """
    if started_by and started_by[0].pid == os.getppid():
        end_with(started_by[0].pid)


# --- the hosts -------------------------------------------------------------------------------------------------------


def require_hosts(processes: Processes, expect_world_size: int | None) -> None:
    """Refuse to train on fewer hosts than intended.

    If the launcher's --hostfile does not exist, DeepSpeed only warns and trains on this host alone, with the same
    global batch in many more passes. Raises ConfigError if the hostfile is missing, if DeepSpeed would misread its
    first name, or if the world size is not --expect_world_size.
    """
    if expect_world_size not in (None, processes.world_size):
        raise ConfigError(
            f"--expect_world_size is {expect_world_size}, but the world size is {processes.world_size}; look at "
            "the hostfile and at what the launcher printed"
        )
    for launcher in launchers():
        if hostfile := named_hostfile(command_line(launcher)):
            require_readable(hostfile, folder_of(launcher))


def require_readable(hostfile: str, folder: str) -> None:
    """Raise ConfigError if DeepSpeed does not find the hostfile (relative to `folder`) or misreads its first name."""
    path = os.path.join(folder, hostfile)
    if not os.path.isfile(path):
        raise ConfigError(
            f"the hostfile {hostfile} does not exist, and DeepSpeed would train on this host alone; "
            "write it (one line per host: NAME slots=GPUS) or leave --hostfile out"
        )
    with open(path, "rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise ConfigError(
                f"the hostfile {hostfile} begins with a byte order mark (BOM), which DeepSpeed reads as part of the "
                "first host's name; save it as UTF-8 without BOM"
            )


def folder_of(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:  # it has just ended, as the guard will notice
        return os.getcwd()


def named_hostfile(arguments: Sequence[str]) -> str | None:
    """Return the value of --hostfile as DeepSpeed's launcher reads it, None if the launcher refuses its arguments.

    Arguments after the name of the script (or of the module, with --module) are not the launcher's.
    """
    program, given = program_of(arguments)
    if program not in DEEPSPEED:
        return None
    parser = Quiet(add_help=False)
    parser.add_argument("-H", "--hostfile")
    for short, name in (("-i", "--include"), ("-e", "--exclude")):
        parser.add_argument(short, name)
    for name in WITH_VALUE:
        parser.add_argument(f"--{name}")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    try:
        return parser.parse_args(given).hostfile
    except ValueError:
        return None


def require_no_hostfile(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a --hostfile among a recipe's arguments (`sys.argv`), which the launcher does not see."""
    script, *flags = arguments
    words = [word for flag in flags for word in flag.split("=", 1)]  # --host and -Hx may be the recipe's own
    hostfile = next((after for flag, after in pairwise(words) if flag in ("--hostfile", "-H")), None)
    if hostfile:
        raise ConfigError(
            f"--hostfile {hostfile} stands after {script}, so the launcher does not read it and would train on "
            f"this host alone; put it before the script: deepspeed --hostfile {hostfile} {script} ..."
        )


class Quiet(argparse.ArgumentParser):
    """A parser that raises ValueError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
