"""The vocabulary of an experiment: a data set, the rows of a table, and claims about them stated beforehand."""

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
    """A deeper network for a data set: its recipe, and what `ours` is measured on with it."""

    recipe: str
    place: str


@dataclass(frozen=True)
class DataSet:
    """A data set, its network, and the numbers of its baseline, which were chosen on the baseline alone.

    recipe, config    paths of the recipe's script and the JSON of the large batch, relative to the repository's root
    deeper            a deeper network for Table 2c, if there is one
    base_batch        images per update of the baseline; base_lr is its learning rate, chosen among candidate_lrs if any
    decay_epochs      the epochs at which the learning rate falls; none if the JSON counts in iterations
    large             the factor at which Tables 1 and 2 compare; factors are those of Figure 1
    micro_batch       maximum images of one pass
    margin_pct        two rows differ by less than this many points, or the claim of "no difference" fails
    prepare           commands that make data_dir, each a list of arguments after `python`; {work_dir} is filled in
    data_dir          folder of the .beton files; {work_dir} is filled in
    gpus_per_run      GPUs that a run takes if there are any; 0 for all of the machine
    per_worker_batch  n; every micro batch is a multiple of it
    complete          the file in data_dir that exists once the data is complete
    is_detection      whether the recipe trains a detector
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
    """A row of a table: a global batch of `factor` times the baseline's, and other settings of the JSON.

    name             the name of its folder. Two experiments that share a row give it the same name, so it runs once.
    script, flags    a script to run in place of the data set's recipe, and further flags
    epochs           the epochs of a run, if not the data set's
    inputs           flags with files that other runs made, such as ("--backbone_weights", "{work_dir}/.../weights.pt")
    made_by          the command that makes these files
    is_simulated     whether the script simulates workers on one process (`commands.simulate`)
    """

    name: str
    factor: int
    settings: tuple[str, ...] = ()
    script: str | None = None
    flags: tuple[str, ...] = ()
    epochs: int | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    made_by: str = ""
    is_simulated: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, stated before the runs: row `row` against row `against`.

    kind           "same": the 95 % interval of the difference (row - against) lies within ± the data set's margin;
                   "no worse": the interval lies below the margin; "worse": it lies above zero. If more is better, as
                   with average precision, "below" and "above" change places
    curves_from    compare how far the training curves of both rows lie from this row's mean curve (`match.distances`);
                   without it, compare their errors
    """

    text: str
    row: str
    kind: str
    against: str
    curves_from: str = ""


@dataclass(frozen=True)
class Study:
    """One experiment: its rows and its claims for a data set, and the place in the paper that it repeats.

    sections        makes the sections of its page from the rows by name; by default the paper's table and its curves
    grid            the grid, with its own commit, that its runs belong to; by default the data set's
    is_detection    whether it compares detectors, which have their own data sets
    table           the table of the paper that its rows make, by default the one with its name
    place           what `ours` is measured on, by default the data set's
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
        """The tables that its page and its pictures show, if its rows make them."""
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
        """Return the files of other runs that this run needs, by their flags."""
        return {flag: Path(file.format(work_dir=work_dir, seed=self.seed)) for flag, file in self.row.inputs}


def jobs_of(rows: tuple[Row, ...], seeds: tuple[int, ...]) -> list[Job]:
    """Return the runs of a grid: every row with the first seed, then with the second, so that rows compare early."""
    return [Job(row, seed) for seed in seeds for row in rows]


# --- the rows that several studies share ------------------------------------------------------------------------------


def gradual(factor: int) -> Row:
    """Return a batch of `factor` times the baseline's by the linear rule, with gradual warmup if factor > 1."""
    return Row(f"x{factor}", factor)


BASELINE = gradual(1)  # the small batch without warmup, with which everything is compared


def setting(key: str, value: object) -> str:
    """Return the argument of --set for a value of the `lbsgd` block."""
    return f"lbsgd.{key}={json.dumps(value)}"
