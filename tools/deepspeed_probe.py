"""Find by trials which JSON values a piece of code takes: a ladder of values, and bisection between neighbours.

A description of accepted values in the schema is {} if anything is accepted. Otherwise each JSON type has a list of
values, a list of intervals [least, most] (null: no end), or true or false. For a list, `items` describes each position;
the last description holds for all further positions.

    {"null": false, "bool": [true, false], "int": [[1, null]], "float": [], "text": {"any": false, "but": ["best"]},
     "list": {"lengths": [2], "items": [{...}, {...}]}, "block": false}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

Trial = Callable[[Any], bool]

# Code that takes all of these takes anything.
ODD: tuple[Any, ...] = (None, {}, [], [1], "x", "", True, -1000, 0, 1, -0.5, 0.0)
INTS = (-1000, -2, -1, 0, 1, 2, 1000)
FLOATS = (-1000.0, -1.0, -0.5, 0.0, 1e-3, 0.5, 1.0, 1.5, 1e3)
TEXTS = ("", "x", "1", "0.5", "1e-3", "-1", "true", "None")
STEPS = 24  # of bisection, which finds a boundary that is no round number to a millionth


def describe(accepts: Trial, words: Iterable[str] = (), with_lists: bool = True) -> dict[str, Any]:
    """Return which JSON values a trial accepts, {} for any. words: texts that may have a meaning there."""
    if all(accepts(value) for value in ODD):
        return {}
    found: dict[str, Any] = {
        "null": accepts(None),
        "bool": [value for value in (True, False) if accepts(value)],
        "int": intervals(accepts, INTS, whole=True),
        "float": intervals(accepts, FLOATS, whole=False),
        "text": texts(accepts, words),
        "block": accepts({}),
    }
    if with_lists:
        found["list"] = lists(accepts)
    return found


def intervals(accepts: Trial, ladder: tuple[Any, ...], whole: bool) -> list[list[Any]]:
    """Return the accepted intervals of numbers. The ladder's ends stand for all numbers beyond them."""
    verdicts = [accepts(value) for value in ladder]
    found: list[list[Any]] = []
    for at, (value, good) in enumerate(zip(ladder, verdicts, strict=True)):
        if good and (at == 0 or not verdicts[at - 1]):
            least = None if at == 0 else boundary(accepts, ladder[at - 1], value, whole)
            found.append([least, None])
        if good and at + 1 < len(ladder) and not verdicts[at + 1]:
            found[-1][1] = boundary(accepts, ladder[at + 1], value, whole)
    return found


def boundary(accepts: Trial, bad: Any, good: Any, whole: bool) -> Any:
    """Return the last accepted number before the refused ones, between a good number and a bad one."""
    if whole:
        while abs(good - bad) > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if accepts(middle) else (good, middle)
        return good
    if not accepts(math.nextafter(good, bad)):
        return good
    if accepts(math.nextafter(bad, good)):
        return math.nextafter(bad, good)
    for _ in range(STEPS):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if accepts(middle) else (good, middle)
    return good


def texts(accepts: Trial, words: Iterable[str]) -> dict[str, Any]:
    """Return whether any text is accepted, and the words that are exceptions."""
    tried = sorted({*TEXTS, *words, *(word.upper() for word in words if accepts(word))})
    any_text = accepts("a text that nothing expects")
    return {"any": any_text, "but": [word for word in tried if accepts(word) != any_text]}


def lists(accepts: Trial) -> Any:
    """Return which lists are accepted: their lengths, and the items at each place; False if none are."""
    for inner in (0.5, 1, 5, "x"):
        lengths = [length for length in range(5) if accepts([inner] * length)]
        if lengths and lengths != [0]:
            length = next(each for each in lengths if each)
            return {
                "lengths": None if 4 in lengths else lengths,
                "items": [describe(at_place(accepts, [inner] * length, at), with_lists=False) for at in range(length)],
            }
    if accepts([0.5, 1.5]):  # two numbers around 1
        items = [describe(at_place(accepts, [0.5, 1.5], at), with_lists=False) for at in range(2)]
        return {"lengths": [2], "items": items}
    return {"lengths": [0], "items": []} if accepts([]) else False


def at_place(accepts: Trial, values: list[Any], place: int) -> Trial:
    """Return the trial of one item of a list whose other items are accepted."""
    return lambda value: accepts([*values[:place], value, *values[place + 1 :]])
