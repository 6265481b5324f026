"""`lbsgd check --deepspeed 0.16..0.19`: a table of a file's findings in each version of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lbsgd.commands.check_screen import others_passed_over
from lbsgd.config.accepted.schema import VERSIONS, accepted
from lbsgd.config.checks.finding import SEVERITIES
from lbsgd.config.checks.inspection import Inspection, inspect
from lbsgd.errors import ConfigError
from lbsgd.report.lines import on_width
from lbsgd.units import counted, printable

Row = tuple[str, str]  # code and key path of a finding


def versions_in(given: str) -> tuple[str, ...]:
    """Return the versions that a flag names: one, or a range such as 0.16..0.19.

    Raises ConfigError for an unknown version, and for a range that runs backwards.
    """
    first, separator, last = given.partition("..")
    ends = (first, last) if separator else (first,)
    for version in ends:
        if version not in VERSIONS:
            known = f"{', '.join(VERSIONS)}, and ranges such as {VERSIONS[0]}..{VERSIONS[-1]}"
            raise ConfigError(f"--deepspeed {given}: known are {known}")
    chosen = VERSIONS[VERSIONS.index(ends[0]) : VERSIONS.index(ends[-1]) + 1]
    if not chosen:
        raise ConfigError(f"--deepspeed {given}: runs backwards; say {last}..{first}")
    return chosen


def print_versions(files: Sequence[str], versions: Sequence[str], passed_over: int = 0) -> int:
    """Print a table for each file. Return 1 if there are errors in the last version, else 0."""
    errors = False
    for file in files:
        inspections = [inspect(file, version=version) for version in versions]
        print("\n".join(table(file, inspections, versions)))
        errors |= inspections[-1].count("error") > 0
    if passed_over:
        print(others_passed_over(passed_over))
    return int(errors)


def table(file: str, inspections: Sequence[Inspection], versions: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a file: findings that differ between versions, then the number and errors of the others."""
    columns = [severities(inspection) for inspection in inspections]
    rows = sorted({row for column in columns for row in column}, key=lambda row: worst(row, columns))
    differing = [row for row in rows if len({column.get(row) for column in columns}) > 1]
    same = [row for row in rows if row not in differing]
    yield on_width(f"{printable(file)}  DeepSpeed {', '.join(accepted(version).version for version in versions)}", 4)
    yield from rows_of(differing, columns, versions) if differing else ()
    errors = [each for each in inspections[-1].findings if (each.code, each.key) in same and each.severity == "error"]
    yield f"  {counted(len(same), 'finding')} the same in all" + (
        f", {counted(len(errors), 'error')}:" if errors else ""
    )
    yield from (on_width(f"  {each.code:5}{printable(each.key)} {printable(each.message)}", 7) for each in errors)


def rows_of(rows: Sequence[Row], columns: Sequence[dict[Row, str]], versions: Sequence[str]) -> Iterator[str]:
    """Yield a column of severities for each version or, where that is wider than the terminal, a list for each row."""
    width = max(len(printable(key)) for _, key in rows)
    named = [
        (f"  {code:5}", printable(key), [column.get((code, key), "-") for column in columns]) for code, key in rows
    ]
    lines = [f"{'':7}{'':{width}}  " + "".join(f"{version:9}" for version in versions).rstrip()]
    lines += [f"{code}{key:{width}}  {''.join(f'{cell:9}' for cell in cells).rstrip()}" for code, key, cells in named]
    if all(on_width(line) == line for line in lines):
        yield from lines
        return
    for code, key, cells in named:
        found = ", ".join(f"{version} {cell}" for version, cell in zip(versions, cells, strict=True))
        yield on_width(f"{code}{key}: {found}", 7)


def severities(inspection: Inspection) -> dict[Row, str]:
    """Return the severity of each finding of one version; the worst if a key has several with one code."""
    return {(finding.code, finding.key): finding.severity for finding in reversed(inspection.findings)}


def worst(row: Row, columns: Sequence[dict[Row, str]]) -> tuple[int, Row]:
    """Return the sort key of a row: errors come first."""
    return min(SEVERITIES.index(column[row]) for column in columns if row in column), row  # type: ignore[arg-type]
