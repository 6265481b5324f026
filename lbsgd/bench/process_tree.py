"""End a process with all its descendants, in any session."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil


def descendants(leader: int) -> list[psutil.Process]:
    """Return the descendants of a living process; after its death they cannot be found."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(leader).children(recursive=True)
    return []


def end_family(leader: int, known: Sequence[psutil.Process] = ()) -> None:
    """Kill a process and its descendants. If it has ended already, kill the known ones and its process group."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(leader)
        process.suspend()  # it must start no more processes
        try:
            while living := [each for each in process.children(recursive=True) if is_alive(each)]:
                kill(living)
                time.sleep(0.01)
        finally:  # or the caller would wait for a suspended process forever
            process.kill()
    kill(known)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def kill(processes: Sequence[psutil.Process]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
