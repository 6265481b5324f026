"""Pictures, sources and commands that the tests of the converter share."""

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lbsgd.convert.beton_writer import RECORD, BetonWriter
from lbsgd.convert.image import COPIED, UNDECODABLE
from lbsgd.data.beton import BetonFile

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools/convert_imagenet_to_ffcv.py"
PAGE = 1 << 23  # bytes, of the files that append_images writes
SETTINGS = dict(max_side=500, quality=90, num_processes=2, overwrite=False)


def picture(height, width, phase=0.0):
    """Return a smooth picture, which JPEG preserves well: (height, width, 3)."""
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


JPEG = encoded()


def make_tree(folder):
    """Make a small source: two classes, three training and two validation images."""
    names = ("train/ant/1.JPEG", "train/ant/2.JPEG", "train/bee/1.JPEG", "val/ant/1.JPEG", "val/bee/1.JPEG")
    for phase, name in enumerate(names):
        save(folder / name, phase=phase)
    return folder


def damage(tree):
    """Cut off one image of the tree, replace another by text, and add one so that each class keeps an image."""
    content = (tree / "train/ant/1.JPEG").read_bytes()
    (tree / "train/ant/1.JPEG").write_bytes(content[: len(content) // 2])
    (tree / "val/bee/1.JPEG").write_text("no image")
    save(tree / "val/bee/2.JPEG")
    return tree


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def stored(path):
    """Return the bytes of each image in a file."""
    beton, content = BetonFile.open(path), path.read_bytes()
    return [
        content[int(at) : int(at) + int(size)] for at, size in zip(beton.images["data_at"], beton.sizes, strict=True)
    ]


def change_byte(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def run_tool(folder, *flags, **environment):
    return subprocess.run(
        [sys.executable, TOOL, *flags], cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )


def blob(number):
    """Return bytes that only the writer takes for an image, with sizes that do not fit pages well."""
    return bytes([number]) * (1_300_000 + 100_000 * number)


def append_images(path, contents, *, start=0, stop=None, kinds=None, commit_each=1, finish=True):
    """Append images one at a time, with a commit after every `commit_each` images."""
    writer = BetonWriter(path, len(contents), PAGE)
    assert writer.done == start
    for number in range(start, len(contents) if stop is None else stop):
        kind = kinds[number] if kinds else COPIED
        data = contents[number]
        width, height = (40, 30) if kind != UNDECODABLE else (0, 0)
        writer.append(np.array([(kind, width, height, len(data), zlib.crc32(data), 0)], RECORD), memoryview(data))
        if (number + 1) % commit_each == 0:
            writer.commit(writer.done)
    if finish:
        writer.commit(writer.done)
        writer.finish(np.arange(len(contents)) % 5)
    return writer
