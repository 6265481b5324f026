"""Images of COCO on their way to the device: the host waits for no copy, and every failure is one line."""

import io
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.PngImagePlugin import PngInfo
from tool_modules import load_tool
from torch.utils.data import Dataset

from lbsgd.data import coco_images, coco_loader
from lbsgd.data.coco_annotations import Image, read_split
from lbsgd.data.coco_images import CocoEval, CocoTrain, draw_of, example_of, pixels_of
from lbsgd.data.coco_loader import TENSORS, loaded, tensors_of
from lbsgd.data.share import Cut, Share
from lbsgd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    load_tool("render_scenes").render(folder, 4, 2)
    return folder


# --- to the device ----------------------------------------------------------------------------------------------------


def passes(split, device):
    cut = Cut(seed=0, global_batch=2, micro_batch=2)
    return CocoTrain(split, cut, per_forward=2, flip=True, loader_workers=0, device=device).epoch(0)


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("cuda", True), (torch.device("cuda", 1), True)])
def test_images_are_loaded_into_pinned_memory_exactly_for_a_gpu(scenes, monkeypatch, device, pinned):
    asked = []

    def nothing(*_, **options):
        asked.append(options["pin_memory"])
        return []

    monkeypatch.setattr(coco_loader, "DataLoader", nothing)
    split = read_split(scenes, "train")
    assert [*passes(split, device), *CocoEval(split, loader_workers=2, device=device, share=Share())] == []
    assert asked == [pinned, pinned]


def test_no_copy_to_the_device_is_waited_for(scenes, monkeypatch):
    split, copies, copy = read_split(scenes, "train"), [], torch.Tensor.to

    def noted(tensor, *where, **how):
        copies.append(how)
        return copy(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    example_of(split.images[0], split.label_of, 0, flip=False).to("cpu")
    list(CocoEval(split, loader_workers=0, device="cpu", share=Share()))
    assert copies == [{"non_blocking": True}] * (4 + 4)  # pixels, boxes, labels and masks; four images' pixels


def test_a_pass_is_a_micro_batch_in_the_given_order_with_the_draws_of_seed_and_epoch(scenes):
    split, cut = read_split(scenes, "train"), Cut(seed=3, global_batch=4, micro_batch=1)
    train = CocoTrain(split, cut, per_forward=1, flip=True, loader_workers=0, device="cpu")
    examples = [example for [example] in train.batches(np.array([2, 0, 3, 1]), epoch=1)]
    assert [int(each.target["draw"]) for each in examples] == [draw_of(3, 1, number) for number in (2, 0, 3, 1)]
    kinds = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "draw": torch.int64}
    assert all({name: tensor.dtype for name, tensor in each.target.items()} == kinds for each in examples)


# --- what cannot be decoded -------------------------------------------------------------------------------------------


def png_with_a_damaged_chunk(data):
    """Cut the pixels of a PNG into two chunks, and damage the name of the second."""
    at = data.index(b"IDAT")
    first = data[at : at + 100]
    sound = struct.pack(">I", len(first) - 4) + first + struct.pack(">I", zlib.crc32(first))
    return data[: at - 4] + sound + struct.pack(">I", 50) + b"\xb1\xbe_\x8c" + data[at + 100 :]


def test_a_damaged_png_is_one_line(scenes, tmp_path):
    image = read_split(scenes, "train").images[0]
    path = tmp_path / "damaged.png"
    path.write_bytes(png_with_a_damaged_chunk(image.path.read_bytes()))
    object.__setattr__(image, "path", path)
    with pytest.raises(DataError, match="damaged.png cannot be decoded .*broken PNG file.*; fetch it again") as caught:
        pixels_of(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError, EOFError, struct.error, TypeError, IndexError, OverflowError])
def test_whatever_pil_raises_is_one_line(scenes, monkeypatch, error):
    def raising(*_):
        raise error("two\nlines")

    image = read_split(scenes, "train").images[0]
    monkeypatch.setattr("PIL.Image.Image.convert", raising)
    with pytest.raises(DataError, match="scene_00000.png cannot be decoded .*two lines.*; fetch it again"):
        pixels_of(image)


def test_memory_that_runs_out_is_no_damage(scenes, monkeypatch):
    def raising(*_):
        raise MemoryError

    image = read_split(scenes, "train").images[0]
    monkeypatch.setattr("PIL.Image.Image.convert", raising)
    with pytest.raises(MemoryError):
        pixels_of(image)


# --- open files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit_of_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_workers_may_open_as_many_files_as_their_batches_have_tensors(scenes, limit_of_open_files):
    limit_of_open_files(max(map(int, os.listdir("/proc/self/fd"))) + 40)
    examples = coco_images._Examples(read_split(scenes, "train"), 0, 0, False)
    assert len([*tensors_of(examples[0])]) == TENSORS
    [batch] = loaded(examples, [[0, 1, 2, 3] * 10], 1)  # 200 files
    assert len(batch) == 40


