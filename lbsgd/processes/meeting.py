"""How the processes of a run meet at one store, and agree on a part of it that is theirs alone.

Thousands of them wait at the store of one process. So each asks for a key of its own, less often the more there
are, and rank 0 alone reads the list of all. The store's own blocking wait prints warnings whenever it times out.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import groupby

from torch.distributed import PrefixStore, Store

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError
from lbsgd.processes.connection import MEETING, of_agent
from lbsgd.processes.environment import Processes

QUESTIONS_PER_SECOND = 2000  # of all processes that wait, of which a store answers ten times as many


class OtherFailed(LbsgdError):
    """Another process failed first. This one ends with the same exit code, and does not call it an error of its own."""

    label = "ended"

    def __init__(self, rank: int, host: str, error: str, exit_code: int):
        super().__init__(f"by rank {rank} on {host}: {error}")
        self.host, self.exit_code = host, exit_code


def fresh_prefix(store: Store, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> str:
    """Return a prefix of keys that all processes of this start agree on and that no earlier start knows.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712, #167288), and its TORCHELASTIC_RESTART_COUNT is
    each agent's own. So every process gives itself a new name and adds it to a list. Rank 0 answers each name with its
    own, which becomes the prefix of keys. Only a rank 0 of the same start can answer a name, because agents end all old
    processes before new ones begin.

    Nobody returns before all have come: whoever waits here hears why another process never will.
    Raises LostProcessError, which names the missing ones, after timeout_seconds, OtherFailed where another process
    ended before it came, and ConfigError where it has another world size than rank 0.
    """
    name, rank = uuid.uuid4().hex, processes.rank
    prefix: str | None = None
    arrived = False
    patience = timeout_seconds + (5 if rank else 0)  # rank 0, which knows more, ends first
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        alive(MEETING)
        if not arrived and (arrived := is_of_same_run(store, processes)):
            store.append("arrived", f"{rank} {name}\n")  # type: ignore[attr-defined]  # torch's type stubs lack it
        if arrived and not prefix:
            prefix = join(store, name, rank) if rank else lead(store, name, processes.world_size)
            if prefix:
                deadline = time.monotonic() + patience  # rank 0 may have come later than this process
        if prefix and read(store, f"{prefix}/host/0"):
            return prefix
        if failure := read(news_of(store, prefix or name), "failure"):
            let_others_read(processes)
            raise OtherFailed(**json.loads(failure))
        time.sleep(pause(processes.world_size) if rank else pause(1))
    error = some_did_not_come(store, name, processes, timeout_seconds)
    if not rank:
        tell(news_of(store, name), rank, error)
        let_others_read(processes)
    raise error


def is_of_same_run(store: Store, processes: Processes) -> bool:
    """Say the world size of rank 0, or compare this process's with it; return whether rank 0 has said it yet.

    Raises ConfigError where the two differ. That ends nobody else, because the store may be that of another run, to
    which this process has come by its port; but rank 0 has it in its words if it waits in vain.
    """
    if of_agent():  # torchrun gives all its processes one world size, but another after a restart
        return True
    if processes.is_rank_0:
        store.set("world_size", str(processes.world_size))
        return True
    if not (first := read(store, "world_size")):
        return False
    if int(first) != processes.world_size:
        mine = f"WORLD_SIZE is {processes.world_size} for rank {processes.rank} on {socket.gethostname()}"
        store.set("refused", mine)
        raise ConfigError(
            f"{mine}, but {first} for rank 0; start all processes with the same, and a second run with another "
            "--master_port"
        )
    return True


def some_did_not_come(store: Store, name: str, processes: Processes, timeout_seconds: float) -> LostProcessError:
    """Return the error of a process that has waited in vain; rank 0, whose name is given, knows for whom."""
    missing = [] if processes.rank else not_joined(store, name, processes.world_size)
    refused = read(store, "refused")
    return LostProcessError(
        f"of {processes.world_size} processes some did not come within {timeout_seconds:g} s"
        + (f": rank {in_words(missing)}" if missing else "")
        + ("; " + (f"{refused}, which is not {processes.world_size}" if refused else "look at their hosts"))
    )


def news_of(store: Store, prefix: str) -> Store:
    """Return the part of the store where a failure is told to the processes that wait for others.

    Normally the whole store, because processes that rank 0 has not answered must be able to read it. torchrun's agent
    keeps the store over restarts, with the failures of earlier starts, so there it is the part of this start.
    """
    return PrefixStore(prefix, store) if of_agent() else store


def pause(world_size: int) -> float:
    """Return the seconds between two questions of a process that waits."""
    return max(0.1, world_size / QUESTIONS_PER_SECOND)


def lead(store: Store, name: str, world_size: int) -> str | None:
    """Do rank 0's part: answer those that have come since; return its name once all others have joined it."""
    missing = not_joined(store, name, world_size)
    if missing:
        names = dict(line.split() for line in read(store, "arrived").splitlines())  # the newest name of each rank
        answers = [f"answer/{names[str(rank)]}" for rank in missing if str(rank) in names]
        if answers:
            store.multi_set(answers, [name] * len(answers))  # type: ignore[attr-defined]
        return None
    store.set(f"{name}/host/0", socket.gethostname())
    return name


def join(store: Store, name: str, rank: int) -> str | None:
    """Do another rank's part: once rank 0 has answered, say which host this is, and return rank 0's name."""
    if not (prefix := read(store, f"answer/{name}")):
        return None
    store.set(f"{prefix}/host/{rank}", socket.gethostname())
    store.append(f"{prefix}/joined", f"{rank}\n")  # type: ignore[attr-defined]
    return prefix


def not_joined(store: Store, name: str, world_size: int) -> list[int]:
    """Return the ranks that have not joined the rank 0 of this name."""
    joined = set(map(int, read(store, f"{name}/joined").split()))
    return [rank for rank in range(1, world_size) if rank not in joined]


def tell(store: Store, rank: int, error: LbsgdError) -> int:
    """Leave word of what ends this process, unless another one has; return the rank of the one that did first."""
    mine = {"rank": rank, "host": socket.gethostname(), "error": str(error), "exit_code": error.exit_code}
    return json.loads(store.compare_set("failure", "", json.dumps(mine)))["rank"]


def let_others_read(processes: Processes) -> None:
    """Keep the store, which ends with rank 0, until all that wait have looked for a failure."""
    if processes.is_rank_0 and not of_agent():
        time.sleep(1 + pause(processes.world_size))


def in_words(ranks: Sequence[int]) -> str:
    """Return rising numbers as a list, in which three or more in a row are one entry: 1, 2, 8 to 15."""
    entries: list[str] = []
    for _, row in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        first, *rest = [rank for _, rank in row]
        entries += [f"{first} to {rest[-1]}"] if len(rest) > 1 else map(str, (first, *rest))
    return ", ".join(entries)


def read(store: Store, key: str) -> str:
    """Return the value of a key, "" where it is not set; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""
