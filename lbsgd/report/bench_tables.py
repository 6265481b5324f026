"""The tables of a bench on a GPU (tools/bench_gpu.py), from the JSON that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbsgd.disk import read_note
from lbsgd.errors import ConfigError
from lbsgd.units import markdown_table

PART: dict[str, Any] = {"name": str, "title": str, "state": str, "why": str | None, "figures": list, "notes": list}
END = int | float | None
FIGURE: dict[str, Any] = {
    **dict.fromkeys(("name", "unit", "verdict", "beside"), str),
    **{"value": int | float, "low": END, "high": END, "goal": str | None, "count": int},
}
HEADS = ("what", "measured [95 %]", "goal", "", "of", "beside")


def value_words(value: float, low: float | None, high: float | None, unit: str) -> str:
    """Return a measured value with its unit, and its interval if it has one."""
    after = f" {unit}" if unit else ""
    return f"{value:.4g}{after}" if low is None else f"{value:.3f}{after} [{low:.3f}, {high:.3f}]"


def interval_words(figure: Mapping[str, Any]) -> str:
    """Return the value of a figure of the JSON, and its interval if it has one, without its unit."""
    return value_words(figure["value"], figure["low"], figure["high"], "")


def figures_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of a bench's JSON as a Markdown table."""
    rows = [
        (
            each["name"],
            value_words(each["value"], each["low"], each["high"], each["unit"]),
            each["goal"] or "",
            each["verdict"],
            str(each["count"]),
            each["beside"],
        )
        for each in figures
    ]
    return markdown_table(HEADS, rows)


def bench_tables(path: Path, wanted: Sequence[str]) -> list[str]:
    """Return the wanted parts, by default all: title, what went wrong, the table of the figures, notes.

    Raises ConfigError if the file was not written by a bench, or lacks a wanted part.
    """
    try:
        found = read_note(path)
        parts = {part["name"]: part for part in found["parts"]}
        about = f"{found['device']}, {[*found['started'].split(), ''][0]}"
        for part in parts.values():
            require_types(part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: holds no results of tools/bench_gpu.py ({error})") from None
    if missing := [name for name in wanted if name not in parts]:
        raise ConfigError(f"{path}: has no part {', '.join(missing)}; it has {', '.join(parts)}")
    return [part_table(parts[name], about) for name in wanted or parts]


def require_types(part: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError if a part, or one of its figures, lacks a value that its table shows."""
    parts = [(part, PART), *((figure, FIGURE) for figure in part["figures"])]
    for block, types in parts:
        for key, kind in types.items():
            if not isinstance(block[key], kind):
                raise TypeError(f"{key} is {block[key]!r}")
    if not all(isinstance(note, str) for note in part["notes"]):
        raise TypeError("a note is no text")
    if any((figure["low"] is None) != (figure["high"] is None) for figure in part["figures"]):
        raise TypeError("an interval has one end")


def part_table(part: Mapping[str, Any], about: str) -> str:
    return paragraphs(f"**{part['title']}** ({about})", part, part["state"])


def paragraphs(head: str, part: Mapping[str, Any], state: str) -> str:
    """Return a part's head and, below it, its state, figures and notes. state: its state in the words of a page."""
    said = [head]
    if part["state"] != "done":
        said.append(state + (f": {part['why']}" if part["why"] else ""))
    if part["figures"]:
        said.append(figures_table(part["figures"]))
    return "\n\n".join([*said, *part["notes"]]) + "\n"
