"""Single images: which JPEGs keep their bytes, how all others are encoded, and how images are shrunk."""

import io
import shutil
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from converter import JPEG, SETTINGS, encoded, picture, save, stored
from PIL import Image
from stock_ffcv import read_by_stock_ffcv

import lbsgd.convert.image
from lbsgd.convert.convert import convert
from lbsgd.convert.image import COPIED, ENCODED, PIXELS, ImageError, stored_image
from lbsgd.convert.jpeg_header import MAX_PIXELS, plain_size
from lbsgd.convert.settings import Settings
from lbsgd.convert.verify import verify
from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import IMAGE_FIELD
from lbsgd.data.beton_format import JPEG as JPEG_MODE
from lbsgd.data.beton_format import RAW as RAW_MODE
from lbsgd.data.beton_layout import read_layout
from lbsgd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def ffcv():
    import lbsgd.data.ffcv_loader  # noqa: F401  imports FFCV so that torch keeps its number of threads


def palette(**options):
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).quantize(256).save(buffer, "PNG", **options)
    return buffer.getvalue()


def ycck():
    """Return a CMYK JPEG whose Adobe marker says that its colours are stored as luminance and chroma."""
    data = bytearray(encoded("CMYK"))
    data[data.index(b"\xff\xee") + 15] = 2
    return bytes(data)


