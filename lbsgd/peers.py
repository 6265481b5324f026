"""What the processes of a run tell each other beside their collective calls: who is there, who failed first, who is silent.

Collective calls wait for every process, so they cannot say that one is missing. This goes through the key-value store that
torch's processes meet at, which rank 0 (or torchrun's agent) serves.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any, Optional

from torch.distributed import PrefixStore, rendezvous

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError
from lbsgd.launch import Processes

BEAT_SECONDS = 1.0


class Peers:
    """The processes of one run, as this one sees them."""

    def __init__(self, processes: Processes, store: Any):
        self.rank, self.world_size = processes.rank, processes.world_size
        self.processes, self.store = processes, store
        self.beats = 0

    # --- meeting --------------------------------------------------------------------------------------------------------

    @classmethod
    def meet(cls, processes: Processes, timeout_seconds: float) -> Peers:
        """Comes to the meeting point. Raises ConfigError where it cannot be used, or is not there after timeout_seconds."""
        peers = cls(processes, meeting_point(processes, timeout_seconds))
        peers.store.set(f"host/{peers.rank}", socket.gethostname())
        return peers

    def agree(self, facts: dict[str, str], timeout_seconds: float) -> None:
        """Waits until all processes are there and compares facts: name -> fingerprint, such as of the code.

        Raises LostProcessError that names the missing ones after timeout_seconds, and ConfigError where the facts differ from
        those of rank 0.
        """
        self.store.set(f"facts/{self.rank}", json.dumps(facts))
        deadline = time.monotonic() + timeout_seconds
        while missing := self.missing():
            if time.monotonic() > deadline:
                raise LostProcessError(f"{len(missing)} of {self.world_size} processes did not come within {timeout_seconds:g} s: "
                                       f"rank {', '.join(map(str, missing))}; look at their hosts")
            time.sleep(0.2)
        first = json.loads(self.store.get("facts/0"))
        for name, fingerprint in facts.items():
            if first[name] != fingerprint:
                raise ConfigError(f"{self.name(self.rank)} does not have the {name} of {self.name(0)}; make them the same on "
                                  "all hosts")

    def missing(self) -> list[int]:
        """Ranks that have not come; asked one by one only where some have not."""
        if self.store.check([f"facts/{rank}" for rank in range(self.world_size)]):
            return []
        return [rank for rank in range(self.world_size) if not self.store.check([f"facts/{rank}"])]

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host/{rank}').decode()}"

    # --- the first failure ----------------------------------------------------------------------------------------------

    def fail(self, error: LbsgdError) -> bool:
        """Tells the others what ends this process; False where another one failed before, or cannot be told any more."""
        mine = json.dumps({"rank": self.rank, "host": socket.gethostname(), "error": str(error), "exit_code": error.exit_code})
        try:
            return json.loads(self.store.compare_set("failure", "", mine))["rank"] == self.rank
        except RuntimeError:  # the store went with the process that served it
            return True

    def failure(self) -> Optional[OtherFailed]:
        """The first failure of another process, if there was one. Raises RuntimeError where the store is gone."""
        if not self.store.check(["failure"]):
            return None
        found = json.loads(self.store.get("failure"))
        return None if found["rank"] == self.rank else OtherFailed(**found)

    # --- signs of life --------------------------------------------------------------------------------------------------

    def beat(self, position: str) -> None:
        """A sign of life, with how far this process has got."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {position}")

    def silent(self) -> list[str]:
        """Names of the processes that give no sign of life; takes three beats, and compares no clocks of different hosts."""
        before = self.all_beats()
        time.sleep(3 * BEAT_SECONDS)
        return [self.name(rank) for rank, (was, now) in enumerate(zip(before, self.all_beats()))
                if was == now and rank != self.rank]

    def all_beats(self) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        return [self.store.get(key) if self.store.check([key]) else b"" for key in keys]

    # --- a request to stop ----------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        self.store.set("stop", reason)

    def stop_requested(self) -> Optional[str]:
        return self.store.get("stop").decode() if self.store.check(["stop"]) else None


class OtherFailed(LbsgdError):
    """Another process failed first; this one ends with its exit code, and does not call it an error of its own."""

    def __init__(self, rank: int, host: str, error: str, exit_code: int):
        super().__init__(f"rank {rank} on {host}: {error}")
        self.rank, self.host, self.exit_code = rank, host, exit_code


def meeting_point(processes: Processes, timeout_seconds: float) -> PrefixStore:
    """The store at MASTER_ADDR:MASTER_PORT, with keys of our own."""
    try:
        store, _, _ = next(rendezvous("env://", processes.rank, processes.world_size,
                                      timeout=timedelta(seconds=timeout_seconds)))
    except RuntimeError as error:
        raise ConfigError(f"cannot join the other processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                          f"({str(error).splitlines()[0]}); if the port is taken, give the launcher another --master_port") \
            from error
    return PrefixStore("lbsgd", store)


def tell_before_joining(processes: Processes, error: LbsgdError) -> None:
    """Lets the other hosts know why this process will never come; on its own host the launcher ends the others."""
    seconds = 20
    try:
        peers = Peers(processes, meeting_point(processes, seconds))
        peers.fail(error)
    except LbsgdError:
        return  # nobody to tell
    if processes.rank == 0:
        time.sleep(seconds)  # the store is ours, and goes with us
