"""The converter's memory is bounded, however large the images are."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from converter import JPEG, ROOT, picture, save
from PIL import Image

from lbsgd.convert import convert_split
from lbsgd.convert.convert import convert
from lbsgd.convert.process_pool import with_room


def test_a_very_large_image_takes_no_memory_to_speak_of(tmp_path):
    """36 million pixels would take 108 MB; a process may use 200 MB."""
    save(tmp_path / "large.JPEG", size=(600, 600))
    with Image.open(tmp_path / "large.JPEG") as image:
        image.resize((6000, 6000)).save(tmp_path / "large.JPEG")
    code = f"""
from lbsgd.convert.image import stored_image
from lbsgd.convert.settings import Settings
kept = stored_image(open({str(tmp_path / "large.JPEG")!r}, "rb").read(), 0, Settings(max_side=500), 1 << 23)
print(kept.width, *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""
    width, kilobytes = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).split())
    assert width == 500 and kilobytes < 150_000


PEAK = """
import contextlib, os, sys, threading, time
from pathlib import Path
from lbsgd.convert import convert_split
from lbsgd.convert.convert import convert
from lbsgd.convert.verify import verify

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
    """Return (MB of the process with the second largest use, MB of all) while some code runs."""
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
    """A progressive JPEG's coefficients alone take 6 bytes per pixel, here 150 MB, however small it is decoded."""
    data = large(side=(5000, 5000), progressive=True, subsampling=0, quality=20)
    repeated(tmp_path / "source/train/a/x.JPEG", 4, data)
    repeated(tmp_path / "source/val/a/x.JPEG", 1, JPEG)
    work = "convert_split.CHUNK_IMAGES = 1; convert(*map(Path, sys.argv[1:]), max_side=500, num_processes=3)"
    second, _ = peak_memory(work, tmp_path / "source", tmp_path / "data")
    assert second < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", ["max_side=500", "max_side=60_000, reencode=True", "max_side=6000, raw_fraction=0.5"]
)
def test_memory_is_bounded_whatever_images_there_are(tmp_path, settings):
    """With 2 GiB, and 200 MB per process: all processes except one at a time stay below 200 MB."""
    for number, data in enumerate([large(), large(progressive=True, subsampling=0), large("PNG"), large("CMYK"), JPEG]):
        repeated(tmp_path / f"source/train/{number % 2}/{number}_.JPEG", 6 if len(data) > 1e5 else 2000, data)
        repeated(tmp_path / f"source/val/{number % 2}/{number}_.JPEG", 1, data)
    folders = tmp_path / "source", tmp_path / "data"
    for work in (
        f"convert(*map(Path, sys.argv[1:]), num_processes=6, {settings})",
        "verify(Path(sys.argv[2]), 6)",
        "verify(Path(sys.argv[2]), 6, Path(sys.argv[1]))",
    ):
        second, most = peak_memory(work, *folders)
        assert second < 200 and most < 2048 + 6 * 200
    shutil.rmtree(tmp_path / "data")


def test_processes_whose_results_are_very_large_are_fewer(tmp_path, monkeypatch, capsys):
    """An image of 3,300 x 3,300 pixels kept as pixels is 33 MB; one of 6,700 x 6,700, 135 MB."""
    assert [with_room(16, num_bytes) for num_bytes in (10, 33 << 20, 135 << 20, 1 << 40)] == [16, 16, 4, 1]
    for number in range(4):
        save(tmp_path / f"source/{'train' if number else 'val'}/a/{number}.JPEG")
    taken = []
    monkeypatch.setattr(convert_split, "_chunks", lambda *arguments: taken.append(arguments[2]) or iter(()))
    for side in (500, 1000, 2000, 6700):
        with pytest.raises(AssertionError):  # nothing was converted
            convert(tmp_path / "source", tmp_path / "data", max_side=side, raw_fraction=0.5, num_processes=8)
        shutil.rmtree(tmp_path / "data")
    assert taken[::2] == [32, 8, 2, 1]
    assert "train: 2 of 8 processes, because one image may need 134.7 MB\n" in capsys.readouterr().out


WRITING = """
import sys
from pathlib import Path
import numpy as np
from lbsgd.convert import archives, files
from lbsgd.convert.beton_writer import RECORD, BetonWriter
from lbsgd.convert.tar_layout import splits_in

folder, num_images, num_classes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
files.RUN = 2000

def headers(*_):
    for number in range(num_images):
        wnid = f"n{number * 7919 % num_classes:08}"
        yield f"train/{wnid}/{wnid}_{number * 31 % num_images}.JPEG", 1024 * number, 1

archives._members = headers
(folder / "a.tar").touch()
for _ in range(2):  # from the archive, and from the listing kept of it
    images = None
    members = archives.cached_members(folder / "a.tar", folder / "scratch")
    images = splits_in(members, folder / "a.tar", folder)["train"].images()
    del members
writer = BetonWriter(folder / "a.beton", num_images, 1 << 23)
records = np.zeros(1000, RECORD)
records["num_bytes"] = 1
for at in range(0, num_images, len(records)):
    writer.append(records, memoryview(bytes(len(records))))
    if at % 10_000 == 0:
        writer.commit(writer.done)
images.digest(images.offsets, images.stamps)
writer.finish(images.labels)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def bytes_per_image(folder, few, many, num_classes):
    """Return the slope of the peak memory between few and many images, from a tar's headers to the finished file.

    This leaves out Python's own memory. It excludes opening the tables again for the manifest, which maps them.
    """
    peaks = []
    for num_images in (few, many):
        (folder / str(num_images)).mkdir()
        arguments = map(str, (folder / str(num_images), num_images, num_classes))
        peaks.append(1024 * int(subprocess.check_output([sys.executable, "-c", WRITING, *arguments], cwd=ROOT)))
    return (peaks[1] - peaks[0]) / (many - few)


@pytest.mark.parametrize("num_classes", [1, 1000])
def test_the_process_that_writes_takes_at_most_150_bytes_per_image(tmp_path, num_classes):
    assert bytes_per_image(tmp_path, 20_000, 80_000, num_classes) < 150


@pytest.mark.slow
def test_the_process_that_writes_takes_at_most_150_bytes_per_image_up_to_a_million(tmp_path):
    found = bytes_per_image(tmp_path, 100_000, 1_000_000, num_classes=1000)
    print(f"\n{found:.1f} bytes per image")
    assert found < 150
