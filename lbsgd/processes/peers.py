"""Let processes tell each other, outside collective calls, who is there, who failed first, and who is silent.

Collective calls wait for every process, so they cannot say that one is missing. These messages go through the key-value
store at which torch's processes meet, served by rank 0 or by torchrun's agent.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from torch.distributed import PrefixStore, Store

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError, Stopped, one_line
from lbsgd.processes.connection import allow_connections, meeting_point, serves_store
from lbsgd.processes.environment import Processes
from lbsgd.processes.meeting import OtherFailed, fresh_prefix, in_words, is_of_same_run, read, tell
from lbsgd.units import counted

MOST_HOSTS = 8  # that a line names
WAITED_FOR_SECONDS = 20  # by a process that tells the others why it never comes


class Peers:
    """The processes of one run as this one sees them, once all have met at `store`."""

    BEAT_SECONDS = 1.0
    LOOKERS = 16  # processes that may look for silent ones; thousands would overload the store

    def __init__(self, processes: Processes, store: Store):
        self.rank, self.world_size, self.store = processes.rank, processes.world_size, store
        self.beats = 0

    @classmethod
    def meet(cls, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> Peers:
        """Wait until all processes are there, and call `alive` meanwhile.

        Raises LostProcessError after timeout_seconds, which names the missing processes, or if rank 0 is gone. Raises
        ConfigError if the meeting point cannot be used, world sizes differ or rank 0 may not open enough files,
        OtherFailed if another process ended before it came, and Stopped if another was told to stop.
        """
        if serves_store(processes):
            try:
                allow_connections(processes.world_size)
            except ConfigError as error:
                tell_before_joining(processes, error)
                raise
        store = meeting_point(processes, timeout_seconds, alive)
        try:
            prefix = fresh_prefix(store, processes, timeout_seconds, alive)
        except RuntimeError as error:
            raise LostProcessError(f"rank 0, or the way to its host, is gone ({one_line(error)})") from error
        return cls(processes, PrefixStore(prefix, store))

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare facts (name -> fingerprint, such as the code's). Raises ConfigError if they differ from rank 0's."""
        if self.rank == 0:
            self.store.set("facts", json.dumps(facts))
        first = json.loads(self.store.get("facts"))  # waits for rank 0, but not long, because all have come
        for name, fingerprint in facts.items():
            if first[name] != fingerprint:
                raise ConfigError(
                    f"{self.name(self.rank)} does not have the {name} of {self.name(0)}; make them the same on "
                    "all hosts"
                )

    def require_address(self) -> None:
        """Raise ConfigError if there are other hosts and gloo would give them an address that only this host reaches.

        gloo takes the address of the host's own name, which is 127.0.1.1 on a fresh Debian.
        """
        other = 0 if self.rank else self.world_size - 1
        if os.environ.get("GLOO_SOCKET_IFNAME") or self.host(self.rank) == self.host(other):
            return
        address = own_address()
        if ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"{self.name(self.rank)} takes {address} for its address, at which {self.name(other)} cannot reach it; "
                "set GLOO_SOCKET_IFNAME to the network's interface (`ip -brief address` lists them), or correct the "
                "host's name in /etc/hosts"
            )

    def own_connection(self) -> Store:
        """Return another connection to the store, because a thread that waits on one blocks its other users."""
        return self.store.clone()  # type: ignore[attr-defined]  # torch's type stubs lack it

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.host(rank)}"

    def host(self, rank: int) -> str:
        return self.store.get(f"host/{rank}").decode()

    # --- the first failure -------------------------------------------------------------------------------------------

    def fail(self, error: LbsgdError) -> bool:
        """Tell the others what ends this process. Return False if another process failed first.

        Return True if the store is gone, because then no other process can have reported a failure.
        """
        try:
            return tell(self.store, self.rank, error) == self.rank
        except RuntimeError:  # the store went with the process that served it
            return True

    def failure(self) -> OtherFailed | None:
        """Return the first failure if it was another process's. Raises RuntimeError if the store is gone."""
        found = json.loads(read(self.store, "failure") or "null")
        return OtherFailed(**found) if found and found["rank"] != self.rank else None

    # --- signs of life -----------------------------------------------------------------------------------------------

    def beat(self, position: str) -> None:
        """Give a sign of life that says how far this process has got."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {position}")

    @cached_property
    def may_look(self) -> bool:
        """Whether this process is among the first that ask. The others wait for what these find."""
        return self.store.add("looks", 1) <= self.LOOKERS

    def silent(self) -> list[str]:
        """Return, in words by host, the processes that give no sign of life within three beats.

        This compares values, not times, because clocks differ between hosts.
        """
        before = self.all_beats()
        time.sleep(3 * self.BEAT_SECONDS)
        after = self.all_beats()
        found = [rank for rank in range(self.world_size) if before[rank] == after[rank] and rank != self.rank]
        return self.by_host(found) if found else []

    def all_beats(self) -> list[bytes]:
        """Return the last sign of life of each process. All have given one at the meeting (`meeting.introduce`)."""
        return self.store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])

    def by_host(self, ranks: Sequence[int]) -> list[str]:
        """Name some processes, a host at a time. A cluster that is cut in two would else fill the screen with names."""
        ranks_on: dict[bytes, list[int]] = {}
        for rank, host in zip(ranks, self.store.multi_get([f"host/{rank}" for rank in ranks]), strict=True):
            ranks_on.setdefault(host, []).append(rank)
        words = [f"rank {in_words(together)} on {host.decode()}" for host, together in ranks_on.items()]
        left_out = len(words) - MOST_HOSTS
        return words if left_out <= 0 else [*words[:MOST_HOSTS], f"those on {counted(left_out, 'more host')}"]

    # --- a request to stop -------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        self.store.set("stop", reason)

    def stop_requested(self) -> str | None:
        return read(self.store, "stop") or None


def tell_before_joining(processes: Processes, error: LbsgdError) -> None:
    """Tell the processes that wait for this one, and that no launcher ends, why it never comes."""
    try:
        store = meeting_point(processes, WAITED_FOR_SECONDS)
        is_of_same_run(store, processes)  # raises ConfigError if the store is another run's
        peers = Peers(processes, store)
        if isinstance(error, Stopped):
            peers.request_stop(str(error))
        else:
            peers.fail(error)
    except (LbsgdError, RuntimeError):  # torch's error if the store is gone
        return  # nobody to tell
    if processes.is_rank_0:
        time.sleep(WAITED_FOR_SECONDS)  # the store ends with this process


def own_address() -> str:
    """Return the address of this host's own name. If it has none, return 127.0.0.1, as torch does."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "127.0.0.1"
