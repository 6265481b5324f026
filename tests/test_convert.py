"""The converter: images in, FFCV files out that FFCV itself reads, complete or not there at all, also after a SIGKILL."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import lbsgd.convert.convert
import lbsgd.convert.estimate
import lbsgd.convert.image
import lbsgd.convert.work_folder
from lbsgd.convert.beton_writer import METADATA, METADATA_AT, RECORD, BetonWriter
from lbsgd.convert.convert import convert, look
from lbsgd.convert.image import COPIED, ENCODED, PIXELS, Settings, plain_size, stored_image
from lbsgd.convert.process_pool import with_room
from lbsgd.convert.sources import find_source
from lbsgd.convert.verify import verify
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import open_data
from lbsgd.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools/convert_imagenet_to_ffcv.py"
SETTINGS = dict(max_side=500, quality=90, num_workers=2, overwrite=False)


@pytest.fixture(scope="module")
def ffcv():
    import lbsgd.data.ffcv_loader  # noqa: F401  imports FFCV so that torch keeps its number of threads


def picture(height, width, phase=0.0):
    """A smooth picture, which JPEG keeps well: (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(phase + x / width * a + y / height * b) for a, b in ((3, 1), (-2, 4), (1, -5))]
    return np.uint8(127.5 + 127.5 * np.stack(waves, axis=-1))


def encoded(mode="RGB", size=(64, 64), file_format="JPEG", phase=0.0, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture(*size, phase)).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def save(path, *arguments, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(*arguments, **options))


def palette(**options):
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).quantize(256).save(buffer, "PNG", **options)
    return buffer.getvalue()


def ycck():
    """A CMYK JPEG whose Adobe marker says that its colours are turned into luminance and chroma."""
    data = bytearray(encoded("CMYK"))
    data[data.index(b"\xff\xee") + 15] = 2
    return bytes(data)


def turned():
    """Half as wide as high, with the EXIF entry that asks for it to be shown lying."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(size=(64, 32), exif=exif.tobytes())


def by_opencv(*options):
    return cv2.imencode(".jpg", picture(64, 64), options)[1].tobytes()


@pytest.fixture
def tree(tmp_path):
    """A small source: two classes, three training and two validation images."""
    names = ("train/ant/1.JPEG", "train/ant/2.JPEG", "train/bee/1.JPEG", "val/ant/1.JPEG", "val/bee/1.JPEG")
    for phase, name in enumerate(names):
        save(tmp_path / "source" / name, phase=phase)
    return tmp_path / "source"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def stored(path):
    """The bytes of each image in a file."""
    beton, content = BetonFile.open(path), path.read_bytes()
    return [content[int(at) : int(at) + int(size)] for at, size in zip(beton.images["data_at"], beton.sizes)]


def pil(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), int)


# --- images of every kind ---------------------------------------------------------------------------------------------

JPEG = encoded()
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # of the five entries that it tells of, the first is cut
EXIF = b"\xff\xe1" + (len(EXIF) + 2).to_bytes(2, "big") + EXIF
FRAME = JPEG.index(b"\xff\xc0")


def rgb(change):
    """A JPEG of red, green and blue, of which PIL's own says so twice: by Adobe's marker and by its components' ids."""
    data = encoded(keep_rgb=True)
    adobe = data.index(b"\xff\xee")
    if change == "ids":
        return data[:adobe] + data[adobe + 16 :]
    for red, green, blue, step in ((b"R", b"G", b"B", 3), (b"R", b"G", b"B", 2)):  # in the frame, in the scan
        at = next(at for at in range(len(data)) if data[at : at + 2 * step + 1 : step] == red + green + blue)
        between = data[at + 1 : at + step], data[at + step + 1 : at + 2 * step]
        data = data[:at] + b"\1" + between[0] + b"\2" + between[1] + b"\3" + data[at + 2 * step + 1 :]
    return data


def odd_sampling():
    """All components at 2x1: no subsampling, in a way that no program writes."""
    data = bytearray(encoded(subsampling=0))
    for at in range(3):
        data[FRAME + 11 + 3 * at] = 0x21
    return bytes(data)


