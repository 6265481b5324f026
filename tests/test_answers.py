"""Claims about rows with diverged seeds or equal seeds: what can be concluded, and what cannot."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lbsgd.experiments.answers import Answer, answers, markdown
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.grid import Claim
from lbsgd.report.measure import TOP1
from lbsgd.report.statistics import Difference


def cells(kind, row, against, num_seeds=None):
    """The answer about two rows, each given by its values and how many of its runs diverged."""
    study = replace(STUDIES["table1"], claims=lambda data: (Claim("a claim", "a", kind, "b"),))
    names = ("a", "b")
    rows = {
        name: SimpleNamespace(values=values, num_diverged=diverged, measure=TOP1)
        for name, (values, diverged) in zip(names, (row, against), strict=True)
    }
    num_seeds = num_seeds or min(len(values) + diverged for values, diverged in (row, against))
    [answer] = answers(study, DATA_SETS["digits"], rows, num_seeds=max(2, num_seeds))
    return answer.cells[2], answer.cells[1]


KINDS = ("worse", "same", "no worse")
OPEN = "could not be answered"
TWO, TWO_OF_TWO, ONE_OF_TWO = ([1.0, 2.0], 0), ([], 2), ([1.0], 1)
FINISHED, DIVERGED = ([1.0, 2.0, 1.0], 0), ([], 3)
FIVE, ONE_OF_FIVE, FOUR_OF_FIVE = ([1.0, 2.0, 1.0, 2.0, 1.0], 0), ([1.0, 2.0, 1.0, 2.0], 1), ([1.0], 4)


def test_a_claim_on_curves_waits_for_the_row_whose_curves_they_are():
    claim = Claim("a claim", "a", "worse", "b", curves_from="c")
    study = replace(STUDIES["table1"], claims=lambda data: (claim,))
    ended = SimpleNamespace(values=[1.0, 2.0], num_diverged=0, measure=TOP1)
    for of_c, words in (([1.0, 2.0], OPEN), ([1.0], "not known yet")):
        rows = {"a": ended, "b": ended, "c": SimpleNamespace(values=of_c, num_diverged=0, measure=TOP1)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lbsgd.experiments.answers.compared", lambda *_: [])
            [answer] = answers(study, DATA_SETS["digits"], rows, num_seeds=2)
        assert answer.cells[1] == words


@pytest.mark.parametrize("kind, holds", zip(KINDS, (OPEN, "no", "yes"), strict=True))
def test_a_row_beside_one_that_diverged_is_no_worse_and_nobody_knows_whether_it_is_worse(kind, holds):
    assert cells(kind, FINISHED, DIVERGED) == ("3 of 3 seeds of b diverged", holds)


@pytest.mark.parametrize("kind, holds", zip(KINDS, ("yes", "no", "no"), strict=True))
def test_a_row_that_diverged_is_worse(kind, holds):
    assert cells(kind, DIVERGED, FINISHED) == ("3 of 3 seeds of a diverged", holds)  # p = 1/20
    assert cells(kind, FOUR_OF_FIVE, FIVE) == ("4 of 5 seeds of a diverged", holds)  # p = 5/210


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_diverged_seed_answers_nothing(kind):
    assert cells(kind, ONE_OF_FIVE, FIVE) == ("1 of 5 seeds of a diverged", OPEN)  # p = 0.5
    assert cells(kind, FIVE, ONE_OF_FIVE) == ("1 of 5 seeds of b diverged", OPEN)
    # the three remaining seeds, as many as the other row has, do not stand for all four
    assert cells(kind, ([1.0, 2.0, 1.0], 1), FINISHED) == ("1 of 4 seeds of a diverged", OPEN)  # p = 4/7


@pytest.mark.parametrize("kind", KINDS)
def test_two_seeds_are_too_few_even_if_all_of_a_row_diverge(kind):
    assert cells(kind, TWO_OF_TWO, TWO) == ("2 of 2 seeds of a diverged", OPEN)  # p = 1/6
    assert cells(kind, TWO, TWO_OF_TWO) == ("2 of 2 seeds of b diverged", OPEN)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_that_diverged_answer_nothing(kind):
    words = "1 of 2 seeds of a diverged, 1 of 2 seeds of b diverged"
    assert cells(kind, ONE_OF_TWO, ONE_OF_TWO) == (words, OPEN)
    assert cells(kind, DIVERGED, DIVERGED)[1] == OPEN


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_says_by_what_diverged_seeds_are_judged(kind):
    study = replace(STUDIES["table1"], claims=lambda data: (Claim("a claim", "a", kind, "b"),))
    row = SimpleNamespace(values=[1.0], num_diverged=1, measure=TOP1)
    [answer] = answers(study, DATA_SETS["digits"], {"a": row, "b": row}, num_seeds=2)
    assert "Fisher's exact test of their number, one-sided, p ≤ 0.05" in answer.test


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_answer_nothing(kind):
    assert cells(kind, ([2.0, 2.0], 0), ([1.0, 1.0], 0)) == ("+1.00", "could not be answered")


def test_a_claim_is_open_while_a_run_goes_on():
    assert cells("worse", ([1.0], 0), ONE_OF_TWO) == ("1 of 2 seeds of b diverged", "not known yet")
    assert cells("worse", ([], 1), TWO) == ("1 of 1 seeds of a diverged", "not known yet")
    # p = 1/56 and p = 1/20, and two of five runs are still running
    for row in ([], 5), ([], 3):
        words = f"{row[1]} of {row[1]} seeds of a diverged"
        assert cells("worse", row, FINISHED, num_seeds=5) == (words, "not known yet")
    one_seed = Answer(Claim("a claim", "a", "worse", "b"), Difference(1.0, None, None), None, "", ended=True)
    assert one_seed.cells[1:3] == ("not known yet", "+1.00")  # more seeds may follow


def test_a_study_without_claims_has_no_empty_table():
    assert markdown([]) == "No claim.\n"
