"""A table of runs from their logs, with the paper's numbers (Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from rich import box
from rich.markup import escape
from rich.table import Table

from lbsgd.report.groups import read_rows
from lbsgd.report.measure import Measure, Record
from lbsgd.report.names import names_of, row_names
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.training_time import processes, training_time

WIDE = 80  # terminal columns that hold the paper's numbers of a run, and its training time
SPEED, TIME, PROCESSES = "images\n/s", "training\ntime", "processes"
BEST = "best\nval"
# The terminal width that a column needs, so that the names of the runs keep their room.
LEAST_WIDTH = {
    "η": 50,
    "epochs": 50,
    BEST: 60,
    "k": WIDE,
    "train": WIDE,
    TIME: WIDE,
    SPEED: WIDE + 7,
    PROCESSES: WIDE + 17,
}


def error_table(runs: Sequence[LoggedRun], width: int = WIDE) -> Table:
    """Return a row per run and, as in the paper's tables, mean ± std of runs that differ only in their seed.

    The numbers are those of each run's first measure; other headlines, such as mask AP, have their own columns. A
    narrow terminal gets the most important columns. If there are several means, each has the name of its row's folder.
    """
    further = list(dict.fromkeys(measure for run in runs for measure in run.headlines[1:]))
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        caption="\n"
        + "; ".join(dict.fromkeys(caption(run.measures[0]) for run in runs))
        + ("\ntraining time: h:mm:ss, without evaluations" if width >= LEAST_WIDTH[TIME] else ""),
    )
    shorts = [measure.short.replace(" ", "\n") for measure in further]
    heads = ["run", "kn", "k", "η", "epochs", "val", BEST, "train", *shorts, SPEED, TIME, PROCESSES]
    shown = [number for number, head in enumerate(heads) if width >= LEAST_WIDTH.get(head, 0)]
    for number in shown:
        if number == 0:
            table.add_column(heads[0], overflow="fold")
        else:
            table.add_column(heads[number], justify="right", no_wrap=True)

    def add(*cells: str) -> None:
        table.add_row(*(cells[number] for number in shown if number < len(cells)))

    for name, run in zip(names_of(runs), runs, strict=True):
        numbers = [*numbers_of(run), *(measure.of(run.epochs) for measure in further)]
        add(escape(name), *recipe_cells(run), *map(percent, numbers), speed_cell(run), *time_cells(run))
    table.add_section()
    rows = [row for row in read_rows(runs)[0] if len(row.values) > 1]
    for name, row in zip(row_names(rows), rows, strict=True):
        which = f"{escape(name)}: " if len(rows) > 1 else ""
        add(f"{which}mean of {len(row.values)} ± std", *recipe_cells(row.finished[0]), str(row.spread))
    return table


def caption(measure: Measure) -> str:
    """Return `top-1 errors in %; val, train: median of last 5 epochs`."""
    unit = f"s in {measure.unit}" if measure.unit else ""
    return f"{measure.name}{unit}; val{', train' if measure.training else ''}: {measure.how}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def recipe_cells(run: LoggedRun) -> list[str]:
    header, done, planned = run.header, run.epochs_done, run.planned_epochs
    return [
        str(header["global_batch"]),
        str(header["num_workers"]),
        f"{header['schedule']['reference_lr']:g}",
        f"{done:.4g}" if run.reached_its_plan else f"{done:.4g}/{planned:.4g}",
    ]


def numbers_of(run: LoggedRun) -> tuple[float | None, float | None, float | None]:
    """Return the run's number, the best of its evaluations, and the number on the training images."""
    measure = run.measures[0]
    training = replace(measure, key=measure.training).of(run.epochs) if measure.training else None
    return measure.of(run.epochs), measure.best(run.epochs), training


def speed_cell(run: LoggedRun) -> str:
    # Take the epochs' speeds if they have any: a published log holds only the first iterations of each epoch, which are
    # slow. Take the median, because the first epoch, or iteration, is slow.
    speeds = speeds_of(run.epochs) or speeds_of(run.iterations)
    return f"{median(speeds):.0f}" if speeds else "-"


def time_cells(run: LoggedRun) -> list[str]:
    return [training_time(run) or "-", processes(run) or "-"]


def speeds_of(records: Sequence[Record]) -> list[float]:
    return [record["images_per_second"] for record in records if record.get("images_per_second") is not None]
