"""`lbsgd reproduce STUDY DATA_SET`: the data, the code, the runs, their logs in results/, and the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from lbsgd.disk import exists, rewrite_file
from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments import launch
from lbsgd.experiments.answers import HEADS, Answer, answers, markdown
from lbsgd.experiments.checkout import (
    NOTE,
    ROOT,
    Checkout,
    last_line,
    noted_commit,
    one_at_a_time,
    open_checkout,
    unsaved_changes,
)
from lbsgd.experiments.collect import bring_back, collect
from lbsgd.experiments.grid import DataSet, Job, Row, Study, jobs_of
from lbsgd.experiments.launch import Grid, Machine
from lbsgd.experiments.printed import print_study
from lbsgd.experiments.runner import Runner
from lbsgd.experiments.same_data import require_same_data
from lbsgd.report.families import Family
from lbsgd.report.lines import say_fact, warn
from lbsgd.report.page import PAGE_NAME, Section
from lbsgd.report.paper_tables import tables_of
from lbsgd.report.write import families_at, rows_by_name, write_report


@dataclass(frozen=True)
class GridRequest:
    """What a command asks for.

    work_dir    the folder of data/ and runs/
    results     the folder of the thinned logs
    epochs      end every run earlier, to try out a grid; such logs are not published
    """

    studies: tuple[Study, ...]
    data: DataSet
    seeds: tuple[int, ...]
    work_dir: Path
    results: Path
    side_by_side: int | None = None
    epochs: int | None = None

    @property
    def grid(self) -> Path:
        """The folder of the runs."""
        name = "_".join([self.data.name, *self.own_grid, *([f"{self.epochs}_epochs"] if self.epochs else [])])
        return self.work_dir / "runs" / "reproduce" / name

    @property
    def own_grid(self) -> list[str]:
        """The grid of the studies, if it is not the data set's."""
        return [grid for grid in {study.grid for study in self.studies} if grid]

    @property
    def published(self) -> Path:
        """The folder of runs/ with the thinned logs, and of the note of their commit."""
        return Path(self.results, self.data.name, *self.own_grid)

    @property
    def logs(self) -> Path:
        """The folder of the thinned logs, which for a trial is the grid itself."""
        return self.grid if self.epochs else self.published / "runs"

    @property
    def data_folder(self) -> Path:
        """The folder of the images."""
        return Path(self.data.data_dir.format(work_dir=self.work_dir))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all studies, each once."""
        return tuple({row.name: row for study in self.studies for row in study.rows(self.data)}.values())

    @property
    def jobs(self) -> list[Job]:
        return jobs_of(self.rows, self.seeds)


def listed(request: GridRequest) -> str:
    """Return the commands of all runs, one per line, for the current folder."""
    require_possible(request)
    grid = grid_of(request)
    return "\n".join(shlex.join(launch.command(job, grid, Path.cwd())) for job in request.jobs)


def grid_of(request: GridRequest) -> Grid:
    """Return the grid on this machine. Raises ConfigError as `Machine.here` does."""
    machine = Machine.here(request.data, request.side_by_side)
    return Grid(request.data, request.work_dir, request.grid, machine, request.epochs)


def reproduce(request: GridRequest) -> None:
    """Run a grid to its end. Raises Stopped after a stop signal; the same command then goes on."""
    require_possible(request)
    commit = noted_commit(request.published)
    if commit and not request.epochs and all(launch.is_done(job.folder(request.logs)) for job in request.jobs):
        say_fact("runs", f"all {len(request.jobs)} are in {request.logs}, of commit {commit[:10]}")
        say_fact("", "to train them yourself, give another place with --results")
        report(request, commit)  # needs no code and no data
        return
    grid = grid_of(request)
    with one_at_a_time(request.grid):
        checkout = begin(request)
    seeds = len(request.seeds)
    say_fact(
        "grid",
        f"{len(request.rows)} rows x {seeds} seeds, {grid.machine.side_by_side} side by side, "
        f"{grid.machine.threads} threads each",
    )

    def publish(job: Job) -> None:
        if not request.epochs:
            collect(job.folder(request.grid), job.folder(request.logs))

    Runner(grid, checkout, publish).run(request.jobs)
    report(request, checkout.commit)


def begin(request: GridRequest) -> Checkout:
    """Return the grid's code, after making everything that its runs need."""
    begins = not exists(request.grid / NOTE)
    checkout = open_checkout(request.grid, None if request.epochs else request.published)
    if begins and (changed := unsaved_changes()):
        warn(f"the grid runs commit {checkout.commit[:10]}, without your {len(changed.splitlines())} changed files")
    for job in request.jobs:
        bring_back(job.folder(request.logs), job.folder(request.grid))
    say_fact("code", f"commit {checkout.commit[:10]}, in {checkout.folder}")
    waiting = [job for job in request.jobs if not launch.is_done(job.folder(request.grid))]
    if waiting:  # a report alone needs only logs
        require_inputs(waiting, request.work_dir)
        prepare(request, checkout)
        done = [job.folder(request.grid) for job in request.jobs]  # published runs have been copied there
        require_same_data(request.data, request.data_folder, done, checkout)
    return checkout


