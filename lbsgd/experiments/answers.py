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
UNANSWERABLE = "could not be answered"  # the row compared with has diverged, or both have; or all seeds are equal


@dataclass(frozen=True)
class Answer:
    """A claim with the difference that was measured, and whether it holds; None where that is not known."""

    claim: Claim
    apart: Difference | None
    holds: bool | None
    test: str
    diverged: tuple[int, ...] = (0, 0)  # runs of the two rows
    ended: bool = False  # whether all runs of both have ended
    num_seeds: int = 1

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        pair = f"{self.claim.row} - {self.claim.against}"
        rows = zip((self.claim.row, self.claim.against), self.diverged, strict=True)
        lost = ", ".join(f"{number} of {name} diverged" for name, number in rows if number)
        settled = self.ended and (lost or self.num_seeds > 1)
        holds = UNANSWERABLE if self.holds is None and settled else WORDS[self.holds]
        return self.claim.text, pair, self.test, str(self.apart or lost or "-"), holds


HEADS = ("claim", "rows", "test", "difference [95 %]", "holds")


def answers(study: Study, data: DataSet, rows: dict[str, Group], num_seeds: int) -> list[Answer]:
    """Answer a study's claims; rows are by their names, and a row with fewer than num_seeds runs answers nothing."""
    found = []
    for claim in study.claims(data):
        pair = [rows.get(claim.row), rows.get(claim.against)]
        values = [row.values for row in pair if row and len(row.values) >= num_seeds]
        diverged = tuple(row.num_diverged if row else 0 for row in pair)
        ended = all(row and len(row.values) + row.num_diverged >= num_seeds for row in pair)
        apart = difference(*values) if len(values) == 2 and not any(diverged) else None
        higher = any(row.measure.higher for row in pair if row)
        test = (MORE_IS_BETTER if higher else TESTS)[claim.kind].format(margin=data.margin_pct)
        judged = apart.opposite() if apart and higher else apart
        holds = verdict(claim.kind, judged, data.margin_pct)
        if ended and any(diverged):
            holds = of_diverged(claim.kind, *diverged)
        found.append(Answer(claim, apart, holds, test, diverged, ended, num_seeds))
    return found


def of_diverged(kind: str, row: int, against: int) -> bool | None:
    """Answer where one row has runs without a result: it is worse, and not the same.

    A row beside it that has finished is no worse; whether it is worse than a whole run would be cannot be told.
    """
    if row and not against:
        return kind == "worse"
    if against and not row:
        return {"worse": None, "same": False, "no worse": True}[kind]
    return None


def markdown(found: Sequence[Answer]) -> str:
    return markdown_table(HEADS, [answer.cells for answer in found]) + "\n"