def test_more_files_than_the_system_allows_are_refused_before_a_worker_starts(monkeypatch):
    asked = []
    monkeypatch.setattr(coco_loader, "allow_open_files", lambda needed: asked.append(needed) or 4096)
    with pytest.raises(
        ConfigError, match=r"128 images a pass .* allows 4,096; .*-Hn.*--micro_batch.*--loader_workers 0"
    ):
        next(loaded(Ends("never"), [[0] * 128], 1))
    assert not multiprocessing.active_children()
    batches = TENSORS * 128 * 4  # 2 ahead of the one worker, and 2 more
    assert batches + coco_loader.OTHER_FILES < asked[0] < batches + 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_torch_s_own_generator_and_may_be_of_nothing(workers):
    """Otherwise a resumed epoch would go on with other random numbers."""
    before = torch.get_rng_state()
    assert len([*loaded(Ends("never"), [[0], [1]], workers)]) == 2 and [*loaded(Ends("never"), [], workers)] == []
    assert torch.equal(torch.get_rng_state(), before)


# --- loader workers that are lost -------------------------------------------------------------------------------------


def test_a_full_dev_shm_that_takes_no_lock_is_named(scenes, monkeypatch):
    split = read_split(scenes, "train")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", full)
    with pytest.raises(DataError, match="^/dev/shm takes no lock of the processes .*--loader_workers 0$"):
        list(CocoEval(split, loader_workers=2, device="cpu", share=Share()))


LOST = r"^a loader worker \(pid.*\) .*/dev/shm.*--loader_workers 0"


class Ends(Dataset):
    """Item 3 ends the worker that loads it."""

    def __init__(self, end):
        self.end = end

    def __getitem__(self, number):
        if number == 3:
            self.end()
        return number


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def exited():
    os._exit(3)


@pytest.mark.parametrize("end", [killed, exited])
def test_a_worker_that_is_lost_is_one_line(end):
    with pytest.raises(DataError, match=LOST) as caught:
        list(loaded(Ends(end), [[number] for number in range(8)], 2))
    assert "\n" not in str(caught.value) and "num_workers" not in str(caught.value)


def test_a_worker_that_is_lost_during_a_pass_is_one_line():
    """torch notices it by a signal, and raises at any place of the run."""
    batches = loaded(Ends(None), [[0], [1]] + [[0]] * 50, 2)
    next(batches)
    with pytest.raises(DataError, match=LOST) as caught:
        for worker in multiprocessing.active_children():
            worker.kill()
        for _ in range(500):
            time.sleep(0.01)
    assert "\n" not in str(caught.value) and "signal: Killed" in str(caught.value)
    batches.close()


def test_other_errors_of_a_dataset_stay_what_they_are():
    def bug():
        raise RuntimeError("a bug of ours")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug of ours") as caught:
            list(loaded(Ends(bug), [[3]], workers))
        assert not isinstance(caught.value, DataError)


WITHOUT_SHARED_MEMORY = """
import resource
import torch
from torch.utils.data import Dataset
from lbsgd.data.coco_images import ValImage
from lbsgd.data.coco_loader import TENSORS, loaded, tensors_of
from lbsgd.errors import ConfigError, DataError

class Big(Dataset):
    def __getitem__(self, number):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # of this worker, as if it were full
        return ValImage(torch.zeros(3, 100, 100, dtype=torch.uint8), None)

try:
    list(loaded(Big(), [[0], [1]], 1))
except DataError as error:
    print(error)
"""


