"""Marked regions of a Markdown file, written from logs, so that no number in a README is typed by hand.

    <!-- report results/digits/runs --table table1 -->
    ... this is replaced ...
    <!-- end of report -->

The marker holds the arguments: places of runs, relative to the file's folder, and `--table NAME` for one table. A
place may also be the JSON of a bench on a GPU, whose tables have the names of its parts.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lbsgd.disk import rewrite_file
from lbsgd.errors import ConfigError
from lbsgd.report.bench_tables import bench_tables
from lbsgd.report.groups import BadLogs
from lbsgd.report.paper_tables import NEEDS, lacking, tables_of, why_not
from lbsgd.report.write import families_at

FENCE = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^`\n]*\n.*?(?:^[ \t]*(?P=fence)|\Z)"  # code, whose markers are examples
REGION = (
    r"^(?P<marker><!-- report (?P<arguments>[^\n]*?) -->(?P<newline>\r?\n))(?P<body>.*?)(?P<end><!-- end of report -->)"
)
PART = re.compile(f"{FENCE}|{REGION}", re.DOTALL | re.MULTILINE)
BEGIN = re.compile(r"^<!-- report [^\n]*-->", re.MULTILINE)
INSIDE = "<!-- report "  # anywhere in a region: a second region begins before the first has ended


def update(files: Sequence[Path]) -> list[Path]:
    """Update the regions of files. Return the files that have changed.

    Raises BadLogs for all logs that cannot be read, before it writes any file. Raises ConfigError if a file cannot be
    read or written, has no region, or has a region without its end.
    """
    changed: dict[Path, str] = {}
    bad: list[str] = []
    for file in files:
        text = read(file)
        try:
            new = updated(text, file)
        except BadLogs as error:
            bad += error.reasons
            continue
        if new != text:
            changed[file] = new
    if bad:
        raise BadLogs(bad)
    for file, new in changed.items():
        try:
            rewrite_file(file, new.encode())
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None
    return list(changed)


def read(file: Path) -> str:
    try:
        return file.read_bytes().decode()  # keeps the line ends
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file}: cannot be read ({reason}); give a Markdown file with marked regions") from None


def updated(text: str, file: Path) -> str:
    """Return the text with its regions updated from the logs. Raises BadLogs for all logs that cannot be read."""
    regions = [part for part in PART.finditer(text) if part["marker"]]
    begins = sum(1 for _ in BEGIN.finditer(PART.sub(lambda part: part["marker"] or "", text)))
    whole = sum(INSIDE not in region["body"] for region in regions)
    if not begins or begins != whole:
        raise ConfigError(
            f"{file}: {begins} regions begin and {whole} are complete; write `<!-- report results/digits/runs --table "
            "table1 -->` in a line of its own before a region and `<!-- end of report -->` after it"
        )
    bad: list[str] = []

    def again(part: re.Match[str]) -> str:
        if not part["marker"]:
            return part[0]
        try:
            said = body(part["arguments"], file).replace("\n", part["newline"])
        except BadLogs as error:
            bad.extend(error.reasons)
            return part[0]
        return f"{part['marker']}{said}{part['end']}"

    new = PART.sub(again, text)
    if bad:
        raise BadLogs(bad)
    return new


def body(arguments: str, file: Path) -> str:
    """Return the content of a region, between blank lines."""
    try:
        words = shlex.split(arguments)
    except ValueError as error:  # a quotation mark without its partner
        raise ConfigError(f"{file}: a report's marker is wrong: {arguments}: {error}") from None
    given = parser(file).parse_args(words)
    places = [file.parent / place for place in given.places]
    if [place.suffix for place in places] == [".json"]:
        return "\n" + "\n".join(bench_tables(places[0], given.table)) + "\n"
    if unknown := [name for name in given.table if name not in NEEDS]:
        raise ConfigError(
            f"{file}: a report's marker is wrong: there is no table {unknown[0]}; there are {', '.join(NEEDS)}"
        )
    families = families_at(places)
    if unmade := why_not(families, given.table):
        raise ConfigError(f"{file}: {'; '.join(unmade)}")
    tables = tables_of(families, given.table)
    if not tables:
        why = lacking(families) or "Give more rows"
        raise ConfigError(f"{file}: no table of the paper can be made of {' '.join(given.places)}. {why}")
    return "\n" + "\n".join(table.markdown() for table in tables) + "\n"


class MarkerParser(argparse.ArgumentParser):
    """Turns a mistake in a marker into an error that names the file."""

    def __init__(self, file: Path):
        super().__init__(add_help=False)
        self.file = file

    def error(self, message: str):
        raise ConfigError(f"{self.file}: a report's marker is wrong: {message}")


def parser(file: Path) -> MarkerParser:
    flags = MarkerParser(file)
    flags.add_argument("places", nargs="+")
    flags.add_argument("--table", action="append", default=[])
    return flags
