"""The memory that this process may still fill: the host's, or less within a container or a Slurm job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from lbsgd.processes.control_groups import groups

# By version of control groups: the file with a group's limit, and the entries of memory.stat that cannot be dropped.
FILES = {1: ("memory.limit_in_bytes", ("total_rss", "total_shmem")), 2: ("memory.max", ("anon", "shmem"))}


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free or hold files that can be read again. root: the parent of /proc and /sys."""
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group that holds this process and has a limit."""
    for folder, version in groups("memory", root):
        limit, kept = FILES[version]
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            most = int((folder / limit).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            yield most - sum(int(number) for name, number in map(str.split, lines) if name in kept)
