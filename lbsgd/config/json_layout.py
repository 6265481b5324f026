"""Change values in a JSON's text, and leave everything else as its author wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lbsgd.config.keypath import is_same

SPACE = re.compile(r"[ \t\n\r]*")
BEFORE_NAME = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")
COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
INDENT = re.compile(r"\n([ \t]*)")
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """The text of a key of a JSON object and of its value."""

    before: str  # the text before the name: space, and a comma except before the first member
    name: str  # with its quotation marks
    colon: str  # with the space around it
    value: str

    def __str__(self) -> str:
        return self.before + self.name + self.colon + self.value


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a strict JSON object with other values.

    Unchanged values keep their text. A new key is written like its neighbours; a deleted key takes its comma with it.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    text = text.replace(newline, "\n")
    start = end_of(SPACE, text, 0)
    _, end = DECODER.raw_decode(text, start)
    return (text[:start] + changed(text[start:end], values) + text[end:]).replace("\n", newline)


def changed(text: str, value: Any) -> str:
    """Return a value's text, changed to express another value."""
    before = json.loads(text)
    if is_same(before, value):
        return text
    if not (before and value and isinstance(before, dict) and isinstance(value, dict)):
        return json.dumps(value, ensure_ascii=False)
    members, end = members_of(text)
    first, *others = members.values()
    between = min((member.before for member in others), key=len, default="," + (first.before or " "))
    new: list[Member] = []
    for key, item in value.items():
        if key in members:
            member = replace(members[key], value=changed(members[key].value, item))
        else:
            member = Member(between, json.dumps(key, ensure_ascii=False), first.colon, written(item, between))
        if not new:
            member = replace(member, before=first.before)
        elif "," not in member.before:  # the member was the first
            member = replace(member, before=between)
        new.append(member)
    return "{" + "".join(map(str, new)) + end + "}"


def written(value: Any, before: str) -> str:
    """Return the text of a new value: a block with blocks inside on several lines, if the keys around it are too."""
    has_blocks = isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())
    indents = INDENT.findall(before)
    if not has_blocks or not indents:
        return json.dumps(value, ensure_ascii=False)
    indent = indents[-1]  # new blocks belong at the top level, where the indent is also one step
    return json.dumps(value, ensure_ascii=False, indent=indent).replace("\n", "\n" + indent)


def members_of(text: str) -> tuple[dict[str, Member], str]:
    """Return the members of a non-empty object by key, and the space before its closing brace."""
    members: dict[str, Member] = {}
    place = 1
    while True:
        name_at = end_of(BEFORE_NAME, text, place)
        key, name_end = DECODER.raw_decode(text, name_at)
        value_at = end_of(COLON, text, name_end)
        _, end = DECODER.raw_decode(text, value_at)
        members[key] = Member(text[place:name_at], text[name_at:name_end], text[name_end:value_at], text[value_at:end])
        closing = end_of(SPACE, text, end)
        if text[closing] == "}":
            return members, text[end:closing]
        place = end


def end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Return the end of a pattern's match at a place in a text."""
    match = pattern.match(text, place)
    assert match, "the text is strict JSON"
    return match.end()
