"""Files that are whole or not there, whatever dies, and JSON in them; how many may be open; and the output."""

import contextlib
import fcntl
import json
import os
import resource
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lbsgd.errors import ConfigError, DataError

MOST_LEVELS = 100  # of blocks inside each other, of any JSON


def is_there(path: Path) -> bool:
    """Return whether a path exists. Raises DataError where this user may not look, or the disk does not answer."""
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def to_disk(path: Path) -> None:
    """Force a file, or the names in a folder such as one that a rename has just given, out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OutputError(Exception):
    """Standard output takes no more; the cause is its OSError.

    This is no OSError, so that no caller blames a file for it.
    """

    def refusal(self) -> ConfigError:
        """Return it as the error that ends a command."""
        reason = self.__cause__.strerror if isinstance(self.__cause__, OSError) else self
        return ConfigError(f"the output cannot be written ({reason})")


def require_output() -> None:
    """Raise ConfigError where the caller has closed standard output: the next file opened would take its place."""
    if sys.stdout is None:
        raise ConfigError("standard output is closed; send it to a file, or to /dev/null")


def say(line: str) -> None:
    """Print a line at once. Raises OutputError, where an OSError would be taken for one of a file."""
    try:
        print(line, flush=True)
    except OSError as error:
        raise OutputError(str(error)) from error


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give the place to write a file that gets its name when it is whole and on the disk; else nothing stays."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file: it holds the old bytes or the new ones, whenever the process or the machine dies.

    One process at a time may write it (`rewrite_file`, several): a later call overwrites what a killed one has left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError:  # a full disk, say, which must not keep the half
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_note(path: Path) -> Any:
    """Return the JSON that a file holds. Raises OSError, and ValueError as `parse_note`."""
    return parse_note(path.read_bytes())


def parse_note(text: str | bytes) -> Any:
    """Return the JSON that a text holds. Raises ValueError where it holds none, or one that no command writes.

    Python's own json raises RecursionError, which no reader expects, for one that is nested deeply.
    """
    try:
        value = json.loads(text)
        require_shallow(value)
    except RecursionError:
        raise ValueError(f"nested in more than {MOST_LEVELS} levels") from None
    return value


def require_shallow(value: Any, levels: int = MOST_LEVELS) -> None:
    """Raise RecursionError for a JSON value of more levels, in which a walk through it may end so."""
    if isinstance(value, (dict, list)):
        if not levels:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            require_shallow(inner, levels - 1)


def locked(file: IO | int, *, wait: bool) -> bool:
    """Take the lock of an open file, which lasts until it is closed; return False where another process has it.

    A file system without locks lets all in.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process that asks for this folder is in it. A file system without locks lets all in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def rewrite_file(path: Path, data: bytes, like: Path | None = None, to_the_disk: bool = True) -> None:
    """Write a whole file that a user named: the one behind a symbolic link, and with the mode that it has.

    A new file gets the mode of `like`, or the usual one. What is no file, such as /dev/stdout, is written into.
    Several processes may write it at once: one of them is the last. Without to_the_disk a dying machine may lose it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    model = path if path.exists() else like
    temporary = path.with_name(f".lbsgd-{secrets.token_hex(8)}.tmp")  # nobody else's
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if model is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(model.stat().st_mode))
            file.write(data)
            file.flush()
            if to_the_disk:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def allow_open_files(needed: int) -> int | None:
    """Raise this process's limit of open files, on many systems 1,024, to `needed`.

    Return the most that the system allows if that is fewer, else None.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    if hard != resource.RLIM_INFINITY and hard < needed:
        return hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return None
