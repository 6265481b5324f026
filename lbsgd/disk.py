"""Atomic file writes, JSON files, file locks, and the limit of open files."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lbsgd.errors import DataError

MOST_LEVELS = 100  # of nested blocks in any JSON
MOST_LINKS = 40  # that Linux follows to a file
HELD = errno.EACCES, errno.EAGAIN  # a lock's errors if another process has it; network file systems give either
NOTHING_THERE = errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP


def exists(path: Path) -> bool:
    """Return whether a path exists. Raises OSError where nobody can tell, for which pathlib says no since Python 3.14.

    So a folder that this user may not look into, or a disk that does not answer, is never taken for an empty one.
    """
    return mode_of(path) != 0


def is_dir(path: Path) -> bool:
    """Return whether a path is a folder. Raises OSError where nobody can tell."""
    return stat.S_ISDIR(mode_of(path))


def is_file(path: Path) -> bool:
    """Return whether a path is a file. Raises OSError where nobody can tell."""
    return stat.S_ISREG(mode_of(path))


def mode_of(path: Path) -> int:
    """Return `st_mode` of what the path leads to, 0 if nothing is there. Raises other OSErrors."""
    try:
        return path.stat().st_mode
    except ValueError:  # a name that no file can have
        return 0
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise
        return 0


def is_still_at(path: Path, file: IO) -> bool:
    """Return whether an open file is the one at a path, so that nobody has removed, moved or replaced it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def is_there(path: Path) -> bool:
    """Return whether a path exists. Raises DataError if this user may not look, or if the disk does not answer."""
    try:
        return exists(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def nearest(folder: Path, there: Callable[[Path], bool] = os.path.exists) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if there(place))


def to_disk(path: Path) -> None:
    """Flush a file from the page cache to the disk, or a folder's names, for example after a rename.

    Some file systems, such as a virtual machine's shared folder, do not flush names.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not is_dir(path):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; rename it to `path` once it is on the disk, or remove it after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically: it holds the old bytes or the new ones, whenever the process or the machine dies.

    Only one process at a time may write the file (`rewrite_file` allows several). A later call overwrites the
    temporary file of a killed one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError:  # a full disk, say, which must not keep half a file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_note(path: Path) -> Any:
    """Return a file's JSON. Raises OSError, and ValueError as `parse_note` does."""
    return parse_note(path.read_bytes())


def parse_note(text: str | bytes) -> Any:
    """Return a text's JSON. Raises ValueError if it is not JSON, or nested more deeply than any command writes.

    Python's json raises RecursionError for deep nesting, which no caller expects.
    """
    try:
        value = json.loads(text)
        require_shallow(value)
    except RecursionError:
        raise ValueError(f"nested in more than {MOST_LEVELS} levels") from None
    return value


def require_shallow(value: Any, levels: int = MOST_LEVELS) -> None:
    """Raise RecursionError if a JSON value has more levels, before a recursive walk through it fails."""
    if isinstance(value, (dict, list)):
        if not levels:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            require_shallow(inner, levels - 1)


def locked(file: IO | int, *, wait: bool) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    On a file system without locks every process gets True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in HELD
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock inside, waiting for other processes first. A file system without locks lets all in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def rewrite_file(path: Path, data: bytes, to_the_disk: bool = True) -> None:
    """Write a file that a user named atomically. It keeps its mode, and a symbolic link is followed.

    A stream is written into. Several processes may write at once; the last one wins. Without to_the_disk a machine
    that dies may lose the file.
    """
    if is_stream(path):
        write_into(path, data)
        return
    if is_dir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".lbsgd-{secrets.token_hex(8)}.tmp")  # no other process has this name
    write_new(temporary, data, like=path if exists(path) else None, to_the_disk=to_the_disk)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes, like: Path | None = None, to_the_disk: bool = True) -> None:
    """Write a file that is not there yet, with the mode of `like` or the usual one; leave nothing after an error.

    Raises FileExistsError if it is there: of several processes that write it at once, one does.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            if like is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(like.stat().st_mode))
            file.write(data)
            file.flush()
            if to_the_disk:
                os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def is_stream(path: Path) -> bool:
    """Return whether a path is a pipe, a device, or a name of an open file. Raises OSError where nobody can tell.

    An open file's name, such as /dev/stdout, is that of a stream even if the stream goes into a regular file.
    """
    return in_proc(path) is not None or mode_of(path) != 0 and not (is_file(path) or is_dir(path))


def in_proc(path: Path) -> Path | None:
    """Return the name in /proc that a path leads to, such as /proc/1234/fd/1 of /dev/stdout; None if to none."""
    for _ in range(MOST_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if path.parts[:2] == ("/", "proc"):
            return path
        if not os.path.islink(path):
            break
        path = path.parent / os.readlink(path)
    return None


def write_into(path: Path, data: bytes) -> None:
    """Write into a stream: a file that this process has open goes on where it stands."""
    place = in_proc(path)
    if place and place.parent == Path(os.path.realpath("/proc/self/fd")) and place.name.isdecimal():
        with open(os.dup(int(place.name)), "wb") as file:
            file.write(data)
    else:
        path.write_bytes(data)


def allow_open_files(needed: int) -> int | None:
    """Raise this process's limit of open files (1,024 on many systems) to `needed`, or as far as the system allows.

    Return None, or the system's limit if it is lower than `needed`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return None if allowed == needed else hard
