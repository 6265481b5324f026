"""Where the bytes of the images come from: memory, if the file fits there, else the disk, some batches ahead."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from lbsgd.errors import ConfigError

FITS = 0.8  # of the memory that is free for the page cache: the rest is left to what else runs
AHEAD_BYTES = 256 << 20
CHUNK = 64 << 20


@dataclass(frozen=True)
class Source:
    """How the file is read: `kind` is memory (read whole before training), page cache, or disk (read ahead in order)."""

    kind: str
    reason: str

    @classmethod
    def choose(cls, path: Path, in_memory: bool) -> Source:
        """By the sizes found. Raises ConfigError where in_memory is asked for and the file does not fit."""
        size, free = path.stat().st_size, psutil.virtual_memory().available
        sizes = f"{path.name} has {size / 1e9:.2f} GB, {free / 1e9:.1f} GB of memory are free"
        if in_memory and size > FITS * free:
            raise ConfigError(f"--in_memory: {sizes}; leave it out, or convert with a smaller --max_side")
        if in_memory:
            return cls("memory", sizes)
        return cls("page cache" if size <= FITS * free else "disk", sizes)


def read_whole(path: Path) -> None:
    """Fills the page cache with the file, which all processes of the host share."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while file.readinto(buffer):
            pass


class ReadAhead:
    """Asks the kernel for the images of an epoch in the order in which they will be decoded, AHEAD_BYTES at most before they are.

    The decoder faults in a page at a time and waits for each; the kernel reads many images at once when it knows of them.
    starts, sizes: where each image of the order lies in the file.
    """

    def __init__(self, path: Path, starts: np.ndarray, sizes: np.ndarray):
        self.file = open(path, "rb", buffering=0)
        self.starts, self.ends = starts, np.cumsum(sizes.astype(np.int64))
        self.sizes = sizes
        self.decoded, self.asked, self.changed = 0, 0, threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="lbsgd read ahead", daemon=True)
        self.thread.start()

    def advance(self, num_images: int) -> None:
        """The first num_images of the order are decoded."""
        with self.changed:
            self.decoded = num_images
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.asked < self.target())
                if self.closed:
                    return
                first, last = self.asked, self.target()
                self.asked = last
            for start, size in zip(self.starts[first:last].tolist(), self.sizes[first:last].tolist()):
                begin = start - start % mmap.PAGESIZE
                os.posix_fadvise(self.file.fileno(), begin, start + size - begin, os.POSIX_FADV_WILLNEED)

    def target(self) -> int:
        """How many images of the order may have been asked for."""
        done = self.ends[self.decoded - 1] if self.decoded else 0
        return int(np.searchsorted(self.ends, done + AHEAD_BYTES))

    def close(self) -> None:
        """Also a second time, as FFCV's iterator does when it is deleted."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
        self.file.close()
