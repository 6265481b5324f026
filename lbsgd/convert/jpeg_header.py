"""Read a JPEG's header: whether the file is plain, and its size.

A JPEG is plain if every libjpeg-turbo reads the same pixels from it without hints: YCbCr or grey, eight bits, Huffman
coding, usual subsampling, whole tables, and not truncated. PIL and OpenCV then decode it to equal pixels, bit for bit.
"""

from __future__ import annotations

import contextlib

MAX_PIXELS = 178_956_970  # PIL takes a larger image for an attack
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
DQT, DHT, SOS, DRI, APP0, APP14, COM = 0xDB, 0xC4, 0xDA, 0xDD, 0xE0, 0xEE, 0xFE
SUBSAMPLING = {(h, v, 1, 1, 1, 1) for h, v in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))}


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return the (width, height) of a plain JPEG, or None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    with contextlib.suppress(IndexError):  # the data end within the header
        segments, scan = _segments(data)
        # In coded data, 00 or a restart marker follows FF, so FF D9 after the start of the scan ends the image.
        complete = scan and (data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", scan) > 0)
        if complete and DQT in segments and DHT in segments:
            return _plain_frame(segments)
    return None


def _segments(data: bytes) -> tuple[dict[int, bytes], int]:
    """Return the header's segments by marker, and where the first scan starts, 0 after anything unusual."""
    segments: dict[int, bytes] = {}
    at = 2
    while data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == SOS:
            return segments, at if end == at + 8 + 2 * data[at + 4] else 0  # two bytes for each component of the scan
        if not (marker in (*HUFFMAN_FRAMES, DQT, DHT, DRI, COM) or APP0 <= marker < APP0 + 16):
            break
        if marker in HUFFMAN_FRAMES and not segments.keys().isdisjoint(HUFFMAN_FRAMES):
            break  # libjpeg refuses a second frame
        if marker in (DQT, DHT) and not _whole_tables(marker, data[at + 4 : end]):
            break
        name = data[at + 4 : at + 9]
        if not APP0 <= marker < APP0 + 16 or (marker, name) in ((APP0, b"JFIF\0"), (APP14, b"Adobe")):
            segments[marker] = data[at + 4 : end]
        at = end
    return segments, 0


def _whole_tables(marker: int, tables: bytes) -> bool:
    """Whether a segment holds whole tables with valid numbers. libjpeg refuses an image with other tables."""
    at = 0
    while at < len(tables):
        kind, number = tables[at] >> 4, tables[at] & 15
        if kind > 1 or number > 3:
            return False
        at += 1 + 64 * (1 + kind) if marker == DQT else 17 + sum(tables[at + 1 : at + 17])
    return at == len(tables)


def _plain_frame(segments: dict[int, bytes]) -> tuple[int, int] | None:
    frame = next((segments[marker] for marker in HUFFMAN_FRAMES if marker in segments), b"")
    if not frame or frame[0] != 8:  # bits per sample
        return None
    height, width, components = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4], frame[5]
    ids = tuple(frame[6 : 6 + 3 * components : 3])
    sampling = tuple(value for packed in frame[7 : 7 + 3 * components : 3] for value in (packed >> 4, packed & 15))
    adobe = segments[APP14][11] if APP14 in segments else None
    # libjpeg's rule for three components: YCbCr by JFIF, by Adobe's transform 1, or by the ids 1 2 3.
    declared_ycbcr = adobe in (None, 1) and (APP0 in segments or adobe == 1 or ids == (1, 2, 3))
    ycbcr = components == 3 and sampling in SUBSAMPLING and declared_ycbcr
    plain = 0 < width * height <= MAX_PIXELS and (ycbcr or components == 1)
    return (width, height) if plain else None
