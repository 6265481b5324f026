"""The random crop of training has torchvision's distribution, and depends only on (seed, epoch, image)."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from lbsgd.data.crops import centre_crop, crop_key, mirror, random_resized_crop, uniform

NUM_CROPS = 5000


@pytest.fixture(scope="module")
def draw():
    return random_resized_crop((0.08, 1.0), flip=True)


def our_crops(draw, height, width, num_crops=NUM_CROPS):
    return np.array([draw(crop_key(0, 0), image, height, width) for image in range(num_crops)])


def largest_gap(ours, theirs):
    """Return the largest gap between two samples' distribution functions (Kolmogorov and Smirnov's statistic)."""
    at = np.union1d(ours, theirs)
    return max(
        abs(
            np.searchsorted(np.sort(ours), at, "right") / len(ours)
            - np.searchsorted(np.sort(theirs), at, "right") / len(theirs)
        )
    )


def properties(crops, height, width):
    top, left, h, w = crops.T
    return {
        "top": top,
        "left": left,
        "height": h,
        "width": w,
        "area": h * w,
        "aspect ratio": w / h,
        "place": top / (height - h + 1) + 2 * left / (width - w + 1),
    }


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (6, 6), (40, 40), (100, 500)])
def test_crops_are_distributed_as_torchvision_s(draw, height, width):
    """Most tries fail in the last image."""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(NUM_CROPS)])
    ours = properties(our_crops(draw, height, width)[:, :4], height, width)
    for name, values in properties(theirs, height, width).items():
        # By chance more than 0.04 in one of 1,500 pairs of samples; these samples are always the same.
        assert largest_gap(ours[name], values) < 0.04, name


@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 300), (300, 1), (30, 500), (333, 500)])
def test_crops_lie_within_the_image(draw, height, width):
    for crop in (*our_crops(draw, height, width, 500), centre_crop(0, 0, height, width)):
        top, left, h, w, _ = crop
        assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_crops_smaller_than_the_image_reach_all_its_edges(draw):
    top, left, h, w, _ = our_crops(draw, 40, 40, 1000).T
    for start, size in ((top, h), (left, w)):
        assert start.min() == 0 and (start + size)[size < 40].max() == 40


@pytest.mark.parametrize("height, width, crop", [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))])
def test_an_image_in_which_no_try_fits_gives_torchvision_s_fallback(height, width, crop):
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), (0.5, 1.0), (3 / 4, 4 / 3))
    ours = our_crops(random_resized_crop((0.5, 1.0), flip=True), height, width, 40)
    assert {tuple(each) for each in ours[:, :4].tolist()} == {theirs} == {crop}
    assert 10 < ours[:, 4].sum() < 30  # mirrored


def test_half_of_the_images_are_mirrored_if_any(draw):
    assert abs(our_crops(draw, 300, 300)[:, 4].mean() - 0.5) < 0.03
    assert not our_crops(random_resized_crop((0.08, 1.0), flip=False), 300, 300)[:, 4].any()


def test_crops_differ_between_images_epochs_and_seeds(draw):
    crops = {
        draw(crop_key(seed, epoch), image, 5000, 5000)
        for seed in range(5)
        for epoch in range(5)
        for image in (0, 1, 2, 1_281_166)
    }
    assert len(crops) == 100


def test_no_random_number_serves_twice(draw, monkeypatch):
    """Otherwise small crops, for example, could be the mirrored ones. Here only the last try of each image fits."""
    taken = []

    def recorded(key, position):
        taken.append(int(position))
        return float(len(taken) % 23 < 20)  # per image: 1 for its flip, 18 for 9 tries, 4 for the last try

    monkeypatch.setattr("lbsgd.data.crops.uniform", recorded)
    for image in range(3):
        assert draw.py_func(0, image, 100, 100)[2:4] == (33, 24)
    assert len(set(taken)) == len(taken) == 3 * 23


def test_the_generator_is_splitmix64():
    """The first numbers of its reference implementation (Steele, Lea and Flood 2014) from state 1234567."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(np.uint64(1234567), np.uint64(i)) for i in range(4)] == [(x >> 11) * 2.0**-53 for x in reference]


@pytest.mark.parametrize("width", [7, 8])
def test_mirror_reverses_rows(width):
    image = np.random.default_rng(0).integers(0, 256, (5, width, 3), np.uint8)
    mirrored = image.copy()
    mirror(mirrored)
    assert np.array_equal(mirrored, image[:, ::-1])


def test_the_test_crop_is_224_of_256():
    assert centre_crop(0, 0, 256, 256) == (16, 16, 224, 224, False)
    assert centre_crop(0, 0, 256, 340) == (16, 58, 224, 224, False)
    assert centre_crop(0, 0, 258, 300) == (16, 37, 225, 225, False)  # 225.75, as FFCV cuts it off
