"""Standard output whose reader may stop reading, as `head` does."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lbsgd.output import discard


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Discard output once its reader has left, so that a command still ends with its own exit code.

    This is for commands that only print, or print last.
    """
    output = sys.stdout
    raw = getattr(getattr(output, "buffer", None), "raw", None) or getattr(output, "buffer", None)
    if not isinstance(output, io.TextIOWrapper) or not isinstance(raw, io.FileIO):  # closed, or a notebook's
        yield
        return
    output.flush()
    pipe = io.BufferedWriter(_Pipe(raw.fileno(), "wb", closefd=False))
    sys.stdout = io.TextIOWrapper(
        pipe,
        output.encoding,
        output.errors,
        line_buffering=output.line_buffering,
        write_through=output.write_through,
    )
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    finally:
        sys.stdout = output


class _Pipe(io.FileIO):
    """A file that discards what is written once its reader has left, or once writing has failed.

    After a failure Python writes the same again when it frees the stream, and 3.14 would print that failure, too.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            discard(self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            return super().write(data)
