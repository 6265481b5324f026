"""The FFCV loader: the same pixels for any threads, batches, processes and restarts; no image lost, no thread left."""

import copy
import io
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from lbsgd.beton import open_data
from lbsgd.convert import convert
from lbsgd.crops import centre_crop, crop_key, random_resized_crop
from lbsgd.errors import ConfigError, DataError
from lbsgd.loader import EvalLoader, TrainLoader
from lbsgd.shuffle import epoch_order

NUM_TRAIN, NUM_VAL, GLOBAL_BATCH = 53, 21, 16
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CPU = dict(resolution=24, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth pictures of many sizes and shapes, each another one, as a data folder."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for i in range(number):
            path = folder / "source" / split / f"class_{i % 5}" / f"{i:03}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize(tuple(rng.integers(30, 120, 2)), Image.Resampling.BICUBIC).save(path, quality=95)
    convert(folder / "source", folder / "data", max_side=100, quality=95, num_workers=2, overwrite=False)
    return open_data(folder / "data")


def train_loader(photos, *, threads, micro_batch, world_size=1, rank=0, **options):
    return TrainLoader(photos.train, seed=7, global_batch=GLOBAL_BATCH, world_size=world_size, rank=rank,
                       micro_batch=micro_batch, threads=threads, **CPU, **options)


@pytest.fixture(scope="module")
def loader(photos):
    """One process with one thread: what every other cut of the work must agree with."""
    loader = train_loader(photos, threads=1, micro_batch=8)
    yield loader
    loader.close()


def joined(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


# --- the same pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads, micro_batch, world_size", [(2, 16, 1), (2, 4, 2)])
def test_pixels_do_not_depend_on_threads_batches_processes_and_passes(photos, loader, threads, micro_batch, world_size):
    images, labels = joined(loader.epoch(2))
    assert images.shape == (48, 3, 24, 24)  # 53 // 16 iterations of 16 images
    ranks = [train_loader(photos, threads=threads, micro_batch=micro_batch, world_size=world_size, rank=rank)
             for rank in range(world_size)]
    parts = [joined(other.epoch(2)) for other in ranks]
    for whole, cut in zip((images, labels), zip(*parts)):
        iterations = torch.stack([part.view(3, 16 // world_size, *whole.shape[1:]) for part in cut], dim=1)
        assert torch.equal(iterations.view_as(whole), whole)


@pytest.mark.parametrize("first_iteration", [1, 2, 3])
def test_any_first_iteration_gives_exactly_the_rest_of_the_epoch(loader, first_iteration):
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, first_iteration))
    assert len(rest) == len(whole) - 2 * first_iteration
    for (images, labels), (same_images, same_labels) in zip(rest, whole[2 * first_iteration:]):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_several_epochs_may_be_read_at_once(loader):
    together = list(zip(loader.epoch(0), loader.epoch(1)))
    for epoch, batches in enumerate(zip(*together)):
        assert torch.equal(joined(batches)[0], joined(loader.epoch(epoch))[0])


def jpegs(beton):
    """The images of a file as PIL decodes them, in order: uint8 (height, width, 3)."""
    from ffcv.reader import Reader

    allocations = np.sort(Reader(str(beton.path)).alloc_table, order="sample_id")
    content = beton.path.read_bytes()
    return [np.asarray(Image.open(io.BytesIO(content[int(at):int(at) + int(size)]))) for _, at, size in allocations]


def by_definition(image, crop):
    """Cut, resized, mirrored and normalised, by OpenCV and NumPy."""
    import cv2

    top, left, h, w, mirrored = crop
    image = cv2.resize(image[top:top + h, left:left + w], (24, 24), interpolation=cv2.INTER_AREA)
    return ((image[:, ::-1] if mirrored else image) / 255 - MEAN).transpose(2, 0, 1) / STD.reshape(3, 1, 1)


def test_training_images_are_the_crops_of_their_numbers(photos, loader):
    images, labels = joined(loader.epoch(4))
    originals, draw = jpegs(photos.train), random_resized_crop((0.08, 1.0), flip=True)
    for image, label, number in zip(images, labels, epoch_order(NUM_TRAIN, 7, 4)):
        assert label == photos.train.labels[number]
        expected = by_definition(originals[number], draw(crop_key(7, 4), number, *originals[number].shape[:2]))
        assert np.abs(image.numpy() - expected).mean() < 0.05  # one of 255 steps is 0.017


def test_batch_norm_statistics_are_taken_from_the_epoch_s_first_images(photos, loader):
    first = joined(loader.epoch(5))[0][:32].view(8, 4, 3, 24, 24)
    for rank in range(2):
        one_of_two = copy.copy(loader)  # spares a compilation
        one_of_two.world_size, one_of_two.rank = 2, rank
        batches = list(one_of_two.statistics_batches(5, num_images=32, per_worker_batch=4))
        assert [len(images) for images in batches] == [8, 8]
        assert torch.equal(torch.cat(batches), first[rank::2].flatten(0, 1))


def test_images_come_in_the_precision_and_memory_format_asked_for(photos):
    loader = train_loader(photos, threads=1, micro_batch=8, dtype=torch.bfloat16, channels_last=True, flip=False)
    images, labels = next(loader.epoch(0))
    assert images.dtype is torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype is torch.int64 and labels.shape == (8,)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_every_validation_image_comes_once_by_its_centre_crop(photos):
    shares = [EvalLoader(photos.val, world_size=2, rank=rank, batch=4, threads=rank + 1, **CPU) for rank in range(2)]
    assert [[len(labels) for _, labels in share] for share in shares] == [[4, 4, 3], [4, 4, 2]]
    images, labels = map(torch.cat, zip(*(joined(share) for share in shares)))
    assert labels.tolist() == photos.val.labels.tolist()
    for image, original in zip(images, jpegs(photos.val)):
        expected = by_definition(original, centre_crop(0, 0, *original.shape[:2]))
        assert np.abs(image.numpy() - expected).mean() < 0.05


def test_a_rank_without_images_yields_nothing(photos):
    assert list(EvalLoader(photos.val, world_size=30, rank=29, batch=4, threads=1, **CPU)) == []


# --- threads ----------------------------------------------------------------------------------------------------------


def decoding_threads():
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "DecodingThread"]


def test_a_failure_in_ffcv_s_thread_ends_the_training_within_seconds(loader, monkeypatch):
    def fails(**_):
        raise RuntimeError("the disk is gone")

    stages, outputs = loader._ffcv.code
    monkeypatch.setattr(loader._ffcv, "code", ([(fails, stages[0][1])], outputs))
    start = time.monotonic()
    with pytest.raises(DataError, match="decoding .*train.beton failed: RuntimeError.*the disk is gone"):
        next(loader.epoch(0))
    assert time.monotonic() - start < 5
    assert not decoding_threads()


def test_an_epoch_that_is_left_leaves_no_thread(loader):
    for _ in loader.epoch(0):
        break
    assert not decoding_threads()


def test_close_ends_the_threads_of_epochs_that_are_still_referred_to(loader):
    epochs = [loader.epoch(0), loader.epoch(1)]
    for epoch in epochs:
        next(epoch)
    assert len(decoding_threads()) == 2
    loader.close()
    assert not decoding_threads()


def test_torch_s_threads_and_numpy_s_generator_are_left_alone(photos):
    torch_threads, state = torch.get_num_threads(), np.random.get_state()[1].copy()
    try:
        torch.set_num_threads(3)
        seen = []
        for _ in train_loader(photos, threads=1, micro_batch=16).epoch(0):
            seen.append(torch.get_num_threads())
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
        assert set(seen) == {3}
    finally:
        torch.set_num_threads(torch_threads)
    assert np.array_equal(np.random.get_state()[1], state)


def test_importing_the_loader_leaves_torch_s_threads_alone():
    code = "import torch; torch.set_num_threads(3); import lbsgd.loader; print(torch.get_num_threads())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "3\n"


@pytest.mark.parametrize("threads", [0, 1000])
def test_threads_that_this_process_cannot_have_are_refused(photos, threads):
    with pytest.raises(ConfigError, match=f"{threads} loader threads are not possible.*--loader_threads"):
        train_loader(photos, threads=threads, micro_batch=8)


def test_a_loader_opens_a_file_by_its_path(photos):
    assert EvalLoader(str(photos.val.path), world_size=1, rank=0, batch=4, threads=1, **CPU).beton.num_images == NUM_VAL
    with pytest.raises(DataError, match="cannot read nowhere"):
        EvalLoader("nowhere", world_size=1, rank=0, batch=4, threads=1, **CPU)
