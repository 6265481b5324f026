"""Writes a report of runs as files: tables, pictures and the page, the same bytes each time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from lbsgd.disk import rewrite_file
from lbsgd.errors import ConfigError, DataError
from lbsgd.report.families import Family, families_of
from lbsgd.report.figures import band_figure, batch_figure, save
from lbsgd.report.group_page import by_outcome, group_page
from lbsgd.report.groups import Group, find_runs, group_runs
from lbsgd.report.names import row_place_of
from lbsgd.report.page import Section
from lbsgd.report.paper_table import PaperTable, error_cell
from lbsgd.report.paper_tables import tables_of
from lbsgd.units import markdown_table

Cells = tuple[str, ...]


def families_at(places: Sequence[str | Path]) -> list[Family]:
    """Return the families of the runs at some places. Raises DataError if there is none."""
    return families_of(group_runs(find_runs(places)))


def write_report(
    families: Sequence[Family],
    folder: Path,
    title: str,
    tables: Sequence[str] = (),
    answers: Sequence[Section] = (),
) -> list[Path]:
    """Write tables.md, tables.csv, a picture per table and index.html into a folder; return the paths written.

    Tables with other columns go into tables_2.csv and so on.
    tables: names of the wanted tables, such as table1; all by default.
    Raises ConfigError if the folder cannot be written.
    """
    found = [(family, tables_of([family], tables), ending_of(number)) for number, family in enumerate(families, 1)]
    rows = rows_of([family for family, made, _ in found if not made])
    in_markdown = [table.markdown() for _, made, _ in found for table in made]
    in_markdown += [markdown_table(*given) + "\n" for given in rows]
    in_csv = by_heads([*(table.csv(end) for _, made, end in found for table in made), *rows])
    csv_files = [folder / f"tables{ending_of(number)}.csv" for number, _ in enumerate(in_csv, 1)]
    written = [folder / "tables.md", *csv_files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(written, ["\n".join(in_markdown), *(as_csv(*given) for given in in_csv)], strict=True):
            rewrite_file(path, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error
    for family, made, end in found:
        written += pictures(family, made, folder, end)
    written.append(group_page(title, families, tables, answers).write(folder))
    return written


def pictures(family: Family, tables: Sequence[PaperTable], folder: Path, ending: str) -> list[Path]:
    """Draw a picture per table, or one for a family without tables. `ending` keeps the files of families apart."""
    written = []
    for table in tables:
        title = f"{table.title}\n{table.ours}"
        written += save(band_figure(title, table.curve_names, table.groups), folder / f"{table.name}{ending}")
        if table.name.startswith("figure1") and any(by_outcome(table.groups)):
            written += save(batch_figure(title, family, table.groups), folder / f"error_over_batch{ending}")
    if not tables:
        written += save(band_figure(family.place, family.curve_names(), family.rows), folder / f"curves{ending}")
    return written


def ending_of(number: int) -> str:
    """Return the ending that keeps names of files apart: nothing for the first, then _2, _3 and so on."""
    return "" if number == 1 else f"_{number}"


def rows_of(families: Sequence[Family]) -> list[tuple[Cells, list[Cells]]]:
    """Return heads and rows of runs that make no table of the paper, one table for each measure."""
    return by_heads(row_of(*named) for family in families for named in zip(family.names, family.rows, strict=True))


def row_of(name: str, row: Group) -> tuple[Cells, list[Cells]]:
    heads = ("row", "kn", "η", f"{row.measure.short} {row.measure.unit}".rstrip(), "seeds")
    return heads, [(name, f"{row.global_batch:,}", f"{row.lr:.3g}", error_cell(row), str(len(row.runs)))]


def by_heads(tables: Iterable[tuple[Cells, list[Cells]]]) -> list[tuple[Cells, list[Cells]]]:
    """Join tables with equal heads into one."""
    found: dict[Cells, list[Cells]] = {}
    for heads, rows in tables:
        found.setdefault(heads, []).extend(rows)
    return list(found.items())


def as_csv(heads: Cells, rows: Sequence[Cells]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def rows_by_name(families: Sequence[Family]) -> dict[str, Group]:
    """Return the rows of a grid by name. Raises DataError if two rows have one name, because one would be lost."""
    found: dict[str, Group] = {}
    for row in (row for family in families for row in family.rows):
        first = found.setdefault(row_place_of(row.runs[0]).name, row)
        if first is not row:
            raise DataError(
                f"{first.runs[0].path} and {row.runs[0].path} are of one row by their folders, but differ in their "
                "plan, their data or where they ended; leave one out, or run it again"
            )
    return found
