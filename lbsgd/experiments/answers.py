"""The claims of the paper that were stated beforehand, answered with the numbers, also where they fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbsgd.experiments.grid import Claim, DataSet, Study
from lbsgd.report.groups import Group
from lbsgd.report.statistics import Difference, difference, verdict
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


@dataclass(frozen=True)
class Answer:
    """A claim with the difference that was measured, and whether it holds; None while runs are missing."""

    claim: Claim
    apart: Difference | None
    holds: bool | None
    test: str
    diverged: tuple[int, ...] = (0, 0)  # runs of the two rows

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        pair = f"{self.claim.row} - {self.claim.against}"
        rows = zip((self.claim.row, self.claim.against), self.diverged, strict=True)
        lost = ", ".join(f"{number} of {name} diverged" for name, number in rows if number)
        return self.claim.text, pair, self.test, str(self.apart or lost or "-"), WORDS[self.holds]


HEADS = ("claim", "rows", "test", "difference [95 %]", "holds")


def answers(study: Study, data: DataSet, rows: dict[str, Group], num_seeds: int) -> list[Answer]:
    """Answer a study's claims; rows are by their names, and a row with fewer than num_seeds runs answers nothing."""
    found = []
    for claim in study.claims(data):
        pair = [rows.get(claim.row), rows.get(claim.against)]
        values = [row.values for row in pair if row and len(row.values) >= num_seeds]
        diverged = tuple(row.num_diverged if row else 0 for row in pair)
        apart = difference(*values) if len(values) == 2 and not any(diverged) else None
        higher = any(row.measure.higher for row in pair if row)
        test = (MORE_IS_BETTER if higher else TESTS)[claim.kind].format(margin=data.margin_pct)
        judged = apart.opposite() if apart and higher else apart
        holds = verdict(claim.kind, judged, data.margin_pct) if apart else of_diverged(claim.kind, pair, num_seeds)
        found.append(Answer(claim, apart, holds, test, diverged))
    return found


def of_diverged(kind: str, pair: Sequence[Group | None], num_seeds: int) -> bool | None:
    """Answer where all runs have ended and one row has runs without a result: it is worse, and not the same."""
    if any(row is None or len(row.values) + row.num_diverged < num_seeds for row in pair):
        return None
    lost = [bool(row and row.num_diverged) for row in pair]
    if lost == [True, False]:
        return kind == "worse"
    return kind == "no worse" if lost == [False, True] else None


def markdown(found: Sequence[Answer]) -> str:
    return markdown_table(HEADS, [answer.cells for answer in found]) + "\n"
