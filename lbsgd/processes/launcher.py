"""The processes of a run as their launcher started them, and how they end together."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import psutil

from lbsgd.errors import ConfigError, LbsgdError, print_error


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is: overall (rank of world_size) and on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Processes:
        """As DeepSpeed's launcher or torchrun say; one process alone where neither started us. Raises ConfigError where
        another launcher started several, each of which would take itself for the only one."""
        if "RANK" not in os.environ:
            for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
                if int(os.environ.get(name) or 1) > 1:
                    raise ConfigError(
                        f"{name} is {os.environ[name]}, but RANK is not set, so each process would train alone; "
                        "start the recipe with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, "
                        "MASTER_ADDR and MASTER_PORT"
                    )
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
        return cls(int(os.environ.get("RANK", 0)), world_size, int(os.environ.get("LOCAL_RANK", 0)), int(local))

    @property
    def alone(self) -> bool:
        """Whether no launcher started this process."""
        return "RANK" not in os.environ

    @property
    def cores(self) -> int:
        """CPU cores for this process: its share of those that the host lets it use."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def export(self, master_port: int) -> None:
        """The variables that a launcher would have set, for a process that runs alone."""
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(master_port),
        )


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


def free_port() -> int:
    """A port that nobody listens on; a launcher's default, 29500, is taken where another run goes on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def from_rank_0(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every process, or its LbsgdError; all processes must call it.

    What only rank 0 can find out, such as the state of the output folder, then ends all hosts at once: the others would
    wait for it until the collective call times out.
    """
    import torch  # here, for a process that only has an error to tell should not wait for it

    box = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [function()]
        except LbsgdError as error:
            box = [error]
    torch.distributed.broadcast_object_list(box)
    if isinstance(box[0], LbsgdError):
        raise box[0]
    return box[0]


def end_with_error(error: LbsgdError, speak: bool = True) -> NoReturn:
    """Ends this process with the error's exit code, its lines on stderr where this process is the one to speak.

    Nothing is cleaned up: that could wait for the other processes, or for a loader's threads.
    """
    if sys.stdout.isatty():
        sys.stdout.write("\033[?25h")  # the cursor, which the progress bar hides
    sys.stdout.flush()
    if speak:
        print_error(error)
    os._exit(error.exit_code)
