"""Chooses the files that `lbsgd check` looks at: those given by name, and the DeepSpeed JSONs of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lbsgd.config.checks.inspection import read_hjson
from lbsgd.config.checks.recognise import is_deepspeed_json, may_be_deepspeed_json
from lbsgd.config.json_file import RepeatedKeyError, read_json
from lbsgd.disk import is_stream
from lbsgd.errors import ConfigError
from lbsgd.units import counted

NOT_ENTERED = frozenset({"node_modules", ".git", "__pycache__", "site-packages", ".tox", ".venv"})


@dataclass(frozen=True)
class Files:
    """The files under the given names, and lines on what cannot be checked.

    checked        the files to check
    empty          files without content in the folders, which need not be DeepSpeed's
    others         other JSONs in the folders
    unread         lines on what cannot be read in the folders, which need not be DeepSpeed's either
    problems       lines on given files and folders that cannot be checked
    """

    checked: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def require_all(self) -> None:
        """Raise ConfigError if a given file or folder cannot be checked."""
        if self.problems:
            raise ConfigError(*self.problems)

    def require_correctable(self) -> None:
        """Raise ConfigError if a given file or folder cannot be checked, or is a stream."""
        self.require_all()
        if streams := [name for name in self.checked if is_stream(Path(name))]:
            raise ConfigError(f"{streams[0]}: --fix cannot correct a pipe or standard input; name a file")


def files_of(given: Sequence[str]) -> Files:
    """Return the given files, and the DeepSpeed JSONs in and below the given folders.

    A problem is a file that cannot be read, or a folder without a DeepSpeed JSON. Raises ConfigError if nothing can be
    checked.
    """
    if not all(given):
        raise ConfigError("lbsgd check: a name is empty; name a DeepSpeed JSON or a folder of them")
    # os.path.isdir, because Path.is_dir raises for a name that is too long
    found = [in_folder(name) if os.path.isdir(name) else by_name(name) for name in given]
    seen: set[str] = set()
    files = Files(
        checked=once((name for each in found for name in each.checked), seen),
        empty=once((name for each in found for name in each.empty), seen),
        others=once((name for each in found for name in each.others), seen),
        unread=tuple(dict.fromkeys(line for each in found for line in each.unread)),
        problems=tuple(line for each in found for line in each.problems),
    )
    if not files.checked:
        files.require_all()
    return files


def by_name(name: str) -> Files:
    """Return a file that was given by its name."""
    reason = reason_not_to_read(name)
    if reason:
        return Files(problems=(f"{name}: cannot be read ({reason}); name a DeepSpeed JSON or a folder of them",))
    return Files(checked=(name,))


def in_folder(name: str) -> Files:
    """Return the JSONs in and below a folder. A folder without one of DeepSpeed's is a problem."""
    closed: list[OSError] = []
    reasons = {str(path): reason_not_to_read(str(path)) for path in jsons_below(Path(name), closed)}
    unread = [f"{path} cannot be read ({reason})" for path, reason in sorted(reasons.items()) if reason]
    unread += [f"{error.filename} cannot be read ({error.strerror})" for error in closed]
    readable = sorted(path for path, reason in reasons.items() if not reason)
    theirs = [path for path in readable if is_theirs(Path(path))]
    rest = sorted({*readable} - {*theirs})
    empty = [path for path in rest if is_empty(Path(path))]
    others = sorted({*rest} - {*empty})
    problems = []
    if not theirs:
        held = f"{counted(len(readable), 'JSON')}, and none is DeepSpeed's" if readable else "no .json file"
        but = f"; {unread[0]}" if unread else ""
        problems.append(f"{name}: holds {held}{but}; name a DeepSpeed JSON, or a folder of them")
    return Files(tuple(theirs), tuple(empty), tuple(others), tuple(unread), tuple(problems))


def once(names: Iterable[str], seen: set[str]) -> tuple[str, ...]:
    """Return the files not seen yet, each by its first name. A folder and a file in it may both be given."""
    first = []
    for name in names:
        place = os.path.realpath(name)
        if place not in seen:
            first.append(name)
        seen.add(place)
    return tuple(first)


def reason_not_to_read(name: str) -> str | None:
    """Return why a file cannot be read, None if it can. The file is not opened: it may be a pipe."""
    try:
        os.stat(name)
    except OSError as error:
        return error.strerror
    may_read = os.access(name, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if may_read else os.strerror(errno.EACCES)


def jsons_below(folder: Path, closed: list[OSError]) -> Iterator[Path]:
    """Yield the .json files in and below a folder, except in folders of package managers, git and Python.

    Pipes and devices are left out, because opening one may wait forever. Folders that cannot be read go into `closed`.
    """
    for path, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if name not in NOT_ENTERED and not is_environment(Path(path) / name)]
        yield from (Path(path) / name for name in names if name.endswith(".json") and os.path.isfile(Path(path) / name))


def is_environment(folder: Path) -> bool:
    """Whether a folder is a virtual environment."""
    return os.path.isfile(folder / "pyvenv.cfg")


def is_theirs(path: Path) -> bool:
    """Whether a file in a folder is a DeepSpeed JSON, even a broken one."""
    try:
        return is_deepspeed_json(read_json(path))
    except ConfigError as error:
        repeated = isinstance(error, RepeatedKeyError)
    with contextlib.suppress(RepeatedKeyError):
        config = None if repeated else read_hjson(str(path))
        if config is not None:
            return is_deepspeed_json(config)
    try:
        content = path.read_bytes()
    except OSError:
        return False
    text = content.replace(b"\0", b"").decode(errors="replace")  # UTF-16, which Windows may write, has zeros between
    return may_be_deepspeed_json(text)


def is_empty(path: Path) -> bool:
    """Whether a file holds only white space, as a placeholder does."""
    try:
        return not path.read_bytes().strip()
    except OSError:
        return False