PLAIN = {
    "colour": JPEG,
    "progressive": encoded(progressive=True),
    "grey": encoded("L"),
    "restarts": encoded(restart_marker_blocks=2),
    "4:4:4": encoded(subsampling=0),
    "4:2:2": encoded(subsampling=1),
    "4:4:0": by_opencv(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
    "4:1:1": by_opencv(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
    "corrupt EXIF": JPEG[:2] + EXIF + JPEG[2:],
    "bytes after the end": JPEG + b"left by some camera",
}
ODD = {
    "PNG": encoded(file_format="PNG"),
    "PNG with alpha": encoded("RGBA", file_format="PNG"),
    "grey PNG with alpha": encoded("LA", file_format="PNG"),
    "PNG of 256 colours": palette(),
    "PNG of 256 colours, some transparent": palette(transparency=bytes(range(256))),
    "PNG of 16 bits, grey": cv2.imencode(".png", np.uint16(picture(64, 64)[:, :, 0]) * 257)[1].tobytes(),
    "PNG of 16 bits": cv2.imencode(".png", np.uint16(picture(64, 64)) * 257)[1].tobytes(),
    "CMYK": encoded("CMYK"),
    "YCCK": ycck(),
    "RGB in a JPEG": encoded(keep_rgb=True),
    "RGB by Adobe's marker": rgb("adobe"),
    "RGB by its ids": rgb("ids"),
    "odd sampling": odd_sampling(),
    "TIFF": encoded(file_format="TIFF"),
    "WebP": encoded(file_format="WEBP", lossless=True),
    "BMP": encoded(file_format="BMP"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Palette images with Transparency")
def test_plain_jpegs_are_kept_as_they_are_and_all_others_as_pil_decodes_them():
    for name, data in PLAIN.items():
        assert plain_size(data) == (64, 64), name
        kept = stored_image(data, 0, Settings(max_side=64), 1 << 23)
        assert kept.kind == COPIED and kept.data == data
    for name, data in ODD.items():
        assert plain_size(data) is None, name
        kept = stored_image(data, 0, Settings(max_side=64), 1 << 23)
        assert kept.kind == ENCODED and plain_size(bytes(kept.data)) == (kept.width, kept.height) == (64, 64)
        by_pil = io.BytesIO()
        Image.fromarray(np.uint8(pil(data))).save(by_pil, "JPEG", quality=90)
        assert np.array_equal(pil(bytes(kept.data)), pil(by_pil.getvalue())), name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Palette images with Transparency")
def test_stock_ffcv_reads_every_kind_with_the_pixels_that_pil_sees(tmp_path, ffcv):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    images = [data for name, data in (PLAIN | ODD).items() if name != "odd sampling"]  # noise, which JPEG does not keep
    for number, data in enumerate(images):
        path = tmp_path / "source/train" / "ab"[number % 2] / f"{number:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.copytree(tmp_path / "source/train", tmp_path / "source/val")
    convert(tmp_path / "source", tmp_path / "data", raw_fraction=0.25, **SETTINGS)
    loader = Loader(
        str(tmp_path / "data/train.beton"),
        len(images),
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    [(pixels, labels)] = loader
    expected = images[0::2] + images[1::2]
    assert labels.ravel().tolist() == [0] * len(images[0::2]) + [1] * len(images[1::2])
    for found, data in zip(pixels, expected):
        assert np.abs(found - pil(data)).mean() < 4
    modes = BetonFile.open(tmp_path / "data/train.beton").images["mode"]
    assert modes.sum() == len(images) // 4 and (found := pixels[modes == 1]).any()
    for raw, data in zip(found, np.array(expected, object)[modes == 1]):
        assert np.array_equal(raw, pil(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_exif_block_corrupt_or_not_changes_no_pixel():
    """FFCV's decoder and torchvision's loader know nothing of orientation; the bytes are copied, or encoded as they lie."""
    for data, size in ((turned(), (32, 64)), (PLAIN["corrupt EXIF"], (64, 64))):
        assert stored_image(data, 0, Settings(max_side=64), 1 << 23).data is data
        for settings in (
            Settings(max_side=64, reencode=True),
            Settings(max_side=64, raw_fraction=1),
            Settings(max_side=20),
        ):
            kept = stored_image(data, 0, settings, 1 << 23)
            wanted = settings.size(*size)
            assert (kept.width, kept.height) == wanted
            pixels = pil(bytes(kept.data)) if kept.kind == ENCODED else kept.data.reshape(*wanted[::-1], 3)
            expected = cv2.resize(np.uint8(pil(data)), wanted, interpolation=cv2.INTER_AREA)
            assert (
                np.abs(pixels - expected).mean() < 8
            )  # of 20 pixels, JPEG keeps less; turned, it would be 60 and more


def test_what_pil_takes_for_an_attack_is_not_decoded_either():
    data = bytearray(JPEG)
    data[FRAME + 5 : FRAME + 9] = (13_400).to_bytes(2, "big") * 2
    assert plain_size(bytes(data)) is None and 13_400**2 > 2 * Image.MAX_IMAGE_PIXELS == lbsgd.convert.image.MAX_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        stored_image(bytes(data), 0, Settings(max_side=64), 1 << 23)


def test_an_empty_file_is_no_image():
    assert plain_size(b"") is None
    with pytest.raises(Image.UnidentifiedImageError):
        stored_image(b"", 0, Settings(max_side=64), 1 << 23)


@pytest.mark.parametrize("cut", [3, 20, 300, len(JPEG) // 2, len(JPEG) - 2])
def test_a_jpeg_without_its_end_is_pil_s_to_judge(cut):
    assert plain_size(JPEG[:cut]) is None
    with pytest.raises(Exception):
        stored_image(JPEG[:cut], 0, Settings(max_side=64), 1 << 23)


def test_random_damage_to_a_header_never_passes_for_a_plain_jpeg_that_pil_refuses():
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(JPEG)
        for at in rng.integers(2, 620, 2):
            data[at] = rng.integers(256)
        if size := plain_size(bytes(data)):
            try:
                assert pil(bytes(data)).shape[1::-1] == size
            except OSError:  # PIL's "broken data stream": tables whose content is damaged, which only decoding shows
                pass


@pytest.mark.parametrize(
    "settings, size, expected",
    [
        (dict(max_side=100), (200, 120), (100, 60)),
        (dict(max_side=100), (100, 60), (100, 60)),
        (dict(max_side=500), (501, 375), (500, 374)),  # FFCV rounds down
        (dict(short_side=100), (200, 120), (166, 100)),
        (dict(short_side=100), (120, 201), (100, 167)),  # as torchvision
        (dict(short_side=100), (300, 100), (300, 100)),
        (dict(short_side=100), (99, 3000), (99, 3000)),
        (dict(max_side=10), (3000, 2), (10, 1)),
    ],
)
def test_images_are_shrunk_to_a_longer_or_a_shorter_side_and_never_enlarged(settings, size, expected):
    assert Settings(**settings).size(*size) == expected
    kept = stored_image(encoded(size=size[::-1]), 0, Settings(**settings), 1 << 23)
    assert (kept.width, kept.height) == expected and plain_size(bytes(kept.data)) == expected
    assert kept.kind == (COPIED if size == expected else ENCODED)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (1000, 1300)])
def test_encoding_again_gives_ffcv_s_bytes_or_nearly_so(ffcv, size):
    """Bytes where nothing is shrunk; where JPEGs are decoded at a fraction of their size, nearly the same pixels."""
    from ffcv.fields.rgb_image import encode_jpeg, resizer

    data = encoded(size=size)
    theirs = encode_jpeg(resizer(np.uint8(pil(data)), 200), 90).tobytes()
    ours = bytes(stored_image(data, 0, Settings(max_side=200, reencode=True), 1 << 23).data)
    assert ours == theirs if max(size) <= 400 else np.abs(pil(ours) - pil(theirs)).mean() < 0.5
    assert abs(len(ours) / len(theirs) - 1) < 0.03


def test_raw_images_are_spread_evenly():
    raw = [Settings(max_side=9, raw_fraction=0.3).is_raw(index) for index in range(1000)]
    assert sum(raw) == 300 and max(sum(raw[at : at + 10]) for at in range(990)) <= 4
    assert not any(Settings(max_side=9).is_raw(index) for index in range(100))
    assert stored_image(JPEG, 0, Settings(max_side=64, raw_fraction=1), 1 << 23).kind == PIXELS


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_side=500, short_side=256),
        {},
        dict(max_side=0),
        dict(short_side=70_000),
        dict(max_side=5, quality=0),
        dict(max_side=5, raw_fraction=1.1),
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="--(max_side|short_side|quality|raw_fraction)"):
        Settings(**settings)


def test_a_very_large_image_takes_no_memory_to_speak_of(tmp_path):
    """36 million pixels would be 108 MB; processes have 200 MB."""
    save(tmp_path / "large.JPEG", size=(600, 600))
    with Image.open(tmp_path / "large.JPEG") as image:
        image.resize((6000, 6000)).save(tmp_path / "large.JPEG")
    code = f"""
import lbsgd.convert.image as jpeg
kept = jpeg.stored_image(open({str(tmp_path / "large.JPEG")!r}, "rb").read(), 0, jpeg.Settings(max_side=500), 1 << 23)
print(kept.width, *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""
    width, kilobytes = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).split())
    assert width == 500 and kilobytes < 150_000


PEAK = """
import contextlib, os, sys, threading, time
from pathlib import Path
import lbsgd.convert.convert, lbsgd.convert.verify

def private(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) // 1000

def total(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) // 1000

def watch():
    while True:
        with contextlib.suppress(OSError, ValueError, StopIteration):  # one has ended
            pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            second[0] = max(second[0], sorted([0, 0, *map(private, pids)])[-2])
            most[0] = max(most[0], sum(map(total, [os.getpid(), *pids])))
        time.sleep(0.005)

second, most = [0], [0]  # MB of the process with the second most, and of all
threading.Thread(target=watch, daemon=True).start()
if __name__ == "__main__":
    work()
    print(second[0], most[0])
"""


def peak_memory(work, *arguments):
    """(MB of the process that takes the second most, MB of all) while a function's code runs."""
    code = PEAK.replace("    work()", "    " + work)
    output = subprocess.check_output([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True)
    return map(int, output.splitlines()[-1].split())


def repeated(path, count, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    (first := path.with_stem(f"{path.stem}0")).write_bytes(data)
    for number in range(1, count):
        os.link(first, path.with_stem(f"{path.stem}{number}"))


def large(*options, side=(6000, 8000), **more):
    buffer = io.BytesIO()
    image = Image.fromarray(picture(60, 80)).resize(side[::-1], Image.NEAREST)
    (image.convert("CMYK") if "CMYK" in options else image).save(buffer, "PNG" if "PNG" in options else "JPEG", **more)
    return buffer.getvalue()


def test_only_one_process_at_a_time_decodes_a_very_large_image(tmp_path):
    """Its coefficients alone are 6 bytes a pixel of a progressive JPEG, 150 MB here, however small it is decoded."""
    repeated(
        tmp_path / "source/train/a/x.JPEG", 6, large(side=(5000, 5000), progressive=True, subsampling=0, quality=20)
    )
    repeated(tmp_path / "source/val/a/x.JPEG", 1, JPEG)
    second, _ = peak_memory(
        "lbsgd.convert.convert.CHUNK_IMAGES = 1; lbsgd.convert.convert.convert(*map(Path, sys.argv[1:]), max_side=500, "
        "num_workers=3)",
        tmp_path / "source",
        tmp_path / "data",
    )
    assert second < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", ["max_side=500", "max_side=60_000, reencode=True", "max_side=6000, raw_fraction=0.5"]
)
def test_memory_is_bounded_whatever_images_there_are(tmp_path, settings):
    """2 GiB, and 200 MB a process: all but one process at a time stay below 200 MB."""
    for number, data in enumerate([large(), large(progressive=True, subsampling=0), large("PNG"), large("CMYK"), JPEG]):
        repeated(tmp_path / f"source/train/{number % 2}/{number}_.JPEG", 6 if len(data) > 1e5 else 2000, data)
        repeated(tmp_path / f"source/val/{number % 2}/{number}_.JPEG", 1, data)
    folders = tmp_path / "source", tmp_path / "data"
    for work in (
        f"lbsgd.convert.convert.convert(*map(Path, sys.argv[1:]), num_workers=6, {settings})",
        "lbsgd.convert.verify.verify(Path(sys.argv[2]), 6)",
        "lbsgd.convert.verify.verify(Path(sys.argv[2]), 6, Path(sys.argv[1]))",
    ):
        second, most = peak_memory(work, *folders)
        assert second < 200 and most < 2048 + 6 * 200
    shutil.rmtree(tmp_path / "data")


def test_processes_whose_results_are_very_large_are_fewer(tmp_path, monkeypatch, capsys):
    """An image of 3,300 x 3,300 pixels kept as such is 33 MB; of 6,700 x 6,700, 135 MB."""
    assert [with_room(16, num_bytes) for num_bytes in (10, 33 << 20, 135 << 20, 1 << 40)] == [16, 16, 4, 1]
    for number in range(4):
        save(tmp_path / f"source/{'train' if number else 'val'}/a/{number}.JPEG")
    taken = []
    monkeypatch.setattr(lbsgd.convert.convert, "_chunks", lambda *arguments: taken.append(arguments[2]) or iter(()))
    for side in (500, 1000, 2000, 6700):
        with pytest.raises(AssertionError):  # nothing was done
            convert(tmp_path / "source", tmp_path / "data", max_side=side, raw_fraction=0.5, num_workers=8)
        shutil.rmtree(tmp_path / "data")
    assert taken[::2] == [32, 8, 2, 1]
    assert "train: 2 of 8 processes, as an image may keep 134.7 MB of memory\n" in capsys.readouterr().out


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_made(tree, tmp_path):
    save(tree / "train/bee/2.JPEG", size=(700, 10))
    convert(tree, tmp_path / "data", **SETTINGS)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert (
        manifest["classes"] == ["ant", "bee"] and manifest["source"] == str(tree) and manifest["converter_version"] == 2
    )
    assert manifest["settings"] == dict(max_side=500, short_side=None, quality=90, raw_fraction=0, reencode=False)
    assert manifest["stored"]["train"] == dict(copied=3, encoded=1, raw=0)
    assert manifest["skipped"] == dict(train=[], val=[])
    assert manifest["images_per_class"] == dict(train=[2, 2], val=[1, 1])
    for name, num_images in (("train", 4), ("val", 2)):
        beton = BetonFile.open(tmp_path / f"data/{name}.beton")
        assert manifest[name] == {
            "num_images": num_images,
            "num_bytes": beton.path.stat().st_size,
            "fingerprint": beton.fingerprint,
        }
    assert names_in(tmp_path / "data") == ["manifest.json", "train.beton", "val.beton"]


def test_original_bytes_are_kept_where_no_resize_is_needed(tree, tmp_path):
    convert(tree, tmp_path / "data", **SETTINGS)
    assert stored(tmp_path / "data/train.beton") == [path.read_bytes() for path in sorted(tree.glob("train/*/*"))]
    convert(tree, tmp_path / "again", reencode=True, **SETTINGS)
    assert stored(tmp_path / "again/train.beton") != stored(tmp_path / "data/train.beton")


def test_the_files_do_not_depend_on_the_number_of_processes_or_on_chunks(tree, tmp_path, monkeypatch):
    for number in range(20):
        save(tree / f"train/ant/{number}.JPEG", size=(40 + number, 600))
    contents = set()
    for num_workers, chunk, slot_bytes in ((1, 32, 1 << 23), (3, 2, 1 << 23), (2, 5, 4096)):  # too small slots, too
        monkeypatch.setattr(lbsgd.convert.convert, "CHUNK_IMAGES", chunk)
        monkeypatch.setattr("lbsgd.convert.process_pool.SLOT_BYTES", slot_bytes)
        convert(tree, tmp_path / str(num_workers), **{**SETTINGS, "num_workers": num_workers})
        contents.add((tmp_path / str(num_workers) / "train.beton").read_bytes())
    assert len(contents) == 1


# --- what is there already --------------------------------------------------------------------------------------------


def test_a_complete_folder_is_left_and_a_damaged_one_made_again(tree, tmp_path, capsys):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    before = (data / "train.beton").stat().st_mtime_ns
    convert(tree, data, **SETTINGS)
    assert (data / "train.beton").stat().st_mtime_ns == before
    assert "is complete: 3 training and 2 validation images, 2 classes" in capsys.readouterr().out

    os.truncate(data / "train.beton", 1000)
    convert(tree, data, **SETTINGS)
    assert open_data(data).train.num_images == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree, data: SETTINGS | {"quality": 80}, "differs in settings"),
        (lambda tree, data: (save(tree / "val/bee/new.JPEG"), SETTINGS)[1], "differs in validation images"),
        (
            lambda tree, data: (save(tree / "val/bee/1.JPEG", quality=50), SETTINGS)[1],
            "differs in names or sizes of images",
        ),
        (
            lambda tree, data: ((data / "manifest.json").unlink(), SETTINGS)[1],
            "holds train.beton, but no manifest.json",
        ),
    ],
)
def test_other_data_is_not_replaced_unasked(tree, tmp_path, change, message):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    settings = change(tree, data)
    content = (data / "train.beton").read_bytes()
    with pytest.raises(DataError, match=message) as error:
        convert(tree, data, **settings)
    assert "--overwrite" in str(error.value)
    assert (data / "train.beton").read_bytes() == content
    convert(tree, data, **{**settings, "overwrite": True})
    open_data(data)


def test_a_conversion_that_fails_leaves_the_old_data_as_it_was(tree, tmp_path):
    data = tmp_path / "data"
    convert(tree, data, **SETTINGS)
    fingerprint = open_data(data).fingerprint
    (tree / "val/ant/1.JPEG").write_text("no image")
    with pytest.raises(DataError):
        convert(tree, data, **{**SETTINGS, "overwrite": True})
    assert open_data(data).fingerprint == fingerprint
    assert names_in(data) == [".converting", "manifest.json", "train.beton", "val.beton"]


# --- interruptions ----------------------------------------------------------------------------------------------------

KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import lbsgd.convert.convert

source, folder = map(Path, sys.argv[1:])
lbsgd.convert.convert.CHUNK_IMAGES, quick = 4, lbsgd.convert.convert.jpeg.stored_image

def slow(*arguments, **options):  # so that the moments fall into the work, however fast the machine is
    time.sleep(0.008)
    return quick(*arguments, **options)

def start():
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        lbsgd.convert.convert.convert(source, folder, max_side=150, num_workers=2, commit_seconds=0.01)
        os._exit(0)
    return child

def there():
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != ".converting"}

os.waitpid(start(), 0)
reference = there()
assert len(reference) == 3
shutil.rmtree(folder)
lbsgd.convert.convert.jpeg.stored_image = slow
random.seed(0)
kills, ends, journals = 0, 0, set()
while kills < 20:
    child = start()
    time.sleep(random.uniform(0.02, 0.45))
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    kills += killed
    assert all(content == reference[name] for name, content in there().items())  # complete, or not there
    assert "manifest.json" not in there() or there() == reference
    if not killed:
        assert there() == reference
        ends += 1
        shutil.rmtree(folder)
    elif (journal := folder / ".converting/train.journal").exists():
        journals.add(journal.stat().st_size)
_, status = os.waitpid(start(), 0)
assert status == 0 and there() == reference
print(len(journals), ends)
"""


def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(tmp_path):
    for number in range(160):
        save(tmp_path / f"source/train/{number % 2}/{number:03}.JPEG", size=(420 + number % 7, 440), phase=number)
        if number % 16 == 0:
            save(tmp_path / f"source/val/{number % 32 // 16}/{number:03}.JPEG", phase=number)
    command = [sys.executable, "-c", KILLER, tmp_path / "source", tmp_path / "data"]
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    different_journals, ends = map(int, output.split())
    assert different_journals >= 4 and ends >= 1  # else the moments were not where anything happens


@pytest.mark.parametrize("step", range(5))
def test_killed_while_the_files_get_their_names_it_ends_with_the_same_bytes(tree, tmp_path, monkeypatch, step):
    convert(tree, tmp_path / "whole", **SETTINGS)
    data, steps = tmp_path / "data", iter(range(step + 1))

    def killed_at_step(function):
        def stepwise(*arguments, **options):
            if next(steps, step) == step:
                raise SystemExit
            return function(*arguments, **options)

        return stepwise

    with monkeypatch.context() as patch:
        for name in ("unlink", "rename"):
            patch.setattr(Path, name, killed_at_step(getattr(Path, name)))
        patch.setattr(lbsgd.convert.work_folder.shutil, "rmtree", killed_at_step(shutil.rmtree))
        with pytest.raises(SystemExit):
            convert(tree, data, **SETTINGS)
    assert (data / "manifest.json").exists() == (step >= 4)
    convert(tree, data, **SETTINGS)
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]
    for name in names_in(data):
        assert (data / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_work_for_other_images_or_settings_is_not_taken_up(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lbsgd.convert.convert, "publish", lambda *_: None)
        convert(tree, tmp_path / "data", **SETTINGS)
        save(tree / "train/ant/1.JPEG", phase=7)  # another picture, of which a journal would know nothing
    convert(tree, tmp_path / "data", **SETTINGS)
    assert stored(tmp_path / "data/train.beton")[0] == (tree / "train/ant/1.JPEG").read_bytes()


def test_two_conversions_into_one_folder_are_refused(tree, tmp_path):
    code = (
        "import sys, time, lbsgd.convert.work_folder as w; from pathlib import Path\n"
        "with w.locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    (tmp_path / "data").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "data/.converting"], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        other.stdout.readline()
        with pytest.raises(DataError, match="another process is converting into .*data"):
            convert(tree, tmp_path / "data", **SETTINGS)
    finally:
        other.kill()
        other.wait()
    convert(tree, tmp_path / "data", **SETTINGS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_ends_at_once_and_says_how_to_go_on(tmp_path, number):
    for image in range(4):
        save(tmp_path / f"source/{'train' if image % 2 else 'val'}/a/{image}.JPEG", size=(2000, 2000), subsampling=0)
    for image in range(800):
        os.link(tmp_path / "source/train/a/1.JPEG", tmp_path / f"source/train/a/more{image}.JPEG")
    process = subprocess.Popen(
        [sys.executable, TOOL, "--source", "source", "--data_dir", "data"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "data/.converting/val.journal").exists():
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(number)
    asked = time.monotonic()
    _, errors = process.communicate()
    assert time.monotonic() - asked < 3 and process.returncode == 75
    assert errors == (
        f"stopped: {number.name}; what is done is kept in data/.converting: the same command goes on from there\n"
    )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tree):
    content = (tree / "train/ant/1.JPEG").read_bytes()
    (tree / "train/ant/1.JPEG").write_bytes(content[: len(content) // 2])
    (tree / "val/bee/1.JPEG").write_text("no image")
    save(tree / "val/bee/2.JPEG")
    return tree


def test_undecodable_images_are_all_listed_before_it_fails(damaged, tmp_path, capsys):
    with pytest.raises(DataError, match="2 of 6 images cannot be decoded") as error:
        convert(damaged, tmp_path / "data", **SETTINGS)
    assert f"{damaged}/train/ant/1.JPEG, {damaged}/val/bee/1.JPEG" in str(error.value)
    assert "--on_error skip" in str(error.value)
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot be decoded: ")]
    assert listed == [f"cannot be decoded: {damaged}/{name}" for name in ("train/ant/1.JPEG", "val/bee/1.JPEG")]
    assert names_in(tmp_path / "data") == [".converting"]


def test_a_source_of_nothing_but_empty_files_is_refused(tree, tmp_path, capsys):
    for path in tree.glob("*/*/*"):
        path.write_bytes(b"")
    assert "100.0% cannot be decoded" in look(tree, tmp_path / "data", 2, max_side=500)
    with pytest.raises(DataError, match="5 of 5 images cannot be decoded"):
        convert(tree, tmp_path / "data", **SETTINGS)
    with pytest.raises(DataError, match="none of the 3 images can be decoded"):
        convert(tree, tmp_path / "data", on_error="skip", **SETTINGS)


def test_told_to_skip_them_it_leaves_them_out_and_says_so_without_doing_the_others_again(
    damaged, tmp_path, monkeypatch
):
    with pytest.raises(DataError):
        convert(damaged, tmp_path / "data", **SETTINGS)
    monkeypatch.setattr(lbsgd.convert.convert, "Workers", None)
    convert(damaged, tmp_path / "data", on_error="skip", **SETTINGS)
    data, manifest = open_data(tmp_path / "data"), json.loads((tmp_path / "data/manifest.json").read_text())
    assert data.train.labels.tolist() == [0, 1] and data.val.labels.tolist() == [0, 1]
    assert manifest["skipped"] == {"train": [f"{damaged}/train/ant/1.JPEG"], "val": [f"{damaged}/val/bee/1.JPEG"]}
    verify(tmp_path / "data", 1, damaged)
    convert(damaged, tmp_path / "data", on_error="skip", **SETTINGS)  # is complete


def test_the_death_of_a_process_ends_the_conversion_which_can_go_on(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lbsgd.convert.convert.jpeg, "stored_image", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(DataError, match="died: killed by signal 9, as when memory runs out; what is done is kept"):
            convert(tree, tmp_path / "data", **SETTINGS)
    assert names_in(tmp_path / "data") == [".converting"]
    convert(tree, tmp_path / "data", **SETTINGS)


def test_a_full_disk_ends_the_conversion_which_can_go_on(tree, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write to .*data: File too large; what is done is kept: make room"):
            convert(tree, tmp_path / "data", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path / "data") == [".converting"]
    convert(tree, tmp_path / "data", **SETTINGS)


def test_a_disk_without_room_for_the_result_is_refused_before_anything_is_written(tree, tmp_path, monkeypatch):
    needed = sum(path.stat().st_size for path in tree.glob("*/*/*"))
    for free, refused in ((needed // 2, True), (2 * needed, False)):
        monkeypatch.setattr(lbsgd.convert.estimate, "free_bytes", lambda folder: free)
        if refused:
            with pytest.raises(
                DataError, match=r"has [\d.]+ MB free, and the result needs about [\d.]+ MB more; make room"
            ):
                convert(tree, tmp_path / "data", **SETTINGS)
        else:
            convert(tree, tmp_path / "data", **SETTINGS)


@pytest.mark.parametrize("num_bytes", [0, 5, 30, 3000])
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(tree, tmp_path, num_bytes):
    """The most that a file may have stands for the disk, of the identity, the listing, the journal or the images."""
    for number in range(40):
        save(tree / f"train/ant/{number}.JPEG", phase=number)
    limited = ["bash", "-c", f'trap \'\' XFSZ; exec prlimit --fsize={num_bytes} "$0" "$@"', sys.executable, TOOL]
    flags = ["--source", "source", "--data_dir", "data"]
    result = subprocess.run([*limited, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and names_in(tmp_path / "data") == [".converting"]
    assert result.stderr == (
        "error: cannot write to data: File too large; what is done is kept: make room and run the same "
        "command, or name another folder with --data_dir\n"
    )
    assert run_tool(tmp_path, *flags).returncode == 0
    convert(tree, tmp_path / "whole", **SETTINGS)
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_journal_of_which_the_disk_takes_a_part_is_a_full_disk(tmp_path, monkeypatch):
    writer = BetonWriter(tmp_path / "a.beton", 1, 1 << 23)
    writer.append(np.array([(COPIED, 64, 64, len(JPEG), 0, 0)], RECORD), memoryview(JPEG))
    monkeypatch.setattr(os, "write", lambda _file, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"):
        writer.commit(1)


def test_a_folder_that_cannot_be_written_to_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match="cannot write to .*file/data: Not a directory; name another folder with --data_dir"
    ):
        convert(tree, tmp_path / "file/data", **SETTINGS)


def test_nothing_is_left_where_there_is_no_source(tmp_path):
    with pytest.raises(DataError, match="no images in .*nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "data", **SETTINGS)
    assert not (tmp_path / "data").exists()


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tree, tmp_path):
    save(tree / "train/bee/large.JPEG", size=(700, 600))
    convert(tree, tmp_path / "data", **SETTINGS)
    return tmp_path / "data"


def change_byte(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_an_intact_folder_is_verified_also_against_its_source(converted, tree, capsys):
    verify(converted, 2)
    verify(converted, 2, tree)
    out = capsys.readouterr().out
    assert "train: 4 images decode and agree with the manifest, their checksums" in out
    assert f"val: 2 images decode and agree with the source {tree}/val, the manifest, their checksums" in out


def test_the_first_damaged_image_is_named(converted):
    beton = BetonFile.open(converted / "train.beton")
    for index in (3, 2):
        change_byte(beton.path, int(beton.images["data_at"][index]) + 300)
        with pytest.raises(
            DataError, match=f"train.beton: image {index} .label 1. is damaged: its bytes have checksum"
        ):
            verify(converted, 2)


TABLE = METADATA_AT  # where the first image's coding, width, height, place and label are written


@pytest.mark.parametrize(
    "place, reason",
    [
        (lambda beton: TABLE + 2 * METADATA.itemsize + 1, "does not decode to its 65 x 64 pixels"),
        (lambda beton: TABLE + 2 * METADATA.itemsize + 3, "does not decode to its 64 x 65 pixels"),
        (lambda beton: TABLE + 2 * METADATA.itemsize, "does not decode to its 64 x 64 pixels"),  # as a JPEG
        (lambda beton: TABLE + 2 * METADATA.itemsize + 5, "is damaged: its bytes have checksum"),
        (lambda beton: TABLE + 2 * METADATA.itemsize + 12, "is damaged: the file says that it lies beyond its end"),
        (
            lambda beton: int(beton.images["data_at"][-1] + beton.sizes[-1]) + 4 * 2,
            "is damaged: its bytes have checksum",
        ),
        (lambda beton: beton.path.stat().st_size - 24 * 2 + 16, "is damaged: its bytes have checksum"),
    ],
    ids=["width", "height", "coding", "place", "far place", "checksum", "size"],
)
@pytest.mark.parametrize("against", ["manifest", "source"])
def test_a_changed_byte_in_any_table_is_told_with_its_image(converted, tree, place, reason, against):
    path = converted / "train.beton"
    change_byte(path, place(BetonFile.open(path)))
    with pytest.raises(DataError, match=f"train.beton: image 2 .label 1. {reason}"):
        verify(converted, 2, tree if against == "source" else None)


@pytest.mark.parametrize("against", ["manifest", "source"])
def test_swapped_labels_are_told_with_the_first_of_them(converted, tree, against):
    path = converted / "train.beton"
    for image in (1, 2):  # of classes 0 and 1
        change_byte(path, TABLE + image * METADATA.itemsize + METADATA.fields["f1"][1])
    assert BetonFile.open(path).labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="train.beton: image 1 has label 1, and manifest.json beside it says another"):
        verify(converted, 2, tree if against == "source" else None)


def test_another_s_file_or_a_truncated_one_is_told(converted, tree, tmp_path):
    content = (converted / "train.beton").read_bytes()
    last = int(BetonFile.open(converted / "train.beton").images["data_at"][2])
    for num_bytes, said in (
        (len(content) - 1, "should have [\\d,]+; copy"),
        (last + 1, "cut off from image 2 on"),
        (last - 1, "cut off from image 1 on"),
        (1200, "should have [\\d,]+; copy"),
    ):
        os.truncate(converted / "train.beton", num_bytes)
        with pytest.raises(DataError, match=f"train.beton is truncated or damaged: it has {num_bytes:,} bytes.*{said}"):
            verify(converted, 2)
        (converted / "train.beton").write_bytes(content)
    save(tree / "train/bee/1.JPEG", phase=3)
    convert(tree, tmp_path / "other", **SETTINGS)
    shutil.copy(tmp_path / "other/train.beton", converted)  # nothing in it is wrong
    with pytest.raises(DataError, match="train.beton is not the file that manifest.json beside it was written for"):
        verify(converted, 2)


def test_an_image_that_is_not_the_source_s_is_named(converted, tree):
    save(tree / "train/bee/large.JPEG", size=(700, 600), phase=1)
    verify(converted, 2)
    with pytest.raises(DataError, match="train.beton: image 3 .label 1. is not what .*large.JPEG gives with"):
        verify(converted, 2, tree)
    save(tree / "train/ant/more.JPEG")
    with pytest.raises(DataError, match="it was made from another source"):
        verify(converted, 2, tree)
    (tree / "train/bee/1.JPEG").unlink()
    with pytest.raises(DataError, match="image 2 has label 1, and .*more.JPEG has 0"):
        verify(converted, 2, tree)


def test_a_file_of_ffcv_s_own_writer_is_verified_by_decoding_it(tmp_path, ffcv, capsys):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    for name in ("train", "val"):
        fields = {"image": RGBImageField("jpg"), "label": IntField()}
        DatasetWriter(str(tmp_path / f"{name}.beton"), fields, num_workers=1).from_indexed_dataset(
            [(picture(20, 30 + i), i) for i in range(3)]
        )
    verify(tmp_path, 1)
    assert "val: 3 images decode and agree with their sizes" in capsys.readouterr().out
    beton = BetonFile.open(tmp_path / "val.beton")
    with open(beton.path, "r+b") as file:
        file.seek(int(beton.images["data_at"][1]))
        file.write(bytes(100))
    with pytest.raises(DataError, match="val.beton: image 1 .label 1. does not decode to its 31 x 20 pixels"):
        verify(tmp_path, 1)


# --- the command ------------------------------------------------------------------------------------------------------


def run_tool(folder, *flags, **environment):
    return subprocess.run(
        [sys.executable, TOOL, *flags], cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "flags, environment, looked_for",
    [
        ([], {}, "data/imagenet"),
        ([], {"IMAGENET_DIR": "elsewhere"}, "elsewhere"),
        (["--source", "here"], {"IMAGENET_DIR": "elsewhere"}, "here"),
    ],
)
def test_the_command_says_what_it_looked_for(tmp_path, flags, environment, looked_for):
    result = run_tool(tmp_path, *flags, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no images in {looked_for}: no train/ and no ILSVRC2012_img_train.tar")
    assert result.stderr.count("\n") == 1
    assert "python tools/convert_imagenet_to_ffcv.py --source IMAGENET --data_dir data/imagenet_ffcv" in result.stderr


def test_the_command_looks_converts_and_verifies_in_plain_lines(tree, tmp_path):
    result = run_tool(tmp_path, "--source", "source", "--dry_run", IMAGENET_FFCV_DIR="made")
    assert (result.returncode, result.stderr) == (0, "") and not (tmp_path / "made").exists()
    lines = result.stdout.splitlines()
    assert lines[0].startswith("found   source/train: 3 training images") and lines[2] == "classes 2, from ant to bee"
    assert "100% of the images untouched" in lines[3] and lines[4].startswith("time    about 0 s with")

    result = run_tool(tmp_path, "--source", "source", IMAGENET_FFCV_DIR="made")
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split(" in ")[0] for line in result.stdout.splitlines()] == ["train: 3 images", "val: 2 images"]
    assert open_data(tmp_path / "made").num_classes == 2

    change_byte(tmp_path / "made/val.beton", int(BetonFile.open(tmp_path / "made/val.beton").images["data_at"][0]))
    result = run_tool(tmp_path, "--verify", IMAGENET_FFCV_DIR="made")
    assert result.returncode == 2 and result.stderr.startswith("error: made/val.beton: image 0 (label 0) is damaged")


@pytest.mark.parametrize("flags", [["--source", "source"], ["--source", "source", "--dry_run"], ["--verify"]])
def test_without_opencv_the_command_says_how_to_get_it(tree, tmp_path, flags):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/cv2.py").write_text("raise ImportError('libGL.so.1 is missing')")
    result = run_tool(tmp_path, *flags, PYTHONPATH=str(tmp_path / "hidden"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not (tmp_path / "data").exists()
    assert "libGL.so.1 is missing" in result.stderr and "make setup" in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quality", "0"], "--quality 0"),
        (["--max_side", "9", "--short_side", "9"], "give one of the two"),
        (["--num_workers", "0"], "--num_workers 0 is not at least 1"),
        (["--num_workers", "0", "--dry_run"], "--num_workers 0"),
        (["--num_workers", "-1", "--verify"], "--num_workers -1"),
        (["--num_workers", "two"], "invalid int value: 'two'"),
        (["--max_side", "0"], "--max_side 0"),
        (["--short_side", "-5"], "--short_side -5"),
        (["--short_side", "x"], "--short_side"),
        (["--raw_fraction", "1.5"], "--raw_fraction 1.5 is not 0 to 1"),
        (["--raw_fraction", "nan"], "--raw_fraction nan"),
        (["--on_error", "ask"], "--on_error"),
        (["--turbo"], "--turbo"),
        (["more"], "more"),
        (["--data_dir"], "--data_dir"),
        (["--verify", "--dry_run"], "--verify does not go with --dry_run"),
        (["--verify", "--max_side", "9"], "--verify does not go with --max_side"),
        (["--verify", "--quality", "9"], "--verify does not go with --quality"),
        (["--verify", "--overwrite"], "--verify does not go with --overwrite"),
        (["--verify", "--on_error", "skip"], "--verify does not go with --on_error"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(tree, tmp_path, flags, message):
    result = run_tool(tmp_path, "--source", "source", *flags)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and names_in(tmp_path) == ["source"]


def test_a_dry_run_tells_the_size_and_what_cannot_be_decoded(damaged, tmp_path):
    lines = look(damaged, tmp_path / "data", 2, max_side=500).splitlines()
    assert "33.3% cannot be decoded" in lines[3]
    (damaged / "train/ant/1.JPEG").write_bytes(encoded())
    save(damaged / "val/bee/1.JPEG")
    found = find_source(damaged, tmp_path, tmp_path / "data")
    estimate = lbsgd.convert.estimate.estimate(found, Settings(max_side=500), 1 << 23, 100)
    convert(damaged, tmp_path / "data", **SETTINGS)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert 0.95 * made < estimate.num_bytes + 2 * 2120 < 1.05 * made


def photographs(folder, count=60):
    """JPEGs whose sizes and sides differ as those of ImageNet do: 100 to 900 pixels, smooth to noisy."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(100, 900, 2)
        noise = rng.normal(0, rng.uniform(1, 30), (height, width, 3))
        Image.fromarray(np.uint8(np.clip(picture(height, width, number) + noise, 0, 255))).save(
            buffer := io.BytesIO(), "JPEG"
        )
        path = folder / ("val" if number % 5 == 0 else "train") / "a" / f"{number:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_side=500),
        dict(short_side=256),
        dict(max_side=300, reencode=True, quality=50),
        dict(max_side=400, raw_fraction=0.5),
    ],
)
def test_a_dry_run_tells_the_size_within_a_tenth_from_a_few_images(photos, tmp_path, settings):
    found = find_source(photos, tmp_path, tmp_path / "data")
    told = lbsgd.convert.estimate.estimate(found, Settings(**settings), 1 << 23, 40).num_bytes
    convert(photos, tmp_path / "data", num_workers=2, **settings)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert abs(told / made - 1) < 0.1
    [line] = [line for line in look(photos, tmp_path / "data", 2, **settings).splitlines() if line.startswith("result")]
    assert ("kept as pixels" in line) == ("raw_fraction" in settings)


