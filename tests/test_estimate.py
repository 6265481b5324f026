"""`--dry_run` estimates the size and the time of a conversion from a few images."""

import re
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from converter import ROOT, SETTINGS, damage, encoded, make_tree, picture, save
from PIL import Image

import lbsgd.convert.image
from lbsgd.convert.convert import convert, look
from lbsgd.convert.estimate import _mean_size, check_disk, estimate
from lbsgd.convert.settings import Settings
from lbsgd.convert.sources import find_source
from lbsgd.errors import DataError


@pytest.fixture
def damaged(tmp_path):
    return damage(make_tree(tmp_path / "source"))


def test_a_dry_run_tells_the_size_and_what_cannot_be_decoded(damaged, tmp_path, monkeypatch):
    # because other tests fill and empty the disk
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**12))
    lines = look(damaged, tmp_path / "data", 2, max_side=500).splitlines()
    assert "2 of 6 images looked at cannot be decoded" in lines[4]
    refused = "refused: 2 of 6 images looked at cannot be decoded, such as "
    path = r".*source/(train/ant|val/bee)/1.JPEG: the conversion ends with"
    assert re.match(refused + path, lines[2]) and lines[2].endswith(" that unless --on_error skip")
    assert look(damaged, tmp_path / "data", 2, max_side=500, on_error="skip").splitlines() == lines[:2] + lines[3:]
    (damaged / "train/ant/1.JPEG").write_bytes(encoded())
    save(damaged / "val/bee/1.JPEG")
    found = find_source(damaged, tmp_path, tmp_path / "data")
    told = estimate(found, Settings(max_side=500), 100)
    convert(damaged, tmp_path / "data", **SETTINGS)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert 0.95 * made < told.num_bytes + 2 * 2120 < 1.05 * made


def test_a_dry_run_tells_what_happens_to_the_images_of_both_splits_from_the_first_to_the_last(tmp_path):
    tree = make_tree(tmp_path / "source")  # three and two images of 64x64 pixels
    save(tree / "train/bee/2.JPEG", size=(128, 128))
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tree / "train/bee/3.png")
    found, settings = find_source(tree, tmp_path, tmp_path / "data"), Settings(max_side=64)
    told = estimate(found, settings, 100)
    assert (told.copied, told.encoded, told.raw, told.scaled) == pytest.approx((5 / 7, 2 / 7, 0, 1 / 7))
    [line] = [each for each in look(tree, tmp_path / "data", 1, max_side=64).splitlines() if each.startswith("result")]
    assert line.endswith(": 71% of the images untouched, 29% encoded again, 14.3% scaled from 16 bits to 8")
    told = estimate(found, settings, 2)  # of five training images the JPEG ant/1 and the PNG
    assert (told.copied, told.scaled) == pytest.approx(((5 / 2 + 2) / 7, 5 / 2 / 7)) and told.looked_at == 4


def test_a_dry_run_tells_that_the_disk_is_too_full(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    *_, last = look(make_tree(tmp_path / "source"), tmp_path / "data", 1, max_side=64).splitlines()
    assert last.startswith(f"refused: {tmp_path}/data has 0.0 MB free, ") and "make room or name another folder" in last


def test_a_dry_run_prints_nothing_of_opencv_s_own(damaged, tmp_path, capfd):
    """For example that no JPEG is 70,000 pixels wide."""
    Image.new("L", (70_000, 1)).save(damaged / "train/ant/wide.png")
    assert "3 of 7 images looked at cannot be decoded" in look(damaged, tmp_path / "data", 2, short_side=64)
    assert capfd.readouterr() == ("", "")


THREADED = """
import sys
from pathlib import Path
import cv2
import numpy as np
from lbsgd.convert.convert import convert, look
from lbsgd.convert.verify import verify

source, data = map(Path, sys.argv[1:])
steps = [lambda: look(source, data, 1, max_side=40), lambda: convert(source, data, max_side=40), lambda: verify(data)]
for step in steps:
    cv2.setNumThreads(4)
    cv2.resize(np.zeros((4000, 4000, 3), np.uint8), (3000, 3000))
    step()
    assert cv2.getNumThreads() == 4
"""


def test_all_is_done_in_a_process_whose_opencv_has_threads(tmp_path):
    """The threads do not exist in a fork, which would wait for them."""
    command = [sys.executable, "-c", THREADED, str(make_tree(tmp_path / "source")), str(tmp_path / "data")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


def photographs(folder):
    """Make JPEGs whose sizes and sides vary like ImageNet's: 100 to 900 pixels, smooth to noisy."""
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = rng.integers(100, 900, 2)
        noise = rng.normal(0, rng.uniform(1, 30), (height, width, 3))
        path = folder / ("val" if number % 5 == 0 else "train") / "a" / f"{number:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.clip(picture(height, width, number) + noise, 0, 255))).save(path, "JPEG")
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
        dict(max_side=400, raw_fraction=0.25),
    ],
)
def test_a_dry_run_tells_the_size_within_a_tenth_from_a_few_images(photos, tmp_path, settings):
    found = find_source(photos, tmp_path, tmp_path / "data")
    told = estimate(found, Settings(**settings), 40).num_bytes
    convert(photos, tmp_path / "data", num_processes=2, **settings)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert abs(told / made - 1) < 0.1
    [line] = [line for line in look(photos, tmp_path / "data", 2, **settings).splitlines() if line.startswith("result")]
    assert ("kept as pixels" in line) == ("raw_fraction" in settings)


