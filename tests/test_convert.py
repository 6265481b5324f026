"""The converter: folders of images in, FFCV files out that FFCV itself reads, complete or not there at all."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lbsgd.convert
from lbsgd.beton import BetonFile, open_data
from lbsgd.convert import convert, read_source
from lbsgd.errors import DataError

TOOL = Path(__file__).parent.parent / "tools/convert_imagenet_to_ffcv.py"
SETTINGS = dict(max_side=500, quality=90, num_workers=2, overwrite=False)


@pytest.fixture(autouse=True, scope="module")
def ffcv():
    import lbsgd.loader  # noqa: F401  imports FFCV so that torch keeps its number of threads


def picture(height, width, phase=0.0):
    """A smooth picture, which JPEG keeps well: (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(phase + x / width * a + y / height * b) for a, b in ((3, 1), (-2, 4), (1, -5))]
    return np.uint8(127.5 + 127.5 * np.stack(waves, axis=-1))


def save(path, mode="RGB", size=(64, 64), file_format="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(*size)).convert(mode).save(path, file_format)


@pytest.fixture
def tree(tmp_path):
    """A small source: two classes, three training and two validation images."""
    for name in ("train/ant/1.JPEG", "train/ant/2.JPEG", "train/bee/1.JPEG", "val/ant/1.JPEG", "val/bee/1.JPEG"):
        save(tmp_path / "source" / name)
    return tmp_path / "source"


@pytest.fixture
def odd_tree(tree):
    """The suffix may lie, and the colours may be any."""
    save(tree / "train/ant/a_png.JPEG", "RGBA", file_format="PNG")
    save(tree / "train/ant/cmyk.JPEG", "CMYK")
    save(tree / "train/ant/grey.jpeg", "L")
    save(tree / "train/bee/grey_alpha.png", "LA", file_format="PNG")
    save(tree / "train/bee/tiff.TIFF", file_format="TIFF")
    (tree / "train/bee/notes.txt").write_text("not an image by its name, and left out")
    return tree


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- what is written --------------------------------------------------------------------------------------------------


def test_ffcv_reads_odd_images_with_the_pixels_that_pil_sees(odd_tree, tmp_path):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    convert(odd_tree, tmp_path / "data", **SETTINGS)
    train, _ = read_source(odd_tree, tmp_path)
    loader = Loader(str(tmp_path / "data/train.beton"), len(train.paths), num_workers=1, order=OrderOption.SEQUENTIAL,
                    pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
    [(images, labels)] = loader
    assert labels.ravel().tolist() == train.labels == [0] * 5 + [1] * 3
    for image, path in zip(images, train.paths):
        with Image.open(path) as original:
            seen_by_pil = np.asarray(original.convert("RGB"), int)
        assert np.abs(image - seen_by_pil).mean() < 4, path


def test_images_come_in_torchvision_s_order(odd_tree, tmp_path):
    from torchvision.datasets import ImageFolder

    save(odd_tree / "train/ant/nested/0.JPEG")
    save(odd_tree / "train/Zebra/1.JPEG")
    save(odd_tree / "val/Zebra/1.JPEG")
    for split, name in zip(read_source(odd_tree, tmp_path), ("train", "val")):
        theirs = ImageFolder(odd_tree / name)
        assert split.classes == theirs.classes
        assert [(str(path), label) for path, label in zip(split.paths, split.labels)] == theirs.samples


def test_large_images_are_shrunk_and_small_ones_are_not_enlarged(tree, tmp_path):
    from ffcv.reader import Reader

    save(tree / "train/ant/3.JPEG", size=(120, 200))
    convert(tree, tmp_path / "data", **{**SETTINGS, "max_side": 100})
    images = Reader(str(tmp_path / "data/train.beton")).metadata["f0"]
    assert list(zip(images["height"], images["width"])) == [(64, 64), (64, 64), (60, 100), (64, 64)]


def test_the_manifest_says_what_was_made(tree, tmp_path):
    convert(tree, tmp_path / "data", **SETTINGS)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["classes"] == ["ant", "bee"] and manifest["settings"] == {"max_side": 500, "quality": 90}
    assert manifest["source"] == str(tree)
    for name, num_images in (("train", 3), ("val", 2)):
        beton = BetonFile.open(tmp_path / f"data/{name}.beton")
        assert manifest[name] == {"num_images": num_images, "num_bytes": beton.path.stat().st_size,
                                  "fingerprint": beton.fingerprint}
    assert names_in(tmp_path / "data") == ["manifest.json", "train.beton", "val.beton"]


def test_the_fingerprint_does_not_depend_on_the_number_of_processes(digits_tree, digits_data, tmp_path):
    convert(digits_tree, tmp_path, **{**SETTINGS, "num_workers": 3})
    assert open_data(tmp_path).fingerprint == open_data(digits_data).fingerprint


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


@pytest.mark.parametrize("change, message", [
    (lambda tree, data: SETTINGS | {"quality": 80}, "differs in settings"),
    (lambda tree, data: (save(tree / "val/bee/new.JPEG"), SETTINGS)[1], "differs in validation images"),
    (lambda tree, data: ((data / "manifest.json").unlink(), SETTINGS)[1], "holds train.beton, but no manifest.json"),
])
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
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_undecodable_images_are_all_named_and_nothing_is_left(tree, tmp_path):
    content = (tree / "train/ant/1.JPEG").read_bytes()
    (tree / "train/ant/1.JPEG").write_bytes(content[:len(content) // 2])
    (tree / "train/bee/1.JPEG").write_text("no image")
    with pytest.raises(DataError, match="2 of 3 images cannot be decoded") as error:
        convert(tree, tmp_path / "data", **SETTINGS)
    assert "train/ant/1.JPEG" in str(error.value) and "train/bee/1.JPEG" in str(error.value)
    assert names_in(tmp_path / "data") == []


def test_the_death_of_a_writing_process_ends_the_conversion(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(lbsgd.convert, "decode", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="train.beton.partial died: killed by signal 9, as when memory runs out"):
        convert(tree, tmp_path / "data", **SETTINGS)
    assert names_in(tmp_path / "data") == []


def test_a_full_disk_ends_the_conversion(tree, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(DataError, match="train.beton.partial died: File too large"):
            convert(tree, tmp_path / "data", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path / "data") == []


@pytest.mark.parametrize("remove, message", [
    (["train", "val"], "folder train and val not found"), (["val"], "folder val not found"),
    (["val/bee"], "val has other class folders than .*train: bee in one of them only"),
    (["train/bee/1.JPEG"], "no images in .*train for class bee"),
    (["train/ant", "train/bee"], "no images in .*train; expected one folder a class"),
])
def test_an_incomplete_source_is_refused(tree, tmp_path, remove, message):
    for name in remove:
        (tree / name).rename(tmp_path / name.replace("/", "_"))
    with pytest.raises(DataError, match=message):
        convert(tree, tmp_path / "data", **SETTINGS)
    assert not (tmp_path / "data").exists()


def test_at_most_three_differing_classes_are_named(tree, tmp_path):
    for name in "cdefg":
        save(tree / f"val/{name}/1.JPEG")
    with pytest.raises(DataError, match="c, d, e and 2 more in one of them only"):
        read_source(tree, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to .*file/data: Not a directory"):
        convert(tree, tmp_path / "file/data", **SETTINGS)


# --- the command ------------------------------------------------------------------------------------------------------


def run_tool(folder, *flags, **environment):
    return subprocess.run([sys.executable, TOOL, *flags], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("flags, environment, looked_for", [
    ([], {}, "data/imagenet"), ([], {"IMAGENET_DIR": "elsewhere"}, "elsewhere"),
    (["--source", "here"], {"IMAGENET_DIR": "elsewhere"}, "here"),
])
def test_the_command_says_what_it_looked_for(tmp_path, flags, environment, looked_for):
    result = run_tool(tmp_path, *flags, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no images in {looked_for}: folder train and val not found")
    assert result.stderr.count("\n") == 1
    assert "python tools/convert_imagenet_to_ffcv.py --source IMAGENET --data_dir data/imagenet_ffcv" in result.stderr


def test_the_command_converts_and_prints_a_plain_line_for_each_file(tree, tmp_path):
    result = run_tool(tmp_path, "--source", "source", IMAGENET_FFCV_DIR="made")
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split(" in ")[0] for line in result.stdout.splitlines()] == ["train: 3 images", "val: 2 images"]
    assert open_data(tmp_path / "made").num_classes == 2


def test_without_ffcv_the_command_says_how_to_get_it(tree, tmp_path):
    (tmp_path / "hidden/ffcv").mkdir(parents=True)
    (tmp_path / "hidden/ffcv/__init__.py").write_text("raise ImportError('libturbojpeg.so.0 is missing')")
    result = run_tool(tmp_path, "--source", "source", PYTHONPATH=str(tmp_path / "hidden"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "libturbojpeg.so.0 is missing" in result.stderr and "make setup" in result.stderr
    assert names_in(tmp_path / "data/imagenet_ffcv") == []
