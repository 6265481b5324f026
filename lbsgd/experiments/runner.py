"""Runs a grid: as many runs side by side as fit, each once, and each from where it was interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from lbsgd.errors import LbsgdError, Stopped, TrainingError
from lbsgd.experiments import launch
from lbsgd.experiments.checkout import Checkout
from lbsgd.experiments.grid import Job
from lbsgd.experiments.launch import Grid, Started
from lbsgd.experiments.overview import Overview
from lbsgd.output import say
from lbsgd.processes.signals import calling

LOOK_SECONDS = 1.0  # between two checks of the runs


class Runner:
    """The runs of a grid. A run that another process of the same grid has started is left to that process.

    finished    called with each job that has ended, including those that ended before this start
    """

    def __init__(self, grid: Grid, checkout: Checkout, finished: Callable[[Job], None]):
        self.grid, self.checkout, self.finished = grid, checkout, finished
        self.running: list[Started] = []
        self.failed: dict[str, str] = {}
        self.stop_requested: str | None = None

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is not done yet. Raises Stopped after a stop signal, and TrainingError if runs failed."""
        waiting = []
        for job in jobs:
            if launch.is_done(job.folder(self.grid.runs)):
                self.publish(job, say)
            else:
                waiting.append(job)
        with calling(self.request_stop), Overview(jobs, self.grid.runs, self.epochs_of) as overview:
            self.work_off(waiting, overview)
        if self.failed:
            raise TrainingError(*(f"{name}: {words}" for name, words in self.failed.items()))

    def epochs_of(self, job: Job) -> int:
        return self.grid.epochs_of(job.row) or self.grid.data.epochs

    def request_stop(self, number: int, frame: object) -> None:
        self.stop_requested = signal.Signals(number).name

    def work_off(self, waiting: list[Job], overview: Overview) -> None:
        """Start runs while there is room, and watch them until all have ended."""
        while waiting or self.running:
            if self.stop_requested:
                self.stop()
            for started in list(self.running):
                self.take_leave(started, overview)
            for slot in self.free_slots():
                self.start_next(waiting, slot)
            waiting[:] = [job for job in waiting if not self.done_elsewhere(job, overview)]
            overview.update([started.job for started in self.running])
            self.doze()

    def doze(self) -> None:
        """Wait until the next check. A stop signal ends the wait at once.

        A terminal sends Ctrl-C to the runs, too. They take our signal for the same request only if it follows soon.
        """
        until = time.monotonic() + LOOK_SECONDS
        while not self.stop_requested and time.monotonic() < until:
            time.sleep(min(0.1, LOOK_SECONDS))

    def free_slots(self) -> list[int]:
        taken = {started.slot for started in self.running}
        return [slot for slot in range(self.grid.machine.side_by_side) if slot not in taken]

    def start_next(self, waiting: list[Job], slot: int) -> None:
        """Start the first waiting run that no other process runs."""
        for job in waiting:
            if started := launch.start(job, self.grid, self.checkout, slot):
                self.running.append(started)
                waiting.remove(job)
                return

    def take_leave(self, started: Started, overview: Overview) -> None:
        """Handle a run that has ended: note divergence or failure, or publish it."""
        code, folder = started.process.poll(), started.job.folder(self.grid.runs)
        if code is None:
            return
        self.running.remove(started)
        with started.lock:  # held until all is written, or another grid would start the run again
            if code == TrainingError.exit_code:
                started.note_divergence()
            if launch.is_done(folder):
                self.end(started.job, overview)
            else:
                self.failed[started.job.name] = f"{started.last_words()} [{started.output}]"
                overview.say(f"{started.job.name}: ended with exit code {code}: {started.last_words()}")

    def done_elsewhere(self, job: Job, overview: Overview) -> bool:
        """Whether another process has finished a run that waits here."""
        if not overview.may_be_done(job) or not launch.is_done(job.folder(self.grid.runs)):
            return False
        self.end(job, overview)
        return True

    def end(self, job: Job, overview: Overview) -> None:
        launch.clear_up(job.folder(self.grid.runs))
        overview.ended(job)
        self.publish(job, overview.say)

    def publish(self, job: Job, say: Callable[[str], None]) -> None:
        try:
            self.finished(job)
        except LbsgdError as error:  # such as a full disk; the run itself is not lost
            say(f"{job.name}: {error}")

    def stop(self) -> None:
        """Let the runs save and end, then raise Stopped."""
        for started in self.running:
            started.process.terminate()
        for started in self.running:
            started.process.wait()
        raise Stopped(f"{self.stop_requested}: the runs have saved what they had; the same command goes on")
