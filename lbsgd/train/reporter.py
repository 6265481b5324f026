"""Report a run's numbers on rank 0: in the run log, on the screen and in DeepSpeed's monitors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from lbsgd.errors import ConfigError, DataError
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.report.curves import curves
from lbsgd.report.measure import Measure
from lbsgd.report.page import PAGE_NAME
from lbsgd.report.run_log import LoggedRun, RunLog, read_run
from lbsgd.report.training_time import trained_for
from lbsgd.train.checkpoint import AGAIN
from lbsgd.train.live_page import LivePage
from lbsgd.train.peak_memory import peak_bytes
from lbsgd.train.progress import Progress

WAITING_PCT = 5.0  # of an epoch's time; more gets a warning
AGGREGATING_PCT = 20.0  # likewise; at the paper's 90 % efficiency all losses are half of that
POSITION = ("iteration", "num_iterations", "epoch")  # monitors have their own axis for it


@dataclass
class Reporter:
    """Writes each record to the log, the screen, the page and, if the JSON asks for them, to DeepSpeed's monitors.

    waiting_advice    what decodes, and what helps if training waits for it (`ImageSource`)
    stopwatch         of the start, which ends with the first update
    """

    log: RunLog
    progress: Progress
    engine: Any
    waiting_advice: str = ""
    page: LivePage | None = None
    stopwatch: Stopwatch | None = None
    advised: set[str] = field(default_factory=set, init=False)  # subjects of the advice so far

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.progress.__exit__(kind, error, trace)
        if error and self.page:
            self.page.write(self.log.epochs, ended=str(error) or type(error).__name__)
        with suppress(OSError):  # already reported when the line was written
            self.log.__exit__(kind, error, trace)

    def advance(self) -> None:
        """Count one iteration. Costs an addition and a look at the clock."""
        self.progress.advance()
        if self.stopwatch:
            self.stopwatch.lap("first update")
            if line := self.stopwatch.line():
                self.progress.say_fact("start", line)
            self.stopwatch = None

    def report(self, kind: str, record: dict[str, Any]) -> None:
        """Report a record, of kind iteration or epoch. An epoch's gets the peak memory of rank 0's GPU."""
        if kind == "epoch":
            record = record | peak_bytes(self.engine.device)
        try:
            getattr(self.log, kind)(record)
            self.keep_log()
        except OSError as error:  # the line is kept, and written with the next one
            self.progress.say(f"warning: {self.log.path} could not be written ({error}); training goes on")
        getattr(self.progress, kind)(record)
        if not math.isfinite(record.get("val_loss") or 0):
            self.progress.say(
                "warning: val_loss is not a number, because the network's outputs on some validation images are not; "
                "these count as errors. Running statistics that are not numbers cause it, or an overflow in fp16"
            )
        if self.page:
            self.page.note(record)
        if self.page and kind == "epoch":
            for warning in self.page.write(self.log.epochs):
                self.progress.say(f"warning: {warning}")
        if self.engine.monitor.enabled:
            self.monitor(record)

    def keep_log(self) -> None:
        """Write the log anew, and say so, if it is no longer at its place."""
        if self.log.put_back():
            self.progress.say(f"warning: {self.log.path} was removed or replaced; all of it is written there again")

    def monitor(self, record: dict[str, Any]) -> None:
        """Give DeepSpeed's monitors the record's numbers: not its texts, nor numbers per layer."""
        numbers = {name: value for name, value in record.items() if isinstance(value, Real) and name not in POSITION}
        events = [(f"lbsgd/{name}", value, self.engine.global_samples) for name, value in numbers.items()]
        try:
            self.engine.monitor.write_events(events)
        except OSError as error:
            self.advise("monitor", f"a monitor's file could not be written ({error}); training goes on")

    def advise_on_waiting(self, waited_pct: float) -> None:
        """Say once what to change if an epoch's training waited for images."""
        if waited_pct > WAITING_PCT:
            self.advise(
                "data", f"{waited_pct:.0f} % of the epoch's time was spent waiting for data; {self.waiting_advice}"
            )

    def advise_on_aggregation(self, waited_pct: float) -> None:
        """Say once what to change if an epoch's training waited for aggregation."""
        if waited_pct > AGGREGATING_PCT:
            self.advise(
                "aggregation",
                f"{waited_pct:.0f} % of the epoch's time was spent waiting for aggregation: with "
                "zero_optimization.overlap_comm true, try another reduce_bucket_size, lbsgd.aggregation.hierarchy "
                "servers where servers share a slow link, or a larger micro batch, whose back-propagation hides more",
            )

    def advise(self, on: str, words: str) -> None:
        if on not in self.advised:
            self.advised.add(on)
            self.progress.say(f"warning: {words}")

    def conclude(self, judged_by: Sequence[Measure], files: Mapping[str, object]) -> None:
        """Write a finished run's result, page and curves, and say where all files are.

        Raises DataError if the disk fails. The run itself is not lost.
        """
        say_fact, folder = self.progress.say_fact, self.log.path.parent
        say_fact("trained", self.trained(judged_by))
        run = self.write_result() if self.log.epochs else None
        result = run.result if run else None
        if run and (time := trained_for(run)):
            say_fact("training time", f"{time}, without evaluations")
        if self.page:
            self.page.write(self.log.epochs, result, "" if result else "it was to end inside its first epoch")
            say_fact("page", folder / PAGE_NAME)
        if result:
            for measure in (measure for measure in judged_by if measure.headline):
                said = f"{measure.words(result[measure.key])}, {measure.how_of(self.log.epochs)}"
                say_fact(measure.name, said)
            say_fact("curves", folder / "curves.png")
        for name, place in {"log": self.log.path, **files}.items():
            say_fact(name, place)

    def trained(self, judged_by: Sequence[Measure]) -> str:
        """Return how far the run has got, and which part of it no evaluation has seen yet."""
        per_epoch, done = self.progress.per_epoch, self.progress.done
        judged = {measure.key for measure in judged_by}
        seen = (round(each["epoch"] * per_epoch) for each in reversed(self.log.epochs) if judged & each.keys())
        unseen = done - next(seen, 0)
        first = self.progress.first + 1
        said = f"iterations {first} to {done}" if first <= done else f"nothing; {done} iterations were done before"
        return said + (f"; no evaluation has seen the last {unseen}: --evaluate_only makes one" if unseen else "")

    def write_result(self) -> LoggedRun:
        """Write the result and the curves. Return the run as read from its log."""
        folder = self.log.path.parent
        try:
            self.log.result()
            self.keep_log()
            run = read_run(folder)
            curves(run, folder / "curves.png")
        except (OSError, ConfigError) as error:  # the curves' error names another place, which does not help here
            raise DataError(f"cannot write the results in {folder} ({error.__cause__ or error}); {AGAIN}") from None
        return run
