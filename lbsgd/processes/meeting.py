"""Let the processes of a run meet at one store, and agree on a part of the store that is theirs alone.

Thousands of processes may wait at one process's store. So each asks for its own key, less often the more processes
there are, and only rank 0 reads the whole list. They do not use the store's own blocking wait, because it prints
warnings whenever it times out.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import groupby

from torch.distributed import PrefixStore, Store

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError, Stopped
from lbsgd.processes.connection import MEETING, of_agent, pause, serves_store
from lbsgd.processes.environment import Processes, jobs
from lbsgd.processes.launcher import launchers

# torch's watchdog of NCCL sets this key when a collective call fails, past all prefixes, so torchrun's agent keeps it.
NCCL_ALARM = "exception_dump"


class OtherFailed(LbsgdError):
    """Another process failed first. This one ends with the same exit code, and says whose error it was."""

    label = "ended"

    def __init__(self, rank: int, host: str, error: str, exit_code: int):
        super().__init__(f"by rank {rank} on {host}: {error}")
        self.host, self.exit_code = host, exit_code


def fresh_prefix(store: Store, processes: Processes, timeout_seconds: float, alive: Callable[[str], None]) -> str:
    """Return a prefix of keys that all processes of this start agree on and that no earlier start knows.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712, #167288), and each agent has its own
    TORCHELASTIC_RESTART_COUNT. So every process gives itself a new name and adds it to a list. Rank 0 answers each name
    with its own name, which becomes the prefix of keys. Only a rank 0 of the same start can answer, because agents end
    all old processes before new ones begin.

    No process returns before all have come, so a waiting process learns if another one will never come.
    Raises LostProcessError, which names the missing processes, after timeout_seconds. Raises OtherFailed if another
    process ended before it came, Stopped if another was told to stop, and ConfigError if this process's world size
    differs from rank 0's.
    """
    name, rank = uuid.uuid4().hex, processes.rank
    prefix: str | None = None
    arrived = False
    patience = timeout_seconds + (5 if rank else 0)  # rank 0 knows more, so it ends first
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
        news = news_of(store, prefix or name)
        if failure := read(news, "failure"):
            let_others_read(processes)
            raise OtherFailed(**json.loads(failure))
        if reason := read(news, "stop"):
            let_others_read(processes)
            raise Stopped(reason)
        time.sleep(pause(processes.world_size) if rank else pause(1))
    error = some_did_not_come(store, name, processes, timeout_seconds)
    if not rank:
        tell(news_of(store, name), rank, error)
        let_others_read(processes)
    raise error


def is_of_same_run(store: Store, processes: Processes) -> bool:
    """On rank 0, publish this run's facts. On others, compare with them. Return whether rank 0 has published them yet.

    Raises ConfigError if they differ. No other process ends then, because this process may have reached another run's
    store through its port. But if rank 0 waits in vain, its error says so.
    """
    if of_agent():  # torchrun gives all its processes one world size, which may change at a restart
        return True
    if processes.is_rank_0:
        store.set("run", json.dumps(run_of(processes)))
        return True
    if not (published := read(store, "run")):
        return False
    first = json.loads(published)
    for name, value in run_of(processes).items():
        if first.get(name, value) != value:
            differ = (
                f"{name} is {value} for rank {processes.rank} on {socket.gethostname()}, but {first[name]} for rank 0"
            )
            store.set("refused", differ)
            raise ConfigError(
                f"{differ}; start all processes with the same, and a second run with another --master_port "
                "(or MASTER_PORT)"
            )
    return True


def run_of(processes: Processes) -> dict[str, str]:
    """Return the known facts that the processes of a run share, and that usually differ in another run.

    The launcher is known to be the same for all processes only if all are on one host.
    """
    run = {**jobs(), "WORLD_SIZE": str(processes.world_size)}
    if processes.world_size == processes.local_world_size and (started_by := launchers()):
        run["the launcher's process id"] = str(started_by[0].pid)
    return run


def some_did_not_come(store: Store, name: str, processes: Processes, timeout_seconds: float) -> LostProcessError:
    """Return the error of a process that waited in vain. Rank 0, whose name is `name`, can say who is missing."""
    missing = [] if processes.rank else not_joined(store, name, processes.world_size)
    refused = read(store, "refused")
    return LostProcessError(
        f"of {processes.world_size} processes some did not come within {timeout_seconds:g} s"
        + (f": rank {in_words(missing)}" if missing else "")
        + f"; {refused or 'look at their hosts'}"
    )


def news_of(store: Store, prefix: str) -> Store:
    """Return the part of the store in which waiting processes look for a failure and for a request to stop.

    Normally this is the whole store, because processes that rank 0 has not answered must be able to read it. With
    torchrun it is only this start's part, because the agent keeps earlier starts' failures in the store.
    """
    return PrefixStore(prefix, store) if of_agent() else store


def lead(store: Store, name: str, world_size: int) -> str | None:
    """Do rank 0's part: answer the processes that have come. Return rank 0's name once all have joined."""
    missing = not_joined(store, name, world_size)
    if missing:
        names = dict(line.split() for line in read(store, "arrived").splitlines())  # the newest name of each rank
        answers = [f"answer/{names[str(rank)]}" for rank in missing if str(rank) in names]
        if answers:
            store.multi_set(answers, [name] * len(answers))  # type: ignore[attr-defined]
        return None
    # An earlier start's alarm would pass for one of this start, and torch would abort each process 8 minutes later.
    store.delete_key(NCCL_ALARM)
    introduce(store, name, 0)
    return name


def join(store: Store, name: str, rank: int) -> str | None:
    """Do another rank's part: once rank 0 has answered, tell it this host's name, and return rank 0's name."""
    if not (prefix := read(store, f"answer/{name}")):
        return None
    introduce(store, prefix, rank)
    store.append(f"{prefix}/joined", f"{rank}\n")  # type: ignore[attr-defined]
    return prefix


