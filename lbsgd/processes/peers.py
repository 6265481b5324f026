"""Let processes tell each other, beside their collective calls, which are there, failed first, or are silent.

Collective calls wait for every process, so they cannot say that one is missing. These messages go through the key-value
store at which torch's processes meet. Rank 0 serves it, or torchrun's agent.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError
from lbsgd.processes.environment import Processes, master


class Peers:
    """The processes of one run as this one sees them, once all have met at `store`."""

    BEAT_SECONDS = 1.0

    def __init__(self, processes: Processes, store: Store):
        self.rank, self.world_size, self.store = processes.rank, processes.world_size, store
        self.beats = 0

    @classmethod
    def meet(cls, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> Peers:
        """Wait until all processes are there, and call `alive` meanwhile.

        Raises LostProcessError, which names the missing ones, after timeout_seconds, ConfigError where the meeting
        point cannot be used, and OtherFailed where another process ended before it came.
        """
        store = meeting_point(processes, 0.9 * timeout_seconds)  # before a guard takes the wait for a hang
        peers = cls(processes, PrefixStore(fresh_prefix(store, processes, timeout_seconds, alive), store))
        peers.store.set(f"host/{peers.rank}", socket.gethostname())
        return peers

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare facts (name -> fingerprint, as of the code). Raises ConfigError where they differ from rank 0's."""
        if self.rank == 0:
            self.store.set("facts", json.dumps(facts))
        first = json.loads(self.store.get("facts"))
        for name, fingerprint in facts.items():
            if first[name] != fingerprint:
                raise ConfigError(
                    f"{self.name(self.rank)} does not have the {name} of {self.name(0)}; make them the same on "
                    "all hosts"
                )

    def own_connection(self) -> Store:
        """Return another connection to the store; a thread that waits on one holds up all others that use it."""
        return self.store.clone()  # type: ignore[attr-defined]  # torch's type stubs lack it

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host/{rank}').decode()}"

    # --- the first failure -------------------------------------------------------------------------------------------

    def fail(self, error: LbsgdError) -> bool:
        """Tell the others what ends this process; return False where another one has failed before.

        Also True where the store is gone, because then nobody else can have told.
        """
        mine = json.dumps(
            {"rank": self.rank, "host": socket.gethostname(), "error": str(error), "exit_code": error.exit_code}
        )
        try:
            return json.loads(self.store.compare_set("failure", "", mine))["rank"] == self.rank
        except RuntimeError:  # the store went with the process that served it
            return True

    def failure(self) -> OtherFailed | None:
        """Return the first failure, if it is another process's. Raises RuntimeError where the store is gone."""
        found = json.loads(read(self.store, "failure") or "null")
        return OtherFailed(**found) if found and found["rank"] != self.rank else None

    # --- signs of life -----------------------------------------------------------------------------------------------

    def beat(self, position: str) -> None:
        """Give a sign of life, with how far this process has got."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {position}")

    def silent(self) -> list[str]:
        """Return the names of the processes that give no sign of life within three beats.

        It compares values and not times, because clocks differ between hosts.
        """
        before = self.all_beats()
        time.sleep(3 * self.BEAT_SECONDS)
        return [
            self.name(rank)
            for rank, (was, now) in enumerate(zip(before, self.all_beats(), strict=True))
            if was == now and rank != self.rank
        ]

    def all_beats(self) -> list[str]:
        return [read(self.store, f"beat/{rank}") for rank in range(self.world_size)]

    # --- a request to stop -------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        self.store.set("stop", reason)

    def stop_requested(self) -> str | None:
        return read(self.store, "stop") or None


class OtherFailed(LbsgdError):
    """Another process failed first. This one ends with the same exit code, and does not call it an error of its own."""

    label = "ended"

    def __init__(self, rank: int, host: str, error: str, exit_code: int):
        super().__init__(f"by rank {rank} on {host}: {error}")
        self.host, self.exit_code = host, exit_code


# --- meeting ---------------------------------------------------------------------------------------------------------


def meeting_point(processes: Processes, timeout_seconds: float) -> TCPStore:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 serves where torchrun's agent does not.

    Raises ConfigError where rank 0 cannot open the port, LostProcessError where another rank cannot reach it.
    """
    address, port = master()
    try:
        return TCPStore(
            address,
            port,
            is_master=processes.is_rank_0 and not of_agent(),
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if processes.is_rank_0:
            raise ConfigError(
                f"cannot open {address}:{port} for the other processes ({reason}); if the port is taken, give the "
                "launcher another --master_port"
            ) from error
        raise LostProcessError(
            f"cannot reach rank 0 at {address}:{port} ({reason}); look at its host, at --master_addr and --master_port"
        ) from error


def of_agent() -> bool:
    """Return whether torchrun's agent serves the store, and so keeps it over restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_prefix(store: Store, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> str:
    """Return a prefix of keys that all processes of this start agree on and that no earlier start knows.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712, #167288), and its TORCHELASTIC_RESTART_COUNT is
    each agent's own. So every process gives itself a new name, and rank 0's becomes the prefix.
    """
    name, rank, others = uuid.uuid4().hex, processes.rank, range(1, processes.world_size)
    store.set(f"name/{rank}", name)
    deadline = time.monotonic() + timeout_seconds + (5 if rank else 0)  # rank 0, which knows more, ends first
    while time.monotonic() < deadline:
        alive("the meeting of all processes")
        if prefix := join(store, name, rank) if rank else lead(store, name, others):
            return prefix
        if not of_agent() and (failure := read(store, "failure")):
            raise OtherFailed(**json.loads(failure))
        time.sleep(0.1)
    missing = [] if rank else not_here(store, name, others)
    raise LostProcessError(
        f"of {processes.world_size} processes some did not come within {timeout_seconds:g} s"
        + (f": rank {', '.join(map(str, missing))}" if missing else "")
        + "; look at their hosts"
    )


def lead(store: Store, name: str, others: Iterable[int]) -> str | None:
    """Do rank 0's part: show its own name and those it reads; return its name once all others have joined it."""
    if not not_here(store, name, others):
        return name
    store.set("start", json.dumps([name, *(read(store, f"name/{other}") for other in others)]))
    return None


def join(store: Store, name: str, rank: int) -> str | None:
    """Do another rank's part: join a rank 0 that shows this process's new name, and return rank 0's name.

    Only a rank 0 of the same start can show it, because agents end all old processes before new ones begin.
    """
    shown = json.loads(read(store, "start") or "[]")
    if shown[rank : rank + 1] != [name]:
        return None
    store.set(f"{shown[0]}/here/{rank}", "1")
    return shown[0]


def not_here(store: Store, name: str, others: Iterable[int]) -> list[int]:
    """Return the ranks that have not joined the rank 0 of this name."""
    return [other for other in others if not store.check([f"{name}/here/{other}"])]


def read(store: Store, key: str) -> str:
    """Return the value of a key, "" where it is not set; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def tell_before_joining(processes: Processes, error: LbsgdError) -> None:
    """Tell the other hosts why this process never comes; on its own host the launcher ends the others."""
    seconds = 20
    try:
        peers = Peers(processes, meeting_point(processes, seconds))
        peers.fail(error)
    except LbsgdError:
        return  # nobody to tell
    if processes.is_rank_0:
        time.sleep(seconds)  # the store is this process's own, and ends with `peers`
