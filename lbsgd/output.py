"""Standard output, which may be closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lbsgd.errors import ConfigError
from lbsgd.units import harmless


class OutputError(Exception):
    """Standard output cannot be written to. This class is not an OSError, so that no caller blames a file."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written ({error.strerror or error})")

    def refusal(self) -> ConfigError:
        """Return the ConfigError that ends a command for this reason."""
        return ConfigError(str(self))


def hold_closed_streams() -> None:
    """Open /dev/null in the place of each standard stream that is closed; the next file opened would take it.

    A C library's warnings on stderr would go into that file, which may be the log or the data. Python prints the lines
    for a closed stderr on stdout; they go nowhere now. `sys.stdout` stays None, for `require_output`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def discard(descriptor: int) -> None:
    """Let what is written to a descriptor from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def require_output() -> None:
    """Raise ConfigError if standard output is closed: what a command says of its work would be lost."""
    if sys.stdout is None:
        raise ConfigError("standard output is closed; send it to a file, or to /dev/null")


@contextmanager
def blaming_the_output() -> Iterator[None]:
    """Raise OutputError in the place of an OSError, which callers would take for a file's. Inside, only print."""
    try:
        yield
    except OSError as error:
        raise OutputError(error) from error


def say(*lines: str) -> None:
    """Print lines at once. Raises OutputError.

    Control characters, such as in a name from an archive, cannot move the cursor or begin another line.
    """
    with blaming_the_output():
        print("\n".join(map(harmless, lines)), flush=True)