@pytest.mark.parametrize(
    "found, mean",
    [
        ([(10, 10), (30, 30)], 100),
        ([(10, 5), (30, 5)], 5),
        ([(10, 10), (30, 20)], 55),
        ([(10, 7)], 7),
        ([], 0),
    ],
)
def test_sizes_are_estimated_from_the_sources_as_far_as_they_tell(found, mean):
    assert lbsgd.convert.estimate._mean_size(found, np.array([50, 150])) == pytest.approx(mean)


def test_a_dry_run_tells_the_time_that_it_takes(photos, tmp_path, monkeypatch, capsys):
    """Of images that take 50 ms each, by two processes: 1.5 s."""
    quick = lbsgd.convert.image.stored_image

    def slow(*arguments, **options):
        time.sleep(0.05)
        return quick(*arguments, **options)

    monkeypatch.setattr(lbsgd.convert.image, "stored_image", slow)
    monkeypatch.setattr(lbsgd.convert.estimate, "stored_image", slow)
    monkeypatch.setattr(lbsgd.convert.convert, "CHUNK_IMAGES", 4)
    found = find_source(photos, tmp_path, tmp_path / "data")
    told = lbsgd.convert.estimate.estimate(found, Settings(max_side=500), 1 << 23, 20).seconds / 2
    convert(photos, tmp_path / "data", max_side=500, num_workers=2)
    took = sum(float(line.split(" images in ")[1].split()[0]) for line in capsys.readouterr().out.splitlines())
    assert 0.5 * took < told < 1.5 * took


