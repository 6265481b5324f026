"""What a person watches while a run goes on: a bar on a terminal, plain lines anywhere else (rank 0 only)."""

import sys
from math import ceil
from time import perf_counter

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lbsgd.units import clock


class Progress:
    """Shows epoch, iteration, lr, loss, images a second, the share of time spent waiting for data, and time left.

        with Progress(plan.num_iterations, plan.iterations_per_epoch) as progress:
            progress.advance()            after every iteration; an addition and a look at the clock
            progress.iteration(record)    an iteration record of the run log
            progress.epoch(record)        an epoch record: a line that stays
            progress.say(text)            any other line that stays

    A resumed run begins at first_iteration. `console` tells whether there is a terminal; by default it is stdout's.
    """

    def __init__(
        self, total_iterations: int, iterations_per_epoch: int, first_iteration: int = 0, console: Console | None = None
    ):
        self.total, self.per_epoch, self.done = total_iterations, iterations_per_epoch, first_iteration
        # Said outright, for FORCE_COLOR, which build servers set, makes rich take a file for a terminal.
        self.console = console or Console(force_terminal=sys.stdout.isatty())
        self._numbers = ""
        self._ticks: tuple[tuple[int, float], ...] = ()
        self._live = None
        if self.console.is_interactive:
            self._live = Live(get_renderable=self._screen, console=self.console, transient=True)

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self._live.stop()

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._ticks = (*self._ticks[:1], (self.done, perf_counter()))  # the first and the last

    def iteration(self, record: dict) -> None:
        self._numbers = (
            f"lr {record['lr']:.5f}  loss {_number(record['train_loss'], '.4f')}  "
            f"{_number(record['images_per_second'], '5.0f')} images/s  "
            f"waiting {_number(record['data_wait_pct'], '4.1f')} %"
        )
        if not self._live:
            position = self._position(record["iteration"], record["iteration"] + 1)
            self.say("  ".join([*position, self._numbers, self._left()]))

    def epoch(self, record: dict) -> None:
        self.say(
            f"{self._epoch(record['epoch'])}  error: train {record['train_top1_error_pct']:5.2f} %  "
            f"val {record['val_top1_error_pct']:5.2f} %  loss {_number(record['train_loss'], '.4f')}  "
            f"took {clock(record['seconds'])}"
        )

    def say(self, text: str) -> None:
        # soft_wrap: a file has no width, so a line there is never broken.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _screen(self) -> Group:
        """The two lines at the foot of a terminal, drawn a few times a second; at most 80 columns."""
        epoch, iteration = self._position(min(self.done, self.total - 1), self.done)
        bar = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):  # The bar takes the columns that the words leave.
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(epoch, ProgressBar(total=self.total, completed=self.done), iteration, self._left())
        return Group(bar, Text(self._numbers, no_wrap=True, overflow="ellipsis"))

    def _position(self, iteration: int, done: int) -> tuple[str, str]:
        return self._epoch(iteration // self.per_epoch + 1), f"iteration {_of(done, self.total)}"

    def _epoch(self, epoch: int) -> str:
        return f"epoch {_of(epoch, ceil(self.total / self.per_epoch))}"

    def _left(self) -> str:
        """Time left of the whole run at this process's pace so far, evaluations included."""
        if len(self._ticks) < 2:  # The first iteration, which also warms everything up, tells nothing.
            return "left -"
        (first, start), (last, now) = self._ticks
        return f"left {clock((now - start) / (last - first) * (self.total - last))}"


def _of(position: int, total: int) -> str:
    return f"{position:>{len(str(total))}}/{total}"


def _number(value: float | None, form: str) -> str:
    """A number that the log may hold as null."""
    return "-" if value is None else format(value, form)
