"""Our crops have the pixels of FFCV's whole images. Damage is noticed, and a thread's memory ends with the thread."""

import ctypes
import io
import runpy
import subprocess
import sysconfig
import threading
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.compiler import Compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from setuptools import find_packages

from lbsgd.data.native import kernels
from lbsgd.data.native.kernels import DAMAGED, DONE, NO_MEMORY, NOT_DECODED, ffcv_crops, our_crops
from lbsgd.data.native.library import LIBRARY, library
from lbsgd.data.share import Pixels
from lbsgd.data.to_device import Prefetcher, ReusedMemory
from lbsgd.errors import DataError
from lbsgd.train.facts import code_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def noise_can_be_written():
    """PIL refuses to write JPEGs larger than its buffer. Its size is restored afterwards, because PNGs depend on it."""
    before, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, 1 << 20
    yield
    ImageFile.MAXBLOCK = before


@pytest.fixture(scope="module")
def both():
    """Return our crops and FFCV's; `make setup` compiles ours, so they must be there."""
    return our_crops(library()), ffcv_crops(Compiler.compile(imdecode), Compiler.compile(resize_crop))


def picture(height, width, seed=0, detail=5):
    """Draw coarse pixels of `detail` pixels each. With detail 1, a block has all 64 coefficients and no end code."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // detail + 1, width // detail + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, quality=90, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, **options)
    return np.frombuffer(stream.getvalue(), np.uint8)


def crop(crops, data, size, box, resolution, mirrored=False):
    pixels, given_up = np.full((resolution, resolution, 3), 77, np.uint8), times_given_up()
    assert not crops.of_jpeg(data, *size, *box, mirrored, pixels)
    assert times_given_up() == given_up  # libjpeg, which could also decode it, was not needed
    return pixels


def times_given_up():
    return ctypes.c_long.in_dll(library(), "lbsgd_times_given_up").value


@settings(max_examples=200)
@given(
    st.integers(1, 90),
    st.integers(1, 120),
    st.sampled_from([0, 1, 2, (1, 2), (4, 1)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([20, 60, 90, 100]),
    st.sampled_from([1, 2, 5]),
    st.data(),
)
def test_a_crop_at_its_own_size_has_the_pixels_of_the_whole_image(
    both, height, width, subsampling, progressive, optimised, grey, mirrored, quality, detail, data
):
    image = picture(height, width, detail=detail).convert("L" if grey else "RGB")
    if subsampling in ((1, 2), (4, 1)) and not grey:
        flag = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440 if subsampling == (1, 2) else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411
        bytes_ = cv2.imencode(
            ".jpg", np.asarray(image), [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, flag]
        )[1].reshape(-1)
    else:
        bytes_ = jpeg(
            image,
            quality,
            progressive=progressive,
            optimize=optimised,
            **({} if grey else {"subsampling": subsampling}),
        )
    side = data.draw(st.integers(1, min(height, width)))
    box = data.draw(st.integers(0, height - side)), data.draw(st.integers(0, width - side)), side, side
    ours, theirs = (crop(crops, bytes_, (height, width), box, side, mirrored) for crops in both)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("quality, detail", [(100, 1), (100, 3), (30, 1)])
def test_what_is_beside_a_crop_is_passed_over_whatever_it_holds(both, quality, detail):
    """At quality 100, noise has codes and values of the maximum length, and blocks end only at their 64th place."""
    data = jpeg(picture(300, 300, detail=detail), quality, subsampling=0, optimize=detail == 3)
    ours, theirs = (crop(crops, data, (300, 300), (201, 190, 60, 60), 60) for crops in both)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("interval", [1, 7])
def test_restart_markers_are_left_to_libjpeg(both, interval):
    data = cv2.imencode(".jpg", np.asarray(picture(90, 120)), [cv2.IMWRITE_JPEG_RST_INTERVAL, interval])[1].reshape(-1)
    assert b"\xff\xd0" in data.tobytes()
    ours, theirs = (crop(crops, data, (90, 120), (20, 30, 60, 60), 60) for crops in both)
    assert np.array_equal(ours, theirs)


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 100), st.booleans(), st.data())
def test_pixels_are_resized_as_by_opencv_in_exact_arithmetic(both, height, width, resolution, mirrored, data):
    pixels = np.asarray(picture(height, width, seed=1))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    ours = np.empty((resolution, resolution, 3), np.uint8)
    both[0].of_pixels(np.ascontiguousarray(pixels), top, left, h, w, mirrored, ours)
    box = pixels[top : top + h, left : left + w].astype(np.float64)
    is_area = h >= resolution and w >= resolution
    rows = np.tensordot(weights(h, resolution, is_area), box, 1)  # in two steps: einsum alone makes y·h·w·x products
    expected = np.einsum("ywc,xw->yxc", rows, weights(w, resolution, is_area), optimize=True)
    expected = expected[:, ::-1] if mirrored else expected
    assert np.abs(ours - expected).max() <= 0.5 + 1e-3


def weights(length, resolution, is_area):
    """Return the weights of all input pixels in each output pixel, (resolution, length), by INTER_AREA's exact rule."""
    matrix, place = np.zeros((resolution, length)), np.arange(length)
    for i in range(resolution):
        begin, end = i * length / resolution, (i + 1) * length / resolution
        if is_area:
            matrix[i] = np.clip(np.minimum(place + 1, end) - np.maximum(place, begin), 0, None) / (end - begin)
        else:
            low = i * length // resolution
            beyond = (i + 1) * length - (low + 1) * resolution
            second = beyond / length % 1 if beyond > 0 and low + 1 < length else 0
            matrix[i, low] = 1 - second
            if second:
                matrix[i, low + 1] = second
    return matrix


