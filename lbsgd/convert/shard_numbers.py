"""Find missing and repeated shards by the numbers in their names."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

from lbsgd.errors import DataError
from lbsgd.units import shortened

COUNTED = re.compile(r"(?P<number>\d+)-of-(?P<total>\d+)")
NUMBERED = re.compile(r"(?:^|[-_.]|train|val|valid|validation)(?P<number>\d+)(?P<total>)(?:\.\w+)*$")
FIRST_YEAR = 1000  # if the lowest number is at least this, without a leading zero, it is a year or date, not a count


def refuse_copies(path: Path, names: list[str]) -> None:
    """Raise DataError if two shards have the same place in a series: one is a copy, or the images are cut otherwise.

    Examples: train-00000-of-01024 in two folders, or together with train-00000-of-00256.
    """
    places: dict[tuple[str, int | None], str] = {}
    for name in names:
        base = os.path.basename(name)
        match = _number(base)
        place = (base[: match.start("number")], int(match["number"])) if match else (base, None)
        if (other := places.setdefault(place, name)) != name:
            raise DataError(
                f"{path} holds the shards {other} and {name}, and only one can be meant: their images would be there "
                f"twice; keep one copy of the data set"
            )


def refuse_missing(path: Path, names: list[str]) -> None:
    """Raise DataError if names such as train-00003-of-01024 or imagenet-train-000002.tar imply more shards.

    Without a total in the names, shards that are missing at the end go unnoticed.
    """
    series: dict[tuple[str, str], list[re.Match[str]]] = {}
    for name in map(os.path.basename, names):
        if match := _number(name):
            series.setdefault((name[: match.start("number")], match["total"]), []).append(match)
    for (_, total), matches in sorted(series.items()):
        there, expected = {int(match["number"]) for match in matches}, _expected(matches, total)
        if num_missing := len(expected) - sum(number in expected for number in there):
            missing = islice((number for number in expected if number not in there), 3)
            lacking = shortened([_with_number(matches[0], number) for number in missing], num_missing)
            raise DataError(f"{path} lacks the shards {lacking} beside {names[0]}; fetch them")


def _number(name: str) -> re.Match[str] | None:
    return COUNTED.search(name) or NUMBERED.search(name)


def _expected(matches: list[re.Match[str]], total: str) -> range:
    """Return the numbers of a whole series: below its total or, without a total, from 0 or 1 to the highest."""
    numbers = [int(match["number"]) for match in matches]
    padded = any(match["number"].startswith("0") for match in matches)
    if total or not padded and min(numbers) >= FIRST_YEAR:
        return range(int(total or 0))
    return range(min(1, *numbers), max(numbers) + 1)


def _with_number(match: re.Match[str], number: int) -> str:
    """Return the name of another shard of the series, or only its number and total if the rest may differ too."""
    digits = f"{number:0{len(match['number'])}}"
    if match["total"]:
        return f"{digits}-of-{match['total']}"
    return match.string[: match.start("number")] + digits + match.string[match.end("number") :]
