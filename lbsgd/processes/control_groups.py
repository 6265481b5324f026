"""Find this process's control groups, with which containers and Slurm jobs limit memory and cores."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path


def groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) of this process's own group, then of the groups above it.

    Containers may hide the process's own group, but not those above. root: the folder that holds /proc and /sys.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top, version = (f"sys/fs/cgroup/{controller}", 1) if controllers else ("sys/fs/cgroup", 2)
            own = root / top / group.strip("/")
            yield from ((folder, version) for folder in (own, *own.parents))


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, alone or shared with the others in its container or job."""
    return int(min(len(os.sched_getaffinity(0)), quota_of_cores(root)))


def quota_of_cores(root: Path = Path("/")) -> float:
    """Return the time quota of the whole container or job in cores, rounded up; inf without a quota."""
    return min(_quotas(root), default=math.inf)


def _quotas(root: Path) -> Iterator[int]:
    for folder, version in groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:  # version 1 says -1 if there is no quota
                yield -(-quota // period)
