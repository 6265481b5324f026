"""The page of a run while it trains, and the warning if its training curve stays above the baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

from lbsgd.errors import ConfigError
from lbsgd.report.groups import find_runs, group_runs
from lbsgd.report.match import CAUSES, SEEDS, limits
from lbsgd.report.measure import TOP1, TRAIN_TOP1
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.run_page import POINTS, run_page
from lbsgd.units import counted

Records = Sequence[dict[str, Any]]
Limits = Mapping[float, float]  # of the training error, by epoch


def baseline_limits(runs: Sequence[str | Path]) -> Limits:
    """Return the highest training error, by epoch, of a run that follows the baseline (`report.match.limits`).

    runs: the baseline. Raises ConfigError if they are not at least 3 finished runs of one recipe with different seeds,
    or if one has diverged, and DataError if a log cannot be read.
    """
    groups, given = group_runs(find_runs(runs)), f"--baseline {' '.join(map(str, runs))}"
    for group in groups:
        if group.measure != TOP1:
            raise ConfigError(
                f"{given}: {group.header['model']} has no training error to compare with; leave the flag out"
            )
    if len(groups) != 1 or len(groups[0].finished) < SEEDS:
        finished = counted(sum(len(group.finished) for group in groups), "finished run")
        raise ConfigError(
            f"{given}: {finished} of {counted(len(groups), 'recipe')}; give at least {SEEDS} finished runs of one "
            "recipe that differ in their seed"
        )
    if not groups[0].whole:
        raise ConfigError(
            f"{given}: {groups[0].num_diverged} of {len(groups[0].runs)} seeds diverged, and the curves of the others "
            "are not the recipe's; give a recipe whose seeds all finish"
        )
    return limits(groups[0].finished)


class LivePage:
    """Writes index.html after each epoch and at the end. If it cannot be written, training goes on.

    folder, header    the run's folder, and the first line of its log
    baseline          limits of the training error (`baseline_limits`); a run that stays above them gets a warning
    """

    def __init__(self, folder: Path, header: dict[str, Any], baseline: Limits | None = None):
        self.folder, self.header, self.baseline = folder, header, baseline or {}
        self.warnings: list[str] = []
        self.starts: Records = ()  # earlier starts, as the log describes them; the header is this start's
        self.measured: list[dict[str, Any]] = []  # some hundred iteration records with diagnostics
        self.seen, self.stride = 0, 1  # such records so far; every stride-th of them is kept
        self.cannot_write = False

    def take_up(self, logged: LoggedRun) -> None:
        """Take over the log's record of the run: earlier starts, measurements and warnings."""
        self.starts = [logged.header, *logged.resumes]
        for record in logged.iterations:
            self.note(record)
        self.warnings = self.compare(logged.epochs)

    def note(self, record: dict[str, Any]) -> None:
        """Keep an iteration record for the page if it has diagnostics. Of many, keep every second, then every fourth.

        A run on ImageNet may have 45,000 such records, of several kB each, and training waits for the page.
        """
        if "noise_scale" not in record:
            return
        if self.seen % self.stride == 0:
            self.measured.append(record)
        self.seen += 1
        if len(self.measured) == 2 * POINTS:
            self.measured, self.stride = self.measured[::2], 2 * self.stride

    def write(self, epochs: Records, result: dict[str, Any] | None = None, ended: str = "") -> list[str]:
        """Write the page with these epochs. Return the lines to print, such as a new warning.

        ended: why a run without a result has stopped. Without this, its page reloads itself.
        """
        known, self.warnings = len(self.warnings), self.compare(epochs)
        said = self.warnings[known:]
        try:
            run = LoggedRun(self.folder, self.header, self.measured, list(epochs), result, self.starts)
            run_page(run, self.warnings, ended).write(self.folder)
        except ConfigError as error:
            said += [] if self.cannot_write else [f"{error}; training goes on without the page"]
            self.cannot_write = True
        return said

    @property
    def patience(self) -> tuple[float, int]:
        """How many epochs are ignored, and for how many epochs in a row after them training must lie above.

        Training is compared after a quarter of the epochs, when the paper's curves have met (Sec. 5.2), and after twice
        the warmup. It must lie above in a tenth of the epochs, and in at least 3, which rarely happens by chance.
        """
        planned = max(self.baseline, default=0)
        warmup = self.header["schedule"]["warmup_iterations"] / self.header["iterations_per_epoch"]
        return max(planned / 4, 2 * warmup), max(3, ceil(planned / 10))

    def too_short(self, last: float) -> str | None:
        """Return what to say if the run's or the baseline's last epoch is too early for any warning, else None."""
        first, last = floor(self.patience[0]) + self.patience[1], min(last, max(self.baseline, default=last))
        if not self.baseline or first <= last:
            return None
        return (
            f"--baseline warns from epoch {first} on at the earliest, and epoch {last:g} is the last that it compares"
        )

    def compare(self, epochs: Records) -> list[str]:
        """Return a warning for each time that training rises above the baseline's limits and stays above."""
        left_out, stay = self.patience
        warnings, above = [], 0
        for epoch, error in ((record["epoch"], record.get(TRAIN_TOP1)) for record in epochs):
            if epoch not in self.baseline or epoch <= left_out:
                continue
            highest = self.baseline[epoch]
            above = above + 1 if error is not None and error > highest else 0
            if above == stay:
                warnings.append(
                    f"epoch {epoch:g}: the training error, now {error:.2f} %, has been above the baseline's (at most "
                    f"{highest:.2f} %) for {stay} epochs; a curve that stays above mostly ends at a higher error "
                    f"(Sec. 5.2), usual causes: {CAUSES}"
                )
        return warnings
