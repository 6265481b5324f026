"""A source's files in columns. A million tuples take 300 MB, a million rows of columns 60.

Names lie one after the other in a single piece of memory. They are sorted in runs, which are then merged, so only the
order itself takes memory that grows with the number of files.
"""

from __future__ import annotations

import heapq
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lbsgd.convert.left_out import LeftOut
from lbsgd.disk import appearing, parse_note

RUN = 50_000  # names sorted at a time
TYPES = {"sizes": "I", "offsets": "Q", "stamps": "q", "shards": "I", "labels": "i"}


class Member(NamedTuple):
    """Where a file's bytes are."""

    name: str  # within the container; class/name for a member of a tar in a tar
    offset: int  # of the first byte, in the shard; 0 for a file in a folder
    num_bytes: int
    shard: int = 0  # which of the container's files holds it


class Names(Sequence[str]):
    """Packed names. Like Python's file names, they may hold bytes that are not UTF-8."""

    def __init__(self, packed: Any = None, ends: Any = None) -> None:
        self.packed = bytearray() if packed is None else packed
        self.ends = array("Q") if ends is None else ends

    def append(self, name: str) -> None:
        self.packed += name.encode(errors="surrogateescape")
        self.ends.append(len(self.packed))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> str:
        return bytes(self.packed[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]).decode(
            errors="surrogateescape"
        )

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends:
            yield bytes(self.packed[start : int(end)]).decode(errors="surrogateescape")
            start = int(end)

    def of_rows(self, rows: np.ndarray) -> Names:
        """Return some of the names, in the order of the rows, without copying them."""
        return _SomeNames(self, rows)


class _SomeNames(Names):
    def __init__(self, names: Names, rows: np.ndarray) -> None:
        self.all, self.rows = names, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> str:
        return self.all[int(self.rows[index])]

    def __iter__(self) -> Iterator[str]:
        return (self.all[int(row)] for row in self.rows)


class Files:
    """Files in the order found: names, sizes in bytes, and any other columns they need.

    offsets: of the first byte in a shard. stamps: times of modification. shards: which file of the container.
    labels: the container's numbers of the classes. class_names: {number: name} of the classes with a name.
    """

    def __init__(self, *columns: str) -> None:
        self.names = Names()
        self.columns: dict[str, Any] = {name: array(TYPES[name]) for name in ("sizes", *columns)}
        self.class_names: dict[int, str] = {}
        self.left_out = LeftOut()

    def add(self, name: str, **values: int) -> None:
        """Add a file with a value for each column."""
        self.names.append(name)
        for column, value in values.items():
            self.columns[column].append(value)

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: Path) -> None:
        """Write the files atomically: a reader finds all of them or nothing."""
        notes = json.dumps([list(self.class_names.items()), self.left_out.counts, self.left_out.examples])
        columns: dict[str, Any] = {name: self.column(name) for name in self.columns}
        columns["names"] = np.asarray(self.names.packed, np.uint8)
        columns["ends"] = np.asarray(self.names.ends, np.uint64)
        columns["notes"] = np.frombuffer(notes.encode(), np.uint8)
        with appearing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **columns)

    @classmethod
    def load(cls, path: Path) -> Files:
        """Return saved files. Raises OSError, ValueError, EOFError, KeyError or BadZipFile if they cannot be read."""
        files = cls()
        with np.load(path, allow_pickle=False) as saved:
            files.names = Names(saved["names"], saved["ends"])
            files.columns = {name: saved[name] for name in saved.files if name in TYPES}
            class_names, files.left_out.counts, files.left_out.examples = parse_note(saved["notes"].tobytes())
            files.class_names = dict(class_names)
        return files

    def column(self, name: str) -> np.ndarray:
        """Return a column without copying it. If the files lack it, return zeros that take no memory."""
        if name in self.columns:
            return np.asarray(self.columns[name])
        return np.broadcast_to(np.zeros((), TYPES[name]), len(self))

    def taken(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return some rows of a column."""
        column = self.column(name)
        return column[rows] if name in self.columns else column[: len(rows)]

    def member(self, row: int) -> Member:
        offset, num_bytes, shard = (int(self.column(name)[row]) for name in ("offsets", "sizes", "shards"))
        return Member(self.names[row], offset, num_bytes, shard)

    def __iter__(self) -> Iterator[Member]:
        columns = (self.column(name).tolist() for name in ("offsets", "sizes", "shards"))
        return map(Member, self.names, *columns)


def sorted_rows(rows: np.ndarray, key: Callable[[int], Any]) -> Iterator[tuple[Any, int]]:
    """Yield (key, row) in the order of the keys."""
    runs = [np.array(sorted(rows[at : at + RUN].tolist(), key=key), np.uint32) for at in range(0, len(rows), RUN)]
    return heapq.merge(*(((key(int(row)), int(row)) for row in run) for run in runs))
