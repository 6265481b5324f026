"""The FFCV loader: equal pixels for any threads, batches, processes and restarts; no image lost, no thread left."""

import atexit
import copy
import io
import itertools
import os
import threading
import time
import zlib
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from queue import Empty
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from commands import script
from many_images import spread
from numba.extending import is_jitted
from PIL import Image
from stock_ffcv import with_stock_ffcv

from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.algorithm.shuffle import epoch_order, rank_batches
from lbsgd.convert.convert import convert
from lbsgd.data import read_ahead
from lbsgd.data.beton import BetonFile
from lbsgd.data.crops import centre_crop, crop_key, random_resized_crop
from lbsgd.data.ffcv_loader import DecodingThread, SharedShuffleOrder
from lbsgd.data.folder import open_data
from lbsgd.data.kept_threads import keeping_threads
from lbsgd.data.loaders import EvalLoader, TrainLoader
from lbsgd.data.native.kernels import NO_MEMORY, Crops
from lbsgd.data.read_ahead import ReadAhead, ReadFrom, read_whole
from lbsgd.data.share import Cut, Pixels, Share
from lbsgd.errors import ConfigError, DataError
from lbsgd.processes.environment import Processes
from lbsgd.train.images import is_read_from_disk, open_files

NUM_TRAIN, NUM_VAL, GLOBAL_BATCH = 53, 21, 16
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
PIXELS, ALONE = Pixels(resolution=24, device="cpu"), Share()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data folder of smooth pictures, all different, with many sizes and shapes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for i in range(number):
            path = folder / "source" / split / f"class_{i % 5}" / f"{i:03}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize(tuple(rng.integers(30, 120, 2)), Image.Resampling.BICUBIC).save(path, quality=95)
    convert(folder / "source", folder / "data", max_side=100, quality=95, num_processes=2, overwrite=False)
    return open_data(folder / "data")


def train_loader(photos, *, threads, micro_batch, share=ALONE, pixels=PIXELS, **options):
    cut = Cut(seed=7, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, share=share)
    return TrainLoader(photos.train, cut, pixels=pixels, threads=threads, **options)


@pytest.fixture(scope="module")
def loader(photos):
    """A loader of one process with one thread. Every other division of the work must agree with it."""
    loader = train_loader(photos, threads=1, micro_batch=8)
    yield loader
    loader.close()