def test_shared_memory_that_is_full_is_one_line_and_no_wait():
    done = subprocess.run([sys.executable, "-c", WITHOUT_SHARED_MEMORY], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("/dev/shm "), done.stdout + done.stderr
    assert "--shm-size" in done.stdout and "--loader_workers 0" in done.stdout


# --- depths -----------------------------------------------------------------------------------------------------------


def test_grey_of_16_bits_is_scaled_as_in_a_conversion(scenes, tmp_path):
    """PIL's own conversion to RGB clips it, which made the image white."""
    image = read_split(scenes, "train").images[0]
    grey = np.linspace(0, 65_535, image.width * image.height).astype(np.uint16).reshape(image.height, image.width)
    path = tmp_path / "deep.png"
    PILImage.fromarray(grey).save(path)
    object.__setattr__(image, "path", path)
    assert (pixels_of(image).numpy() == np.rint(grey / 257).astype(np.uint8)).all()


# --- EXIF orientation -------------------------------------------------------------------------------------------------


def shown_by(orientation, path, deep=False):
    """Write a 6x4 image with an orientation. Return how PIL shows it, as uint8 (3, H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    if deep:  # grey with 16 bits
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
        PILImage.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(path, exif=exif)
    else:
        PILImage.fromarray(pixels).save(path, exif=exif, quality=100, lossless=True)
        pixels = np.asarray(PILImage.open(path).convert("RGB")) if path.suffix != ".tiff" else pixels
    shown = PILImage.fromarray(pixels)
    shown.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(shown)).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "deep.png", "deep.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_those_that_are_shown(tmp_path, kind, orientation):
    path = tmp_path / f"image.{kind}"
    shown = shown_by(orientation, path, deep="deep" in kind)
    _, height, width = shown.shape
    assert (height > width) == (orientation > 4)
    assert (pixels_of(Image(1, path, height, width, [])).numpy() == shown).all()


def behind_the_pixels(png):
    """Move a PNG's eXIf chunk behind its pixels."""
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4])
    last = png.index(b"IEND") - 4
    return png[:at] + png[end:last] + png[at:end] + png[last:]


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def said_elsewhere(how, orientation, pixels):
    """Return a file whose orientation is not in EXIF before its pixels."""
    file, exif, texts = io.BytesIO(), PILImage.Exif(), PngInfo()
    exif[0x0112] = orientation
    image, xmp = PILImage.fromarray(pixels), XMP.format(orientation)
    if how == "jpg with XMP":
        image.save(file, "JPEG", quality=100, subsampling=0, xmp=xmp.encode())
    elif how == "tiff with XMP":
        image.save(file, "TIFF", tiffinfo={700: xmp.encode()})
    elif "XMP" in how:
        texts.add_itxt("XML:com.adobe.xmp", xmp)
        image.save(file, "PNG", pnginfo=texts)
    elif "raw profile" in how:
        texts.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
        image.save(file, "PNG", pnginfo=texts)
    else:
        image.save(file, "PNG", exif=exif)
        return behind_the_pixels(file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    "how",
    [
        "png behind its pixels",
        "deep png behind its pixels",
        "png with XMP",
        "deep png with XMP",
        "jpg with XMP",
        "tiff with XMP",
        "png with a raw profile",
    ],
)
def test_an_orientation_that_stands_elsewhere_turns_the_pixels_too(tmp_path, how, orientation):
    """Detectron2's getexif() knows all of these. Otherwise training would see the images upside down."""
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (4, 6, 1), dtype=np.uint8), 3, axis=2)
    written = pixels[:, :, 0].astype(np.uint16) * 257 if "deep" in how else pixels
    (path := tmp_path / "image").write_bytes(said_elsewhere(how, orientation, written))
    turn = {1: 0, 3: 2, 6: 3}[orientation]  # quarter turns, counterclockwise
    shown = np.rot90(pixels, turn).transpose(2, 0, 1)
    assert (np.abs(pixels_of(Image(1, path, *shown.shape[1:], [])).numpy().astype(int) - shown) < 3).all()


def test_a_png_of_16_bits_in_colours_is_turned_by_what_stands_behind_its_pixels(tmp_path):
    """OpenCV decodes it, so PIL has not read to its end."""
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    data = cv2.imencode(".png", pixels[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes()
    exif = PILImage.Exif()
    exif[0x0112] = 3
    last = data.index(b"IEND") - 4
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    (tmp_path / "image.png").write_bytes(data[:last] + chunk + data[last:])
    shown = pixels[::-1, ::-1].transpose(2, 0, 1)
    assert (pixels_of(Image(1, tmp_path / "image.png", 4, 6, [])).numpy() == shown).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_annotations_of_the_pixels_before_a_turn_are_refused_by_name(tmp_path, orientation):
    shown_by(orientation, path := tmp_path / "image.jpg")
    turned = orientation > 4
    has, say, shape = ("4x6", "6x4", (4, 6)) if turned else ("6x4", "4x6", (6, 4))
    other = "the file belongs to other annotations"
    why = f"its EXIF orientation {orientation} turns it: make it 1 if they are" if turned else other
    with pytest.raises(DataError, match=f"image.jpg has {has} pixels, its annotations say {say}; {why}"):
        pixels_of(Image(1, path, *shape, []))
    with pytest.raises(DataError, match=f"its annotations say 6x5; {other}"):
        pixels_of(Image(1, path, 5, 6, []))


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation):
    shown_by(orientation, tmp_path / "image.jpg")
    assert pixels_of(Image(1, tmp_path / "image.jpg", 4, 6, [])).shape == (3, 4, 6)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    PILImage.new("RGB", (6, 4)).save(tmp_path / "image.jpg", exif=b"Exif\0\0no TIFF's header")
    assert pixels_of(Image(1, tmp_path / "image.jpg", 4, 6, [])).shape == (3, 4, 6)


def test_an_image_that_is_gone_is_one_line(scenes, tmp_path):
    image = read_split(scenes, "train").images[0]
    object.__setattr__(image, "path", tmp_path / "gone.png")
    with pytest.raises(DataError, match="gone.png cannot be decoded .*No such file.*; fetch it again"):
        pixels_of(image)
