"""How far runs are, from their growing logs. A log is read again only if it has changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lbsgd.report.run_log import LOG_NAME

EPOCH, RESULT = b'{"kind": "epoch"', b'{"kind": "result"'  # how `RunLog` begins these lines


class Seen(NamedTuple):
    """How many epochs a log has, and whether it has a result."""

    epochs: int = 0
    has_result: bool = False


class Watch:
    """The logs of runs by folder, as they were when last read."""

    def __init__(self) -> None:
        self.seen: dict[Path, tuple[tuple[int, ...], Seen]] = {}  # each with inode, size and time of modification

    def look(self, folder: Path) -> Seen:
        """Return what a run's log has now; nothing if it does not exist or cannot be read."""
        log = folder / LOG_NAME
        try:
            status = os.stat(log)
            stamp = status.st_ino, status.st_size, status.st_mtime_ns
            if folder not in self.seen or self.seen[folder][0] != stamp:
                content = log.read_bytes()
                self.seen[folder] = stamp, Seen(content.count(EPOCH), RESULT in content)
            return self.seen[folder][1]
        except OSError:
            return Seen()
