"""Progress of a whole grid: finished runs, epochs of the running ones, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.live import Live
from rich.text import Text

from lbsgd.disk import exists
from lbsgd.experiments import launch
from lbsgd.experiments.grid import Job
from lbsgd.experiments.watch import Watch
from lbsgd.report.printer import Printer
from lbsgd.report.run_log import DIVERGED, LOG_NAME, read_run
from lbsgd.units import duration

WIDTH = 160  # of a pipe, whose lines do not wrap


class Overview:
    """Shows one status line on a terminal, and prints one line for each run that ends."""

    def __init__(self, jobs: Sequence[Job], runs: Path, epochs_of: Callable[[Job], int]):
        self.runs, self.planned = runs, {job.name: epochs_of(job) for job in jobs}
        self.printer = Printer(WIDTH)
        self.live = Live("", console=self.printer, refresh_per_second=2) if self.printer.is_for_people else None
        self.watch, self.running = Watch(), list[Job]()
        self.done = {job.name: launch.is_done(job.folder(runs)) for job in jobs}
        self.reached = {job.name: self.epochs_done(job) for job in jobs}
        self.reached_before, self.began = sum(self.reached.values()), time.monotonic()

    def __enter__(self) -> Overview:
        if self.live:
            self.live.__enter__()
        if any(self.done.values()):
            self.say(f"{sum(self.done.values())} of {len(self.done)} runs were done before")
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.live.__exit__(*error)

    def say(self, line: str) -> None:
        self.printer.print(Text(line), soft_wrap=True)

    def epochs_done(self, job: Job) -> int:
        planned = self.planned[job.name]
        return planned if self.done[job.name] else min(planned, self.watch.look(job.folder(self.runs)).epochs)

    def may_be_done(self, job: Job) -> bool:
        """Whether a run's log looks finished: a cheap check before `launch.is_done`."""
        folder = job.folder(self.runs)
        return exists(folder / DIVERGED) or self.watch.look(folder).has_result

    def update(self, running: Sequence[Job]) -> None:
        """Show how far the running jobs are. Without a terminal their logs are read only when a line is printed."""
        self.running = list(running)
        if self.live:
            self.look()
            names = ", ".join(f"{job.name} {self.reached[job.name]}/{self.planned[job.name]}" for job in running)
            self.live.update(Text(f"{self.standing()}   now {names}", overflow="ellipsis", no_wrap=True))

    def look(self) -> None:
        for job in self.running:
            self.reached[job.name] = self.epochs_done(job)

    def ended(self, job: Job) -> None:
        self.look()
        self.done[job.name], self.reached[job.name] = True, self.planned[job.name]
        self.say(f"{self.standing()}   {job.name}: {self.outcome(job)}")

    def outcome(self, job: Job) -> str:
        folder = job.folder(self.runs)
        if exists(folder / DIVERGED):
            return "diverged"
        run = read_run(folder / LOG_NAME)
        return "no epoch" if run.value is None else f"{run.measures[0].short} {run.measures[0].words(run.value)}"

    def standing(self) -> str:
        """`3 of 20 runs, 17 %, 12 min left`; the time left is estimated from the epochs since this start."""
        total, reached = sum(self.planned.values()), sum(self.reached.values())
        since, elapsed = reached - self.reached_before, time.monotonic() - self.began
        left = f", {duration(elapsed / since * (total - reached))} left" if since and reached < total else ""
        return f"{sum(self.done.values())} of {len(self.done)} runs, {100 * reached / max(1, total):.0f} %{left}"