def test_long_conversions_print_a_line_now_and_then(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lbsgd.convert.progress.LINE_SECONDS", 0)
    monkeypatch.setattr(lbsgd.convert.convert, "CHUNK_IMAGES", 1)
    convert(tree, tmp_path / "data", **SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 1 of 3 images, ") and "images/s" in lines[0] and lines[0].endswith(" left")


def on_a_terminal(folder, columns, **environment):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, TOOL, "--source", "source"],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    text = b""
    try:
        while data := os.read(ours, 4096):
            text += data
    except OSError:
        pass  # how a terminal ends
    assert process.wait() == 0
    return text.decode()


def screen(text):
    """The lines that a terminal shows in the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        row += {"\n": 1, "\x1b[1A": -1}.get(part, 0)
        lines += [""] * (row + 1 - len(lines))
        lines[row] = "" if part == "\x1b[2K" else lines[row] + part * (part[0] not in "\x1b\r\n")
    return [line for line in lines if line]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_there_is_a_bar_of_one_line_that_ends_as_a_line_of_text(tree, tmp_path, columns):
    text = on_a_terminal(tmp_path, columns)
    assert "3 of 3" in text and "━" in text and "images/s" in text and "MB/s" in text and " left" in text
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert all(len(frame) <= columns for frame in frames if "━" in frame)
    assert [line.split(":")[0] for line in screen(text)] == ["train", "val"]


def test_a_terminal_that_cannot_draw_gets_plain_lines(tree, tmp_path):
    text = on_a_terminal(tmp_path, 80, TERM="dumb")
    assert "\x1b" not in text and [line.split(":")[0] for line in text.splitlines()] == ["train", "val"]


def test_the_bar_of_the_whole_of_imagenet_fits_a_terminal(monkeypatch):
    from rich.console import Console

    import lbsgd.convert.progress

    monkeypatch.setattr("rich.get_console", lambda: Console(width=80, force_terminal=True, file=io.StringIO()))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    meter = lbsgd.convert.progress.Meter("train", 1_281_167, 146_000_000_000)
    meter.start -= 3700
    meter.advance(100_000, 11_000_000_000)
    console = Console(width=80, file=io.StringIO())
    console.print(meter._bar)
    [line] = console.file.getvalue().splitlines()
    assert (
        line.startswith("train ━")
        and "  100,000 of 1,281,167" in line
        and "27 images/s" in line
        and "12.6 h left" in line
    )


def test_converting_needs_neither_torch_nor_ffcv():
    code = (
        "import sys, lbsgd.convert.convert, lbsgd.convert.verify\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ffcv', 'cv2', 'PIL', 'rich', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
