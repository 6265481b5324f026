"""A report of runs as files: tables, pictures and the page, the same bytes each time."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.families import Family, families_of
from lbsgd.report.figures import band_figure, batch_figure, save
from lbsgd.report.group_page import group_page
from lbsgd.report.groups import Group, find_runs, group_runs
from lbsgd.report.page import Section
from lbsgd.report.paper_table import PaperTable, error_cell
from lbsgd.report.paper_tables import paper_tables, wanted
from lbsgd.units import markdown_table

Cells = tuple[str, ...]
SEED = re.compile(r"seed\d+")  # the folder of a run in a row of a grid


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
        found = [(family, wanted(paper_tables(family), tables)) for family in families]
        written = [folder / "tables.md", folder / "tables.csv"]
        all_tables = [table for _, made in found for table in made]
        rows = rows_of([family for family, made in found if not made])
        in_markdown = [table.markdown() for table in all_tables] + [markdown_table(*given) + "\n" for given in rows]
        replace_file(written[0], "\n".join(in_markdown).encode())
        replace_file(written[1], "".join([*(table.csv() for table in all_tables), *map(as_csv, rows)]).encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}; choose another --output_dir") from error
    for number, (family, made) in enumerate(found, 1):
        written += pictures(family, made, folder, "" if number == 1 else f"_{number}")
    written.append(group_page(title, families, tables, answers).write(folder))
    return written


def pictures(family: Family, tables: Sequence[PaperTable], folder: Path, ending: str) -> list[Path]:
    """Draw a picture per table, or one of a family without any; `ending` keeps the names of two families apart."""
    written = []
    for table in tables:
        written += save(band_figure(table.labels, table.groups), folder / f"{table.name}{ending}")
        if table.name.startswith("figure1"):
            written += save(batch_figure(family, table.groups), folder / f"error_over_batch{ending}")
    if not tables:
        labels = [family.label(row) for row in family.rows]
        written += save(band_figure(labels, family.rows), folder / f"curves{ending}")
    return written


def rows_of(families: Sequence[Family]) -> list[tuple[Cells, list[Cells]]]:
    """Return heads and rows of runs that make no table of the paper: a table for each measure."""
    found: dict[Cells, list[Cells]] = {}
    for row in (row for family in families for row in family.rows):
        heads = ("row", "kn", "η", f"{row.measure.short} {row.measure.unit}".rstrip(), "seeds")
        cells = (name_of(row), f"{row.global_batch:,}", f"{row.lr:.3g}", error_cell(row), str(len(row.runs)))
        found.setdefault(heads, []).append(cells)
    return list(found.items())


def as_csv(table: tuple[Cells, list[Cells]]) -> str:
    heads, rows = table
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def rows_by_name(families: Sequence[Family]) -> dict[str, Group]:
    """Return the rows of a grid by their names."""
    return {name_of(row): row for family in families for row in family.rows}


def name_of(row: Group) -> str:
    """Return the name of a row's folder: .../NAME/seed0/log.jsonl in a grid, else .../NAME/log.jsonl."""
    folder = row.runs[0].path.resolve().parent
    return folder.parent.name if SEED.fullmatch(folder.name) else folder.name
