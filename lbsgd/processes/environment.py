"""Which of how many processes this is, as the launcher's environment variables say."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from lbsgd.errors import ConfigError


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


def free_port() -> int:
    """A port that nobody listens on; a launcher's default, 29500, is taken where another run goes on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