@pytest.mark.parametrize(
    "box", [(0, 0, 400, 600), (3, 5, 200, 300), (100, 77, 131, 97), (7, 300, 390, 80), (150, 150, 60, 50)]
)
def test_resized_crops_are_ffcv_s_within_half_of_one_in_the_mean(both, box):
    data = jpeg(picture(400, 600))
    resolution = 210 if box == (0, 0, 400, 600) else 224  # more than half of the crop, so it is decoded at full scale
    ours, theirs = (crop(crops, data, (400, 600), box, resolution, mirrored=True).astype(int) for crops in both)
    assert np.abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize("resolution, mean", [(200, 1.5), (100, 1.5), (60, 1.5), (30, 1.5)])
def test_a_crop_that_is_far_too_large_is_decoded_at_a_smaller_scale(both, resolution, mean):
    """Half, a quarter and an eighth of 480 pixels cover 200, 100, 60 and 30. The box begins inside a smaller pixel."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8))
    smooth = coarse.resize((750, 600), Image.Resampling.BICUBIC)
    ours, theirs = (crop(crops, jpeg(smooth), (600, 750), (51, 67, 480, 501), resolution).astype(int) for crops in both)
    assert np.abs(ours - theirs).mean() < mean
    shifted = crop(both[1], jpeg(smooth), (600, 750), (51 + 8, 67, 480, 501), resolution).astype(int)
    assert np.abs(ours - shifted).mean() > 2 * np.abs(ours - theirs).mean()


@pytest.mark.parametrize("damage", ["cut in the middle", "noise in the middle", "another file", "empty"])
def test_damage_within_the_crop_is_noticed(both, damage):
    data = jpeg(picture(200, 300)).copy()
    whole, pixels = (0, 0, 200, 200), np.empty((200, 200, 3), np.uint8)
    assert not any(crops.of_jpeg(data, 200, 300, *whole, False, pixels) for crops in both)
    half = len(data) // 2
    if damage == "cut in the middle":
        data = data[:half]
    elif damage == "noise in the middle":
        data[half : half + 500] = np.random.default_rng(0).integers(0, 256, 500)  # zeros would be valid codes
    else:
        data = np.frombuffer(b"PNG" * 100, np.uint8) if damage == "another file" else data[:0]
    first, again = pixels.copy(), pixels.copy()
    assert both[0].of_jpeg(data, 200, 300, *whole, False, first)
    undamaged = jpeg(picture(200, 300))
    assert both[0].of_jpeg(undamaged, 200, 300, *whole, False, pixels) == DONE  # the damage leaves nothing behind
    assert both[0].of_jpeg(data, 200, 300, *whole, False, again)
    assert np.array_equal(first, again)  # made-up pixels do not depend on earlier content


@pytest.mark.parametrize("quality, subsampling", [(75, 2), (90, 0), (95, 2)])
def test_bits_that_begin_no_code_are_noticed_where_libjpeg_is_silent(both, quality, subsampling):
    """No code has 16 ones. libjpeg-turbo warns of them only near the end of the data."""
    data = jpeg(picture(200, 300), quality, subsampling=subsampling).tobytes()
    half, pixels, given_up = len(data) // 2, np.empty((200, 200, 3), np.uint8), times_given_up()
    ones = np.frombuffer(data[:half] + b"\xff\x00" * 8 + data[half:], np.uint8)
    assert both[0].of_jpeg(ones, 200, 300, 0, 0, 200, 200, False, pixels) == DAMAGED
    assert times_given_up() == given_up + 1


def test_an_image_that_is_none_is_black(both):
    pixels = np.full((20, 20, 3), 77, np.uint8)
    assert both[0].of_jpeg(np.frombuffer(b"PNG" * 100, np.uint8), 40, 60, 0, 0, 40, 40, False, pixels) == NOT_DECODED
    assert not pixels.any()


def test_missing_memory_is_returned_and_does_not_abort_the_process():
    """No machine has the memory for this many output pixels."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    box = 0.0, 0.0, 8.0, 8.0
    assert library().lbsgd_resize(pixels.ctypes.data, 24, *box, False, pixels.ctypes.data, 1 << 50) == NO_MEMORY
    data = jpeg(picture(40, 60))
    decode_crop = library().lbsgd_decode_crop
    assert decode_crop(data.ctypes.data, len(data), 40, 60, 0, 0, 40, 40, 0, pixels.ctypes.data, 1 << 50) == NO_MEMORY


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 2**31), st.booleans())
def test_no_damage_reaches_beyond_the_memory_of_the_image(both, noise, place, progressive):
    """Any damaged data is decoded or refused, and the process survives."""
    data = jpeg(picture(60, 80), progressive=progressive).copy()
    at = place % len(data)
    data[at : at + len(noise)] = np.frombuffer(noise, np.uint8)[: len(data) - at]
    both[0].of_jpeg(data, 60, 80, 10, 10, 40, 40, False, np.empty((40, 40, 3), np.uint8))


