"""Random images in place of a data set have the loaders' interface, and are the same for any number of processes."""

from dataclasses import replace

import torch

from lbsgd.algorithm.shuffle import epoch_order
from lbsgd.data.fake import FakeEval, FakeImages
from lbsgd.data.share import Cut, Pixels, Share

PIXELS = Pixels(resolution=8, device="cpu")


def train(world_size=1, micro_batch=16, rank=0, pixels=PIXELS):
    cut = Cut(seed=3, global_batch=64, micro_batch=micro_batch, share=Share(rank, world_size))
    return FakeImages(1000, 10, cut, pixels)


def test_an_epoch_is_the_same_for_any_world_size_and_micro_batch():
    whole = torch.cat([images for images, _ in train().epoch(2)])
    assert whole.shape == (960, 3, 8, 8)
    for world_size, micro_batch in ((2, 8), (4, 16)):
        ranks = [
            torch.cat([images for images, _ in train(world_size, micro_batch, rank).epoch(2)])
            for rank in range(world_size)
        ]
        iterations = torch.stack([part.view(15, 64 // world_size, 3, 8, 8) for part in ranks], dim=1)
        assert torch.equal(iterations.view_as(whole), whole)


def test_an_epoch_starts_anywhere():
    assert [y.tolist() for _, y in train().epoch(2, 10)] == [y.tolist() for _, y in train().epoch(2)][40:]
    assert [y.tolist() for _, y in train().epoch(1)] != [y.tolist() for _, y in train().epoch(2)]


def test_the_seed_and_the_epoch_give_order_and_crops_of_all_that_is_taken_from_it():
    data, asked = train(), []
    data.batches = lambda numbers, epoch: asked.append((numbers.tolist(), epoch)) or iter(())
    data.epoch(2, first_iteration=3), data.statistics_batches(2, num_images=96, per_worker_batch=16)
    order = epoch_order(1000, seed=3, epoch=2).tolist()
    assert asked == [(order[3 * 64 : 960], 2), (order[:96], 2)]


def test_equal_images_have_equal_labels():
    """So that a network can learn them."""
    labels = {}
    for images, numbers in train().epoch(0):
        for image, label in zip(images, numbers.tolist(), strict=True):
            assert labels.setdefault(image.numpy().tobytes(), label) == label
    assert set(labels.values()) == set(range(10))


def test_images_come_in_the_precision_and_memory_format_asked_for():
    pixels = replace(PIXELS, dtype=torch.bfloat16, memory_format=torch.channels_last)
    images, labels = next(train(pixels=pixels).epoch(0))
    assert images.dtype is torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype is torch.int64


def test_statistics_batches_are_whole_groups_of_the_first_images():
    first = torch.cat([images for images, _ in train().epoch(2)])[:96].view(6, 16, 3, 8, 8)
    for rank in range(2):
        batches = list(train(2, 32, rank).statistics_batches(2, num_images=96, per_worker_batch=16))
        assert [len(batch) for batch in batches] == [32, 16]
        assert torch.equal(torch.cat(batches), first[rank::2].flatten(0, 1))


def test_evaluation_shares_hold_every_image_once():
    def labels(world_size, rank):
        share = FakeEval(50, 10, seed=3, batch=8, share=Share(rank, world_size), pixels=PIXELS)
        assert [y.tolist() for _, y in share] == [y.tolist() for _, y in share]
        return [label for _, y in share for label in y.tolist()]

    assert [label for rank in range(3) for label in labels(3, rank)] == labels(1, 0)
    assert len(labels(1, 0)) == 50
    assert labels(60, 59) == []
