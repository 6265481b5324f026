"""Chooses the files that `lbsgd check` looks at: those given by name, and the DeepSpeed JSONs of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lbsgd.config.checks.inspection import read_hjson
from lbsgd.config.checks.recognise import is_deepspeed_json, may_be_deepspeed_json
from lbsgd.config.json_file import RepeatedKeyError, read_json
from lbsgd.errors import ConfigError
from lbsgd.units import counted

NOT_ENTERED = frozenset({"node_modules", ".git", "__pycache__", "site-packages", ".tox", ".venv"})


@dataclass(frozen=True)
class Files:
    """The files to check, and the problems with others, one line each.

    empty          files without content in the folders, which need not be DeepSpeed's
    unread         lines on what cannot be read in the folders, which need not be DeepSpeed's either
    passed_over    the number of other JSONs in the folders
    """

    checked: tuple[str, ...]
    empty: tuple[str, ...]
    unread: tuple[str, ...]
    passed_over: int
    problems: tuple[str, ...] = ()

    def require_all(self) -> None:
        """Raise ConfigError if a given file or folder cannot be checked."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def files_of(given: Sequence[str]) -> Files:
    """Return the given files, and the DeepSpeed JSONs in and below the given folders.

    A problem is a file that cannot be read, or a folder without a DeepSpeed JSON. Raises ConfigError if nothing can be
    checked.
    """
    checked: list[str] = []
    empty: list[str] = []
    unread: list[str] = []
    others: list[str] = []
    problems: list[str] = []
    for name in given:
        if not name:
            raise ConfigError("lbsgd check: a name is empty; name a DeepSpeed JSON or a folder of them")
        if not os.path.isdir(name):  # Path.is_dir raises for a name that is too long
            problem = unreadable(name)
            (problems if problem else checked).append(problem or name)
            continue
        closed: list[OSError] = []
        below = sorted(str(path) for path in jsons_below(Path(name), closed))
        reasons = {path: reason_not_to_read(path) for path in below}
        lines = [f"{path} cannot be read ({reason})" for path, reason in reasons.items() if reason]
        lines += [f"{error.filename} cannot be read ({error.strerror})" for error in closed]
        found = [path for path in below if not reasons[path]]
        theirs = [path for path in found if is_theirs(Path(path))]
        if not theirs:
            held = f"{counted(len(found), 'JSON')}, and none is DeepSpeed's" if found else "no .json file"
            but = f"; {lines[0]}" if lines else ""
            problems.append(f"{name}: holds {held}{but}; name a DeepSpeed JSON, or a folder of them")
        unread += lines
        checked += theirs
        for path in sorted({*found} - {*theirs}):
            (empty if is_empty(Path(path)) else others).append(path)
    seen: set[str] = set()
    told = tuple(dict.fromkeys(unread))
    files = Files(once(checked, seen), once(empty, seen), told, len(once(others, seen)), tuple(problems))
    if not checked:
        files.require_all()
    return files


def once(names: Sequence[str], seen: set[str]) -> tuple[str, ...]:
    """Return the files not seen yet, each by its first name. A folder and a file in it may both be given."""
    first = []
    for name in names:
        place = os.path.realpath(name)
        if place not in seen:
            first.append(name)
        seen.add(place)
    return tuple(first)


def unreadable(name: str) -> str | None:
    """Return the problem if a given file does not exist or may not be read."""
    reason = reason_not_to_read(name)
    return f"{name}: cannot be read ({reason}); name a DeepSpeed JSON or a folder of them" if reason else None


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
