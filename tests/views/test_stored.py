"""Stored PNGs, many at once: the pixels that Pillow reads, and of whatever else is among them what `decode` makes of it."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_ray.views import UndecodableImage, decode, decode_many
from ssl_ray.views.decode import MAX_PIXELS
from ssl_ray.views.stored import decode_stored

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def block(data: bytes, *, last: bool) -> bytes:
    """A stored block, RFC 1951, 3.2.4."""
    return struct.pack("<BHH", last, len(data), len(data) ^ 0xFFFF) + data


def rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def stream(data: bytes, cuts: list[int] | None = None) -> bytes:
    """A zlib stream of stored blocks that end at `cuts`, RFC 1950."""
    borders = [0, *sorted(cuts or []), len(data)]
    blocks = [block(data[i:j], last=n == len(borders) - 2) for n, (i, j) in enumerate(itertools.pairwise(borders))]
    return b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(data))


def file(pixels: np.ndarray, packed: bytes | None = None, *, header: tuple[int, ...] = (), more: bytes = b"") -> bytes:
    """pixels: [H, W] or [H, W, 3].  header: what it says instead; `more` stands between it and the rows."""
    height, width = pixels.shape[:2]
    header = header or (width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = stream(rows(pixels)) if packed is None else packed
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), more, chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def read(*images: bytes, channels: int = 3) -> list[np.ndarray | None]:
    return decode_stored(images, channels=channels, max_pixels=10_000)


def one_by_one(data: bytes | None, channels: int) -> np.ndarray | UndecodableImage | None:
    try:
        return None if data is None else decode(data, channels=channels)
    except UndecodableImage as error:
        return error


def assert_as_one_by_one(images: list[bytes | None], *, channels: int = 3) -> None:
    for data, found in zip(images, decode_many(images, channels=channels), strict=True):
        expected = one_by_one(data, channels)
        assert type(found) is type(expected)
        assert np.array_equal(found, expected) if isinstance(found, np.ndarray) else str(found) == str(expected)


SIDE = st.integers(1, 40)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(SIDE, SIDE, st.booleans(), st.integers(1, 3)), max_size=6), st.sampled_from([1, 3]), st.integers(0, 2**32)
)
def test_images_of_any_sizes_and_blocks_are_those_that_pillow_reads(kinds, channels, seed):
    rng = np.random.default_rng(seed)
    images = []
    for height, width, colour, count in kinds:
        for _ in range(count):  # neighbours of the same size
            pixels = rng.integers(0, 256, (height, width, 3) if colour else (height, width), np.uint8)
            cuts = rng.integers(0, len(rows(pixels)) + 1, rng.integers(0, 4)).tolist()
            images.append(file(pixels, stream(rows(pixels), cuts)))
    for data, found in zip(images, read(*images, channels=channels), strict=True):
        image = Image.open(io.BytesIO(data))
        if image.mode == "RGB" and channels == 1:
            assert found is None  # colour to luma is Pillow's
        else:
            expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
            assert np.array_equal(found, expected.transpose(2, 0, 1))
    assert_as_one_by_one(images, channels=channels)


def test_images_larger_than_a_block_and_what_data_pack_writes_are_read():
    from ssl_ray.shards.sources import stored_png

    for shape in [(300, 200, 3), (300, 400), (8, 8), (96, 96, 3), (1, 1)]:
        pixels = RNG.integers(0, 256, shape, np.uint8)
        (found,) = decode_stored([stored_png(pixels)], channels=3, max_pixels=MAX_PIXELS)
        assert np.array_equal(found, np.broadcast_to(pixels.reshape(*shape[:2], -1), (*shape[:2], 3)).transpose(2, 0, 1))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored_png(pixels)))), pixels)


def test_the_colours_of_a_pixel_lie_together():
    for found in read(file(PIXELS), file(PIXELS[..., 0])):
        assert found.transpose(1, 2, 0).flags.c_contiguous


OTHERS = [
    *(
        encoded(PIXELS),
        encoded(PIXELS, compress_level=0),
        encoded(PIXELS, "JPEG"),
        encoded(PIXELS, "WEBP"),
        encoded(PIXELS, "GIF"),
    ),
    *(
        file(PIXELS, more=chunk(b"tRNS", bytes(6))),
        file(PIXELS, more=chunk(b"gAMA", bytes(4))),
        file(PIXELS, zlib.compress(rows(PIXELS))),
    ),
    *(b"", b"\x89", b"\x89PNG no image", None, file(PIXELS)[:-20], encoded(PIXELS)[:90], encoded(PIXELS, "JPEG")[:200]),
]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([*OTHERS, *[file(PIXELS), file(PIXELS[..., 0]), file(PIXELS[:5])] * 4]), max_size=12),
    st.sampled_from([1, 3]),
)
def test_a_batch_of_mixed_kinds_is_what_its_images_are_one_by_one(images, channels):
    assert_as_one_by_one(images, channels=channels)


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0]], ids=["RGB", "grey"])
def test_every_changed_bit_and_missing_byte_is_noticed(pixels):
    whole = file(pixels, stream(rows(pixels), [30]))
    assert read(whole)[0] is not None
    changed = [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in range(8)]
    cut = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    assert all(found is None for found in read(*changed, *cut))
    assert_as_one_by_one(changed[::3] + cut)


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), min_size=1, max_size=3), st.sampled_from([[], [30], [0, 57, 58]])
)
def test_what_is_wrong_below_right_checksums_is_as_one_by_one(changes, cuts):
    """In the head of the zlib stream, in those of blocks, in filters and in pixels, with the chunk's checksum right again."""
    pixels = PIXELS[:4, :6]
    packed = bytearray(stream(rows(pixels), cuts))
    for at, value in changes:
        packed[at % len(packed)] = value
    assert_as_one_by_one([file(pixels), file(pixels, bytes(packed)), file(pixels)])


