"""lbsgd/data/native under gcc's sanitizers: damage never makes the C code leave its memory, leak, or be undefined.

`sanitized/drive.c` calls it. All buffers have exactly the needed size, so a read of one byte too many is noticed.
"""

import io
import os
import re
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DRIVER, NATIVE = ROOT / "tests/sanitized/drive.c", ROOT / "lbsgd/data/native"
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g", "-O1"]
SIZES = [(1, 1), (1, 17), (33, 1), (16, 16), (33, 47), (75, 100)]
NUM_IMAGES = 8_000


# In the copy a thread's buffers have exactly the size that an image needs.
EXACT = [("crop_jpeg.c", "wanted <= *capacity", "wanted == *capacity"), ("crop_jpeg.c", " + wanted / 2", "")]
USED_BY = {"huffman.h": "crop_jpeg.c"}  # header -> the only file that includes it


def compile_file(source, folder):
    """Compile a C file as setup.py does but with sanitizers. Return the object."""
    flags = [*SANITIZERS, "-ffp-contract=off", "-pthread", f"-I{folder}"]
    subprocess.run(["cc", *flags, "-c", "-o", folder / f"{source.stem}.o", source], check=True)
    return folder / f"{source.stem}.o"


def copy_native(folder, changes):
    """Copy the C files and apply changes: (file, what it holds, what to put in its place)."""
    for source in NATIVE.glob("*.[ch]"):
        content = source.read_text()
        for name, before, after in changes:
            if source.name == name:
                assert before in content
                content = content.replace(before, after)
        (folder / source.name).write_text(content)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The objects of the driver and of the C files without a fault, by the name of their source."""
    folder = tmp_path_factory.mktemp("objects")
    copy_native(folder, EXACT)
    return {source.name: compile_file(source, folder) for source in (DRIVER, *folder.glob("*.c"))}


def libjpeg_turbo():
    """Return the first number of libjpeg-turbo's version."""
    headers = "#include <stdio.h>\n#include <jpeglib.h>\n"
    done = subprocess.run(["cc", "-E", "-dM", "-xc", "-"], input=headers, stdout=subprocess.PIPE, text=True, check=True)
    [version] = re.findall(r"^#define LIBJPEG_TURBO_VERSION (\d+)", done.stdout, flags=re.MULTILINE)
    return int(version)


def link(folder, objects):
    """Return the program made of these objects."""
    wrapped = [f"-Wl,--wrap={name}" for name in ("malloc", "calloc", "aligned_alloc")]  # the driver makes them fail
    program = folder / "drive"
    subprocess.run(["cc", *SANITIZERS, "-pthread", *wrapped, "-o", program, *objects, "-ljpeg", "-lm"], check=True)
    return program


def drive(program, images, num_images, seed=0):
    command = [program, str(seed), str(num_images), *images]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:handle_sigbus=0", "UBSAN_OPTIONS": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=300)


def with_the_sampling_4_1_0(grey):
    """Reinterpret the blocks of a grey 160 x 96 JPEG as three colours of 192 x 64, which PIL and OpenCV do not write.

    An MCU has 4 x 2 blocks of the first colour and one of each other colour.
    """
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    colours = bytes((1, 0x42, 0, 2, 0x11, 0, 3, 0x11, 0))
    return b"".join(
        [
            grey[:frame] + b"\xff\xc0\0\x11\x08" + (64).to_bytes(2, "big") + (192).to_bytes(2, "big") + b"\3" + colours,
            grey[frame + 13 : scan] + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0",
            grey[scan + 10 :],
        ]
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write small JPEGs of all kinds that libjpeg-turbo reads. Each kind has its own quality and detail."""
    folder, kinds = tmp_path_factory.mktemp("images"), []
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        with_pil = [
            (image, {"subsampling": 0, "quality": 100}),
            (image, {"subsampling": 1, "quality": 30}),
            (image, {"subsampling": 2, "quality": 90, "optimize": True, "exif": b"Exif\0\0" + bytes(40)}),
            (image, {"progressive": True}),
            (image.convert("L"), {"quality": 95, "optimize": True}),
            (image.convert("L"), {"progressive": True}),
            (image.convert("CMYK"), {"quality": 1}),
        ]
        with_cv2 = [
            (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
            (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
            (cv2.IMWRITE_JPEG_RST_INTERVAL, 1 + number),
        ]
        for source, options in with_pil:
            source.save(stream := io.BytesIO(), "JPEG", **options)
            kinds.append(stream.getvalue())
        kinds += [cv2.imencode(".jpg", np.asarray(image), options)[1].tobytes() for options in with_cv2]
    grey = image.resize((160, 96)).convert("L")
    for quality in (50, 60, 70, 80):
        grey.save(stream := io.BytesIO(), "JPEG", quality=quality)
        kinds.append(with_the_sampling_4_1_0(stream.getvalue()))
    for number, content in enumerate(kinds):
        (folder / f"{number:02}.jpg").write_bytes(content)
    return sorted(folder.iterdir())


def test_no_damage_to_an_image_makes_the_kernels_leave_their_memory_or_differ_from_libjpeg(images, objects, tmp_path):
    ended = drive(link(tmp_path, objects.values()), images, NUM_IMAGES)
    assert (ended.returncode, ended.stderr) == (0, "the file is lost\n"), ended.stderr
    done, damaged, refused, without_memory, compared, ours_alone = map(int, re.findall(r"\d+", ended.stdout))
    assert done + damaged + refused + without_memory == 3 * NUM_IMAGES
    assert min(done, damaged, refused, without_memory, compared) > NUM_IMAGES / 10 and ours_alone > 20


@pytest.mark.parametrize(
    "file, right, wrong, message",
    [
        ("crop_jpeg.c", "memchr(begin, 0xFF, end - begin)", "memchr(begin, 0xFF, end - begin + 1)", "AddressSanitizer"),
        ("huffman.h", "* 64 * 4 + 8)", "* 0 + 7)", "AddressSanitizer"),
        ("huffman.h", "NATURAL_ORDER[80]", "NATURAL_ORDER[64]", "runtime error: index"),
        ("pixels.c", "i < count; i++)", "i <= count; i++)", "AddressSanitizer"),
        ("crop_jpeg.c", "        jpeg_destroy_decompress(image);\n        if", "        if", "LeakSanitizer"),
        ("crop_jpeg.c", "*memory ? wanted + wanted / 2 : 0", "wanted", "AddressSanitizer"),
        ("crop_jpeg.c", "(x + w - 1)", "x", "other pixels"),
        ("crop_jpeg.c", "taken_over || ", "", "status 0"),
        ("crop_jpeg.c", "!can_crop_columns(image)", "0", "other pixels at 1/"),
    ],
)
def test_a_fault_in_the_kernels_is_seen(images, objects, tmp_path, file, right, wrong, message):
    copy_native(tmp_path, [(file, right, wrong), *EXACT])
    source = USED_BY.get(file, file)
    program = link(tmp_path, (objects | {source: compile_file(tmp_path / source, tmp_path)}).values())
    ended = drive(program, images, NUM_IMAGES // 8)
    if "can_crop_columns" in right and libjpeg_turbo() >= 3:
        assert ended.returncode == 0, ended.stderr  # it writes these columns itself
    else:
        assert ended.returncode != 0 and message in ended.stderr, ended.stderr
