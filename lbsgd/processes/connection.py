"""The connection of a process to the store at which those of a run meet."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

from lbsgd.disk import allow_open_files
from lbsgd.errors import ConfigError, LostProcessError, one_line
from lbsgd.processes.environment import Processes, master

CONNECTIONS = 3  # of a process to the store: for these messages, for torch's group, and one while it fails
OTHER_FILES = 512  # that rank 0 may have open beside them
NAME_SECONDS = 20.0  # a cluster may make a host's name only when the host is up
OWN_SECONDS = 30.0  # in which rank 0 finds the store that it serves itself
MEETING = "the meeting of all processes"


def meeting_point(
    processes: Processes, timeout_seconds: float, alive: Callable[[str], None] = lambda position: None
) -> TCPStore:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 serves where torchrun's agent does not.

    alive: called meanwhile. torch tries again after its own timeout, so the time that passes here is what counts.
    Raises ConfigError where the address has no meaning, where rank 0 cannot open the port, is not at that address or
    may not have enough files open, LostProcessError where another rank cannot reach it.
    """
    address, port = master()
    serves = processes.is_rank_0 and not of_agent()
    if serves:
        allow_connections(processes.world_size)
    patience = min(timeout_seconds, OWN_SECONDS) if serves else timeout_seconds
    stores: list[TCPStore] = []
    errors: list[Exception] = []

    def connect() -> None:
        try:
            require_resolved(address, min(timeout_seconds, NAME_SECONDS))
            timeout = timedelta(seconds=timeout_seconds)
            stores.append(
                TCPStore(address, port, is_master=serves, wait_for_workers=False, timeout=timeout, multi_tenant=True)
            )
        except (ConfigError, RuntimeError) as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    deadline = time.monotonic() + patience
    while thread.is_alive() and time.monotonic() < deadline:
        alive(MEETING)
        thread.join(0.2)
    if stores:
        return stores[0]
    error = errors[0] if errors else TimeoutError(f"no answer within {patience:g} s")
    if isinstance(error, ConfigError):
        raise error
    reason = one_line(error)
    if processes.is_rank_0:
        raise ConfigError(
            f"cannot open {address}:{port} for the other processes ({reason}); if the port is taken, give the "
            "launcher another --master_port; if the address is not this host's, another --master_addr"
        ) from error
    raise LostProcessError(
        f"cannot reach rank 0 at {address}:{port} ({reason}); look at its host, at --master_addr and --master_port"
    ) from error


def require_resolved(address: str, seconds: float) -> None:
    """Wait until this host knows the address of rank 0. Raises ConfigError where it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
            if isinstance(error, UnicodeError) or time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR is {address!r}, and this host does not know it ({one_line(error)}); correct it, or "
                    "the launcher's --master_addr"
                ) from error
        time.sleep(0.5)


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files so that all processes can connect to it.

    A store that has reached the limit refuses without a word. Raises ConfigError where the system forbids it.
    """
    needed = CONNECTIONS * world_size + OTHER_FILES
    if (most := allow_open_files(needed)) is not None:
        raise ConfigError(
            f"rank 0 needs {needed:,} open files for the connections of {world_size:,} processes, and its host allows "
            f"{most:,}; raise the hard limit there (ulimit -Hn)"
        )


def of_agent() -> bool:
    """Return whether torchrun's agent serves the store, and so keeps it over restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