def introduce(store: Store, prefix: str, rank: int) -> None:
    """Tell the others this process's host, and give a first sign of life.

    So each process that has met the others has given one. If a single one had not, every process that looks for the
    silent ones would have to ask for thousands of signs one by one.
    """
    keys = [f"{prefix}/beat/{rank}", f"{prefix}/host/{rank}"]
    store.multi_set(keys, [MEETING, socket.gethostname()])  # type: ignore[attr-defined]  # torch's type stubs lack it


def not_joined(store: Store, name: str, world_size: int) -> list[int]:
    """Return the ranks that have not joined the rank 0 with this name."""
    joined = set(map(int, read(store, f"{name}/joined").split()))
    return [rank for rank in range(1, world_size) if rank not in joined]


def tell(store: Store, rank: int, error: LbsgdError) -> int:
    """Store what ends this process, unless another process was first. Return the rank of the first."""
    mine = {
        "rank": rank,
        "host": socket.gethostname(),
        "error": "; ".join(map(str, error.args)),
        "exit_code": error.exit_code,
    }
    return json.loads(store.compare_set("failure", "", json.dumps(mine)))["rank"]


def let_others_read(processes: Processes) -> None:
    """On rank 0, keep the store alive until all waiting processes have looked for news."""
    if serves_store(processes):
        time.sleep(1 + pause(processes.world_size))


def in_words(ranks: Sequence[int]) -> str:
    """Return ascending numbers in words. Three or more consecutive ones become one entry: 1, 2, 8 to 15."""
    entries: list[str] = []
    for _, row in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        first, *rest = [rank for _, rank in row]
        entries += [f"{first} to {rest[-1]}"] if len(rest) > 1 else map(str, (first, *rest))
    return ", ".join(entries)


def read(store: Store, key: str) -> str:
    """Return the value of a key, "" if it is not set. `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""
