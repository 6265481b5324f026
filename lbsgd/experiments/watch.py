"""How far runs are, from logs that grow: each look reads only what is new."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lbsgd.report.run_log import LOG_NAME

EPOCH, RESULT = b'{"kind": "epoch"', b'{"kind": "result"'  # as `RunLog` begins their lines


@dataclass
class Seen:
    """The part of a log that has been read: its whole lines up to `read` bytes."""

    file: tuple[int, int] = (0, 0)  # device and inode: a run that goes on has a file of its own
    read: int = 0
    stamp: tuple[int, int] = (0, 0)  # size and time of modification
    epochs: int = 0
    has_result: bool = False


class Watch:
    """The logs of runs by their folders, as they were at the last look."""

    def __init__(self) -> None:
        self.seen: dict[Path, Seen] = {}

    def look(self, folder: Path) -> Seen:
        """Return what a run's log has now; nothing where it is not there or cannot be read."""
        try:
            with open(folder / LOG_NAME, "rb") as log:
                status = os.fstat(log.fileno())
                seen = self.seen.get(folder)
                file, stamp = (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)
                if seen is None or seen.file != file or status.st_size < seen.read:
                    seen = self.seen[folder] = Seen(file)
                if seen.stamp != stamp:
                    log.seek(seen.read)
                    self.count(seen, log.read())
                    seen.stamp = stamp
                return seen
        except OSError:
            return Seen()

    def count(self, seen: Seen, new: bytes) -> None:
        """Count the whole lines; half of one is read again at the next look."""
        *lines, half = new.split(b"\n")
        seen.read += len(new) - len(half)
        seen.epochs += sum(line.startswith(EPOCH) for line in lines)
        seen.has_result = seen.has_result or any(line.startswith(RESULT) for line in lines)
