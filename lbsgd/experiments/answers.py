"""Answers the claims that were stated before the runs. A claim that fails is reported like one that holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lbsgd.experiments.grid import Claim, DataSet, Study
from lbsgd.report.groups import Group
from lbsgd.report.match import distances
from lbsgd.report.statistics import Difference, difference, fisher, verdict
from lbsgd.units import markdown_table

TESTS = {
    "same": "the interval lies within ±{margin:g}",
    "no worse": "the interval lies below {margin:g}",
    "worse": "the interval lies above 0",
}
MORE_IS_BETTER = {
    **TESTS,
    "no worse": "the interval lies above -{margin:g}",
    "worse": "the interval lies below 0",
}
WORDS = {True: "yes", False: "no", None: "not known yet"}
UNANSWERABLE = "could not be answered"  # too few seeds diverged to tell, or some of both rows, or all errors are equal
SIGNIFICANT = 0.05
BY_SEEDS = f"; as seeds diverged: Fisher's exact test of their number, one-sided, p ≤ {SIGNIFICANT:g}"


class Seeds(NamedTuple):
    """How many runs of a row have diverged, and how many have ended in all."""

    diverged: int = 0
    ended: int = 0

    @classmethod
    def of(cls, row: Group | None) -> Seeds:
        return cls(row.num_diverged, len(row.values) + row.num_diverged) if row else cls()


@dataclass(frozen=True)
class Answer:
    """A claim with the measured difference, and whether it holds; None if that is not known."""

    claim: Claim
    apart: Difference | None
    holds: bool | None
    test: str
    diverged: tuple[Seeds, Seeds] = (Seeds(), Seeds())  # of the two rows
    ended: bool = False  # whether all runs of the claim's rows have ended
    num_seeds: int = 1

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row of the claims' table. The answer comes early, because a narrow screen shows only some columns."""
        curves = f", distances of curves from {self.claim.curves_from}" if self.claim.curves_from else ""
        pair = f"{self.claim.row} - {self.claim.against}{curves}"
        rows = zip((self.claim.row, self.claim.against), self.diverged, strict=True)
        lost = ", ".join(f"{number} of {ended} seeds of {name} diverged" for name, (number, ended) in rows if number)
        settled = self.ended and (lost or self.num_seeds > 1)
        holds = UNANSWERABLE if self.holds is None and settled else WORDS[self.holds]
        return self.claim.text, holds, str(self.apart or lost or "-"), pair, self.test


HEADS = ("claim", "holds", "difference [95 %]", "rows", "test")


def answers(study: Study, data: DataSet, rows: dict[str, Group], num_seeds: int) -> list[Answer]:
    """Answer a study's claims. rows maps names to rows; a row with fewer than num_seeds runs answers nothing."""
    found = []
    for claim in study.claims(data):
        row, against = rows.get(claim.row), rows.get(claim.against)
        pair = [each for each in (row, against) if each]
        values = [seen for each in pair if len(seen := compared(claim, each, rows, num_seeds)) >= num_seeds]
        diverged = Seeds.of(row), Seeds.of(against)
        names = filter(None, (claim.row, claim.against, claim.curves_from))
        ended = all(Seeds.of(rows.get(name)).ended >= num_seeds for name in names)
        lost = any(seeds.diverged for seeds in diverged)
        apart = difference(*values) if len(values) == 2 and not lost else None
        higher = not claim.curves_from and any(each.measure.higher for each in pair)
        test = (MORE_IS_BETTER if higher else TESTS)[claim.kind].format(margin=data.margin_pct)
        judged = apart.opposite() if apart and higher else apart
        holds = verdict(claim.kind, judged, data.margin_pct)
        if lost:
            test += BY_SEEDS
            holds = of_diverged(claim.kind, *diverged) if ended else None
        found.append(Answer(claim, apart, holds, test, diverged, ended, num_seeds))
    return found


def compared(claim: Claim, row: Group, rows: dict[str, Group], num_seeds: int) -> list[float]:
    """Return the numbers of a row's seeds that the claim compares: their errors, or the distances of their curves."""
    if not claim.curves_from:
        return row.values
    baseline = rows.get(claim.curves_from)
    if baseline is None or not baseline.whole or len(baseline.finished) < num_seeds:
        return []  # its mean is not known
    return distances(row, baseline)


def of_diverged(kind: str, row: Seeds, against: Seeds) -> bool | None:
    """Answer a claim about rows with diverged seeds. A row is worse if clearly more of its seeds have diverged.

    The other row is then no worse. Whether it is worse than the row's runs would be without divergence is not known.
    Nor is anything known if only a few more seeds have diverged.
    """
    if clearly_more(row, against):
        return kind == "worse"
    if clearly_more(against, row):
        return {"worse": None, "same": False, "no worse": True}[kind]
    return None


def clearly_more(row: Seeds, against: Seeds) -> bool:
    """Return whether more seeds diverge than chance explains. Three of three against none of three has p = 0.05."""
    return fisher(row.diverged, row.ended, against.diverged, against.ended) <= SIGNIFICANT


def markdown(found: Sequence[Answer]) -> str:
    return (markdown_table(HEADS, [answer.cells for answer in found]) if found else "No claim.") + "\n"
