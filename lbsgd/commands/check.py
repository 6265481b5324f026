"""`lbsgd check`: what is wrong in DeepSpeed JSONs, why it hurts, and the fix; and what a code means."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.config.checks.finding import SEVERITIES, Finding
from lbsgd.config.checks.inspect import Inspection, inspect
from lbsgd.errors import ConfigError
from lbsgd.units import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

INDENT = 2
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def check_files(files: Sequence[str], as_json: bool = False, fix: bool = False) -> int:
    """Print the findings of files and folders; return 1 if there are errors, else 0."""
    if not files:
        raise ConfigError("lbsgd check: name a DeepSpeed JSON or a folder of them, or a code with --explain")
    inspections = [inspect(file, fix) for given in files for file in in_folder(given)]
    if as_json:
        print(json.dumps(as_dict(inspections), indent=2))
    else:
        print_inspections(inspections)
    return int(any(each.count("error") for each in inspections))


def print_explanation(code: str, as_markdown: bool = False) -> int:
    """Print the entry of a code, or of all; as Markdown, always all: docs/checks.md."""
    from lbsgd.config.checks.explain import explain, explain_all, markdown

    if as_markdown:
        if code != "all":
            raise ConfigError("--markdown writes docs/checks.md, which holds every code: say --explain all")
        print(markdown(), end="")
    else:
        print(explain_all() if code == "all" else explain(code))
    return 0


def in_folder(given: str) -> list[str]:
    """Return the JSONs in a folder and below it; a file stands for itself."""
    if not Path(given).is_dir():
        return [given]
    found = sorted(str(path) for path in Path(given).glob("**/*.json"))
    if not found:
        raise ConfigError(f"{given}: holds no .json file; name a DeepSpeed JSON, or a folder of them")
    return found


def as_dict(inspections: Sequence[Inspection]) -> dict[str, object]:
    """Return all findings as plain data."""
    return {
        "errors": sum(each.count("error") for each in inspections),
        "warnings": sum(each.count("warning") for each in inspections),
        "files": [each.as_dict() for each in inspections],
    }


def print_inspections(inspections: Sequence[Inspection], console: Console | None = None) -> None:
    """Print each file with its findings, and the totals of several."""
    from rich.console import Console

    console = console or Console(highlight=False)
    for each in inspections:
        print_inspection(each, console)
    if len(inspections) > 1:
        totals = (counted(sum(each.count(severity) for each in inspections), severity) for severity in SEVERITIES)
        console.print(f"{len(inspections)} files: {', '.join(totals)}")


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print one file: its name and verdict, what was fixed, and its findings."""
    from rich.text import Text

    kind = "" if inspection.ours or inspection.config is None else " (plain DeepSpeed: no lbsgd block)"
    heading = ((plain(inspection.file), "bold"), (kind, "dim"), "  ", verdict(inspection))
    console.print(Text.assemble(*heading), soft_wrap=True)
    for change in inspection.fixed:
        console.print(Text.assemble("    ", ("fixed    ", "green"), plain(change)), soft_wrap=True)
    for finding in inspection.findings:
        console.print(lines_of(finding, console.width if console.is_terminal else None), soft_wrap=True)


def verdict(inspection: Inspection) -> tuple[str, str]:
    """Return a file's counts and their style."""
    counts = [counted(inspection.count(severity), severity) for severity in SEVERITIES if inspection.count(severity)]
    return (", ".join(counts), "") if counts else ("nothing found", "green")


def plain(text: str) -> str:
    """Return a file's words without characters that move a terminal's cursor or have no encoding."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def lines_of(finding: Finding, width: int | None) -> Text:
    """Return a finding as lines: severity and code on the left; key, message and fix on the right.

    They are wrapped at a terminal's width, and not at all for a file or a pipe (None). Everything is a Text, because a
    file's words may look like rich's markup.
    """
    from rich.text import Text

    severity, code, key = f"{finding.severity:7}  ", f"{finding.code}  ", plain(finding.key)
    indent = " " * (INDENT + len(severity) + len(code))
    words = hanging(f"{key} {plain(finding.message)}", indent, width)
    fix = hanging(f"-> {plain(finding.fix)}", indent, width)
    text = Text.assemble(" " * INDENT, (severity, STYLES[finding.severity]), code, words, f"\n{indent}", fix)
    text.stylize("bold", len(indent), len(indent) + len(key))
    start = len(text) - len(fix)
    text.stylize("green", start, start + len("->"))
    return text


def hanging(text: str, indent: str, width: int | None) -> str:
    """Return a text whose lines after the first begin with the indent, none longer than the width."""
    if width is None:
        return text
    return f"\n{indent}".join(textwrap.wrap(text, max(20, width - len(indent))))
