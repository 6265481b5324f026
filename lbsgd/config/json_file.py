"""Read JSON files strictly, and write them for people to read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lbsgd.config.json_layout import with_values
from lbsgd.config.keypath import shown
from lbsgd.disk import is_file, require_shallow, rewrite_file, write_new
from lbsgd.errors import ConfigError

INSTEAD = "give a DeepSpeed JSON such as ds_configs/8k.json"
WIDTH = 127  # of the lines in the shipped files


class RepeatedKeyError(ConfigError):
    """A JSON object has the same key twice, so it is unclear which value counts."""


class NumberError(Exception):
    """A token that stands for a number in a JSON cannot be read as one."""

    def __init__(self, token: str, problem: str):
        super().__init__(problem)
        self.token = token


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file, read strictly. Raises ConfigError as `read_text` and `parse_json` do."""
    return parse_json(path, read_text(path))


def read_text(path: str | Path) -> str:
    """Return a file's text, with its own line ends. Raises ConfigError if the file cannot be read."""
    try:
        return text_of(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); {INSTEAD}"
    except UnicodeDecodeError:
        problem = f"is not text in UTF-8; save it so, or {INSTEAD}"
    raise ConfigError(f"{path}: {problem}")


def parse_json(path: str | Path, text: str) -> dict[str, Any]:
    """Return the JSON object in a file's text, read strictly.

    Raises ConfigError, with line and column if known, if the text is no strict JSON object, and RepeatedKeyError if an
    object has a key twice.
    """
    try:
        return strict_object(text)
    except json.JSONDecodeError as error:
        problem = (
            f"is no strict JSON in line {error.lineno}, column {error.colno} ({error.msg}); "
            "correct it: strict JSON has no comments and no trailing commas"
        )
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None
    raise ConfigError(f"{path}: {problem}")


def text_of(path: str | Path) -> str:
    """Return a file's text. A pipe is read once and its text kept. Raises OSError and UnicodeDecodeError."""
    if is_file(Path(path)):
        return Path(path).read_bytes().decode()
    return text_of_pipe(str(path), os.stat(path).st_ino)


@cache
def text_of_pipe(path: str, inode: int) -> str:
    """Return a pipe's text, cached. The inode is part of the key because a later pipe may have the same path."""
    return Path(path).read_bytes().decode()


def strict_object(text: str) -> dict[str, Any]:
    """Return a text's JSON object. Raises ConfigError or json's own errors if it is not strict JSON."""
    if not text.strip():
        raise ConfigError(f"is empty; {INSTEAD}")
    if text.startswith("\ufeff"):
        raise ConfigError("begins with a byte order mark, which strict JSON does not have; save it without one")
    try:
        value = json.loads(
            text,
            object_pairs_hook=without_repetition,
            parse_constant=refuse_constant,
            parse_float=finite,
            parse_int=whole,
        )
        require_shallow(value)
    except RecursionError:
        raise ConfigError(f"is nested too deeply to be a DeepSpeed JSON; {INSTEAD}") from None
    except NumberError as error:
        raise ConfigError(f"has in line {line_of(error.token, text)} {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"holds no JSON object; {INSTEAD}")
    return value


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict. Raises RepeatedKeyError if a key comes twice."""
    keys = [key for key, _ in pairs]
    repeated = sorted(key for key in set(keys) if keys.count(key) > 1)
    if repeated:
        raise RepeatedKeyError(f"has the key {shown(repeated[0])} twice; keep one")
    return dict(pairs)


def refuse_constant(name: str) -> None:
    """Raise NumberError for NaN, Infinity or -Infinity, which Python's json would accept."""
    raise NumberError(name, f"{name}, which is no strict JSON; write a number")


def finite(digits: str) -> float:
    """Parse a number with a fraction or an exponent. Raises NumberError if it exceeds floats, such as 1e999."""
    number = float(digits)
    if not math.isfinite(number):
        raise NumberError(digits, f"{digits[:36]}, which is too large for a number; write a smaller one")
    return number


def whole(digits: str) -> int:
    """Parse a whole number. Raises NumberError if it has more digits than Python reads."""
    try:
        return int(digits)
    except ValueError:
        raise NumberError(digits, f"a whole number of {len(digits)} digits; write a smaller one") from None


def line_of(token: str, text: str) -> int:
    """Return the number of the first line that contains a token outside of strings."""
    places = re.finditer(rf'"(?:\\.|[^"\\])*"|({re.escape(token)})', text)
    return text.count("\n", 0, next(place.start() for place in places if place[1])) + 1


def format_json(value: Any, indent: str = "", used: int = 0, ascii_only: bool = True) -> str:
    """Format JSON as in ds_configs: a block of plain values on one line if it fits, else one line per key.

    used is the number of characters before the value on its line. With ascii_only all other letters are escaped,
    because not every terminal has them.
    """
    inline = json.dumps(value, ensure_ascii=ascii_only)
    flat = isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values())
    if not isinstance(value, dict) or not value or (flat and indent and used + len(inline) < WIDTH):
        return inline
    inner = indent + "  "
    names = {key: f"{inner}{json.dumps(key, ensure_ascii=ascii_only)}: " for key in value}
    lines = [names[key] + format_json(item, inner, len(names[key]), ascii_only) for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def keep_original(path: str | Path, content: bytes) -> Path:
    """Write a file's content to FILE.orig, or to FILE.orig.2 and so on if that exists, and return that path.

    content: what was read from the file, which another process may have changed since. Raises ConfigError if the copy
    cannot be written.
    """
    copied, number = Path(f"{path}.orig"), 1
    while True:
        try:
            write_new(copied, content, like=Path(path))
            return copied
        except FileExistsError:
            number += 1
            copied = Path(f"{path}.orig.{number}")
        except OSError as error:
            raise ConfigError(f"{copied}: cannot be written ({error.strerror}); nothing was changed") from None


def text_written(config: Mapping[str, Any]) -> bytes:
    """Return a JSON as `write_json` writes it; a lone surrogate, which UTF-8 cannot encode, stays a JSON escape."""
    return (format_json(config, ascii_only=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: str | Path, config: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, in UTF-8. Raises ConfigError if it cannot be written."""
    write_bytes(path, text_written(config))


def write_values(path: str | Path, text: str, config: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: its text with other values, in the same layout. Raises as `write_json` does."""
    write_bytes(path, with_values(text, config).encode("utf-8", "backslashreplace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically. Raises ConfigError if it cannot be written."""
    try:
        rewrite_file(Path(path), data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
