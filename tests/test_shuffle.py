"""Remark 4: one shuffle per epoch, divided among all k workers, for any number of processes.

test_pitfalls.py shows what happens when each rank shuffles for itself.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import lbsgd
from lbsgd.algorithm import process_group
from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.algorithm.shuffle import epoch_order, rank_batches, rank_groups, rank_share

SEEDS, EPOCHS = st.integers(0, 2**32 - 1), st.integers(0, 1000)


@st.composite
def runs(draw):
    """Draw N images and kn = k·n of them per iteration, cut for a world size, micro batch and number of passes."""
    n, world_size, workers_in_a_pass, passes = (draw(st.integers(1, 5)) for _ in range(4))
    global_batch = n * workers_in_a_pass * passes * world_size
    num_images = draw(st.integers(global_batch, 6 * global_batch))
    return dict(
        n=n,
        world_size=world_size,
        micro_batch=n * workers_in_a_pass,
        global_batch=global_batch,
        num_images=num_images,
        seed=draw(SEEDS),
        epoch=draw(EPOCHS),
    )


def cut(run, order, **changes):
    """Return the images of all ranks: (iterations, world_size, passes, micro_batch)."""
    sizes = {key: run[key] for key in ("global_batch", "world_size", "micro_batch")} | changes
    return np.stack([rank_batches(order, rank=rank, **sizes) for rank in range(sizes["world_size"])], axis=1)


@given(runs())
def test_worker_w_of_iteration_t_holds_the_same_n_images_in_any_cut(run):
    order = epoch_order(run["num_images"], run["seed"], run["epoch"])
    kn, n = run["global_batch"], run["n"]
    iterations = run["num_images"] // kn
    by_definition = [[order[t * kn + w * n : t * kn + (w + 1) * n] for w in range(kn // n)] for t in range(iterations)]
    assert np.array_equal(cut(run, order).reshape(iterations, kn // n, n), by_definition)


@given(runs())
def test_an_epoch_sees_floor_of_N_over_kn_iterations_and_no_image_twice(run):
    seen = cut(run, epoch_order(run["num_images"], run["seed"], run["epoch"])).ravel()
    assert len(seen) == run["num_images"] // run["global_batch"] * run["global_batch"]
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0 and seen.max() < run["num_images"]


@given(runs(), st.data())
def test_any_first_iteration_gives_exactly_the_rest_of_the_epoch(run, data):
    order = epoch_order(run["num_images"], run["seed"], run["epoch"])
    whole = cut(run, order)
    first = data.draw(st.integers(0, len(whole)))
    assert np.array_equal(cut(run, order, first_iteration=first), whole[first:])


@given(runs(), st.integers(1, 6))
def test_statistics_groups_are_those_of_one_rank_dealt_in_turn(run, world_size):
    order = epoch_order(run["num_images"], run["seed"], run["epoch"])
    sizes = dict(num_images=run["num_images"] // run["n"] * run["n"], per_worker_batch=run["n"])
    shares = [rank_groups(order, **sizes, world_size=world_size, rank=rank) for rank in range(world_size)]
    groups = np.empty((sizes["num_images"] // run["n"], run["n"]), int)
    for rank, share in enumerate(shares):
        groups[rank::world_size] = share
    assert np.array_equal(groups.ravel(), order[: sizes["num_images"]])


@given(st.integers(0, 50), st.integers(1, 60))
def test_evaluation_shares_hold_every_image_once(num_images, world_size):
    shares = [rank_share(num_images, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), np.arange(num_images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(50, 5000), SEEDS, EPOCHS, SEEDS, EPOCHS)
def test_another_epoch_or_seed_is_another_shuffle(num_images, seed, epoch, other_seed, other_epoch):
    """50 images have 50! = 3e64 orders, so none repeats by chance."""
    assume((seed, epoch) != (other_seed, other_epoch))
    order = epoch_order(num_images, seed, epoch)
    assert not np.array_equal(order, epoch_order(num_images, other_seed, other_epoch))
    for same_seed, same_epoch in ((seed, epoch + 1), (seed + 1, epoch)):
        assert not np.array_equal(order, epoch_order(num_images, same_seed, same_epoch))
    assert np.array_equal(order, epoch_order(num_images, seed, epoch))


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    orders = {(seed, epoch): epoch_order(1000, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert epoch_order(1000, 2, 1).tobytes() == orders[2, 1]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(global_batch=100), "100 images is not a multiple of 3 ranks x 8 images"),
        (dict(first_iteration=11), "iteration 11 is outside .* 10 iterations"),
        (dict(first_iteration=-1), "iteration -1 is outside"),
        (dict(rank=3), "rank 3 is not one of the 3"),
        (dict(world_size=0), "rank 0 is not one of the 0"),
        (dict(micro_batch=0), r"micro_batch \(0\) must be at least 1"),
        (dict(micro_batch=-8), r"micro_batch \(-8\) must be at least 1"),
        (dict(global_batch=0), r"global_batch \(0\) and .* must be at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, message):
    fitting = dict(global_batch=96, world_size=3, micro_batch=8, rank=0)
    with pytest.raises(ValueError, match=message):
        rank_batches(epoch_order(1000, 0, 0), **{**fitting, **sizes})


@pytest.mark.parametrize("rank", [-1, 3])
def test_no_share_is_made_for_a_rank_that_does_not_exist(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not one of the 3 ranks"):
        rank_share(10, world_size=3, rank=rank)
    with pytest.raises(ValueError, match=f"rank {rank} is not one of the 3 ranks"):
        rank_groups(epoch_order(10, 0, 0), num_images=10, per_worker_batch=2, world_size=3, rank=rank)


@pytest.mark.parametrize("cut", [dict(world_size=0), dict(world_size=2, rank=2)])
def test_the_sampler_takes_no_world_size_for_another(cut):
    with pytest.raises(ValueError, match="is not one of the"):
        SharedShuffleSampler(1000, global_batch=96, micro_batch=8, **cut)


def test_a_sampler_takes_no_other_process_s_share_for_want_of_a_rank(monkeypatch):
    cut = dict(global_batch=96, micro_batch=8, world_size=2)
    with pytest.raises(ValueError, match="^world_size is 2, and no rank is given: give rank, from 0 to 1$"):
        SharedShuffleSampler(1000, **cut)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test's group may still be there
    with pytest.raises(ValueError, match="init_process_group"):
        SharedShuffleSampler(1000, **cut)
    SharedShuffleSampler(1000, **cut, rank=1)
    SharedShuffleSampler(1000, global_batch=96, micro_batch=8, world_size=1)  # this process alone, whoever started it


@pytest.mark.parametrize("num_images", [0, 100, 255])
def test_a_sampler_that_could_give_nothing_is_refused_with_the_numbers(num_images):
    with pytest.raises(ValueError, match=f"{num_images} images do not fill one global batch of 256"):
        SharedShuffleSampler(num_images, global_batch=256, micro_batch=32)
    assert len(SharedShuffleSampler(256, global_batch=256, micro_batch=32)) == 8


def test_the_end_of_an_epoch_is_no_mistake():
    """A run saved after an epoch's last iteration goes on there: nothing of it is left, and the next one is whole."""
    sampler = SharedShuffleSampler(600, global_batch=256, micro_batch=32)
    sampler.set_epoch(3, first_iteration=2)
    assert list(sampler) == []
    sampler.set_epoch(4)
    assert len(sampler) == 16


