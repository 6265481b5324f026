"""Types of flags: each turns the text of a flag into its value, or says what the flag takes instead.

Every command and recipe uses these, so that a number means the same everywhere.
"""

from __future__ import annotations

import math
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lbsgd.commands.help import Help
from lbsgd.errors import ConfigError

TakesFlags = ArgumentParser | _ArgumentGroup  # what takes flags
TOO_LARGE = 10**12  # above any count of images, iterations or seconds: a typing mistake
NAMES = {"settings": "--set", "source": "--from", "library": "--for", "files": "FILE"}  # flags by their `dest`


class OneLineParser(ArgumentParser):
    """A parser that refuses a wrong flag in one line, and whose help is laid out by `Help`."""

    def __init__(self, *, formatter_class: Any = Help, **given: Any) -> None:
        super().__init__(formatter_class=formatter_class, **given)

    def error(self, message: str) -> NoReturn:
        """Refuse a flag in one line, like every other error."""
        self.exit(2, f"error: {message}; --help lists the flags\n")


def reword(flags: ArgumentParser, words: Mapping[str, str | None]) -> None:
    """Give flags, by their `dest`, other words in --help; None leaves out a flag that the command refuses."""
    for action in flags._actions:
        if action.dest in words:
            action.help = words[action.dest] or SUPPRESS
    groups = flags._mutually_exclusive_groups  # argparse cannot print the usage of one without a word of help
    groups[:] = [group for group in groups if any(action.help != SUPPRESS for action in group._group_actions)]


def positive(text: str) -> int:
    """A whole number of at least 1, below 10^12, in decimal digits."""
    return whole_from(text, 1)


def seconds(text: str) -> int:
    """A whole number of seconds, of at least 1 and below 10^9: torch counts nanoseconds in 64 bits."""
    number = positive(text)
    if number >= 10**9:
        raise ArgumentTypeError(f"{text!r} is too large: give fewer than 10^9 seconds, which are 31 years")
    return number


def natural(text: str) -> int:
    """A whole number of at least 0, below 10^12, in decimal digits."""
    return whole_from(text, 0)


def whole_from(text: str, least: int) -> int:
    number = whole_number(text)
    if number is None or number < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    if number >= TOO_LARGE:
        raise ArgumentTypeError(f"{text!r} is too large: give a whole number below 10^12")
    return number


def quantity(text: str) -> float:
    """A number above 0, between 10^-12 and 10^12."""
    number = above_zero(text)
    if number is None:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    if not 1 / TOO_LARGE < number < TOO_LARGE:
        raise ArgumentTypeError(f"{text!r} is too large or too small: give a number between 10^-12 and 10^12")
    return number


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    number = finite(text)
    if number is None or number < 0:
        raise ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = finite(text)
    if number is None or not 0 <= number <= 1:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def interval(text: str) -> tuple[int | None, float | None]:
    """Iterations and minutes, one of them None: `50` means 50 iterations, `10m` means 10 minutes."""
    if (whole_number(text) or 0) > 0:
        return positive(text), None
    minutes = above_zero(text.removesuffix("m")) if text.endswith("m") else None
    if minutes is None:
        raise ArgumentTypeError(f"{text!r} is neither a number of iterations, such as 50, nor of minutes, such as 10m")
    return None, minutes


def named(text: str) -> str:
    """The name of a file or a folder. An empty name is refused: it would be the current folder, or none."""
    if not text:
        raise ArgumentTypeError("'' is no name of a file or a folder; such is a variable that nobody has set")
    return text


def path(text: str) -> Path:
    return Path(named(text))


def whole_number(text: str) -> int | None:
    """The number written in decimal digits; None for any other text, such as `+1`, `1_000` and `²`.

    Only the first 30 digits are read, because Python refuses more than 4,300.
    """
    return int(text.lstrip("0")[:30] or 0) if text.isascii() and text.isdecimal() else None


def above_zero(text: str) -> float | None:
    number = finite(text)
    return number if number is not None and number > 0 else None


def finite(text: str) -> float | None:
    """The number that a text holds; None for any other text, such as `1_000` and `²`, and for NaN and infinity."""
    try:
        number = float(text if text.isascii() and "_" not in text else "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def add_settings(flags: TakesFlags) -> None:
    """Add `--set KEY=VALUE`, which several commands take; the values arrive as `settings`."""
    text = "any key of the JSON, such as lbsgd.warmup.epochs=2; null deletes it; what depends on it is derived again"
    flags.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help=text)


def require_alone(given: Namespace, flag: str, beside: tuple[str, ...] = ()) -> None:
    """Raise ConfigError if other flags are given than this one and those in `beside`."""
    values = {NAMES.get(name, f"--{name}"): value for name, value in vars(given).items() if name != "run"}
    said = [name for name, value in values.items() if value is not None and value is not False and value != []]
    unread = [name for name in said if name not in (flag, *beside)]
    if unread:
        raise ConfigError(f"{flag} does not take {', '.join(unread)}; leave {flag} or the others out")
