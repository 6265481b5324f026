"""Read from the environment which process this is, and how many there are."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lbsgd.errors import ConfigError
from lbsgd.processes.control_groups import quota_of_cores

WAY_OUT = (
    "start the recipe with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR "
    "and MASTER_PORT"
)


@dataclass(frozen=True)
class Processes:
    """This process's place among all processes of a run (rank of world_size) and among those of its host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Processes:
        """Read the variables of DeepSpeed's launcher or torchrun. Without them, this is a single process.

        If no variable says how many processes this host has, all are assumed to be on one host.

        Raises ConfigError, which names the variable, if a value makes no sense, if the local rank contradicts that
        assumption, or if another launcher started several processes, each of which would train alone.
        """
        if not os.environ.get("RANK"):
            require_single_process()
            return cls(rank=0, world_size=1, local_rank=0, local_world_size=1)
        world_size = required_number("WORLD_SIZE", at_least=1)
        local_name = next(filter(os.environ.get, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")), None)  # torchrun's, DeepSpeed's
        # A single process started inside another run inherits that run's LOCAL_WORLD_SIZE.
        most = (world_size, f"WORLD_SIZE is {world_size}") if world_size > 1 else None
        local_world_size = required_number(local_name, 1, most) if local_name else world_size
        rank = required_number("RANK", at_most=(world_size - 1, f"WORLD_SIZE is {world_size}"))
        processes = cls(
            rank=rank,
            world_size=world_size,
            local_rank=required_number(
                "LOCAL_RANK", at_most=(local_world_size - 1, f"this host has {local_world_size} processes")
            ),
            local_world_size=local_world_size,
        )
        if not local_name and processes.local_rank != rank:
            raise ConfigError(
                f"LOCAL_WORLD_SIZE is not set, but RANK is {rank} and LOCAL_RANK {processes.local_rank}, so "
                f"there are several hosts; {WAY_OUT}"
            )
        return processes

    @property
    def is_rank_0(self) -> bool:
        """Whether this process prints and writes for all processes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether no launcher started this process."""
        return not os.environ.get("RANK")

    @property
    def cores(self) -> int:
        """Number of CPU cores for this process: the cores bound to it alone, else its share of the host's cores.

        All processes of a container share its time quota, which may allow fewer cores than the container sees.
        """
        cores, together = os.sched_getaffinity(0), self.local_world_size
        of_its_own = len(cores) if are_bound(cores) else len(cores) // together
        return max(1, int(min(of_its_own, quota_of_cores() / together)))


def are_bound(cores: set[int]) -> bool:
    """Whether the launcher has bound this process to these cores.

    srun does so with --cpus-per-task, and DeepSpeed and torchrun do with their own bindings (`--bind_cores_to_rank`).
    The launcher's own process keeps all cores.
    """
    per_task, world_size = os.environ.get("SLURM_CPUS_PER_TASK", ""), os.environ.get("WORLD_SIZE")
    each_is_a_task = os.environ.get("SLURM_STEP_NUM_TASKS", world_size) == world_size  # else a task starts several
    by_torchrun = os.environ.get("TORCHELASTIC_RUN_ID")  # the task may be torchrun, even if the numbers are equal
    if os.environ.get("SLURM_STEP_ID") and each_is_a_task and not by_torchrun:
        return per_task.isdecimal() and len(cores) <= int(per_task)
    try:
        return cores < os.sched_getaffinity(os.getppid())
    except OSError:  # it has just ended
        return False


def master() -> tuple[str, int]:
    """Return rank 0's address and port, where the processes of a run meet. Raises ConfigError if they are not set.

    Port 0 means any free port. Only a single process may use it, because others could not know the port.
    """
    least = int(os.environ.get("WORLD_SIZE") != "1")
    return required("MASTER_ADDR"), required_number("MASTER_PORT", least, (65535, "a port has 16 bits"))


def require_single_process() -> None:
    """Raise ConfigError if RANK is not set although several processes run."""
    for name in ("WORLD_SIZE", slurm_variable(), "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name and (number(name, at_least=1) or 1) > 1:
            raise ConfigError(
                f"{name} is {os.environ[name]}, but RANK is not set, so each process would train alone; {WAY_OUT}; "
                f"for a single process, unset {name}"
            )


def slurm_variable() -> str | None:
    """Return the name of the variable that says how many processes srun has started, None without srun.

    `salloc` and `sbatch` set SLURM_NTASKS for the whole allocation, even though only one shell or script runs in it;
    sbatch also sets SLURM_PROCID to 0 for its script. srun adds the number of its step and the step's number of tasks,
    which may be fewer than those of the allocation.
    """
    number("SLURM_NTASKS", at_least=1)  # raises if it is not a number, even if it is not used
    if os.environ.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_STEP_NUM_TASKS"
    return "SLURM_NTASKS" if os.environ.get("SLURM_STEP_ID") else None


def jobs() -> dict[str, str]:
    """Return the variables that say which Slurm job, and which start of mpirun, this process belongs to.

    ssh forwards neither, so other processes of the same run may lack them.
    """
    slurm = "SLURM_HET_JOB_ID" if os.environ.get("SLURM_HET_JOB_ID") else "SLURM_JOB_ID"  # each part has its own
    return {name: value for name in (slurm, "PMIX_NAMESPACE") if (value := os.environ.get(name))}


def required_number(name: str, at_least: int = 0, at_most: tuple[int, str] | None = None) -> int:
    """Return the whole number in a variable that a launcher always sets together with RANK.

    at_most: the largest value that makes sense, and why. Raises ConfigError if the value is missing or out of range.
    """
    required(name)
    value = number(name, at_least) or 0
    if at_most is not None and value > at_most[0]:
        raise ConfigError(f"{name} is {value}, but {at_most[1]}, so it can be {at_most[0]} at most; {WAY_OUT}")
    return value


def required(name: str) -> str:
    """Return a variable that a launcher always sets together with RANK. Raises ConfigError if it is not set."""
    if text := os.environ.get(name):
        return text
    raise ConfigError(f"{name} is not set, but RANK is {os.environ['RANK']}; {WAY_OUT}; or unset RANK to run alone")


def number(name: str, at_least: int = 0) -> int | None:
    """Return the whole number in an environment variable, None if it is unset or empty. Raises ConfigError."""
    if not (text := os.environ.get(name)):
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < at_least:
        raise ConfigError(f"{name} is {text!r}, not a whole number of at least {at_least}; unset or correct it")
    return int(text)