def report(request: GridRequest, commit: str) -> None:
    """Print tables and answers of each study, and write them next to its logs with curves and page."""
    for study in request.studies:
        rows = study.rows(request.data)
        places = [request.logs / row.name for row in rows if exists(request.logs / row.name)]
        if not places:
            raise DataError(f"{request.logs} holds no run of {study.name}, so there is nothing to report")
        families = families_at(places)
        found = answers(study, request.data, rows_by_name(families), len(request.seeds))
        print_study(tables_of(families, study.tables), found)
        folder = (request.grid if request.epochs else request.results / request.data.name) / study.name
        try:
            write_study(folder, study, request.data, families, found, commit)
        except (ConfigError, OSError) as error:  # such as in another user's checkout; the numbers are printed already
            reason = getattr(error.__cause__ or error, "strerror", error)
            warn(f"{folder} cannot be written ({reason}), so the page there is not made again")
        else:
            say_fact("page", folder / PAGE_NAME)


def write_study(
    folder: Path, study: Study, data: DataSet, families: Sequence[Family], found: Sequence[Answer], commit: str
) -> None:
    """Write tables, curves, page and answers of a study. Raises ConfigError or OSError if they cannot be written."""
    title = f"{study.source}: {study.title} ({study.place(data)})"
    claims = Section("Claims", "stated before the runs", HEADS, [answer.cells for answer in found], words=True)
    own = study.sections(data, rows_by_name(families)) if study.sections else []
    write_report(families, folder, title, study.tables, [*own, *([claims] if found else [])])
    rewrite_file(folder / "claims.md", f"# {title}\n\nCommit {commit}.\n\n{markdown(found)}".encode())


def require_possible(request: GridRequest) -> None:
    """Raise ConfigError, before anything runs, if a study or a row is not possible."""
    if not exists(ROOT / request.data.config):  # a wheel has neither recipes nor ds_configs
        raise ConfigError(
            "reproduce: needs a git clone of the repository, installed by `make setup` or `pip install -e .`"
        )
    for study in request.studies:
        require_together(study, request.data)
    for row in request.rows:
        plan = launch.plan_of(Job(row, request.seeds[0]), request.data, ROOT)
        if request.epochs and request.epochs > (most := ceil(plan.num_epochs)):
            raise ConfigError(f"--epochs {request.epochs} is more than the {most} of {row.name}; it ends runs earlier")


def require_together(study: Study, data: DataSet) -> None:
    """Raise ConfigError if a study does not suit this data set."""
    if data.is_detection != study.is_detection:
        kind = "detectors" if study.is_detection else "classifiers"
        raise ConfigError(f"reproduce: {study.name} compares {kind}, and {data.name} is no data set for these")
    if not study.rows(data):
        raise ConfigError(f"reproduce: {study.name} has nothing to run on {data.name}")


def require_inputs(jobs: Sequence[Job], work_dir: Path) -> None:
    """Raise DataError if a job needs a file of another run that does not exist."""
    for job in jobs:
        for file in job.inputs(work_dir).values():
            if not exists(file):
                elsewhere = f"delete {file.parent}, whose run ended elsewhere, and " if exists(file.parent) else ""
                raise DataError(
                    f"{file} is not there, and {job.name} needs it; {elsewhere}make it with `{job.row.made_by}`"
                )


def prepare(request: GridRequest, checkout: Checkout) -> None:
    """Make the data folder with the repository's own tools, which leave a complete folder as it is."""
    places, folder = {"work_dir": request.work_dir}, request.data_folder
    for arguments in request.data.prepare:
        tool = [part.format(**places) for part in arguments]
        done = checkout.run([sys.executable, *tool])
        if done.returncode:
            older = f"; if other code than {checkout.commit[:10]} made {folder}, delete it" if exists(folder) else ""
            raise DataError(f"{shlex.join(tool)}: {last_line(done).removeprefix('error: ')}{older}")
    if not exists(folder / request.data.complete):
        raise DataError(
            f"{folder} holds no converted data; make it with "
            f"`python tools/convert_imagenet_to_ffcv.py --source YOUR_COPY --data_dir {shlex.quote(str(folder))}`"
        )
