"""The page of a run while it trains, and the warning when its training curve leaves the baseline's band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbsgd.errors import ConfigError
from lbsgd.report.groups import find_runs, group_runs
from lbsgd.report.match import CAUSES, SEEDS, band
from lbsgd.report.measure import TOP1, TRAIN_TOP1
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.run_page import run_page
from lbsgd.units import counted

Records = Sequence[dict[str, Any]]
Band = Sequence[tuple[float, float]]


def baseline_band(runs: Sequence[str | Path]) -> Band:
    """Return the training errors between which a run follows the baseline, per epoch (`report.match.band`).

    Raises ConfigError if they are not at least 3 finished runs of one recipe with different seeds, or one of them has
    diverged, DataError for a log that cannot be read.
    """
    groups = group_runs(find_runs(runs))
    for group in groups:
        if group.measure != TOP1:
            raise ConfigError(
                f"--baseline {' '.join(map(str, runs))}: {group.header['model']} has no training error to compare "
                "with; leave the flag out"
            )
    if len(groups) != 1 or len(groups[0].finished) < SEEDS:
        finished = counted(sum(len(group.finished) for group in groups), "finished run")
        raise ConfigError(
            f"--baseline {' '.join(map(str, runs))}: {finished} of {counted(len(groups), 'recipe')}; give at least "
            f"{SEEDS} finished runs of one recipe that differ in their seed"
        )
    if not groups[0].whole:
        raise ConfigError(
            f"--baseline {' '.join(map(str, runs))}: {groups[0].num_diverged} of {len(groups[0].runs)} seeds diverged, "
            "and the curves of the others are not the recipe's; give a recipe whose seeds all finish"
        )
    return band(groups[0].finished)


class LivePage:
    """Writes index.html after each epoch and at the end. A page that cannot be written ends no training.

    folder, header    the run's folder, and the first line of its log
    baseline          training errors (lowest, highest) of each epoch; after the warmup, errors outside are reported
    """

    def __init__(self, folder: Path, header: dict[str, Any], baseline: Band = ()):
        self.folder, self.header, self.baseline = folder, header, baseline
        self.warnings: list[str] = []
        self.measured: list[dict[str, Any]] = []  # iteration records with diagnostics
        self.outside = False
        self.cannot_write = False

    def take_up(self, logged: LoggedRun) -> None:
        """Go on with the log's record of the run: the measured numbers, and the warnings already given."""
        self.measured = [record for record in logged.iterations if "noise_scale" in record]
        self.warnings = [warning for record in logged.epochs for warning in self.compare(record)]

    def write(self, epochs: Records, result: dict[str, Any] | None = None, ended: str = "") -> list[str]:
        """Write the page with these epochs; return the lines to print: a warning about the last epoch, if any.

        ended: why a run without a result has stopped; otherwise its page reloads itself.
        """
        said = self.compare(epochs[-1]) if epochs and result is None else []
        self.warnings += said
        try:
            run = LoggedRun(self.folder, self.header, self.measured, list(epochs), result)
            run_page(run, self.warnings, ended).write(self.folder)
        except ConfigError as error:
            said += [] if self.cannot_write else [f"{error}; training goes on without the page"]
            self.cannot_write = True
        return said

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Return a warning if the epoch leaves the baseline's band; another one only after it has come back."""
        epoch, error = record["epoch"], record.get(TRAIN_TOP1)
        warmup = self.header["schedule"]["warmup_iterations"] / self.header["iterations_per_epoch"]
        if error is None or epoch != int(epoch) or epoch > len(self.baseline) or epoch <= 2 * warmup:
            return []
        low, high = self.baseline[epoch - 1]
        before, self.outside = self.outside, not low <= error <= high
        if before or not self.outside:
            return []
        return [
            f"epoch {epoch}: training error {error:.2f} % is outside the baseline's {max(low, 0):.2f} to {high:.2f} %; "
            f"a curve that does not follow it ends at a higher error (Sec. 5.2), usual causes: {CAUSES}"
        ]
