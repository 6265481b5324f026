"""Decoding only what a crop needs gives the pixels of decoding everything, bit for bit, and notices damage."""

import io

import numpy as np
import pytest
from ffcv.libffcv import imdecode
from ffcv.pipeline.compiler import Compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lbsgd.crop_jpeg import crop_decoder, library, whole_image_decoder


@pytest.fixture(scope="module")
def decoders():
    """(ours, FFCV's); `make setup` compiles ours, so it must be there."""
    return crop_decoder(library()), whole_image_decoder(Compiler.compile(imdecode))


def picture(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, **options)
    return np.frombuffer(stream.getvalue(), np.uint8)


def crop_of(decode, data, size, box):
    top, left, h, w = box
    pixels, top, left, damaged = decode(data, *size, *box)
    assert not damaged
    return pixels[top:top + h, left:left + w]


@settings(max_examples=150)
@given(st.integers(1, 90), st.integers(1, 120), st.sampled_from([0, 1, 2]), st.booleans(), st.booleans(), st.data())
def test_a_crop_has_the_pixels_of_the_whole_image(decoders, height, width, subsampling, progressive, grey, data):
    image = picture(height, width).convert("L") if grey else picture(height, width)
    bytes_ = jpeg(image, progressive=progressive, **({} if grey else {"subsampling": subsampling}))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    ours, theirs = (crop_of(decode, bytes_, (height, width), box) for decode in decoders)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("damage", ["cut in the middle", "noise in the middle", "another file", "empty"])
def test_damage_within_the_crop_is_noticed(decoders, damage):
    data = jpeg(picture(200, 300)).copy()
    whole = (0, 0, 200, 300)
    assert not any(decode(data, 200, 300, *whole)[3] for decode in decoders)
    half = len(data) // 2
    if damage == "cut in the middle":
        data = data[:half]
    elif damage == "noise in the middle":
        data[half:half + 500] = np.random.default_rng(0).integers(0, 256, 500)  # zeros would be valid codes
    else:
        data = np.frombuffer(b"PNG" * 100, np.uint8) if damage == "another file" else data[:0]
    assert decoders[0](data, 200, 300, *whole)[3]
    intact = jpeg(picture(200, 300))
    assert not decoders[0](intact, 200, 300, *whole)[3]  # and the next image is decoded as if nothing had been


def test_a_size_that_is_not_the_image_s_is_noticed(decoders):
    assert decoders[0](jpeg(picture(20, 30)), 40, 60, 10, 10, 30, 50)[3]