@pytest.mark.parametrize("raw_fraction", [0.1, 0.02])
def test_pixels_are_counted_even_if_the_sample_misses_each_image_kept_as_pixels(tmp_path, raw_fraction):
    """Of 101 images, numbers 0, 10, 20, ... are looked at, and 9, 19, ... or 49 and 99 are kept as pixels."""
    for number in range(101):
        save(tmp_path / f"source/train/a/{number:03}.JPEG", size=(200, 200), phase=number)
    save(tmp_path / "source/val/a/0.JPEG")
    settings = dict(max_side=500, raw_fraction=raw_fraction)
    found = find_source(tmp_path / "source", tmp_path, tmp_path / "data")
    told = estimate(found, Settings(**settings), 11)
    convert(tmp_path / "source", tmp_path / "data", num_processes=2, **settings)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert abs(told.num_bytes / made - 1) < 0.1


@pytest.mark.parametrize("side", [1250, 1000])
def test_a_dry_run_counts_what_is_left_at_the_ends_of_pages(tmp_path, side):
    """With images of 4.7 or 3 MB in pages of 8.4 MB."""
    for number in range(10):
        save(tmp_path / f"source/{'val' if number > 5 else 'train'}/a/{number}.JPEG", size=(side, side), phase=number)
    settings = dict(max_side=side, raw_fraction=1.0)
    found = find_source(tmp_path / "source", tmp_path, tmp_path / "data")
    told = estimate(found, Settings(**settings), 24).num_bytes
    convert(tmp_path / "source", tmp_path / "data", num_processes=2, **settings)
    made = sum((tmp_path / f"data/{name}.beton").stat().st_size for name in ("train", "val"))
    assert abs(told / made - 1) < 0.01
    assert made > 1.2 * 10 * 3 * side**2


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
    assert _mean_size(found, np.array([50, 150])) == pytest.approx(mean)


def test_a_dry_run_tells_the_time_that_it_takes(photos, tmp_path, monkeypatch, capsys):
    """For images that take 50 ms each, on two processes: 1.5 s."""
    quick = lbsgd.convert.image.stored_image

    def slow(*arguments, **options):
        time.sleep(0.05)
        return quick(*arguments, **options)

    monkeypatch.setattr("lbsgd.convert.convert_split.stored_image", slow)
    monkeypatch.setattr("lbsgd.convert.estimate.stored_image", slow)
    monkeypatch.setattr("lbsgd.convert.convert_split.CHUNK_IMAGES", 4)
    found = find_source(photos, tmp_path, tmp_path / "data")
    told = estimate(found, Settings(max_side=500), 20).seconds / 2
    convert(photos, tmp_path / "data", max_side=500, num_processes=2)
    took = sum(float(seconds) for seconds in re.findall(r" images in ([0-9.]+)", capsys.readouterr().out))
    assert 0.5 * took < told < 1.5 * took


@pytest.mark.parametrize("free, fits", [(1_059_000, True), (1_049_000, False)])
def test_the_margin_is_asked_for_on_what_is_still_to_be_written(monkeypatch, tmp_path, free, fits):
    """1 MB of 10 MB remains: the margin is 5 % of 1 MB, not of 10."""
    told = SimpleNamespace(num_bytes=10_000_000)
    monkeypatch.setattr("lbsgd.convert.estimate.estimate", lambda *_, **__: told)
    monkeypatch.setattr("lbsgd.convert.estimate.free_bytes", lambda folder: free)
    with nullcontext() if fits else pytest.raises(DataError, match="needs about 1.1 MB more"):
        check_disk(None, Settings(max_side=500), tmp_path / ".converting", 9_000_000)
    check_disk(None, Settings(max_side=500), tmp_path / ".converting", 11_000_000)
