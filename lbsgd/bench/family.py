"""Ends a process with all that it has started, in whatever session that runs."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil


def end_family(leader: int) -> None:
    """Kill a process and its descendants; if it has ended by itself, what is left of the process group that it led."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(leader)
        process.suspend()  # so that it starts nothing more
        while living := [each for each in process.children(recursive=True) if is_alive(each)]:
            for each in living:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            time.sleep(0.01)
        process.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
