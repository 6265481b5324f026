"""What the processes of a run tell each other beside their collective calls: who is there, who failed first, who is silent.

Collective calls wait for every process, so they cannot say that one is missing. This goes through the key-value store that
torch's processes meet at, which rank 0 (or torchrun's agent) serves.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError
from lbsgd.processes.environment import Processes

BEAT_SECONDS = 1.0


class Peers:
    """The processes of one run, as this one sees them, once all have met at `store`."""

    def __init__(self, processes: Processes, store: PrefixStore):
        self.rank, self.world_size, self.store = processes.rank, processes.world_size, store
        self.beats = 0

    @classmethod
    def meet(cls, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> Peers:
        """Waits until all processes are there, and tells `alive` that it waits.

        Raises LostProcessError that names the missing ones after timeout_seconds, ConfigError where the meeting point cannot
        be used, and what another process ended with before it came.
        """
        store = meeting_point(processes, 0.9 * timeout_seconds)  # before a guard takes the wait for a hang
        peers = cls(processes, PrefixStore(fresh_prefix(store, processes, timeout_seconds, alive), store))
        peers.store.set(f"host/{peers.rank}", socket.gethostname())
        return peers

    def agree(self, facts: dict[str, str]) -> None:
        """Compares facts, name -> fingerprint, such as of the code. Raises ConfigError where they differ from rank 0's."""
        if self.rank == 0:
            self.store.set("facts", json.dumps(facts))
        first = json.loads(self.store.get("facts"))
        for name, fingerprint in facts.items():
            if first[name] != fingerprint:
                raise ConfigError(
                    f"{self.name(self.rank)} does not have the {name} of {self.name(0)}; make them the same on "
                    "all hosts"
                )

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host/{rank}').decode()}"

    # --- the first failure ----------------------------------------------------------------------------------------------

    def fail(self, error: LbsgdError) -> bool:
        """Tells the others what ends this process; False where another one failed before, or cannot be told any more."""
        mine = json.dumps(
            {"rank": self.rank, "host": socket.gethostname(), "error": str(error), "exit_code": error.exit_code}
        )
        try:
            return json.loads(self.store.compare_set("failure", "", mine))["rank"] == self.rank
        except RuntimeError:  # the store went with the process that served it
            return True

    def failure(self) -> OtherFailed | None:
        """The first failure of another process, if there was one. Raises RuntimeError where the store is gone."""
        found = json.loads(read(self.store, "failure") or "null")
        return OtherFailed(**found) if found and found["rank"] != self.rank else None

    # --- signs of life --------------------------------------------------------------------------------------------------

    def beat(self, position: str) -> None:
        """A sign of life, with how far this process has got."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {position}")

    def silent(self) -> list[str]:
        """Names of the processes that give no sign of life; takes three beats, and compares no clocks of different hosts."""
        before = self.all_beats()
        time.sleep(3 * BEAT_SECONDS)
        return [
            self.name(rank)
            for rank, (was, now) in enumerate(zip(before, self.all_beats()))
            if was == now and rank != self.rank
        ]

    def all_beats(self) -> list[str]:
        return [read(self.store, f"beat/{rank}") for rank in range(self.world_size)]

    # --- a request to stop ----------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        self.store.set("stop", reason)

    def stop_requested(self) -> str | None:
        return read(self.store, "stop") or None


class OtherFailed(LbsgdError):
    """Another process failed first; this one ends with its exit code, and does not call it an error of its own."""

    label = "ended"

    def __init__(self, rank: int, host: str, error: str, exit_code: int):
        super().__init__(f"by rank {rank} on {host}: {error}")
        self.host, self.exit_code = host, exit_code


# --- meeting ------------------------------------------------------------------------------------------------------------


def meeting_point(processes: Processes, timeout_seconds: float) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 serves where torchrun's agent does not."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(
            address,
            port,
            is_master=processes.rank == 0 and not of_agent(),
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if processes.rank == 0:
            raise ConfigError(
                f"cannot open {address}:{port} for the other processes ({reason}); if the port is taken, give the "
                "launcher another --master_port"
            ) from error
        raise LostProcessError(
            f"cannot reach rank 0 at {address}:{port} ({reason}); look at its host, at --master_addr and --master_port"
        ) from error


def of_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_prefix(store: TCPStore, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> str:
    """A prefix of keys that all processes of this start agree on, and none of an earlier one knows.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712, #167288), and its TORCHELASTIC_RESTART_COUNT is each
    agent's own. So every process gives itself a new name. Rank 0 shows who it is and whose names it has read; who finds its
    own new name there knows that this rank 0 is of its own start: agents end all old processes before new ones begin.
    """
    name, rank, others = uuid.uuid4().hex, processes.rank, range(1, processes.world_size)
    store.set(f"name/{rank}", name)
    deadline = time.monotonic() + timeout_seconds + (5 if rank else 0)  # so that rank 0, which knows more, speaks first
    while time.monotonic() < deadline:
        alive("the meeting of all processes")
        if rank == 0:
            if all(store.check([f"{name}/here/{other}"]) for other in others):
                return name
            store.set("start", json.dumps([name, *(read(store, f"name/{other}") for other in others)]))
        elif (shown := json.loads(read(store, "start") or "[]"))[rank : rank + 1] == [name]:
            store.set(f"{shown[0]}/here/{rank}", "1")
            return shown[0]
        if not of_agent() and (failure := read(store, "failure")):
            raise OtherFailed(**json.loads(failure))
        time.sleep(0.1)
    missing = [other for other in others if not store.check([f"{name}/here/{other}"])] if rank == 0 else []
    raise LostProcessError(
        f"of {processes.world_size} processes some did not come within {timeout_seconds:g} s"
        + (f": rank {', '.join(map(str, missing))}" if missing else "")
        + "; look at their hosts"
    )


def read(store, key: str) -> str:
    """The value of a key, "" where it is not set; get alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def tell_before_joining(processes: Processes, error: LbsgdError) -> None:
    """Lets the other hosts know why this process will never come; on its own host the launcher ends the others."""
    seconds = 20
    try:
        peers = Peers(processes, meeting_point(processes, seconds))
        peers.fail(error)
    except LbsgdError:
        return  # nobody to tell
    if processes.rank == 0:
        time.sleep(seconds)  # the store is ours, and goes with `peers`
