"""Share files between the processes of a host and its later starts: surveys of tables, orders, compiled code.

Each file can be made again at any time. So a file that is missing, damaged or of another version is replaced, and
without a usable folder each process makes its own copy in memory. The files are in TMPDIR/lbsgd-UID, which must belong
to this user alone, because it holds compiled code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lbsgd.data.mapped import mapped
from lbsgd.disk import exists, locked, nearest
from lbsgd.errors import ConfigError

HEAD = np.dtype([("magic", "S8"), ("checksum", "<u4"), ("unused", "V4"), ("num_bytes", "<u8"), ("reserved", "V40")])
MAGIC = b"lbsgd-h1"
# The number of files of each kind to keep. An order of 14 million images has 56 MB. A file that is unlinked stays valid
# in processes that have mapped it.
KEPT = {"order": 2, "tables": 64, "sizes": 4, "code": 64}
TORCHS_CODE = "TORCHINDUCTOR_CACHE_DIR"  # the variable that says where torch.compile keeps its code
TRITONS_CODE = ("TRITON_CACHE_DIR", "TRITON_HOME")  # the same for Triton, whose own place is below the home folder


def key_of(*parts: object) -> str:
    """Return a short name for plain values, which repr must show in full."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def folder() -> Path | None:
    """Return this user's folder; None if it cannot be made, or if others can write to it."""
    path = Path(tempfile.gettempdir()) / f"lbsgd-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        about = path.lstat()
    except OSError:
        return None
    trusted = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
    return path if trusted else None


def keep_torchs_code(compiles: bool) -> None:
    """Let torch.compile keep its code in this user's folder. Call this before torchvision is imported.

    torch's own place is TMPDIR/torchinductor_NAME. Anybody may have made that folder, and torch unpickles its files.
    Raises ConfigError if the run compiles and this user's folder cannot be used, or is unfit for code.
    """
    if TORCHS_CODE in os.environ:
        return
    if place := folder():
        if compiles and (why := unfit_for_code(place)):
            raise ConfigError(
                f"--compile: {place} {why}; set TMPDIR or {TORCHS_CODE} to a folder of your own elsewhere"
            )
        os.environ[TORCHS_CODE] = str(place / "torchinductor")
    elif compiles:
        raise ConfigError(
            f"--compile: {tempfile.gettempdir()}/lbsgd-{os.getuid()} is not a folder of this user alone, and code from "
            f"it cannot be trusted; remove it, or set TMPDIR or {TORCHS_CODE} to a folder of your own"
        )


def unfit_for_code(place: Path) -> str:
    """Return why torch.compile cannot keep its code in a folder, "" if it can."""
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        return "lies on a file system that is mounted noexec, from which no code may be run"
    return "has a space in its name, with which torch does not call the compiler" if " " in str(place) else ""


def keep_tritons_code() -> None:
    """Let Triton keep its kernels in this user's folder if the home folder cannot be written.

    So it is in a container (`docker run --user 1000` sets HOME=/), and Triton would end with a PermissionError.
    """
    home = Path(os.path.expanduser("~/.triton/cache"))
    usable = home.is_absolute() and os.access(
        nearest(home), os.W_OK
    )  # not absolute: nothing tells where the home folder is
    if not usable and not any(name in os.environ for name in TRITONS_CODE) and (place := folder()):
        os.environ[TRITONS_CODE[0]] = str(place / "triton")


def shared(kind: str, key: str, make: Callable[[], bytes | np.ndarray]) -> np.ndarray:
    """Return make()'s bytes, as uint8. One process of the host makes them, and all map them.

    kind is one of KEPT, and key names everything that the bytes depend on.
    """
    found = read(kind, key)
    if found is not None:
        return found
    with _one_at_a_time(kind):
        found = read(kind, key)  # another process may have made the file while this one waited
        if found is not None:
            return found
        made = make()
        write(kind, key, made)
    found = read(kind, key)
    return np.frombuffer(made, np.uint8) if found is None else found


def read(kind: str, key: str) -> np.ndarray | None:
    """Map a file; None if it is missing or damaged."""
    place = folder()
    if place is None:
        return None
    try:
        content = mapped(place / f"{kind}-{key}", "remove it, and it is made again")
    except (OSError, ValueError):  # missing, or empty
        return None
    if len(content) < HEAD.itemsize:
        return None
    head, content = content[: HEAD.itemsize].view(HEAD)[0], content[HEAD.itemsize :]
    whole = (
        head["magic"] == MAGIC and head["num_bytes"] == len(content) and zlib.crc32(content.data) == head["checksum"]
    )
    return content if whole else None


def write(kind: str, key: str, content: bytes | np.ndarray) -> None:
    """Write a file atomically. Do nothing if there is no room for it."""
    place = folder()
    if place is None:
        return
    view = memoryview(content.data if isinstance(content, np.ndarray) else content).cast("B")
    head = np.zeros(1, HEAD)
    head["magic"], head["checksum"], head["num_bytes"] = MAGIC, zlib.crc32(view), len(view)
    temporary = place / f".{kind}-{key}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(head.tobytes())
            file.write(view)
        os.replace(temporary, place / f"{kind}-{key}")
        _remove_oldest(place, kind)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_oldest(place: Path, kind: str) -> None:
    """Remove all but the newest files of a kind, and the unfinished files of killed processes."""
    files = sorted(place.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime)
    for path in files[: -KEPT[kind]]:
        path.unlink(missing_ok=True)
    for path in place.glob(f".{kind}-*"):
        if not exists(Path("/proc", path.suffix[1:])):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(kind: str) -> Iterator[None]:
    """Let only one process of the host at a time make files of a kind; if it dies, the next one may."""
    place = folder()
    if place is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a lock, such as on a full disk, all make it
            locked(stack.enter_context(open(place / f"{kind}.lock", "wb")), wait=True)
        yield
