"""Format durations, sizes, counts, names and tables for people, and read the versions of packages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

NOT_INSTALLED = "lbsgd is not installed, so it has no version; run `pip install -e .`"


def clock(seconds: float, with_hours: bool = False) -> str:
    """Format a duration to the second, as a counter does: `2:05` or `1:02:05`, or `0:02:05` with_hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours or with_hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """Format a duration as an estimate: `45 s`, `12 min` or `3.2 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """Format a number of bytes in powers of 1,000: `12.3 MB` or `1.2 GB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def counted(number: int, noun: str) -> str:
    """Format a count: `1 error`, `2,000 errors`, `2 processes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural * (number != 1)}"


def shortened(names: Sequence[str], num_names: int | None = None) -> str:
    """Format a list: `a, b, c and 2 more`. num_names: how many there are, if only the first three are given."""
    more = (len(names) if num_names is None else num_names) - 3
    return ", ".join(names[:3]) + (f" and {more:,} more" if more > 0 else "")


def printable(text: str) -> str:
    """Replace by ? the characters that move a terminal's cursor or that no font and no encoding has."""
    return "".join(letter if is_shown(letter) else "?" for letter in text)


def harmless(line: str) -> str:
    """Replace by ? the characters of a line that move a terminal's cursor, line ends included.

    Bytes of file names that are not UTF-8 stay, because a stream writes them as escapes (`plain_letters.py`).
    """
    kept = (is_shown(letter) or "\udc80" <= letter <= "\udcff" for letter in line)
    return "".join(letter if keep else "?" for letter, keep in zip(line, kept, strict=True))


def is_shown(letter: str) -> bool:
    """Return whether a terminal shows a letter, and does nothing else. Spaces of all widths are shown."""
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, one line per row, without a final line break. Bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def installed(package: str) -> str | None:
    """Return a package's version from its metadata, without importing it; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # late, because it takes milliseconds

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(version: str | None) -> tuple[int, ...]:
    """Return a version's first two numbers, such as (2, 11) for 2.11.0+cu130; empty for None."""
    return tuple(map(int, re.findall(r"\d+", version or "")[:2]))