@pytest.mark.parametrize("height, width", [(20, 30), (40, 61), (41, 60), (65000, 60)])
def test_a_size_that_is_not_the_image_s_is_noticed(both, height, width):
    """The image would be a different picture, or take gigabytes."""
    data, frame = jpeg(picture(40, 60)).tobytes(), b"\xff\xc0\x00\x11\x08"
    at = data.index(frame) + len(frame)
    data = np.frombuffer(data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :], np.uint8)
    assert both[0].of_jpeg(data, 40, 60, 10, 10, 10, 10, False, np.empty((8, 8, 3), np.uint8))


def test_an_image_without_tables_does_not_get_those_of_the_one_before(both):
    pixels, data = np.empty((40, 40, 3), np.uint8), jpeg(picture(40, 60)).tobytes()
    at = data.index(b"\xff\xdb")
    without = np.frombuffer(data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :], np.uint8)
    assert not both[0].of_jpeg(jpeg(picture(40, 60), quality=20), 40, 60, 0, 0, 40, 40, False, pixels)
    assert both[0].of_jpeg(without, 40, 60, 0, 0, 40, 40, False, pixels)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_image_that_ends_where_its_scan_would_begin_is_noticed(both, missing):
    """libjpeg then makes up the end of the header in its own memory."""
    data = jpeg(picture(40, 60)).tobytes()
    scan = data.index(b"\xff\xda")
    header = data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]
    cut = np.frombuffer(header[:-missing], np.uint8)
    assert both[0].of_jpeg(cut, 40, 60, 0, 0, 40, 40, False, np.empty((40, 40, 3), np.uint8))


def test_the_memory_of_a_thread_ends_with_it(both):
    """FFCV decodes each epoch in a new thread."""
    data, pixels = jpeg(picture(1000, 1500)), np.empty((224, 224, 3), np.uint8)

    def decode():
        both[0].of_jpeg(data, 1000, 1500, 0, 0, 400, 400, False, pixels)

    def run_threads(count):
        for _ in range(count):
            thread = threading.Thread(target=decode)
            thread.start()
            thread.join()
        return psutil.Process().memory_info().rss

    before = run_threads(20)
    assert run_threads(100) - before < 20e6  # each thread has 1 MB


def test_the_kernels_are_found_where_an_installation_puts_them_and_may_be_missing(tmp_path, monkeypatch):
    """setup.py compiles into the package of kernels.py. Without a compiler there are no kernels, and FFCV decodes."""
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    [extension] = given["ext_modules"]
    assert extension.optional and all((ROOT / source).is_file() for source in (*extension.sources, *extension.depends))
    compiled = ROOT / (extension.name.replace(".", "/") + sysconfig.get_config_var("EXT_SUFFIX"))
    assert compiled.parent == Path(kernels.__file__).parent and compiled.match(LIBRARY)
    assert extension.name.rpartition(".")[0] in find_packages(str(ROOT))
    assert library(tmp_path) is None


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    memory = ReusedMemory()
    first = memory.take((2, 3)).fill_(1)
    row = first[0]
    address = first.data_ptr()
    del first
    second = memory.take((2, 3)).fill_(2)
    assert second.data_ptr() != address and row.tolist() == [1, 1, 1]
    del row
    third = memory.take((2, 3))
    assert third.data_ptr() == address
    del third
    assert memory.take((1, 3)).shape == (1, 3)  # the last batch of an evaluation
    fourth, fifth = memory.take((2, 3)), memory.take((2, 3))
    assert len({each.data_ptr() for each in (second, fourth, fifth)}) == 3


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_images, resolution", [(3, 37), (1, 1), (5, 1), (2, 3), (1, 32)])
def test_normalisation_on_the_cpu_is_torch_s_to_the_last_bit(layout, dtype, num_images, resolution, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, resolution, resolution, 3), np.uint8)
    prefetcher = Prefetcher(Pixels(resolution=resolution, device="cpu", dtype=dtype, memory_format=layout))
    with monkeypatch.context() as patched:  # as if the package was installed without a C compiler
        patched.setattr("lbsgd.data.to_device.library", lambda: None)
        [expected] = prefetcher([pixels])
    monkeypatch.delattr(Prefetcher, "_normalised")  # so the kernel makes the images, in either layout
    for batch in (pixels, np.asfortranarray(pixels)):  # the same numbers in another memory order
        [images] = prefetcher([batch])
        assert torch.equal(images, expected) and images.dtype is dtype
        assert images.stride() == expected.stride() and images.is_contiguous(memory_format=layout)


