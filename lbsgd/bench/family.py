"""Ends a process with all that it has started, in whatever session that runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil


def descendants(leader: int) -> list[psutil.Process]:
    """Return what a process has started, and what that has, while the process lives: later nobody knows."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(leader).children(recursive=True)
    return []


def end_family(leader: int, known: Sequence[psutil.Process] = ()) -> None:
    """Kill a process and its descendants; if it has ended by itself, the known ones and the process group it led."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(leader)
        process.suspend()  # so that it starts nothing more
        try:
            while living := [each for each in process.children(recursive=True) if is_alive(each)]:
                kill(living)
                time.sleep(0.01)
        finally:  # a stopped process would be waited for without end
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
