"""Many small PNG files at once whose pixels are stored, not compressed, as `ssl-ray data pack` writes arrays.

One call of compiled code, without Python's lock, checks and copies them: 1 us for an image of 32 px, where zlib and Python one
by one take 10.  Only the plainest files are read here: 8-bit grey or RGB, not interlaced or
filtered, IHDR, one IDAT and IEND.  What is of another kind, or has a wrong checksum, is left to `decode`.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numba import types
from zlib_ng import zlib_ng

from ssl_ray.views.compiled import inner, loader

_START = np.frombuffer(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", np.uint8)
_END = np.frombuffer(b"\0\0\0\0IEND\xaeB`\x82", np.uint8)
_IDAT = np.frombuffer(b"IDAT", np.uint8)
_LEAST = 33 + 12 + 12 + 2 + 5 + 2 + 4
"""Bytes of a file: start and IHDR, the frames of IDAT and IEND, of the zlib stream and of one block, a grey pixel."""


def decode_stored(images: Sequence[bytes | memoryview], *, channels: int, max_pixels: int) -> list[np.ndarray | None]:
    """uint8 [C, H, W] of each, the colours of a pixel together in memory, or None where `decode` must look at it."""
    stops = np.cumsum(np.fromiter(map(len, images), np.int64, len(images)))
    files = np.frombuffer(b"".join(images), np.uint8)
    # Of the chunk IDAT, if it is such a file; a fifth of the time that compiled code of ours would take.
    crcs = np.fromiter((zlib_ng.crc32(memoryview(data)[37:-16]) for data in images), np.uint32, len(images))
    # The pixels of a file are fewer than its bytes.
    pixels, sizes = np.empty(len(files) * channels, np.uint8), np.empty((len(images), 2), np.int64)
    load()(files, stops, crcs, channels, max_pixels, pixels, sizes)
    found: list[np.ndarray | None] = []
    start = 0
    for (height, width), run in itertools.groupby(sizes.tolist()):
        count = sum(1 for _ in run)
        if not height:
            found += [None] * count
            continue
        stop = start + count * height * width * channels
        # [n * H * W * C] -> n of [C, H, W]
        found += list(pixels[start:stop].reshape(count, height, width, channels).transpose(0, 3, 1, 2))
        start = stop
    return found


_CRC = np.array([zlib_ng.crc32(bytes([i])) ^ zlib_ng.crc32(b"\0") for i in range(256)], np.uint32)
"""What a byte at the end adds to the CRC-32 (of zlib and PNG)."""


@inner
def _crc32(data):
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = _CRC[(crc ^ byte) & np.uint32(255)] ^ crc >> np.uint32(8)
    return crc ^ np.uint32(0xFFFFFFFF)


@inner
def _adler32(low, high, data):
    """The two halves of the Adler-32 of what came before, continued."""
    for first in range(0, len(data), 4096):  # before the sums leave 32 bits
        some = data[first : first + 4096]  # indices that begin at zero: the loop becomes vector instructions
        plain = weighted = np.uint32(0)
        for i in range(len(some)):
            byte = np.uint32(some[i])
            plain = np.uint32(plain + byte)
            weighted = np.uint32(weighted + byte * np.uint32(len(some) - i))
        high = (high + len(some) * low + weighted) % 65521
        low = (low + plain) % 65521
    return low, high


@inner
def _same(data, expected):
    for i in range(len(expected)):  # noqa: SIM110, numba has no all() of these
        if data[i] != expected[i]:
            return False
    return True


@inner
def _big_endian(data, at):
    return np.int64(data[at]) << 24 | np.int64(data[at + 1]) << 16 | np.int64(data[at + 2]) << 8 | np.int64(data[at + 3])


@inner
def _little_endian(data, at):
    return np.int64(data[at]) | np.int64(data[at + 1]) << 8


@inner
def _size(file, crc, channels, max_pixels):
    """Height, width and colours of a file that is of this kind, but for its zlib stream; PNG specification, 5 and 11.2.2."""
    other = 0, 0, 0
    if len(file) < _LEAST or not _same(file, _START) or not _same(file[37:], _IDAT) or not _same(file[-12:], _END):
        return other
    width, height, colours = _big_endian(file, 16), _big_endian(file, 20), 3 if file[25] == 2 else 1
    if file[24] != 8 or (file[25] != 0 and file[25] != 2) or file[26] or file[27] or file[28] or colours > channels:
        return other
    if not 0 < width * height <= max_pixels or _big_endian(file, 33) != len(file) - 57:
        return other
    if _crc32(file[12:29]) != _big_endian(file, 29) or crc != _big_endian(file, len(file) - 16):
        return other
    return height, width, colours


@inner
def _copy(stream, length, pixels):
    """Fills pixels uint8 [H * L] from a zlib stream (RFC 1950, 1951) of stored blocks, rows with a zero before each.

    Whether it is that and no more, its checksum right.
    """
    if stream[0] != 0x78 or stream[1] != 1:
        return False
    at, end, low, high = 2, len(stream) - 4, 1, 0
    done = left = 0  # bytes of pixels that are filled, and those that the row still lacks
    last = False
    while not last:
        if at + 5 > end or stream[at] > 1:
            return False
        last, size = stream[at] == 1, _little_endian(stream, at + 1)
        at += 5
        stop = at + size
        if size ^ _little_endian(stream, at - 2) != 0xFFFF or stop > end:
            return False
        low, high = _adler32(low, high, stream[at:stop])
        while at < stop:
            if left == 0:
                if stream[at] != 0 or done == len(pixels):
                    return False
                at, left = at + 1, length
            some = min(left, stop - at)
            into, out = pixels[done : done + some], stream[at : at + some]
            for i in range(some):
                into[i] = out[i]
            at, done, left = at + some, done + some, left - some
    return at == end and done == len(pixels) and high << 16 | low == _big_endian(stream, end)


@inner
def _repeat(count, pixels):
    """Grey pixels to three channels where they lie, from the end."""
    for i in range(count - 1, -1, -1):
        colour = pixels[3 * i : 3 * i + 3]
        colour[0] = colour[1] = colour[2] = pixels[i]


def _decode(files, stops, crcs, channels, max_pixels, pixels, sizes):
    """Fills pixels uint8 [sum of H * W * C], image after image, and sizes int64 [n, 2] with H and W, 0 for other kinds.

    files: uint8, the bytes of all, of which each ends at its place in stops, int64 [n].  crcs: uint32 [n], of the IDAT of each.
    pixels has room for C times as many: a header that lies does not lead beyond it, since of each file no more is written than
    it has bytes.
    """
    start = done = 0
    for i in range(len(stops)):
        file = files[start : stops[i]]
        start = stops[i]
        height, width, colours = _size(file, crcs[i], channels, max_pixels)
        if height and not _copy(file[41:-16], width * colours, pixels[done : done + height * width * colours]):
            height = width = 0
        sizes[i, 0], sizes[i, 1] = height, width
        if colours < channels:
            _repeat(height * width, pixels[done:])
        done += height * width * channels


_SIGNATURE = types.void(
    types.Array(types.uint8, 1, "C", readonly=True),
    types.int64[::1],
    types.uint32[::1],
    types.int64,
    types.int64,
    types.uint8[::1],
    types.int64[:, ::1],
)
load = loader(_decode, _SIGNATURE)
"""_decode as machine code."""