def test_another_default_dtype_of_torch_changes_no_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    form = Pixels(resolution=3, device="cpu")
    [expected] = Prefetcher(form)([pixels])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        prefetcher = Prefetcher(form)
    finally:
        torch.set_default_dtype(before)
    [images] = prefetcher([pixels])
    assert torch.equal(images, expected)


def test_every_value_of_a_pixel_is_normalised_to_torch_s_last_bit():
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    prefetcher = Prefetcher(Pixels(resolution=16, device="cpu", memory_format=torch.channels_last))
    [images] = prefetcher([pixels])
    assert torch.equal(images, prefetcher._normalised(torch.from_numpy(pixels)))


def test_images_in_channels_last_lie_in_memory_that_is_used_again_and_keep_it():
    batches = np.random.default_rng(0).integers(0, 256, (4, 2, 5, 5, 3), np.uint8)
    prefetcher = Prefetcher(Pixels(resolution=5, device="cpu", memory_format=torch.channels_last))
    dropped, kept = [], []
    for images in prefetcher(batches):
        dropped.append(images.data_ptr())
        del images
    assert len(set(dropped)) <= 2  # one is made while the reader still has the other
    for images in prefetcher(batches):
        kept.append(images)
    for images, pixels in zip(kept, batches, strict=True):
        assert torch.equal(images, prefetcher._normalised(torch.from_numpy(pixels)))


@pytest.mark.parametrize(
    "change, differs",
    [
        (("a.py", "2"), "code of lbsgd"),
        (("b.c", "2"), "code of lbsgd"),
        (("_kernels.so", None), "compiled kernels of lbsgd"),
        (("below/d.py", "2"), "code of lbsgd"),
        (("below/e.h", "2"), "code of lbsgd"),
        (("below/_kernels.so", None), "compiled kernels of lbsgd"),
    ],
)
def test_hosts_with_other_kernels_are_told_apart(tmp_path, change, differs):
    (tmp_path / "below").mkdir()
    other_kernels = {"_kernels.so", "below/_kernels.so"} - {change[0]} if change[1] is None else set()
    for name in {"a.py", "b.c", "c.h", "_kernels.so", "below/d.py", "below/e.h", "below/_kernels.so"} - other_kernels:
        (tmp_path / name).write_text("1")
    before, (name, content) = code_of(tmp_path), change
    (tmp_path / name).write_text(content) if content else (tmp_path / name).unlink()
    assert [name for name, fact in code_of(tmp_path).items() if fact != before[name]] == [differs]


def test_a_file_that_an_editor_has_open_is_no_other_code(tmp_path):
    """Emacs locks it by a link to nowhere, and a Mac leaves its own files on a share."""
    (tmp_path / "plan.py").touch()
    before = code_of(tmp_path)
    (tmp_path / ".#plan.py").symlink_to("me@here.1234:1")
    (tmp_path / "._plan.py").write_text("\0")
    assert code_of(tmp_path) == before


def test_kernels_that_cannot_be_loaded_are_one_line_and_those_of_this_python_come_first(tmp_path):
    own = f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    (tmp_path / "_kernels.cpython-310.so").write_text("of another Python, left there by an older build")
    with pytest.raises(DataError, match="_kernels.cpython-310.so cannot be loaded .*`make setup` here installs"):
        library(tmp_path)
    (tmp_path / own).symlink_to(Path(kernels.__file__).with_name(own))
    library.cache_clear()
    assert library(tmp_path) is not None
    library.cache_clear()


def test_kernels_of_another_version_are_one_line(tmp_path):
    (tmp_path / "old.c").write_text("long lbsgd_decode_crop(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "_kernels.so", tmp_path / "old.c"], check=True)
    with pytest.raises(DataError, match="_kernels.so is of another version of lbsgd .*lbsgd_resize.*make setup"):
        library(tmp_path)