def wrong_streams() -> dict[str, bytes]:
    data = rows(PIXELS)
    ending = struct.pack(">I", zlib.adler32(data))
    return {
        "no last block": b"\x78\x01" + block(data, last=False) + ending,
        "a block behind the last": b"\x78\x01" + block(data, last=True) + block(b"", last=True) + ending,
        "a byte too many": stream(data + b"\0"),
        "a byte too few": stream(data[:-1]),
        "a filter": stream(b"\1" + data[1:]),
        "another checksum": stream(data)[:-1] + bytes([stream(data)[-1] ^ 1]),
        "bits beside the kind of block": b"\x78\x01" + bytes([0x81]) + block(data, last=True)[1:] + ending,
        "a compressed block": b"\x78\x01" + zlib.compress(bytes(len(data)))[2:],
        "nothing": b"",
        "a dictionary": b"\x78\x20" + stream(data)[2:],
    }


@pytest.mark.parametrize("name", wrong_streams())
def test_a_stream_that_is_not_plainly_stored_is_left_to_decode(name):
    data = file(PIXELS, wrong_streams()[name])
    assert read(data) == [None]
    assert_as_one_by_one([data])


SIZES = st.sampled_from([0, 1, 6, 7, 8, 9, 10, 63, 2**16, 2**31 - 1, 2**31, 2**32 - 1])


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, st.sampled_from([1, 8, 16]), st.integers(0, 7), st.integers(0, 1))
def test_a_header_that_says_something_else_is_as_one_by_one(width, height, bits, colour, interlace):
    data = file(PIXELS, header=(width, height, bits, colour, 0, 0, interlace))
    assert_as_one_by_one([data, file(PIXELS)])
    assert (read(data)[0] is None) == ((width, height, bits, colour, interlace) != (7, 9, 8, 2, 0))


def test_no_more_pixels_than_allowed():
    assert read(file(np.zeros((101, 100), np.uint8))) == [None]
    assert read(file(np.zeros((100, 100), np.uint8)))[0] is not None
