"""The output of `lbsgd check`: the findings of each file, on a terminal, into a pipe, or as plain data."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from lbsgd.config.accepted.schema import accepted
from lbsgd.config.checks.finding import SEVERITIES, Finding
from lbsgd.config.checks.inspection import Inspection
from lbsgd.report.lines import on_terminal
from lbsgd.units import counted, printable

if TYPE_CHECKING:
    from rich.console import Console

Line = list[tuple[str, str]]  # its parts, each with rich's style
FEWEST_FILES = 4  # from this number of files on, a note that many share is printed once
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def as_dict(inspections: Sequence[Inspection], version: str, passed_over: int = 0) -> dict[str, object]:
    """Return all findings as plain data, with the version of DeepSpeed that they are for."""
    return {
        "deepspeed": accepted(version).version,
        "passed_over": passed_over,
        "errors": sum(each.count("error") for each in inspections),
        "warnings": sum(each.count("warning") for each in inspections),
        "files": [each.as_dict() for each in inspections],
    }


def print_inspections(inspections: Sequence[Inspection], console: Console | None = None, passed_over: int = 0) -> None:
    """Print each file with its findings, and the totals of several files, in colours on a terminal or given console.

    A note that many files share is printed once, at the end.
    """
    if console is None and on_terminal():
        from rich.console import Console

        console = Console(highlight=False)
    for line in lines_of_all(inspections, passed_over, width=console.width if console else None):
        print_line(line, console)


def lines_of_all(inspections: Sequence[Inspection], passed_over: int, width: int | None) -> Iterator[Line]:
    """Yield the lines of all files, then the notes that many of them share, and the totals."""
    common = common_notes(inspections)
    for each in inspections:
        yield from lines_of(each, width, common.keys())
    for note, number in common.values():
        yield [(f"in {number} of {len(inspections)} files:", "bold")]
        yield from lines_of_finding(note, width)
    if len(inspections) > 1:
        totals = (counted(sum(each.count(severity) for each in inspections), severity) for severity in SEVERITIES)
        for text in wrapped(f"{len(inspections)} files: {', '.join(totals)}", "", width):
            yield [(text, "")]
    if passed_over:
        for text in wrapped(others_passed_over(passed_over), "", width):
            yield [(text, "dim")]


def common_notes(inspections: Sequence[Inspection]) -> dict[str, tuple[Finding, int]]:
    """Return the notes that at least half of four or more files share, by their words, with the number of files."""
    notes = [note for each in inspections for note in each.findings if note.severity == "note"]
    numbers = Counter(map(str, notes))
    is_many = len(inspections) >= FEWEST_FILES
    common = {str(note): (note, numbers[str(note)]) for note in notes}
    found = {words: each for words, each in common.items() if is_many and 2 * each[1] >= len(inspections)}
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def others_passed_over(number: int) -> str:
    """Say how many JSONs of folders are not DeepSpeed's."""
    return f"{counted(number, 'other JSON')} passed over: no DeepSpeed JSON"


def print_line(line: Line, console: Console | None) -> None:
    """Print a line. Without a console do not import rich, which takes a fifth of the command's time."""
    if console is None:
        print("".join(text for text, _ in line))
    else:
        from rich.text import Text

        console.print(Text.assemble(*line), soft_wrap=True)


def lines_of(inspection: Inspection, width: int | None, elsewhere: Collection[str] = ()) -> Iterator[Line]:
    """Yield the lines of one file: name, verdict, what was fixed, and findings except those shown elsewhere."""
    version = accepted(inspection.version).version
    kind = f" (DeepSpeed {version})" if inspection.ours else f" (plain DeepSpeed {version}: no lbsgd block)"
    kind = kind if inspection.config is not None else ""
    head: Line = [
        (printable(inspection.file), "bold"),
        (kind, "dim"),
        ("  ", ""),
        verdict(inspection, sum(str(each) in elsewhere for each in inspection.findings)),
    ]
    if width is None or sum(len(text) for text, _ in head) <= width:
        yield head
    else:  # its parts below each other
        yield head[:1]
        for text, style in (head[1], head[3]):
            yield from ([(f"    {part}", style)] for part in wrapped(text.strip(), "    ", width) if part)
    for change in inspection.fixed:
        yield from named("fixed", printable(change), width)
    if inspection.kept:
        yield from named("kept", f"the file as it was in {printable(inspection.kept)}", width)
    for finding in inspection.findings:
        if str(finding) not in elsewhere:
            yield from lines_of_finding(finding, width)


def named(name: str, text: str, width: int | None) -> Iterator[Line]:
    """Yield what was done to a file, after its name."""
    indent = " " * 13
    first, *rest = wrapped(text, indent, width)
    yield [("    ", ""), (f"{name:9}", "green"), (first, "")]
    yield from ([(indent + line, "")] for line in rest)


def verdict(inspection: Inspection, elsewhere: int = 0) -> tuple[str, str]:
    """Return a file's counts and their style. elsewhere: the number of its findings printed at the end."""
    counts = [counted(inspection.count(severity), severity) for severity in SEVERITIES if inspection.count(severity)]
    fixed = f"{len(inspection.fixed)} fixed, " if inspection.fixed else ""
    if counts:
        said = ", ".join(counts) + (f" ({elsewhere} at the end)" if elsewhere else "")
        return f"{fixed}left: {said}" if fixed else said, ""
    return f"{fixed}nothing left" if fixed else "nothing found", "green"


def lines_of_finding(finding: Finding, width: int | None) -> Iterator[Line]:
    """Yield a finding's lines: severity and code on the left; key, message and fix on the right, wrapped."""
    severity, code, key = f"  {finding.severity:9}", f"{finding.code}  ", printable(finding.key)
    indent = " " * len(severity + code)
    first, *rest = wrapped(f"{key} {printable(finding.message)}", indent, width)
    yield [(severity, STYLES[finding.severity]), (code, ""), (first[: len(key)], "bold"), (first[len(key) :], "")]
    yield from ([(indent + line, "")] for line in rest)
    first, *rest = wrapped(f"-> {printable(finding.fix)}", indent, width)
    yield [(indent, ""), ("->", "green"), (first.removeprefix("->"), "")]
    yield from ([(indent + line, "")] for line in rest)


def wrapped(text: str, indent: str, width: int | None) -> list[str]:
    """Return a text in lines that fit after an indent. Without a width, for a file or a pipe, return one line."""
    if width is None:
        return [text]
    width = max(20, width - len(indent))
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
