"""The memory that this process may still fill: the host's, or less within a container or a job of Slurm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

# By version of control groups: the file of a group's limit, and what of its memory.stat the kernel cannot drop.
VERSION_1 = ("memory.limit_in_bytes", ("total_rss", "total_shmem"))
VERSION_2 = ("memory.max", ("anon", "shmem"))


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free, or hold files that can be read again. root: of the host's /proc and /sys."""
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group that holds this process and has a limit: its own, and those above."""
    for group, (limit, kept) in _groups(root):
        for place in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                most = int((place / limit).read_text())
                lines = (place / "memory.stat").read_text().splitlines()
                yield most - sum(int(number) for name, number in map(str.split, lines) if name in kept)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, tuple[str, ...]]]]:
    """Yield the folder of this process's group and its version. Containers may hide it, but not those above."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                yield root / "sys/fs/cgroup" / group.strip("/"), VERSION_2
            elif "memory" in controllers.split(","):
                yield root / "sys/fs/cgroup/memory" / group.strip("/"), VERSION_1
