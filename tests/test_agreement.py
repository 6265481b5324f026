"""All processes learn after the same pass what one of them wishes, also where the answer is read one question later."""

import time

import pytest
import torch
import torch.distributed as dist
from processes import in_processes

import lbsgd.train.agreement
from lbsgd.train.agreement import Agreement
from lbsgd.train.engine import start_processes


def decisions_of(late, stop_at, passes=12):
    """Return for each pass what this process learns; rank 1 wishes to stop from a pass on, rank 0 to save once."""
    lbsgd.train.agreement.AGREE_SECONDS = 0.03
    start_processes()
    rank, due, decisions = dist.get_rank(), 2, []
    agreement = Agreement(torch.device("cpu"), late)
    for number in range(passes):
        time.sleep(0.01 if rank else 0.002)
        decision = agreement.after_pass(rank == 1 and number >= stop_at, rank == 0 and number >= due)
        decisions.append(decision and (decision.stop, decision.save))
        if decision and decision.save:
            due = 1000
            agreement.saved(decision)
    return decisions


@pytest.mark.parametrize("late", [False, True])
def test_both_learn_the_same_after_the_same_pass_and_save_once(late):
    first, second = in_processes(2, decisions_of, late, 7)
    assert first == second and None in first
    said = [decision for decision in first if decision]
    assert [save for _, save in said].count(True) == 1
    stops = [number for number, decision in enumerate(first) if decision and decision[0]]
    assert 7 <= stops[0] <= 11 and all(decision is None or decision[0] for decision in first[stops[0] :])
    assert (first[0] is None) == late


def test_a_process_alone_learns_at_once():
    start_processes()
    agreement = Agreement(torch.device("cpu"))
    assert [agreement.after_pass(stop, False).stop for stop in (False, True)] == [False, True]
