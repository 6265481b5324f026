"""The launcher that started the processes: DeepSpeed's or torch's, found by its command line."""

from __future__ import annotations

import ctypes
import os
import signal

import psutil

from lbsgd.errors import ConfigError
from lbsgd.processes.environment import Processes


def launchers() -> list[psutil.Process]:
    """The processes of DeepSpeed's or torch's launcher that started this one, on this host, the nearest first."""
    return [process for process in psutil.Process().parents() if is_launcher(command_line(process))]


def is_launcher(arguments: list[str]) -> bool:
    """Whether a command line is that of `deepspeed`, `torchrun`, or one of the modules behind them."""
    return any(
        os.path.basename(argument) in ("deepspeed", "ds", "torchrun")
        or argument in ("deepspeed.launcher.launch", "torch.distributed.run")
        for argument in arguments[:4]
    )


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # another user's process is no launcher of ours
        return []


def end_with_launcher(started_by: list[psutil.Process]) -> None:
    """Asks the kernel for SIGTERM when the launcher that started this process dies (Linux), so that nothing is orphaned.

    One that is dead already, and so not the parent any more, is left to the guard, which watches over all of them.
    """
    if started_by and started_by[0].pid == os.getppid():
        PR_SET_PDEATHSIG = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def require_hosts(processes: Processes, expect_world_size: int | None) -> None:
    """Refuses to train on fewer hosts than were meant.

    Where the launcher's --hostfile does not exist, DeepSpeed only warns and trains on this host alone: the global batch
    would be the same, in many more passes. Raises ConfigError then, and where the world size is not --expect_world_size.
    """
    if expect_world_size not in (None, processes.world_size):
        raise ConfigError(
            f"--expect_world_size is {expect_world_size}, but {processes.world_size} processes run; look at "
            "the hostfile and at what the launcher printed"
        )
    for launcher in launchers():
        hostfile = named_hostfile(command_line(launcher))
        if hostfile and not os.path.isfile(os.path.join(launcher.cwd(), hostfile)):
            raise ConfigError(
                f"the hostfile {hostfile} does not exist, and DeepSpeed would train on this host alone; "
                "write it (one line a host: NAME slots=GPUS) or leave --hostfile out"
            )


def named_hostfile(arguments: list[str]) -> str | None:
    """The value of --hostfile (or -H) among the launcher's own arguments, which end where the script is named."""
    if not any(os.path.basename(argument) in ("deepspeed", "ds") for argument in arguments[:3]):
        return None
    for argument, value in zip(arguments, [*arguments[1:], None]):
        if argument.endswith(".py"):
            return None
        if argument in ("--hostfile", "-H"):
            return value
        if argument.startswith("--hostfile="):
            return argument.split("=", 1)[1]
    return None