def joined(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def is_parallel(loader):
    """Return whether several threads decode a batch, as Numba has compiled it."""
    [(stage, _)], _ = loader.images.pipeline.code
    return any(function.targetoptions.get("parallel") for function in filter(is_jitted, stage.__globals__.values()))


# --- the same pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads, micro_batch, world_size", [(2, 16, 1), (2, 4, 2)])
def test_pixels_do_not_depend_on_threads_batches_processes_and_passes(photos, loader, threads, micro_batch, world_size):
    images, labels = joined(loader.epoch(2))
    assert images.shape == (48, 3, 24, 24)  # 53 // 16 iterations of 16 images
    ranks = [
        train_loader(photos, threads=threads, micro_batch=micro_batch, share=Share(rank, world_size))
        for rank in range(world_size)
    ]
    assert [is_parallel(other) for other in ranks] == [threads > 1] * world_size
    parts = [joined(other.epoch(2)) for other in ranks]
    for whole, cut in zip((images, labels), zip(*parts, strict=True), strict=True):
        iterations = torch.stack([part.view(3, 16 // world_size, *whole.shape[1:]) for part in cut], dim=1)
        assert torch.equal(iterations.view_as(whole), whole)


@pytest.mark.parametrize("first_iteration", [1, 2, 3])
def test_any_first_iteration_gives_exactly_the_rest_of_the_epoch(loader, first_iteration):
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, first_iteration))
    assert len(rest) == len(whole) - 2 * first_iteration
    for (images, labels), (same_images, same_labels) in zip(rest, whole[2 * first_iteration :], strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_file_may_have_the_150_gb_of_imagenet(photos, loader, from_disk, tmp_path):
    """Numbers of bytes then need more than 32 bits, and so do those between two images."""
    wide = SimpleNamespace(train=spread(photos.train, tmp_path / "train.beton", NUM_TRAIN * (5 << 30)))
    with closing(train_loader(wide, threads=1, micro_batch=8, from_disk=from_disk)) as far:
        for same, whole in zip(joined(far.epoch(1)), joined(loader.epoch(1)), strict=True):
            assert torch.equal(same, whole)


def test_several_epochs_may_be_read_at_once(loader):
    together = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for epoch, batches in enumerate(zip(*together, strict=True)):
        assert torch.equal(joined(batches)[0], joined(loader.epoch(epoch))[0])


def jpegs(beton):
    """Return the images of a file in order, as PIL decodes them: uint8 (height, width, 3)."""
    from ffcv.reader import Reader

    allocations = np.sort(Reader(str(beton.path)).alloc_table, order="sample_id")
    content = beton.path.read_bytes()
    return [np.asarray(Image.open(io.BytesIO(content[int(at) : int(at) + int(size)]))) for _, at, size in allocations]


def by_definition(image, crop):
    """Crop, resize, mirror and normalise with OpenCV and NumPy."""
    import cv2

    top, left, h, w, mirrored = crop
    image = cv2.resize(image[top : top + h, left : left + w], (24, 24), interpolation=cv2.INTER_AREA)
    return ((image[:, ::-1] if mirrored else image) / 255 - MEAN).transpose(2, 0, 1) / STD.reshape(3, 1, 1)


@pytest.mark.parametrize("compiled", [True, False])
def test_training_images_are_the_crops_of_their_numbers(photos, compiled, monkeypatch):
    if not compiled:  # as if the package was installed without a C compiler
        for module in ("ffcv_loader", "to_device"):
            monkeypatch.setattr(f"lbsgd.data.{module}.library", lambda: None)
    with closing(train_loader(photos, threads=2, micro_batch=8)) as loader:
        images, labels = joined(loader.epoch(4))
    originals, draw = jpegs(photos.train), random_resized_crop((0.08, 1.0), flip=True)
    for image, label, number in zip(images, labels, epoch_order(NUM_TRAIN, 7, 4)[:48], strict=True):
        assert label == photos.train.labels[number]
        expected = by_definition(originals[number], draw(crop_key(7, 4), number, *originals[number].shape[:2]))
        assert np.abs(image.numpy() - expected).mean() < 0.05  # a step of 1/255 is 0.017


def test_batch_norm_statistics_are_taken_from_the_epoch_s_first_images(photos, loader):
    first = joined(loader.epoch(5))[0][:32].view(8, 4, 3, 24, 24)
    for rank in range(2):
        one_of_two = copy.copy(loader)  # avoids a compilation
        one_of_two.cut = replace(one_of_two.cut, share=Share(rank, 2))
        batches = list(one_of_two.statistics_batches(5, num_images=32, per_worker_batch=4))
        assert [len(images) for images in batches] == [8, 8]
        assert torch.equal(torch.cat(batches), first[rank::2].flatten(0, 1))


def test_images_come_in_the_precision_and_memory_format_asked_for(photos):
    pixels = replace(PIXELS, dtype=torch.bfloat16, memory_format=torch.channels_last)
    loader = train_loader(photos, threads=1, micro_batch=8, pixels=pixels, flip=False)
    images, labels = next(loader.epoch(0))
    assert images.dtype is torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype is torch.int64 and labels.shape == (8,)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_every_validation_image_comes_once_by_its_centre_crop(photos):
    shares = [
        EvalLoader(photos.val, batch=4, share=Share(rank, 2), pixels=PIXELS, threads=rank + 1) for rank in range(2)
    ]
    assert [[len(labels) for _, labels in share] for share in shares] == [[4, 4, 3], [4, 4, 2]]
    images, labels = map(torch.cat, zip(*(joined(share) for share in shares), strict=True))
    assert labels.tolist() == photos.val.labels.tolist()
    for image, original in zip(images, jpegs(photos.val), strict=True):
        expected = by_definition(original, centre_crop(0, 0, *original.shape[:2]))
        assert np.abs(image.numpy() - expected).mean() < 0.05


def test_a_rank_without_images_yields_nothing(photos):
    assert list(EvalLoader(photos.val, batch=4, share=Share(29, 30), pixels=PIXELS, threads=1)) == []


# --- threads ----------------------------------------------------------------------------------------------------------


def decoding_threads():
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "DecodingThread"]


def test_a_bug_in_ffcv_s_thread_is_not_taken_for_one_of_the_data(loader, monkeypatch):
    def fails(**_):
        raise KeyError("a bug of ours")

    stages, outputs = loader.images.pipeline.code
    monkeypatch.setattr(loader.images.pipeline, "code", ([(fails, stages[0][1])], outputs))
    with pytest.raises(KeyError, match="a bug of ours"):
        next(loader.epoch(0))
    assert not decoding_threads()


def test_a_failure_in_ffcv_s_thread_ends_the_training_within_seconds(loader, monkeypatch):
    def fails(**_):
        raise OSError(f"the disk is gone, for {numba.get_num_threads()} thread")

    stages, outputs = loader.images.pipeline.code
    monkeypatch.setattr(loader.images.pipeline, "code", ([(fails, stages[0][1])], outputs))
    start = time.monotonic()
    with pytest.raises(DataError, match="decoding .*train.beton failed: OSError.*the disk is gone, for 1 thread"):
        next(loader.epoch(0))
    assert time.monotonic() - start < 5
    assert not decoding_threads()


def test_a_batch_that_comes_while_its_reader_gives_up_waiting_is_taken():
    """A slow thread may deliver its last batch, and end, at that moment."""

    def get(timeout):
        if thread.alive:
            thread.alive = False
            raise Empty
        return "the last batch"

    thread = SimpleNamespace(alive=True, is_alive=lambda: thread.alive, output_queue=SimpleNamespace(get=get))
    assert DecodingThread._take(thread) == "the last batch"


def test_an_epoch_that_is_left_leaves_no_thread(loader):
    for _ in loader.epoch(0):
        break
    assert not decoding_threads()


def test_a_program_that_ends_within_an_epoch_ends_its_thread_first(loader, monkeypatch):
    """Python 3.14 would wait forever for a lock of the thread, which it has stopped."""
    ends = []
    monkeypatch.setattr(atexit, "register", ends.append)
    monkeypatch.setattr(atexit, "unregister", ends.remove)
    batches = loader.epoch(0)
    next(batches)
    [end] = ends
    end()
    assert not decoding_threads()
    batches.close()
    assert ends == []


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of the batches that threads have decoded."""
    numbers, run_pipeline = [], DecodingThread.run_pipeline

    def counted(thread, number, *arguments):
        result = run_pipeline(thread, number, *arguments)
        numbers.append(number)
        return result

    monkeypatch.setattr(DecodingThread, "run_pipeline", counted)
    return numbers


def test_an_epoch_that_is_left_is_not_decoded_to_its_end(loader, decoded):
    """ImageNet's would keep a run from ending for minutes."""
    batches = loader.images.batches(np.zeros(8 * 50, int), crop_key(7, 0))
    next(batches)
    batches.close()
    assert len(decoded) < 25


def test_a_batch_keeps_its_pixels_while_the_thread_decodes_as_far_ahead_as_it_may(loader, decoded):
    with closing(DecodingThread(loader.images.pipeline, np.arange(48), crop_key(7, 0))) as thread:
        pixels = next(thread)
        before = pixels.copy()
        wait_until(lambda: len(decoded) == 5)  # this one, three in the queue, and one that waits for a place there
        assert np.array_equal(pixels, before)


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


def printed_by(code, folder):
    """Return what a program prints that has imported nothing of FFCV before."""
    path = folder / "program.py"
    path.write_text(f"import sys\nassert not {{'ffcv', 'lbsgd.data.ffcv_loader'}} & set(sys.modules)\n{code}")
    done = script(path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_loader_leaves_torch_s_threads_alone(tmp_path):
    code = "import torch; torch.set_num_threads(3); import lbsgd.data.ffcv_loader; print(torch.get_num_threads())"
    assert printed_by(code, tmp_path) == "3\n"


@pytest.mark.parametrize("threads", [0, 1000])
def test_threads_that_this_process_cannot_have_are_refused(photos, threads):
    with pytest.raises(ConfigError, match=f"{threads} loader threads are not possible.*--loader_threads"):
        train_loader(photos, threads=threads, micro_batch=8)


def test_a_loader_opens_a_file_by_its_path(photos):
    options = dict(batch=4, share=ALONE, pixels=PIXELS, threads=1)
    assert len(EvalLoader(str(photos.val.path), **options).numbers) == NUM_VAL
    with pytest.raises(DataError, match="cannot read nowhere"):
        EvalLoader("nowhere", **options)


# --- damage -----------------------------------------------------------------------------------------------------------


def noise(jpeg):
    middle = slice(len(jpeg) * 2 // 3, len(jpeg) - 2)
    jpeg[middle] = bytes(np.random.default_rng(1).integers(0, 256, len(jpeg[middle]), np.uint8))


def impossible_huffman_table(jpeg):
    """Damage at which libjpeg gives up at once."""
    table = jpeg.index(b"\xff\xc4") + 5
    jpeg[table : table + 16] = b"\xff" * 16


def with_noise_in(photos, image, folder, *, converted_so=False, damage=noise):
    """Copy the training file with damage in an image's data: from a bad disk, or as the converter wrote it."""
    data = bytearray(photos.train.path.read_bytes())
    start, size = int(photos.train.images[image]["data_at"]), int(photos.train.sizes[image])
    jpeg = data[start : start + size]
    damage(jpeg)
    data[start : start + size] = jpeg
    path = folder / "train.beton"
    path.write_bytes(data)
    file = BetonFile.open(path)
    if converted_so:
        checksums = file.checksums.copy()
        checksums[image] = zlib.crc32(data[start : start + size])
        file = replace(file, checksums=checksums)
    return file


def load(file):
    cut = Cut(seed=7, global_batch=16, micro_batch=16)
    with closing(TrainLoader(file, cut, pixels=PIXELS, crop_scale=(1.0, 1.0), threads=1)) as loader:
        return joined(loader.epoch(0))


def test_a_damaged_image_ends_the_epoch_and_is_named_unless_its_source_was_so(photos, tmp_path):
    image = int(epoch_order(NUM_TRAIN, 7, 0)[20])
    with pytest.raises(DataError, match=f"image {image} of .*train.beton is damaged"):
        load(with_noise_in(photos, image, tmp_path))
    whole, labels = load(photos.train)
    other, same_labels = load(with_noise_in(photos, image, tmp_path, converted_so=True))
    assert torch.equal(labels, same_labels)
    assert [i for i in range(48) if not torch.equal(whole[i], other[i])] == [20]


@pytest.mark.parametrize("compiled", [True, False])
def test_an_image_that_is_not_decoded_at_all_ends_the_epoch_also_if_its_source_was_so(
    photos, tmp_path, monkeypatch, compiled
):
    """It would be a black image with the label of its class."""
    if not compiled:
        monkeypatch.setattr("lbsgd.data.ffcv_loader.library", lambda: None)
    image = int(epoch_order(NUM_TRAIN, 7, 0)[20])
    file = with_noise_in(photos, image, tmp_path, converted_so=True, damage=impossible_huffman_table)
    with pytest.raises(
        DataError, match=f"image {image} of .*train.beton cannot be decoded.* --reencode --on_error skip"
    ):
        load(file)


def test_an_image_for_which_no_memory_is_left_ends_the_epoch_and_is_not_taken_for_a_black_one(photos, monkeypatch):
    of_jpeg = numba.njit(lambda data, height, width, top, left, h, w, mirrored, destination: NO_MEMORY)
    of_pixels = numba.njit(lambda pixels, top, left, h, w, mirrored, destination: NO_MEMORY)
    monkeypatch.setattr("lbsgd.data.ffcv_loader.crops", lambda: Crops(of_jpeg, of_pixels))
    first = int(epoch_order(NUM_TRAIN, 7, 0)[0])
    with pytest.raises(DataError, match=f"no memory is left to decode image {first} of .*train.beton"):
        load(photos.train)


# --- from the disk ----------------------------------------------------------------------------------------------------


def test_reading_ahead_changes_no_pixel_and_leaves_no_thread(photos, loader, monkeypatch):
    taken, advance, asked = [], ReadAhead.advance, []
    monkeypatch.setattr(ReadAhead, "advance", lambda self, number: (taken.append(number), advance(self, number)))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append(start + size))
    order = epoch_order(NUM_TRAIN, 7, 3)[:48]
    ends = (photos.train.images["data_at"][order] + photos.train.sizes[order]).tolist()
    ahead = train_loader(photos, threads=2, micro_batch=8, from_disk=True)
    epoch = ahead.epoch(3)
    first = next(epoch)
    wait_until(lambda: asked and asked[-1] == ends[-1])
    assert asked == [end for end in ends if end in asked]  # without those decoded before the thread began
    assert all(map(torch.equal, joined(itertools.chain([first], epoch)), joined(loader.epoch(3))))
    assert taken == [8, 16, 24, 32, 40, 48]  # or it stops once it is far enough ahead
    next(ahead.epoch(4))
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lbsgd read ahead"]


def test_images_are_asked_for_in_their_order_and_not_too_far_ahead(photos, monkeypatch):
    asked, advices = [], set()

    def advise(file, start, size, advice):
        asked.append((start, size))
        advices.add(advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr("lbsgd.data.read_ahead.AHEAD_BYTES", 1000)
    starts, sizes = np.array([9000, 0, 5000, 20000]), np.array([600, 300, 800, 100])
    reader = ReadAhead(photos.train.path, starts, sizes)
    wait_until(lambda: len(asked) == 2)  # 900 bytes; with the third image there would be 1,700
    reader.advance(1)  # with 300 bytes left, the third image would still make it 1,100
    reader.advance(2)
    wait_until(lambda: len(asked) == 4)
    reader.close()
    other = os.open(os.devnull, os.O_RDONLY)  # gets the number of the file that is now closed
    reader.close()  # as FFCV does
    os.close(other)
    assert asked == [(8192, 1408), (0, 300), (4096, 1704), (16384, 3716)]
    assert advices == {os.POSIX_FADV_WILLNEED}


def test_an_image_that_is_too_large_to_be_asked_for_holds_up_no_later_one(photos, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append((start, size)))
    monkeypatch.setattr("lbsgd.data.read_ahead.AHEAD_BYTES", 1000)
    reader = ReadAhead(photos.train.path, np.array([0, 4096, 8192, 12288]), np.array([600, 2000, 300, 800]))
    wait_until(lambda: len(asked) == 1)
    reader.advance(2)
    wait_until(lambda: len(asked) == 2)
    reader.close()
    assert asked == [(0, 600), (8192, 300)]  # the last image would make it 1,100 bytes


@pytest.mark.parametrize("failing", ["fadvise", "open", "read_whole"])
def test_what_cannot_be_read_ahead_is_said_once(photos, tmp_path, monkeypatch, capfd, failing):
    def raising(*_):
        raise OSError(5, "Input/output error")

    path = tmp_path / "gone.beton"
    if failing == "fadvise":
        monkeypatch.setattr(os, "posix_fadvise", raising)
        path.write_bytes(b"images")
    for _ in range(2):  # epochs
        if failing == "read_whole":
            read_whole(path)
        else:
            reader = ReadAhead(path, np.array([0]), np.array([6]))
            reader.thread.join(10)
            reader.advance(1)
            reader.close()
    said = capfd.readouterr()
    reason = "Input/output error" if failing == "fadvise" else "No such file or directory"
    line = f"warning: {path} cannot be read ahead ({reason}); images are read as they are needed"
    assert (said.out, said.err) == (line + "\n", "")


def test_a_file_is_read_to_its_end_into_memory(tmp_path, monkeypatch):
    class Watched(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    read = []
    (tmp_path / "train.beton").write_bytes(bytes(10))
    monkeypatch.setattr(read_ahead, "CHUNK", 4)
    monkeypatch.setattr(read_ahead, "open", lambda path, *_, **__: Watched(path), raising=False)
    read_whole(tmp_path / "train.beton")
    assert read == [4, 4, 2, 0]


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for ten seconds")


def test_a_file_that_fits_comes_from_memory_and_one_that_does_not_from_the_disk(photos, monkeypatch):
    path, size = photos.train.path, photos.train.path.stat().st_size
    kinds = (2, False, "page cache"), (1.3, False, "page cache"), (1.2, False, "disk"), (2, True, "memory")
    for files, in_memory, kind in kinds:
        free = int(files * size)
        monkeypatch.setattr("psutil.virtual_memory", partial(SimpleNamespace, available=free))
        read_from = ReadFrom.choose(path, in_memory)
        assert read_from.kind == kind and f"train.beton has {size / 1e6:.1f} MB" in read_from.reason
    read_whole(path)
    monkeypatch.setattr("psutil.virtual_memory", partial(SimpleNamespace, available=size))
    with pytest.raises(ConfigError, match="--in_memory: train.beton has .* MB, .* are free"):
        ReadFrom.choose(path, in_memory=True)


def test_the_json_s_augmentation_and_the_process_s_share_reach_the_loaders(photos, monkeypatch):
    def noting(beton, cut=None, **options):
        opened[beton.path.stem] = (cut, {name: options.get(name) for name in named})
        return io.BytesIO()  # it only has to be closed

    named, opened = ("crop_scale", "flip", "from_disk", "batch", "share", "threads", "pixels"), {}
    for kind in ("TrainLoader", "EvalLoader"):
        monkeypatch.setattr(f"lbsgd.data.loaders.{kind}", noting)
    monkeypatch.setattr("lbsgd.train.images.is_read_from_disk", lambda file, *_: file is photos.val)
    augmentation, share = SimpleNamespace(crop_scale=[0.5, 0.75], flip=False), Share(1, 2)
    recipe = SimpleNamespace(augmentation=augmentation, seed=7)
    plan = SimpleNamespace(recipe=recipe, global_batch=16, micro_batch=4, world_size=2)
    with ExitStack() as stack:
        open_files(photos, 3, False, plan, Processes(1, 2, 1, 2), PIXELS, stack)
    cut = Cut(seed=7, global_batch=16, micro_batch=4, share=share)
    assert opened == {
        "train": (cut, dict(zip(named, ((0.5, 0.75), False, False, None, None, 3, PIXELS), strict=True))),
        "val": (None, dict(zip(named, (None, None, True, 4, share, 3, PIXELS), strict=True))),
    }


@pytest.mark.parametrize("rank, local_rank", [(0, 0), (1, 1), (8, 0)])
def test_one_process_of_each_host_reads_a_file_into_memory_and_rank_0_says_so(
    photos, monkeypatch, capsys, rank, local_rank
):
    read = []
    monkeypatch.setattr("lbsgd.train.images.read_whole", read.append)
    assert not is_read_from_disk(photos.train, True, Processes(rank, 16, local_rank, 8))
    for thread in threading.enumerate():
        if thread.name == "lbsgd read whole":
            thread.join()
    assert read == [photos.train.path] * (local_rank == 0)
    assert ("from memory: train.beton has" in capsys.readouterr().out) == (rank == 0)


# --- FFCV's own Loader and torch's ------------------------------------------------------------------------------------


def test_the_public_shuffle_leaves_ffcv_and_all_threads_as_they_are(tmp_path):
    code = """
import cv2, numba, os, torch
os.environ["NUMBA_NUM_THREADS"] = "4"
numba.config.reload_config()
torch.set_num_threads(3), numba.set_num_threads(2), cv2.setNumThreads(5)
from lbsgd.data.ffcv_loader import SharedShuffleOrder
assert (torch.get_num_threads(), numba.get_num_threads(), cv2.getNumThreads()) == (3, 2, 5)
import importlib, inspect
for module in ("pipeline.compiler", "memory_managers.os_cache", "loader.loader", "loader.epoch_iterator"):
    module = importlib.import_module(f"ffcv.{module}")
    for owner in vars(module).values():
        if inspect.isclass(owner) and owner.__module__.startswith("ffcv"):
            for name, member in vars(owner).items():
                member = getattr(member, "__func__", member)
                assert not (getattr(member, "__module__", "") or "").startswith("lbsgd"), (owner, name)
"""
    printed_by(code, tmp_path)


def stock_loader(photos, threads):
    from ffcv.fields.decoders import CenterCropRGBImageDecoder
    from ffcv.loader import Loader

    image = [CenterCropRGBImageDecoder((24, 24), 224 / 256)]
    pipelines = {"image": image, "label": None}
    return Loader(str(photos.val.path), 7, num_workers=threads, pipelines=pipelines)


def a_stock_loader_beside_ours(folder):
    photos = open_data(folder)
    with keeping_threads(), closing(train_loader(photos, threads=1, micro_batch=8)) as loader:
        before = np.concatenate([images.copy() for (images,) in stock_loader(photos, threads=1)])
        ours = joined(loader.epoch(0))
        with closing(train_loader(photos, threads=2, micro_batch=8)) as second:  # built after a stock one
            assert all(map(torch.equal, joined(second.epoch(0)), ours))
        stock = stock_loader(photos, threads=2)
        assert torch.get_num_threads() == 2  # FFCV sets it in each Loader, and we do not prevent that
        assert np.array_equal(np.concatenate([images.copy() for (images,) in stock]), before)
        assert all(map(torch.equal, joined(loader.epoch(0)), ours))


def test_a_stock_loader_beside_ours_behaves_as_stock_and_ours_as_ours(photos):
    with_stock_ffcv(a_stock_loader_beside_ours, photos.train.path.parent)


CUT = dict(global_batch=16, micro_batch=4, seed=3, world_size=2)


EPOCHS, GIVEN = (0, 1, 5), np.arange(1, 41)


def orders_of_ffcv_s_loader(path, image_field):
    """Orders of FFCV Loaders with our order: of some epochs by rank, and of the first epoch over some images.

    Where FFCV's Loader refuses the latter, why.
    """
    from ffcv.loader import Loader

    orders, options = {}, dict(num_workers=1, pipelines={image_field: None})
    for rank in range(2):
        order = SharedShuffleOrder(rank=rank, **CUT)
        loader = Loader(str(path), 4, order=order, drop_last=True, **options)
        assert len(loader) == 6  # 53 // 16 iterations of 2 passes
        for loader.next_epoch in EPOCHS:
            orders[rank, loader.next_epoch] = loader.next_traversal_order()
        Loader(str(path), 4, order=order, indices=GIVEN, **options)  # shares the order, and changes nothing here
        assert np.array_equal(loader.next_traversal_order(), orders[rank, loader.next_epoch])
    for batch_size in (4, 8):
        order = SharedShuffleOrder(rank=0, **CUT)
        try:
            loader = Loader(str(path), batch_size, order=order, indices=GIVEN, **options)
            orders["given", batch_size] = loader.next_traversal_order()
        except ValueError as error:
            orders["given", batch_size] = str(error)
    return orders


@pytest.fixture(scope="module")
def stock_orders(photos):
    return with_stock_ffcv(orders_of_ffcv_s_loader, photos.train.path, photos.train.image_field)


@pytest.mark.parametrize("rank", [0, 1])
def test_ffcv_s_own_loader_takes_the_shared_shuffle_as_its_order(stock_orders, rank):
    cut = {key: CUT[key] for key in ("global_batch", "micro_batch", "world_size")}
    for epoch in EPOCHS:
        order = rank_batches(epoch_order(NUM_TRAIN, 3, epoch), rank=rank, **cut).ravel()
        assert np.array_equal(stock_orders[rank, epoch], order)


def test_the_shared_shuffle_of_ffcv_s_loader_is_of_the_images_that_it_is_given(stock_orders):
    order = stock_orders["given", 4]
    assert len(order) == 16 and set(order) <= set(GIVEN)  # 2 iterations of half of 16 images
    assert "batch_size=8, and the order micro_batch=4" in stock_orders["given", 8]


def test_torch_s_dataloader_goes_through_the_shared_shuffle():
    sampler = SharedShuffleSampler(100, global_batch=32, micro_batch=8, seed=5, world_size=2, rank=1)
    loader = torch.utils.data.DataLoader(range(100), batch_sampler=sampler)
    expected = rank_batches(
        epoch_order(100, 5, 2), global_batch=32, micro_batch=8, world_size=2, rank=1, first_iteration=1
    )
    sampler.set_epoch(2, first_iteration=1)
    assert len(loader) == 4 and np.array_equal(np.stack([batch.numpy() for batch in loader]), expected.reshape(4, 8))
