"""`lbsgd check`: what is wrong in DeepSpeed JSONs, why it hurts, and the fix; and what a code means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.config.checks.finding import SEVERITIES, Finding
from lbsgd.config.checks.inspect import Inspection, inspect
from lbsgd.errors import ConfigError
from lbsgd.units import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    if inspection.findings:
        console.print(table(inspection.findings))


def verdict(inspection: Inspection) -> tuple[str, str]:
    """Return a file's counts and their style."""
    counts = [counted(inspection.count(severity), severity) for severity in SEVERITIES if inspection.count(severity)]
    return (", ".join(counts), "") if counts else ("nothing found", "green")


def plain(text: str) -> str:
    """Return a file's words without characters that move a terminal's cursor or have no encoding."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def table(findings: Sequence[Finding]) -> Table:
    """Return a table: severity and code on the left; key, message and fix on the right.

    Every cell is a Text, because a file's words may look like rich's markup.
    """
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for width in (2, 7, 3, None):
        grid.add_column(width=width)
    for finding in findings:
        words = Text.assemble(
            (plain(finding.key), "bold"), f" {plain(finding.message)}\n", ("-> ", "green"), plain(finding.fix)
        )
        grid.add_row(Text(), Text(finding.severity, STYLES[finding.severity]), Text(finding.code), words)
    return grid
