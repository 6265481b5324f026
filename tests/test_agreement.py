"""All processes learn after the same pass what one of them wants, even if the answer is read one question later."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import in_processes

import lbsgd.train.agreement
from lbsgd.train.agreement import Agreement, Decision
from lbsgd.train.engine import start_processes


def decisions_of(late, stop_at, passes=16):
    """Return what this process learns after which pass, by its own clock.

    Rank 1 wants to stop from a pass on. Rank 0, whose passes take a quarter of the time, wants to save once.
    """
    start_processes()
    rank, due, decisions, now = dist.get_rank(), 2, {}, 0.0
    lbsgd.train.agreement.time = SimpleNamespace(monotonic=lambda: now)
    agreement = Agreement(torch.device("cpu"), late)
    for number in range(passes):
        now += 1 / 16 if rank else 1 / 64
        decision = agreement.after_pass(rank == 1 and number >= stop_at, rank == 0 and number >= due)
        if decision:
            decisions[number] = decision
        if decision and decision.save:
            due = 1000
            agreement.saved(decision)
    return decisions


NOTHING, SAVE, STOP = (
    Decision(*wishes, pass_seconds=1 / 16) for wishes in ((False, False), (False, True), (True, False))
)


@pytest.mark.parametrize(
    "late, expected",  # a quarter of a second is four passes of the slower process
    [
        (False, {0: NOTHING, 4: SAVE, 8: STOP, 12: STOP}),
        (True, {1: NOTHING, 5: NOTHING, 9: SAVE, 13: STOP}),  # what was requested four passes before
    ],
)
def test_both_learn_the_same_after_the_same_pass_and_save_once(late, expected):
    assert in_processes(2, decisions_of, late, 7) == [expected, expected]


def test_a_process_alone_learns_at_once_and_how_long_a_pass_takes(monkeypatch):
    start_processes()
    now = iter([0.0, 3.0, 3.0, 8.0, 8.0])
    monkeypatch.setattr(lbsgd.train.agreement, "time", SimpleNamespace(monotonic=lambda: next(now)))
    agreement = Agreement(torch.device("cpu"))
    found = [agreement.after_pass(stop, False) for stop in (False, True)]
    assert found == [Decision(pass_seconds=3.0), Decision(stop=True, pass_seconds=5.0)]


def test_only_on_a_gpu_is_an_answer_read_late():
    assert [Agreement(torch.device(kind)).late for kind in ("cuda", "cpu")] == [True, False]


@pytest.mark.parametrize("pass_seconds, passes", [(0.0, 250), (1 / 16, 4), (0.2, 1), (10.0, 1)])
def test_a_quarter_of_a_second_is_one_pass_at_least_and_never_many(pass_seconds, passes):
    start_processes()
    agreement = Agreement(torch.device("cpu"))
    agreement.decide((0.0, 0.0, pass_seconds))
    assert agreement.passes_to_next == passes
