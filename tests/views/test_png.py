"""The way for simple PNGs without Pillow: the pixels that were stored, whatever their filters; all else is left to Pillow."""

import io
import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_ray.views import decode
from ssl_ray.views.png import decode_png

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def filtered(pixels: np.ndarray, kinds: list[int]) -> bytes:
    """Rows of pixels [H, W, C] with the filters of the PNG specification, 9.2, written down as it has them."""
    height, width, channels = pixels.shape
    known = np.zeros((height + 1, width + 1, channels), int)  # a row above and a pixel to the left, zero
    known[1:, 1:] = pixels
    rows = b""
    for y, kind in enumerate(kinds):
        x, a, b, c = known[y + 1, 1:], known[y + 1, :-1], known[y, 1:], known[y, :-1]
        p = a + b - c
        distances = np.stack([abs(p - a), abs(p - b), abs(p - c)])
        nearest = np.choose(distances.argmin(axis=0), [a, b, c])  # the first of equals: a, then b, then c
        guess = [np.zeros_like(x), a, b, (a + b) // 2, nearest][kind]
        rows += bytes([kind]) + ((x - guess) % 256).astype(np.uint8).tobytes()
    return rows


def file(pixels: np.ndarray, rows: bytes, *, pieces: int = 1, before: bytes = b"", after: bytes = b"") -> bytes:
    height, width, channels = pixels.shape
    packed = zlib.compress(rows)
    cuts = [i * len(packed) // pieces for i in range(pieces + 1)]
    body = b"".join(chunk(b"IDAT", packed[i:j]) for i, j in itertools.pairwise(cuts))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0))
    return SIGNATURE + header + before + body + after + chunk(b"IEND", b"")


def plain(pixels: np.ndarray) -> bytes:
    return filtered(pixels, [0] * len(pixels))


def read(data: bytes) -> np.ndarray | None:
    return decode_png(data, max_pixels=10_000)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 5))
def test_pixels_are_those_stored_whatever_the_filters_and_chunks(data, height, width, channels, pieces):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    stored = file(pixels, filtered(pixels, rng.integers(0, 5, height).tolist()), pieces=pieces)
    assert np.array_equal(read(stored), pixels)
    assert np.array_equal(decode(stored, channels=3), np.repeat(pixels, 3 // channels, axis=2).transpose(2, 0, 1))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), pixels[..., 0] if channels == 1 else pixels)


def test_what_pillow_writes_is_read():
    for pixels in (PIXELS, np.add.outer(np.arange(300), np.arange(200)).astype(np.uint8)):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        assert np.array_equal(decode_png(sink.getvalue(), max_pixels=60_000), pixels.reshape(*pixels.shape[:2], -1))


def test_what_is_not_simple_or_not_whole_is_left_to_pillow():
    whole, rows = file(PIXELS, plain(PIXELS)), plain(PIXELS)
    assert read(whole) is not None
    assert all(read(whole[:length]) is None for length in range(len(whole)))
    for at in range(len(whole)):  # every bit is under a checksum, or says what kind of file it is
        changed = bytearray(whole)
        changed[at] ^= 16
        assert read(bytes(changed)) is None
    assert np.array_equal(read(file(PIXELS, rows, before=chunk(b"gAMA", bytes(4)))), PIXELS)
    assert read(file(PIXELS, rows, before=chunk(b"tRNS", bytes(6)))) is None
    assert read(file(PIXELS, rows, after=chunk(b"eXIf", b"MM\0*"))) is None
    assert read(file(PIXELS, rows, before=chunk(b"IHDR", bytes(13)))) is None
    assert read(file(np.zeros((200, 200, 1), np.uint8), bytes(201 * 200))) is None  # more pixels than read allows


@pytest.mark.parametrize("rows", [plain(PIXELS)[:-1], plain(PIXELS) + b"\0", b"\5" + plain(PIXELS)[1:], b"", bytes(10**6)])
def test_rows_that_are_too_few_too_many_or_of_no_known_filter_are_left_to_pillow(rows):
    assert read(file(PIXELS, rows)) is None


def test_a_wrong_checksum_of_the_rows_is_left_to_pillow():
    packed = bytearray(zlib.compress(plain(PIXELS)))
    packed[-1] ^= 1
    whole = file(PIXELS, plain(PIXELS))
    assert read(whole.replace(chunk(b"IDAT", zlib.compress(plain(PIXELS))), chunk(b"IDAT", bytes(packed)))) is None


def test_rows_that_swell_take_no_memory():
    swollen = file(PIXELS, bytes(2 * 10**8))
    tracemalloc.start()
    try:
        assert read(swollen) is None
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
