"""Pairs of one orientation come from the epoch's one shuffle, so every division of the work sees the same pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbsgd.algorithm.pairs import grouped_order
from lbsgd.algorithm.shuffle import epoch_order, rank_batches

TALL = st.lists(st.booleans(), min_size=1, max_size=60).map(np.array)


@given(tall=TALL, seed=st.integers(0, 99), n=st.integers(1, 4))
def test_every_image_is_there_once_and_only_the_last_groups_are_mixed(tall, seed, n):
    order = grouped_order(epoch_order(len(tall), seed, 0), tall, n)
    assert sorted(order) == list(range(len(tall)))
    whole = sum(count // n for count in (tall.sum(), (~tall).sum()))
    groups = tall[order[: whole * n]].reshape(-1, n)
    assert (groups == groups[:, :1]).all()


@given(tall=TALL, seed=st.integers(0, 99), n=st.integers(1, 4))
def test_the_shuffle_decides_who_shares_a_forward(tall, seed, n):
    """Images of a kind stay in the shuffle's order, and groups are in the order in which it completes them."""
    shuffled = epoch_order(len(tall), seed, 0)
    place = np.argsort(shuffled)
    order = grouped_order(shuffled, tall, n)
    for kind in (True, False):
        assert (np.diff(place[[i for i in order if tall[i] == kind]]) > 0).all()
    whole = sum(count // n for count in (tall.sum(), (~tall).sum()))
    assert (np.diff(place[order[: whole * n]].reshape(-1, n)[:, -1]) > 0).all()
    assert (np.diff(place[order[whole * n :]]) > 0).all()  # the others, in their order


@given(tall=st.lists(st.booleans(), min_size=24, max_size=60).map(np.array), seed=st.integers(0, 99))
def test_every_world_size_and_every_global_batch_sees_the_same_pairs(tall, seed):
    order = grouped_order(epoch_order(len(tall), seed, 3), tall, 2)

    def pairs(kn, world_size, micro_batch):
        parts = [
            rank_batches(order, global_batch=kn, world_size=world_size, micro_batch=micro_batch, rank=rank)
            for rank in range(world_size)
        ]
        return {tuple(pair) for part in parts for pair in part.reshape(-1, 2).tolist()}

    all_pairs = pairs(2, 1, 2)
    for kn, world_size, micro_batch in [(12, 1, 2), (12, 1, 12), (12, 2, 6), (12, 3, 4), (12, 6, 2), (4, 2, 2)]:
        seen = pairs(kn, world_size, micro_batch)
        assert seen <= all_pairs and len(seen) == len(tall) // kn * kn // 2


def test_pairs_formed_within_a_ranks_share_would_depend_on_the_number_of_ranks():
    """The mistake that grouping before the division prevents: Remark 4 for pairs."""
    tall = np.arange(24) % 3 == 0

    def pairs(world_size, seed):
        shares = epoch_order(24, seed, 0).reshape(world_size, -1)
        return {tuple(pair) for share in shares for pair in grouped_order(share, tall, 2).reshape(-1, 2).tolist()}

    assert any(pairs(1, seed) != pairs(2, seed) for seed in range(5))  # equal if both halves have even numbers


def test_a_forward_of_no_image_is_refused():
    with pytest.raises(ValueError, match="use 1 at least"):
        grouped_order(np.arange(4), np.zeros(4), 0)
