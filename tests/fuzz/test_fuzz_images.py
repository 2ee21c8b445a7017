"""Image bytes of all kinds, damaged and dressed up: decoded, or refused with a reason, in bounded time and memory."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from fuzzing import damages, fuzz, refused_or_done
from hypothesis import strategies as st
from PIL import Image

from ssl_ray.shards.sources import stored_png
from ssl_ray.views import UndecodableImage, decode, decode_many
from ssl_ray.views import decode as decoding_function
from ssl_ray.views.decode import FORMATS

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 17, 3), np.uint8)
SMOOTH = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def whole() -> list[bytes]:
    """One of each kind that is read."""
    rgb, grey = Image.fromarray(PIXELS), Image.fromarray(SMOOTH)
    exif = Image.Exif()
    exif[274] = 6
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in (3, 7)]
    animated = {"save_all": True, "append_images": frames}
    found = [stored_png(PIXELS), stored_png(SMOOTH), encoded(rgb, "PNG"), encoded(grey, "PNG"), encoded(rgb, "BMP")]
    found += [encoded(rgb.convert(mode), "PNG") for mode in ("1", "LA", "P", "RGBA", "I;16")]
    found += [encoded(rgb, "PNG", **animated), encoded(grey.convert("P"), "PNG", transparency=3)]
    found += [encoded(rgb, "JPEG"), encoded(grey, "JPEG", exif=exif), encoded(rgb, "JPEG", progressive=True)]
    found += [encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgb, "JPEG", subsampling=2, restart_marker_blocks=1)]
    found += [
        encoded(rgb, "GIF", **animated),
        encoded(grey, "GIF"),
        encoded(grey.convert("P"), "BMP"),
        encoded(grey.convert("1"), "BMP"),
    ]
    found += [encoded(rgb, "WEBP", **animated), encoded(rgb, "WEBP", lossless=True), encoded(rgb.convert("RGBA"), "WEBP")]
    return found


WHOLE = whole()


def with_right_checksums(png: bytes) -> bytes:
    """The chunks of a damaged PNG with the checksums of what they hold, so that more of a reader sees the damage."""
    at, out = 8, [png[:8]]
    while at + 12 <= len(png):
        size = struct.unpack_from(">I", png, at)[0]
        if at + 12 + size > len(png):
            break
        body = png[at + 4 : at + 8 + size]
        out.append(struct.pack(">I", size) + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join([*out, png[at:]])


def case(
    which: int, damage: Callable[[bytes], bytes], mend: bool, channels: int, least_size: tuple[int, int] | None, front: bool
) -> None:
    image = WHOLE[which]
    head = len(image) if not front else min(len(image), 64)
    data = damage(image[:head]) + image[head:]
    if mend and data[:4] == b"\x89PNG":
        data = with_right_checksums(data)
    with refused_or_done():
        try:
            pixels = decode(data, channels=channels, least_size=least_size)
        except UndecodableImage as error:
            pixels, reason = None, str(error)
            assert reason.strip()
            assert len(reason) < 1000
            assert "\n" not in reason
        else:
            assert (pixels.dtype, pixels.ndim, len(pixels)) == (np.uint8, 3, channels)
            assert pixels.size
        (other, good) = decode_many([data, WHOLE[0]], channels=3, least_size=least_size)
        assert isinstance(good, np.ndarray)
        assert np.array_equal(good.transpose(1, 2, 0), PIXELS)
        if channels == 3:
            assert np.array_equal(other, pixels) if pixels is not None else isinstance(other, UndecodableImage)


@pytest.mark.parametrize("cases", [100, pytest.param(4500, marks=pytest.mark.long)])
def test_damaged_images_are_decoded_or_refused(cases, monkeypatch):
    module = __import__("sys").modules[decoding_function.__module__]
    monkeypatch.setattr(module, "MAX_PIXELS", 2**20)  # so that a header that lies costs no second each time
    fuzz(
        case,
        cases,
        which=st.integers(0, len(WHOLE) - 1),
        damage=damages(),
        mend=st.booleans(),
        channels=st.sampled_from([1, 3]),
        least_size=st.sampled_from([None, (1, 1), (100, 3)]),
        front=st.booleans(),
    )


def test_the_whole_images_are_decoded():
    kinds = {Image.open(io.BytesIO(data)).format for data in WHOLE}
    assert kinds == set(FORMATS)
    assert all(decode(data, channels=3).size for data in WHOLE)


def test_a_jpeg_of_very_many_scans_is_refused_at_once():
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    first = jpeg.rindex(b"\xff\xda")
    with pytest.raises(UndecodableImage, match=r"a JPEG of 2\d\d scans, more than 100"):
        decode(jpeg[:-2] + jpeg[first:-2] * 200 + jpeg[-2:], channels=3)