@pytest.mark.parametrize("num_images", [0, 33, 1024])
def test_statistics_images_must_be_whole_groups_of_what_there_is(num_images):
    with pytest.raises(ValueError, match="not a multiple of 32 between 1 and 1000"):
        rank_groups(epoch_order(1000, 0, 0), num_images=num_images, per_worker_batch=32, world_size=1, rank=0)


def test_a_number_of_images_of_ffcv_s_type_gives_the_same_order():
    """NumPy alone would permute it in floating point."""
    order = epoch_order(np.uint64(50), 3, 4)
    assert order.dtype == np.int64 and order.tolist() == epoch_order(50, 3, 4).tolist()


def test_the_epoch_that_counts_is_the_one_set_when_the_first_batch_is_asked_for():
    """Lightning asks for an iterator before it tells the epoch of a resumed run."""
    sampler = SharedShuffleSampler(64, global_batch=16, micro_batch=16)
    assert list(sampler)[0] == epoch_order(64, 0, 0)[:16].tolist()  # epoch 0 if none is set
    batches = iter(sampler)
    sampler.set_epoch(2)
    assert next(batches) == epoch_order(64, 0, 2)[:16].tolist()


def test_rank_0_that_is_asked_for_is_rank_0_on_every_process(monkeypatch):
    monkeypatch.setattr(process_group, "rank", lambda: 1)
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    cut = dict(global_batch=8, micro_batch=2, seed=3)
    asked, own = lbsgd.SharedShuffleSampler(32, **cut, rank=0), lbsgd.SharedShuffleSampler(32, **cut)
    assert list(asked) == list(lbsgd.SharedShuffleSampler(32, **cut, world_size=2, rank=0)) != list(own)


def epochs_of(sampler, told):
    """Return lbsgd's warnings in three epochs of a loop that tells the first `told` of them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for epoch in range(3):
            if epoch < told:
                sampler.set_epoch(epoch)
            for _ in DataLoader(range(64), batch_sampler=sampler):
                ...
    return [str(each.message) for each in said]


@pytest.mark.parametrize("rank, told, times", [(0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 3, 0)])
def test_a_sampler_that_is_never_told_an_epoch_says_so_once_on_rank_0(rank, told, times):
    said = epochs_of(SharedShuffleSampler(64, global_batch=16, micro_batch=8, world_size=2, rank=rank), told)
    assert [each.partition(";")[0] for each in said] == [
        "lbsgd: a sampler gives the batches of epoch 0 again, in the same order"
    ] * times


def test_a_look_at_some_batches_is_no_epoch(recwarn):
    sampler = SharedShuffleSampler(64, global_batch=16, micro_batch=16)
    for _ in range(3):
        next(iter(sampler))
    assert len(list(sampler)) == 4 and not recwarn


def test_processes_that_have_not_met_are_not_each_taken_for_the_only_one(monkeypatch):
    monkeypatch.setattr(process_group.dist, "is_initialized", lambda: False)  # earlier tests may have met
    cut = dict(global_batch=8, micro_batch=2)
    for alone in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert len(lbsgd.SharedShuffleSampler(32, **cut)) == 16
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE is 2, but the processes have not met: call .* first, or give"):
        lbsgd.SharedShuffleSampler(32, **cut)
    assert len(lbsgd.SharedShuffleSampler(32, **cut, world_size=2, rank=1)) == 8
