"""Connect a process to the store at which all processes of a run meet."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from lbsgd.disk import allow_open_files
from lbsgd.errors import ConfigError, LbsgdError, LostProcessError, one_line
from lbsgd.output import say
from lbsgd.processes.environment import Processes, master

CONNECTIONS = 3  # per process to the store: for these messages, for torch's group, and one more while it fails
OTHER_FILES = 512  # that rank 0 may have open in addition to the connections
QUESTIONS_PER_SECOND = 2000  # from all waiting processes together; a store could answer ten times as many
ATTEMPT_SECONDS = 5.0  # to connect
TOLD_AFTER_SECONDS = 20.0  # of waiting for an unknown name
ADDRESSES_IPV6 = Path("/proc/net/if_inet6")
LOOPBACK_SCOPE, LINK_SCOPE = "10", "20"  # its fourth column
ALL_IPV4 = "0.0.0.0"  # a listener there is reached at each IPv4 address of its host
MEETING = "the meeting of all processes"


def meeting_point(
    processes: Processes, timeout_seconds: float, alive: Callable[[str], None] = lambda position: None
) -> TCPStore:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 serves if torchrun's agent does not.

    alive: called repeatedly while this waits.

    Raises ConfigError if the address is not known, or if rank 0 cannot open the port or is not at that address. Raises
    LostProcessError if another rank cannot reach rank 0.
    """
    address, port = master()
    deadline = time.monotonic() + timeout_seconds
    wait_for_name(address, timeout_seconds, alive, tells=processes.local_rank == 0)
    served = serve(address, port, processes, timeout_seconds) if serves_store(processes) else None
    port = served.port if served else port  # a single process may ask for any port
    try:
        wait_for_port(address, port, deadline, pause(processes.world_size), alive)
        alive(f"the connection to {address}:{port}")  # torch waits forever if something else listens there
        store = served or TCPStore(
            # torch's client may retry after its timeout, which doubles the time. The guard waits for all of it.
            address,
            port,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(0.1, (deadline - time.monotonic()) / 3)),
        )
    except (OSError, RuntimeError) as error:
        raise unreachable(address, port, processes, timeout_seconds, one_line(error)) from error
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def serve(address: str, port: int, processes: Processes, timeout_seconds: float) -> TCPStore:
    """Open rank 0's store. Raises ConfigError if the port is taken.

    The store asks nobody for a password, and whoever reaches it can end the run, or lead its processes to another host.
    """
    listener = own_listener(address, port, processes)
    # This process reaches the store even if the address leads elsewhere, which `unreachable` then tells.
    here = "localhost"
    if listener:
        bound, port = listener.getsockname()[:2]
        here = "127.0.0.1" if bound == ALL_IPV4 else bound
    try:
        return TCPStore(
            here,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds / 3),
            multi_tenant=True,
            master_listen_fd=listener.detach() if listener else None,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"cannot open {address}:{port} for the other processes ({one_line(error)}); if the port is taken, give the "
            "launcher another --master_port (or MASTER_PORT)"
        ) from error


def own_listener(address: str, port: int, processes: Processes) -> socket.socket | None:
    """Return the socket at which the store listens, or None if torch is to listen at all addresses of the host.

    If all processes meet at a loopback address of one host, others cannot reach them.

    Other hosts may know this one by any of its addresses. If those are of IPv4, torch must not listen by IPv6, though
    it would serve both: its store asks for the name of each connection's address, and an IPv4 address in IPv6's form is
    not looked up in /etc/hosts but in DNS, one after the other.

    None also if the port is taken: torch then finds the store that this process has opened there before, or says why.
    """
    if processes.world_size == processes.local_world_size and is_loopback(address):
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    elif is_reached_by_ipv4(address):
        family, place = socket.AF_INET, (ALL_IPV4, port)
    else:
        return None
    try:
        listener = socket.socket(family)
    except OSError:  # a host without IPv6 may know itself by such an address
        return None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier run's connections may still be closing
    try:
        listener.bind(place)
    except OSError:
        listener.close()
        return None
    return listener


def wait_for_port(address: str, port: int, deadline: float, between: float, alive: Callable[[str], None]) -> None:
    """Try to connect every `between` seconds until something listens. Raises OSError if nothing does in time.

    torch's own client would wait as well, but it prints a stack trace for every attempt that fails.
    """
    while True:
        alive(MEETING)
        try:
            left = deadline - time.monotonic()
            socket.create_connection((address, port), timeout=max(0.1, min(ATTEMPT_SECONDS, left))).close()
            return
        except OSError:
            if time.monotonic() + between > deadline:
                raise
        time.sleep(between)


def unreachable(address: str, port: int, processes: Processes, seconds: float, reason: str) -> LbsgdError:
    """Return the error of a process that waited in vain for rank 0's store."""
    if serves_store(processes):
        return ConfigError(
            f"rank 0 runs on {socket.gethostname()}, and {address}:{port} does not lead there ({reason}); give the "
            "launcher this host as --master_addr (or MASTER_ADDR), or start rank 0 on the other"
        )
    server = "the agent of torchrun" if of_agent() else "rank 0"
    way_out = "look at its host, at --master_addr and --master_port"
    if processes.world_size > processes.local_world_size and is_loopback(address):
        way_out = f"on {socket.gethostname()} this address is {socket.gethostname()} itself: name the host of rank 0"
    return LostProcessError(f"cannot reach {server} at {address}:{port} within {seconds:.0f} s ({reason}); {way_out}")


def is_loopback(address: str) -> bool:
    """Return whether an address that this host knows is a loopback address, which leads to the asking host itself."""
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
    return ipaddress.ip_address(found).is_loopback


def is_reached_by_ipv4(address: str) -> bool:
    """Return whether all hosts reach an address that this host knows by IPv4.

    Another host may find a name in another list than this one, so a name counts only if this host has no IPv6 address
    that another could reach.
    """
    if any(family != socket.AF_INET for family, *_ in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)):
        return False
    return is_number(address) or not has_ipv6()


def is_number(address: str) -> bool:
    """Return whether an address is a number rather than a name."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def has_ipv6() -> bool:
    """Return whether this host has an IPv6 address that leads beyond itself and its own cables."""
    try:
        scopes = [line.split()[3] for line in ADDRESSES_IPV6.read_text().splitlines()]
    except OSError:  # a kernel without IPv6
        return False
    return not {LOOPBACK_SCOPE, LINK_SCOPE}.issuperset(scopes)


def pause(world_size: int) -> float:
    """Return the seconds between a waiting process's questions."""
    return max(0.1, world_size / QUESTIONS_PER_SECOND)


def wait_for_name(address: str, seconds: float, alive: Callable[[str], None], tells: bool) -> None:
    """Wait until this host knows rank 0's address. A cluster may create a host's name only when the host is up.

    tells: whether this process tells the user about the wait, as one process of each host does.

    Raises ConfigError if the address stays unknown for `seconds`, and at once for an impossible name.
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

    At the limit, a store refuses connections silently. Raises ConfigError if the system forbids a higher limit.
    """
    needed = CONNECTIONS * world_size + OTHER_FILES
    if (most := allow_open_files(needed)) is not None:
        raise ConfigError(
            f"rank 0 needs {needed:,} open files for the connections of {world_size:,} processes, and its host allows "
            f"{most:,}; raise the hard limit there (ulimit -Hn)"
        )


def serves_store(processes: Processes) -> bool:
    """Return whether this process serves the store: rank 0 does, unless torchrun's agent does."""
    return processes.is_rank_0 and not of_agent()


def of_agent() -> bool:
    """Return whether torchrun's agent serves the store, which then survives restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
