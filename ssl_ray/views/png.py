"""The commonest PNG files without Pillow: 8-bit grey or RGB, not interlaced, nothing in them that changes pixels.

Of a 32 px image Pillow's way takes 50 to 80 us, this 25, half of which is zlib's.  What is of another kind, or not whole, is left
to Pillow; what is read here, all checksums right, Pillow reads to the same pixels.
"""

import struct

import numpy as np
from numba import types
from zlib_ng import zlib_ng

from ssl_ray.views.compiled import inner, loader

_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_HEADER, _CHUNK, _CHECKSUM = struct.Struct(">IIBBBBB"), struct.Struct(">I4s"), struct.Struct(">I")
_FIRST_CHUNK = 8
_CHANNELS = {0: 1, 2: 3}
"""Of the colour types grey and RGB; PNG specification (W3C, second edition), 11.2.2."""
_HARMLESS = (b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"bKGD", b"sBIT", b"hIST")
"""Chunks that say nothing of orientation, transparency or animation."""


def decode_png(data: bytes | memoryview, *, max_pixels: int) -> np.ndarray | None:
    """uint8 [H, W, 1 or 3], or None where Pillow must look at it. No more memory is used than the pixels take."""
    if len(data) < len(_START) + _HEADER.size or data[: len(_START)] != _START:
        return None
    width, height, bits, colour, compression, filtering, interlace = _HEADER.unpack_from(data, len(_START))
    if (
        (bits, compression, filtering, interlace) != (8, 0, 0, 0)
        or colour not in _CHANNELS
        or not 0 < width * height <= max_pixels
    ):
        return None
    packed = _packed(memoryview(data))
    if packed is None:
        return None
    channels = _CHANNELS[colour]
    row = 1 + width * channels  # the first byte says how the row was filtered
    inflate = zlib_ng.decompressobj()
    try:
        filtered = inflate.decompress(packed, height * row)
        # The end, with its checksum, is only seen when there is room for more.
        if not inflate.eof and inflate.decompress(inflate.unconsumed_tail, 1):
            return None
    except zlib_ng.error:  # type: ignore[misc]  # of which its stubs say "object"
        return None
    if len(filtered) != height * row or not inflate.eof:
        return None
    pixels = np.empty((height, width, channels), np.uint8)
    known = load()(np.frombuffer(filtered, np.uint8), width * channels, channels, pixels.reshape(-1))
    return pixels if known else None


def _packed(data: memoryview) -> bytes | memoryview | None:
    """The compressed rows of a file; None if it holds what could change pixels, or a checksum is wrong."""
    at, parts = _FIRST_CHUNK, []
    while at + _CHUNK.size <= len(data):
        size, name = _CHUNK.unpack_from(data, at)
        end = at + _CHUNK.size + size
        if end + _CHECKSUM.size > len(data) or zlib_ng.crc32(data[at + 4 : end]) != _CHECKSUM.unpack_from(data, end)[0]:
            return None
        if name == b"IDAT":
            parts.append(data[at + _CHUNK.size : end])
        elif name == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
        elif name not in _HARMLESS and (name != b"IHDR" or at > _FIRST_CHUNK):
            return None
        at = end + _CHECKSUM.size
    return None


@inner
def _paeth(a, b, c):
    """Which of the bytes to the left, above, and above to the left is nearest to a + b - c; the specification's 9.4."""
    to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    nearest = b if to_b <= to_c else c
    return a if to_a <= min(to_b, to_c) else nearest


def _unfilter(filtered, length, channels, pixels):
    """Fills pixels uint8 [H * L] from filtered uint8 [H * (1 + L)]; whether all filters are known. The specification's 9.2."""
    for y in range(len(pixels) // length):
        kind, start, at = filtered[y * (1 + length)], y * (1 + length) + 1, y * length
        if kind > 4:
            return False
        for colour in range(channels):
            a = c = np.int32(0)
            for i in range(colour, length, channels):
                x = np.int32(filtered[start + i])
                b = np.int32(pixels[at - length + i]) if y > 0 else np.int32(0)
                if kind == 4:
                    x += _paeth(a, b, c)
                elif kind == 3:
                    x += (a + b) >> 1
                elif kind == 2:
                    x += b
                elif kind == 1:
                    x += a
                a, c = x & np.int32(255), b
                pixels[at + i] = a
    return True


_SIGNATURE = types.boolean(types.Array(types.uint8, 1, "C", readonly=True), types.int64, types.int64, types.uint8[::1])
load = loader(_unfilter, _SIGNATURE)
"""_unfilter as machine code."""
