"""The words of an experiment: a data set, the rows of a table, and what is claimed of them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from lbsgd.report.groups import Group
from lbsgd.report.page import Section


class Deeper(NamedTuple):
    """Another network for a data set: its recipe, and what `ours` is measured on with it."""

    recipe: str
    place: str


@dataclass(frozen=True)
class DataSet:
    """A data set, its network, and the numbers of its baseline, which were chosen on the baseline alone.

    recipe, config    the recipe's script and the JSON of the large batch, from the repository's root
    deeper            a deeper network for Table 2c, where there is one
    base_batch        images per update of the baseline; base_lr is its learning rate, chosen among candidate_lrs if any
    decay_epochs      where the learning rate falls, in epochs; none where the JSON counts in iterations
    large             the factor at which Tables 1 and 2 compare; factors are those of Figure 1
    micro_batch       most images of one pass
    margin_pct        two rows differ by less than this many points, or the claim of "no difference" fails
    prepare           commands that make data_dir, each a list of arguments after `python`; {work_dir} is filled in
    data_dir          folder of the .beton files; {work_dir} is filled in
    gpus_per_run      GPUs that a run takes where there are any; 0 for all of the machine
    per_worker_batch  n, of which every micro batch is a multiple
    complete          the file in data_dir that is there once the data is complete
    is_detection      whether it trains a detector
    place             what `ours` is measured on, for the headings of tables
    """

    name: str
    place: str
    recipe: str
    config: str
    base_batch: int
    base_lr: float
    warmup_epochs: float
    decay_epochs: tuple[float, ...]
    epochs: int
    large: int
    factors: tuple[int, ...]
    micro_batch: int
    margin_pct: float
    prepare: tuple[tuple[str, ...], ...]
    data_dir: str
    gpus_per_run: int = 1
    candidate_lrs: tuple[float, ...] = ()
    per_worker_batch: int = 32
    complete: str = "manifest.json"
    is_detection: bool = False
    deeper: Deeper | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: a global batch of `factor` times the baseline's, and what is set otherwise in the JSON.

    The name is that of its folder. Two experiments that share a row give it the same name, and it runs once.
    script, flags    what runs in place of the data set's recipe, and its own flags
    epochs           how many a run takes, where these are others than the data set's
    inputs           flags with files that other runs made, such as ("--backbone_weights", "{work_dir}/.../weights.pt")
    made_by          the command that makes these files
    """

    name: str
    factor: int
    settings: tuple[str, ...] = ()
    script: str | None = None
    flags: tuple[str, ...] = ()
    epochs: int | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    made_by: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, stated before the runs: row `row` against row `against`.

    kind    "same": the 95 % interval of the difference (row - against) lies within ± the data set's margin;
            "no worse": the interval lies below the margin; "worse": it lies above zero. Where more is better, as with
            average precision, "below" and "above" change places
    curves_from    the row from whose mean training curve the curves of both are measured (`match.distances`), and these
            distances are compared; without it the errors are
    """

    text: str
    row: str
    kind: str
    against: str
    curves_from: str = ""


@dataclass(frozen=True)
class Study:
    """One experiment: its rows and its claims for a data set, and the place in the paper that it repeats.

    sections    what its page shows of the rows, by their names; by default the paper's table and its curves
    grid        the grid, with a commit of its own, that its runs belong to; by default the data set's
    is_detection    whether it compares detectors, which have data sets of their own
    table       the table of the paper that its rows make, by default that of its own name
    place       what `ours` is measured on, by default the data set's
    """

    name: str
    title: str
    source: str
    rows: Callable[[DataSet], tuple[Row, ...]]
    claims: Callable[[DataSet], tuple[Claim, ...]]
    sections: Callable[[DataSet, dict[str, Group]], list[Section]] | None = None
    grid: str = ""
    is_detection: bool = False
    table: str = ""
    place: Callable[[DataSet], str] = attrgetter("place")

    @property
    def tables(self) -> tuple[str]:
        """The tables that its page and its pictures show, where its rows make them."""
        return (self.table or self.name,)


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}/seed{self.seed}"

    def folder(self, runs: Path) -> Path:
        return runs / self.row.name / f"seed{self.seed}"

    def global_batch(self, data: DataSet) -> int:
        return self.row.factor * data.base_batch

    def inputs(self, work_dir: Path) -> dict[str, Path]:
        """Return the files that the run needs of other runs, by their flags."""
        return {flag: Path(file.format(work_dir=work_dir, seed=self.seed)) for flag, file in self.row.inputs}


def jobs_of(rows: tuple[Row, ...], seeds: tuple[int, ...]) -> list[Job]:
    """Return the runs of a grid: every row with the first seed, then with the second, to compare early."""
    return [Job(row, seed) for seed in seeds for row in rows]


# --- the rows that several studies share ------------------------------------------------------------------------------


def gradual(factor: int) -> Row:
    """Return a batch of `factor` times the baseline's by the linear rule, with gradual warmup where it is larger."""
    return Row(f"x{factor}", factor)


BASELINE = gradual(1)  # the small batch without warmup, which everything is compared with


def setting(key: str, value: object) -> str:
    """Return the --set of a value of the `lbsgd` block."""
    return f"lbsgd.{key}={json.dumps(value)}"
