"""Connect a process to the store at which all processes of a run meet."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

from lbsgd.disk import allow_open_files, say
from lbsgd.errors import ConfigError, LostProcessError, one_line
from lbsgd.processes.environment import Processes, master

CONNECTIONS = 3  # of a process to the store: for these messages, for torch's group, and one more while it fails
OTHER_FILES = 512  # that rank 0 may have open beside the connections
TOLD_AFTER_SECONDS = 20.0  # of waiting for an unknown name
MEETING = "the meeting of all processes"


def meeting_point(
    processes: Processes, timeout_seconds: float, alive: Callable[[str], None] = lambda position: None
) -> TCPStore:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 serves if torchrun's agent does not.

    alive: called before each attempt. An attempt takes at most two thirds of timeout_seconds, because torch's client
    may try again after its own timeout, which doubles the time. Rank 0 has only one attempt, because the others connect
    to the store that it serves meanwhile.

    Raises ConfigError if the address is not known, or if rank 0 cannot open the port, is not at that address or may not
    open enough files. Raises LostProcessError if another rank cannot reach rank 0.
    """
    address, port = master()
    serves = processes.is_rank_0 and not of_agent()
    if serves:
        allow_connections(processes.world_size)
    began = time.monotonic()
    wait_for_name(address, timeout_seconds, alive, tells=processes.local_rank == 0)
    while True:
        alive(MEETING)
        left = began + timeout_seconds - time.monotonic()
        timeout = timedelta(seconds=max(0.1, min(timeout_seconds / 3, left / 2)))
        try:
            store = TCPStore(
                address, port, is_master=serves, wait_for_workers=False, timeout=timeout, multi_tenant=True
            )
            store.set_timeout(timedelta(seconds=timeout_seconds))
            return store
        except RuntimeError as error:
            spent, reason = time.monotonic() - began, one_line(error)
            if not serves and spent < 0.9 * timeout_seconds:
                continue
            if processes.is_rank_0:
                raise ConfigError(
                    f"cannot open {address}:{port} for the other processes ({reason}); if the port is taken, give the "
                    "launcher another --master_port; if the address is not this host's, another --master_addr"
                ) from error
            raise LostProcessError(
                f"cannot reach rank 0 at {address}:{port} within {spent:.0f} s ({reason}); look at its host, "
                "at --master_addr and --master_port"
            ) from error


def wait_for_name(address: str, seconds: float, alive: Callable[[str], None], tells: bool) -> None:
    """Wait until this host knows the address of rank 0: a cluster may create a host's name only when the host is up.

    tells: whether this process tells the user about the wait, which one process of each host does.

    Raises ConfigError if the address stays unknown for so many seconds, and at once for an impossible name.
    """
    began = time.monotonic()
    while True:
        alive(MEETING)
        try:
            socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            waited = time.monotonic() - began
            if isinstance(error, UnicodeError) or waited > seconds:
                raise ConfigError(
                    f"MASTER_ADDR is {address!r}, and this host does not know it ({one_line(error)}); correct it, or "
                    "the launcher's --master_addr"
                ) from error
            if tells and waited > TOLD_AFTER_SECONDS:
                tells = False
                say(f"waiting for MASTER_ADDR {address!r}, which {socket.gethostname()} does not know yet")
        time.sleep(0.5)


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files, so that all processes can connect to it.

    A store that has reached the limit refuses silently. Raises ConfigError if the system forbids a higher limit.
    """
    needed = CONNECTIONS * world_size + OTHER_FILES
    if (most := allow_open_files(needed)) is not None:
        raise ConfigError(
            f"rank 0 needs {needed:,} open files for the connections of {world_size:,} processes, and its host allows "
            f"{most:,}; raise the hard limit there (ulimit -Hn)"
        )


def of_agent() -> bool:
    """Return whether torchrun's agent serves the store, which then survives restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
