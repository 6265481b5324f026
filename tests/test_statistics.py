"""The paper's statistic against numbers worked out by hand, which wrong versions do not give."""

from math import sqrt
from statistics import mean, pstdev

import pytest

from lbsgd.report.measure import TOP1
from lbsgd.report.statistics import Difference, difference, fisher, spread, verdict


def test_a_run_s_error_is_the_median_of_its_last_five_epochs():
    errors = [90.0, 24.0, 26.0, 22.0, 25.0, 30.0]
    assert TOP1.of([{"val_top1_error_pct": error} for error in errors]) == 25.0
    assert mean(errors[-5:]) == 25.4  # the mean is different, and the last epoch has 30
    goes_on = [{"val_top1_error_pct": error} for error in (90.0, 24.0)] + 5 * [{}]  # for example --evaluate_every 7
    assert TOP1.of(goes_on) == 24.0 and TOP1.of(5 * [{}]) is None
    assert TOP1.of([{"val_top1_error_pct": error} for error in (4.0, 0.0, 2.0, 0.0, 0.0)]) == 0.0  # 0 is a number


def test_how_a_run_s_number_comes_about_is_told_by_the_evaluations_there_are():
    told = [TOP1.how_of([{"val_top1_error_pct": 20.0}] * seen + [{}] * (5 - seen)) for seen in (1, 4, 5)]
    assert told == ["last evaluation", "median of 4 evaluations in the last 5 epochs", "median of last 5 epochs"]


def test_a_row_is_the_mean_and_the_sample_standard_deviation_over_seeds():
    found = spread(
        [6.0, 7.0, 9.5]
    )  # mean 22.5 / 3; deviations -1.5, -0.5, 2: squares 2.25 + 0.25 + 4 = 6.5, over n - 1
    assert found.mean == 7.5 and found.std == pytest.approx(sqrt(6.5 / 2)) and str(found) == "7.50 ± 1.80"
    assert found.std != pytest.approx(pstdev([6.0, 7.0, 9.5]))  # of a whole population it would be 1.47
    assert str(spread([6.0, 7.0])) == "6.50 ± 0.71" and str(spread([6.0])) == "6.00" and spread([]) is None


def test_the_interval_is_welch_s():
    # s² = 1 and 4, so se² = 1/3 + 4/3 = 5/3; ν = (5/3)² / ((1/3)²/2 + (4/3)²/2) = 50/17 = 2.941
    # t(0.975, 2.941) = 3.219, between the tables' 3.182 at 3 and 4.303 at 2; half width 3.219 · 1.2910 = 4.156
    found = difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.value == -2 and (found.low, found.high) == pytest.approx((-6.156, 2.156), abs=2e-3)
    # equal variances (Student, ν = 4, t = 2.776) would be narrower: ± 3.584
    assert found.high != pytest.approx(-2 + 2.776 * sqrt(5 / 3), abs=0.1)


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert str(Difference(-0.003, -0.004, -0.002)) == "+0.00 [+0.00, +0.00]"


def test_a_difference_without_two_seeds_of_each_has_no_interval():
    assert difference([1.0], [2.0, 3.0]) == Difference(-1.5, None, None)
    assert difference([2.0, 3.0], [1.0]) == Difference(1.5, None, None)
    assert difference([], [2.0]) is None


@pytest.mark.filterwarnings("error")  # scipy's warnings would appear in the middle of a report
def test_seeds_that_are_equal_by_chance_make_no_interval_of_width_zero():
    assert difference([3.0, 3.0], [1.0, 1.0]) == Difference(2.0, None, None)
    assert difference([0.1 + 0.2, 0.3], [0.7, 0.7]).low is None  # equal except for rounding
    assert difference([3.0, 3.0], [1.0, 1.2]).low < 1.9  # one row's spread is known


@pytest.mark.parametrize(
    "kind, low, high, holds",
    [
        ("same", -0.9, 0.9, True),
        ("same", -0.2, 1.2, False),  # the difference may be 1.2: too little evidence, whatever the p-value
        ("same", -1.2, 0.2, False),
        ("same", 0.2, 0.4, True),  # significant, but small
        ("no worse", -5.0, 0.9, True),
        ("no worse", -5.0, 1.1, False),
        ("worse", 0.1, 3.0, True),
        ("worse", -0.1, 3.0, False),
        ("same", -1.0, 0.9, False),  # inside, not on the border
        ("same", -0.9, 1.0, False),
        ("no worse", -5.0, 1.0, False),
        ("worse", 0.0, 3.0, False),
    ],
)
def test_a_claim_holds_where_the_interval_lies(kind, low, high, holds):
    assert verdict(kind, Difference((low + high) / 2, low, high), margin=1.0) is holds
    assert verdict(kind, Difference(0.0, None, None), margin=1.0) is None


def test_fisher_s_exact_test_is_one_sided():
    assert fisher(1, 5, 0, 5) == 0.5  # the lost one of ten seeds is as likely in either row
    # 4 lost of 10 seeds, all in one row of 5: C(5, 4) / C(10, 4) = 5/210; of 3 and 3 seeds 2: C(3, 2) / C(6, 2) = 3/15
    assert fisher(4, 5, 0, 5) == pytest.approx(5 / 210) and fisher(2, 3, 0, 3) == pytest.approx(0.2)
    assert fisher(0, 5, 4, 5) == 1 and fisher(0, 5, 0, 5) == 1  # at least none
    # rows of 2 and 4 seeds, 2 lost: C(2, 2) / C(6, 2), and the other way round C(4, 2) / C(6, 2)
    assert fisher(2, 2, 0, 4) == pytest.approx(1 / 15) and fisher(2, 4, 0, 2) == pytest.approx(6 / 15)
    # 5 of 5 against 1 of 5: C(5, 5) · C(5, 1) / C(10, 6)
    assert fisher(5, 5, 1, 5) == pytest.approx(5 / 210)
