"""A report of runs as files: tables, pictures and the page, the same bytes each time."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.figures import band_figure, batch_figure, save
from lbsgd.report.group_page import group_page
from lbsgd.report.groups import Family, Group, families_of, find_runs, group_runs
from lbsgd.report.page import Section
from lbsgd.report.paper_table import error_cell
from lbsgd.report.paper_tables import paper_tables, wanted
from lbsgd.units import markdown_table


def families_at(places: Sequence[str | Path]) -> list[Family]:
    """Return the families of the runs at some places. Raises DataError where there is none."""
    return families_of(group_runs(find_runs(places)))


def write_report(
    families: Sequence[Family],
    folder: Path,
    title: str,
    tables: Sequence[str] = (),
    answers: Sequence[Section] = (),
) -> list[Path]:
    """Write tables.md, tables.csv, a picture per table and index.html into a folder; return what was written.

    tables: names of those wanted, such as table1; all by default.
    Raises ConfigError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [(family, table) for family in families for table in wanted(paper_tables(family), tables)]
        written = [folder / "tables.md", folder / "tables.csv"]
        in_markdown = "\n".join(table.markdown() for _, table in found) or rows_markdown(families)
        replace_file(written[0], in_markdown.encode())
        replace_file(written[1], ("".join(table.csv() for _, table in found) or rows_csv(families)).encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}; choose another --output_dir") from error
    for family, table in found:
        written += save(band_figure(table.labels, table.groups), folder / table.name)
        if table.name.startswith("figure1"):
            written += save(batch_figure(family, table.groups), folder / "error_over_batch")
    for number, family in enumerate(families):
        if not wanted(paper_tables(family), tables):
            written += save(
                band_figure([family.label(row) for row in family.rows], family.rows), folder / f"curves{number or ''}"
            )
    written.append(group_page(title, families, tables, answers).write(folder))
    return written


def row_heads(families: Sequence[Family]) -> tuple[str, ...]:
    measure = families[0].rows[0].measure
    return ("row", "kn", "η", f"{measure.short} {measure.unit}".rstrip(), "seeds")


def row_cells(families: Sequence[Family]) -> list[tuple[str, ...]]:
    """Return the rows of runs that make no table of the paper."""
    return [
        (name, f"{row.global_batch:,}", f"{row.lr:.3g}", error_cell(row), str(len(row.runs)))
        for name, row in rows_by_name(families).items()
    ]


def rows_markdown(families: Sequence[Family]) -> str:
    return markdown_table(row_heads(families), row_cells(families)) + "\n"


def rows_csv(families: Sequence[Family]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([row_heads(families), *row_cells(families)])
    return text.getvalue()


def rows_by_name(families: Sequence[Family]) -> dict[str, Group]:
    """Return the rows by the folders that their runs lie in: .../NAME/seed0/log.jsonl."""
    return {row.runs[0].path.parent.parent.name: row for family in families for row in family.rows}
