"""Claims about rows that have diverged, or whose seeds are equal: what can be said of them, and what cannot."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lbsgd.experiments.answers import answers
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.grid import Claim
from lbsgd.report.measure import TOP1


def cells(kind, row, against):
    """The answer about two rows of two seeds, each given by its values and how many of its runs diverged."""
    study = replace(STUDIES["table1"], claims=lambda data: (Claim("a claim", "a", kind, "b"),))
    names = ("a", "b")
    rows = {
        name: SimpleNamespace(values=values, num_diverged=diverged, measure=TOP1)
        for name, (values, diverged) in zip(names, (row, against), strict=True)
    }
    [answer] = answers(study, DATA_SETS["digits"], rows, num_seeds=2)
    return answer.cells[3:]


FINISHED, DIVERGED = ([1.0, 2.0], 0), ([1.0], 1)


@pytest.mark.parametrize("kind, holds", [("worse", "could not be answered"), ("same", "no"), ("no worse", "yes")])
def test_a_row_beside_one_that_diverged_is_no_worse_and_nobody_knows_whether_it_is_worse(kind, holds):
    assert cells(kind, FINISHED, DIVERGED) == ("1 of b diverged", holds)


@pytest.mark.parametrize("kind, holds", [("worse", "yes"), ("same", "no"), ("no worse", "no")])
def test_a_row_that_diverged_is_worse(kind, holds):
    assert cells(kind, DIVERGED, FINISHED) == ("1 of a diverged", holds)


@pytest.mark.parametrize("kind", ["worse", "same", "no worse"])
def test_two_rows_that_diverged_answer_nothing(kind):
    assert cells(kind, DIVERGED, DIVERGED) == ("1 of a diverged, 1 of b diverged", "could not be answered")


@pytest.mark.parametrize("kind", ["worse", "same", "no worse"])
def test_equal_seeds_answer_nothing(kind):
    assert cells(kind, ([2.0, 2.0], 0), ([1.0, 1.0], 0)) == ("+1.00", "could not be answered")


def test_a_claim_is_open_while_a_run_goes_on():
    assert cells("worse", ([1.0], 0), DIVERGED) == ("1 of b diverged", "not known yet")