def turned():
    """Return a JPEG half as wide as high, with an EXIF entry that asks to show it rotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(size=(64, 32), exif=exif.tobytes())


def by_opencv(*options):
    return cv2.imencode(".jpg", picture(64, 64), options)[1].tobytes()


def pil(data):
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):  # grey with 16 bits, which PIL's own conversion clips
            return np.repeat(np.rint(np.asarray(image, float)[:, :, None] / 257), 3, axis=2).astype(int)
        return np.asarray(image.convert("RGB"), int)


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # it announces five entries, and the first is cut
EXIF = b"\xff\xe1" + (len(EXIF) + 2).to_bytes(2, "big") + EXIF
FRAME = JPEG.index(b"\xff\xc0")


def rgb(change):
    """Return a JPEG in RGB that says so in one place only. PIL's say it by Adobe's marker and by their ids."""
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
    """Return a JPEG with all components at 2x1: no subsampling, written as no program does it."""
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
    images = [data for name, data in (PLAIN | ODD).items() if name != "odd sampling"]  # noise, which JPEG loses
    for number, data in enumerate(images):
        path = tmp_path / "source/train" / "ab"[number % 2] / f"{number:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.copytree(tmp_path / "source/train", tmp_path / "source/val")
    convert(tmp_path / "source", tmp_path / "data", raw_fraction=0.25, **SETTINGS)
    [(pixels, labels)] = read_by_stock_ffcv(tmp_path / "data/train.beton", len(images))
    expected = images[0::2] + images[1::2]
    assert labels == [0] * len(images[0::2]) + [1] * len(images[1::2])
    for found, data in zip(pixels, expected, strict=True):
        assert np.abs(found - pil(data)).mean() < 4
    modes = BetonFile.open(tmp_path / "data/train.beton").images["mode"]
    assert modes.sum() == len(images) // 4 and (found := np.array(pixels)[modes == 1]).any()
    for raw, data in zip(found, np.array(expected, object)[modes == 1], strict=True):
        assert np.array_equal(raw, pil(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_exif_block_corrupt_or_not_changes_no_pixel():
    """FFCV's decoder and torchvision's loader ignore orientation. The bytes are copied, or encoded as they are."""
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
            assert np.abs(pixels - expected).mean() < 8  # JPEG loses much of 20 pixels; turned, it is 60 and more


def test_what_pil_takes_for_an_attack_is_not_decoded_either():
    data = bytearray(JPEG)
    data[FRAME + 5 : FRAME + 9] = (13_400).to_bytes(2, "big") * 2
    assert plain_size(bytes(data)) is None and 13_400**2 > 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    with pytest.raises(ImageError) as error:
        stored_image(bytes(data), 0, Settings(max_side=64), 1 << 23)
    assert isinstance(error.value.__cause__, Image.DecompressionBombError)


def test_an_empty_file_is_no_image():
    assert plain_size(b"") is None
    with pytest.raises(ImageError) as error:
        stored_image(b"", 0, Settings(max_side=64), 1 << 23)
    assert isinstance(error.value.__cause__, Image.UnidentifiedImageError)


def eps():
    buffer = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


def iptc(data):
    """Return an IPTC file of 8 x 8 pixels that holds another image."""
    fields = (3, 60, b"\1\0"), (3, 20, b"\0\x08"), (3, 30, b"\0\x08"), (3, 120, b"\5"), (8, 10, data)
    return b"".join(bytes((0x1C, record, tag, *len(value).to_bytes(2, "big"))) + value for record, tag, value in fields)


@pytest.mark.parametrize("data", [eps(), iptc(eps())], ids=["eps", "iptc"])
def test_no_image_starts_ghostscript(data, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ImageError, match="for which PIL would run another program"):
        stored_image(data, 0, Settings(max_side=64), 1 << 23)
    assert not (tmp_path / "ran").exists()


def put(at, *values):
    """Return the JPEG with other bytes at this place."""
    return JPEG[:at] + bytes(values) + JPEG[at + len(values) :]


def segments(*left_out, again=()):
    """Return the JPEG without the header's segments of some markers, or with those of others twice."""
    parts, at = [JPEG[:2]], 2
    while JPEG[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(JPEG[at + 2 : at + 4], "big")
        parts += [JPEG[at:end]] * (0 if JPEG[at + 1] in left_out else 2 if JPEG[at + 1] in again else 1)
        at = end
    return b"".join([*parts, JPEG[at:]])


DQT, DHT, SOS = (JPEG.index(marker) for marker in (b"\xff\xdb", b"\xff\xc4", b"\xff\xda"))
TABLE = b"".join(bytes((0, value)) for value in JPEG[DQT + 5 : DQT + 69])  # of 16 bits


@pytest.mark.parametrize(
    "data",
    [
        segments(0xC4),  # no Huffman tables, as in videos
        segments(0xDB),
        segments(again=[0xC0]),
        segments(0xC0) + b"\xff\xd9",
        put(SOS + 3, 13),
        put(FRAME + 4, 12),  # bits per sample
        put(FRAME + 5, 0, 0),  # the height comes after the scan
        put(FRAME + 9, 2),  # components
        put(FRAME + 1, 0xC9),  # arithmetic coding
        put(DHT + 4, 0x20),
        put(DHT + 4, 0x04),
        put(DHT + 5, JPEG[DHT + 5] + 1),  # a code more than the table has
        put(DQT + 4, 0x04),
        put(DQT + 4, 0x10),  # 16 bits, which the table does not have
    ],
)
def test_a_header_that_lacks_something_or_contradicts_itself_is_not_plain(data):
    assert plain_size(data) is None


@pytest.mark.parametrize(
    "data",
    [
        segments(0xE0),  # no JFIF: the ids 1 2 3 say YCbCr
        JPEG[:2] + b"\xff\xee\x00\x0eOther" + bytes(7) + JPEG[2:],  # not Adobe's
        JPEG[:DQT] + b"\xff\xdb\x00\x83\x10" + TABLE + JPEG[DQT + 69 :],
    ],
)
def test_a_header_of_another_kind_may_be_plain(data):
    assert plain_size(data) == (64, 64) and np.array_equal(pil(data), pil(JPEG))


@pytest.mark.parametrize("cut", [3, 20, 300, len(JPEG) // 2, len(JPEG) - 2])
def test_a_jpeg_without_its_end_is_pil_s_to_judge(cut):
    assert plain_size(JPEG[:cut]) is None
    with pytest.raises(ImageError):
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
            except OSError as error:  # damaged tables, which only decoding shows
                assert "broken data stream" in str(error)


@pytest.mark.parametrize(
    "settings, size, expected",
    [
        (dict(max_side=100), (200, 120), (100, 60)),
        (dict(max_side=100), (100, 60), (100, 60)),
        (dict(max_side=500), (501, 375), (500, 374)),  # FFCV rounds down
        (dict(short_side=100), (200, 120), (166, 100)),
        (dict(short_side=100), (120, 201), (100, 167)),  # as in torchvision
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
    """The same bytes if nothing is shrunk. If JPEGs are decoded at a fraction of their size, nearly the same pixels."""
    from ffcv.fields.rgb_image import encode_jpeg, resizer

    data = encoded(size=size)
    theirs = encode_jpeg(resizer(np.uint8(pil(data)), 200), 90).tobytes()
    ours = bytes(stored_image(data, 0, Settings(max_side=200, reencode=True), 1 << 23).data)
    assert ours == theirs if max(size) <= 400 else np.abs(pil(ours) - pil(theirs)).mean() < 0.5
    assert abs(len(ours) / len(theirs) - 1) < 0.03


def test_an_image_whose_pixels_exceed_a_page_is_kept_as_a_jpeg(tmp_path):
    """--short_side bounds only one side, so the pixels of a long image may exceed the page."""
    for split in ("train", "val"):
        for name, size in (("long", (1000, 3000)), ("tall", (4000, 1001)), ("square", (1000, 1000))):
            path = tmp_path / f"source/{split}/a/{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(size=size))
    convert(tmp_path / "source", tmp_path / "data", short_side=1000, raw_fraction=1.0, num_processes=1)
    beton = BetonFile.open(tmp_path / "data/train.beton")
    assert beton.images["mode"].tolist() == [JPEG_MODE, RAW_MODE, JPEG_MODE]
    assert stored(beton.path)[0] == (tmp_path / "source/train/a/long.JPEG").read_bytes()  # needs no resize
    assert beton.images["width"].tolist() == [3000, 1000, 1000]
    verify(tmp_path / "data", 1, tmp_path / "source")


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


def test_a_jpeg_that_libjpeg_refuses_is_found_by_verifying_and_left_out_where_all_are_encoded_again(tmp_path):
    """It is copied, because its header is plain. The loader's message tells the user to do this."""
    jpeg = bytearray(JPEG)
    table = jpeg.index(b"\xff\xc4") + 5
    jpeg[table : table + 16] = bytes([sum(jpeg[table : table + 16]), *[0] * 15])  # more codes of one bit than can exist
    for split, content in (("train", jpeg), ("val", JPEG)):
        (tmp_path / "source" / split / "a").mkdir(parents=True)
        (tmp_path / "source" / split / "a/1.JPEG").write_bytes(JPEG)
        (tmp_path / "source" / split / "a/2.JPEG").write_bytes(content)
    convert(tmp_path / "source", tmp_path / "data", **SETTINGS)
    with pytest.raises(DataError, match="train.beton: image 1 .label 0. does not decode to its 64 x 64 pixels"):
        verify(tmp_path / "data", 1)
    convert(tmp_path / "source", tmp_path / "data", reencode=True, on_error="skip", **{**SETTINGS, "overwrite": True})
    assert BetonFile.open(tmp_path / "data/train.beton").num_images == 1


def test_a_lack_of_memory_of_opencv_is_not_left_to_pil_which_would_give_other_pixels(monkeypatch):
    def refuse(code):
        error = cv2.error("refused")
        error.code = code
        monkeypatch.setattr(cv2, "imdecode", Mock(side_effect=error))

    sixteen = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(sixteen, "JPEG")
    for data in (sixteen.getvalue(), cv2.imencode(".png", np.zeros((4, 4, 3), np.uint16))[1].tobytes()):
        refuse(-4)
        with pytest.raises(MemoryError):
            lbsgd.convert.image.decode(data)
        refuse(-2)
        assert lbsgd.convert.image.decode(data).shape == (4, 4, 3)  # PIL's


def test_a_lack_of_memory_is_not_a_damaged_image():
    """OpenCV's own error for it says so. A terabyte of pixels is more than any machine has."""
    with pytest.raises(MemoryError, match="Insufficient memory"):
        lbsgd.convert.image._resized(picture(4, 4), (1 << 20, 1 << 20))


def test_a_tiff_comes_out_turned_as_torchvision_s_loader_sees_it():
    """PIL rotates a TIFF by its orientation when it loads it, and no other format."""
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 32)).save(buffer, "TIFF", tiffinfo={274: 6})
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        as_torchvision = np.asarray(image.convert("RGB"))
    kept = stored_image(buffer.getvalue(), 0, Settings(max_side=64, raw_fraction=1.0), 1 << 23)
    assert (kept.width, kept.height) == (64, 32)
    assert (np.frombuffer(kept.view, np.uint8).reshape(32, 64, 3) == as_torchvision).all()


def test_pixels_are_counted_beyond_16_bits_and_must_be_the_image_s_bytes(tmp_path):
    for name in ("train/ant/1.JPEG", "train/bee/1.JPEG", "val/ant/1.JPEG", "val/bee/1.JPEG"):
        save(tmp_path / "source" / name, size=(256, 256))  # 3 * 256 * 256 is 0 in 16 bits
    convert(tmp_path / "source", tmp_path / "data", max_side=500, raw_fraction=1.0, num_processes=1)
    path = tmp_path / "data/train.beton"
    assert BetonFile.open(path).sizes.tolist() == [3 * 256 * 256] * 2
    layout = read_layout(path)
    table = np.memmap(path, layout.record, "r+", layout.metadata_at, (2,))
    table[layout.column(IMAGE_FIELD)]["width"][1] = 255
    table.flush()
    with pytest.raises(DataError, match="image 1 does not have the bytes of its pixels"):
        BetonFile.open(path)
