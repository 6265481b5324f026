"""Show a run's progress on rank 0: a bar on a terminal, plain lines anywhere else."""

import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from time import perf_counter

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lbsgd.output import discard
from lbsgd.report.lines import NAME_WIDTH, fact, fitted
from lbsgd.report.measure import TOP1, Measure
from lbsgd.units import clock, harmless

RECENT_ITERATIONS = 20


class Screen(Console):
    """A console that survives its reader, such as `tee` on Ctrl-C or a lost ssh. rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError):
            discard(sys.stdout.fileno())  # Python writes there when it ends


class Progress:
    """Shows epoch, iteration, lr, loss, images per second, the share of time spent waiting for data, and time left.

        with Progress(plan.num_iterations, plan.iterations_per_epoch) as progress:
            progress.advance()            after every iteration; costs an addition and a look at the clock
            progress.iteration(record)    an iteration record of the run log
            progress.epoch(record)        an epoch record: a line that stays
            progress.say(text)            any other line that stays

    A resumed run begins where `begin` says. With images_per_iteration, a terminal shows the speed of the last
    iterations, updated after each, instead of the last record's. `console`, by default stdout's, tells whether there is
    a terminal. `judged_by` are the numbers that an epoch's line shows.
    """

    def __init__(
        self,
        total_iterations: int,
        iterations_per_epoch: int,
        images_per_iteration: int | None = None,
        judged_by: Sequence[Measure] = (TOP1,),
        console: Console | None = None,
    ):
        self.total, self.per_epoch = total_iterations, iterations_per_epoch
        self.first = self.done = 0
        self.images_per_iteration = images_per_iteration
        self.judged_by = [measure for measure in judged_by if measure.headline]
        # Decided here, because FORCE_COLOR, set on build servers, makes rich take a file for a terminal.
        self.console = console or Screen(force_terminal=sys.stdout.isatty())
        self._record: dict = {}
        self._first_tick: tuple[int, float] | None = None
        self._last_tick: tuple[int, float] | None = None
        self._ticks: deque[tuple[int, float]] = deque(maxlen=RECENT_ITERATIONS + 1)
        self._live: Live | None = None
        if self.console.is_interactive:
            self._live = Live(get_renderable=self._screen, console=self.console, transient=True)

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self._live.stop()

    def begin(self, iteration: int) -> None:
        """Set the iteration at which the run resumes. It may lie beyond the end that was asked for."""
        self.first = self.done = iteration
        if iteration > self.total:
            asked, self.total = self.total, iteration
            done = f"{iteration} iterations ({iteration / self.per_epoch:.4g} epochs)"
            self.say_fact("done before", f"{done}, and this command asks for {asked}, so it trains no more")

    def advance(self, n: int = 1) -> None:
        self.done += n
        tick = (self.done, perf_counter())
        self._first_tick, self._last_tick = self._first_tick or tick, tick
        self._ticks.append(tick)

    def iteration(self, record: dict) -> None:
        self._record = record
        if not self._live:
            position = self._position(record["iteration"], record["iteration"] + 1)
            self.say("  ".join([*position, self._numbers(record["images_per_second"]), self._left()]))

    def epoch(self, record: dict) -> None:
        self._ticks.clear()  # so that the speed leaves out the evaluation
        judged = "  ".join(_judged(measure, record) for measure in self.judged_by if _has(measure, record))
        loss = f"loss {_number(record['train_loss'], '.4f')}  took {clock(record['seconds'])}"
        self.say(f"{self._epoch(ceil(record['epoch']))}  {judged}  {loss}")

    def say(self, text: str, indent: int = 2) -> None:
        """Print a line, fitted to a terminal's width. If that fails, training goes on, because the log has it too."""
        text = harmless(text)
        if self.console.is_terminal:
            text = fitted(text, self.console.width, indent)
        with suppress(OSError):  # stdout may be a file on a full disk
            # soft_wrap: a file has no width, so its lines are never broken.
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_fact(self, name: str, value: object) -> None:
        """Print a name and its value."""
        self.say(fact(name, value), NAME_WIDTH)

    def _screen(self) -> Group:
        """Draw the two lines, of at most 80 columns, at the foot of a terminal. Called a few times per second."""
        epoch, iteration = self._position(min(self.done, self.total - 1), self.done)
        bar = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):  # the bar takes the columns that the words leave
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(epoch, ProgressBar(total=self.total, completed=self.done), iteration, self._left())
        numbers = self._numbers(self._speed()) if self._record else ""
        return Group(bar, Text(numbers, no_wrap=True, overflow="ellipsis"))

    def _numbers(self, images_per_second: float | None) -> str:
        record = self._record
        return (
            f"lr {record['lr']:.5f}  loss {_number(record['train_loss'], '.4f')}  "
            f"{_number(images_per_second, '5.0f')} images/s  waiting {_number(record['data_wait_pct'], '4.1f')} %"
            + (f"  aggregating {record['aggregation_wait_pct']:4.1f} %" if "aggregation_wait_pct" in record else "")
        )

    def _speed(self) -> float | None:
        """Return the images per second of the last iterations, else of the last record."""
        if self.images_per_iteration is None or len(self._ticks) < 2:
            return self._record["images_per_second"]
        (first, start), (last, now) = self._ticks[0], self._ticks[-1]
        return self.images_per_iteration * (last - first) / max(now - start, 1e-9)

    def _position(self, iteration: int, done: int) -> tuple[str, str]:
        return self._epoch(iteration // self.per_epoch + 1), f"iteration {_of(done, self.total)}"

    def _epoch(self, epoch: int) -> str:
        return f"epoch {_of(epoch, ceil(self.total / self.per_epoch))}"

    def _left(self) -> str:
        """Return the time left for the whole run at this process's pace so far, including evaluations."""
        if self._first_tick is None or self._last_tick is None or self._last_tick == self._first_tick:
            return "left -"  # the first iteration tells nothing, because it also warms everything up
        (first, start), (last, now) = self._first_tick, self._last_tick
        return f"left {clock((now - start) / (last - first) * (self.total - last))}"


def _has(measure: Measure, record: dict) -> bool:
    """Whether an epoch's record has numbers of a measure. Without an evaluation it has only training's counts."""
    return measure.key in record or measure.training in record


def _judged(measure: Measure, record: dict) -> str:
    """Return `error: train 12.35 %  val  9.80 %`, or `box AP 35.90` if nothing is counted in training."""
    unit = measure.unit and f" {measure.unit}"
    value = _number(record.get(measure.key), "5.2f") + unit
    if measure.training not in record:
        return f"{measure.short} {value}"
    return f"{measure.short}: train {_number(record[measure.training], '5.2f')}{unit}  val {value}"


def _of(position: int, total: int) -> str:
    return f"{position:>{len(str(total))}}/{total}"


def _number(value: float | None, form: str) -> str:
    """Format a number that the log may hold as null."""
    return "-" if value is None else format(value, form)
