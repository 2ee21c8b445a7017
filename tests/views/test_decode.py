"""One rule for each kind of file; broken bytes are refused with a reason, and never with a warning."""

import io
import struct
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from ssl_ray.views import UndecodableImage, decode
from ssl_ray.views.decode import MAX_PIXELS

NOISE = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
ROWS, COLUMNS = np.mgrid[:40, :56]
SMOOTH = np.stack([ROWS * 6, COLUMNS * 4, 255 - ROWS * 3 - COLUMNS * 2], axis=-1).astype(np.uint8)


def encoded(pixels, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(sink, kind, **options)
    return sink.getvalue()


def luma(rgb: np.ndarray) -> np.ndarray:
    """Rec. 601, float64 [H, W] of [H, W, 3]."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG put together by hand, filter bytes included in `rows`: what Pillow does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- kinds of files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "WEBP", "lossless": True}, {"kind": "BMP"}])
def test_lossless_colour_is_kept_exactly(options):
    pixels = decode(encoded(NOISE, **options), channels=3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, NOISE.transpose(2, 0, 1))
    assert pixels.transpose(1, 2, 0).flags.c_contiguous  # as the kernel likes them


def test_a_memoryview_is_as_good_as_bytes():
    data = encoded(NOISE)
    padded = memoryview(b"xx" + data + b"yyy")[2 : 2 + len(data)]
    assert np.array_equal(decode(padded, channels=3), decode(data, channels=3))


def test_grey_is_repeated_for_three_channels_and_colour_becomes_luma_for_one():
    grey = encoded(NOISE[..., 0])
    assert np.array_equal(decode(grey, channels=1), NOISE[None, ..., 0])
    assert np.array_equal(decode(grey, channels=3), np.repeat(NOISE[None, ..., 0], 3, axis=0))
    one = decode(encoded(NOISE), channels=1)
    assert one.shape == (1, 13, 17)
    assert np.abs(one[0] - luma(NOISE)).max() <= 0.51


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_lossy_files_come_near_what_was_stored(kind, progressive):
    options = {"progressive": progressive} if kind == "JPEG" else {"method": 4}
    pixels = decode(encoded(SMOOTH, kind, quality=95, **options), channels=3)
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - SMOOTH).max() <= 12


def test_grey_jpeg():
    grey = SMOOTH[..., 0]
    pixels = decode(encoded(grey, "JPEG", quality=98), channels=1)
    assert np.abs(pixels[0].astype(int) - grey).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    # The EXIF 2.3 table: where row 0 and column 0 of the stored image are in the upright one.
    store = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: x.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(np.ascontiguousarray(store(SMOOTH)), kind, exif=exif, **quality)
    pixels = decode(data, channels=3).transpose(1, 2, 0)
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).max() <= 5


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"x"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_leaves_the_pixels(kind, exif):
    assert decode(encoded(SMOOTH, kind, exif=exif), channels=3).shape == (3, 40, 56)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_leaves_the_pixels(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(SMOOTH, exif=exif), channels=3), SMOOTH.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_divided_by_257_and_rounded(channels):
    values = np.concatenate([np.arange(0, 65536, 37), [0, 128, 129, 257, 65535, 65406, 65407]]).astype(np.uint16)[None]
    pixels = decode(encoded(values), channels=channels)
    assert pixels.dtype == np.uint8
    assert (pixels == np.rint(values / 257)).all()


def test_16_bit_colour_keeps_the_high_byte():
    values = np.random.default_rng(1).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.array_equal(decode(png(6, 5, 16, 2, rows), channels=3).transpose(1, 2, 0), values >> 8)


def test_cmyk_jpeg_becomes_rgb():
    ink = np.zeros((16, 48, 4), np.uint8)
    ink[:, :16, 0], ink[:, 16:32, 1], ink[:, 32:, 3] = 255, 255, 255  # cyan, magenta, black
    data = encoded(Image.frombytes("CMYK", (48, 16), ink.tobytes()), "JPEG", quality=100)
    patches = decode(data, channels=3)[:, 8, [8, 24, 40]].T
    assert np.abs(patches.astype(int) - [[0, 255, 255], [255, 0, 255], [0, 0, 0]]).max() <= 4
    grey = decode(data, channels=1)[0, 8, [8, 24, 40]]
    assert np.abs(grey - luma(patches.astype(float))).max() <= 1


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """A palette image of five colours, and the colours [5, 3]."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30], [200, 100, 50]], np.uint8)
    image = Image.frombytes("P", (5, 2), bytes([0, 1, 2, 3, 4] * 2))
    image.putpalette(colours.tobytes())
    return image, colours


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_become_their_colours(kind):
    image, colours = palette_image()
    data = encoded(image, kind)
    assert np.array_equal(decode(data, channels=3)[:, 1].T, colours)
    assert np.abs(decode(data, channels=1)[0, 1] - luma(colours)).max() <= 0.51


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_palettes_lie_over_white(channels):
    image, colours = palette_image()
    alpha = np.array([0, 255, 51, 255, 128])
    expected = np.rint((colours * alpha[:, None] + 255 * (255 - alpha[:, None])) / 255)
    for transparency, opaque in ((bytes(alpha.tolist()), expected), (3, np.where(np.arange(5)[:, None] == 3, 255, colours))):
        pixels = decode(encoded(image, transparency=transparency), channels=channels)[:, 0].T
        assert np.abs(pixels - (opaque if channels == 3 else luma(opaque)[:, None])).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_lies_over_white(kind, mode, channels):
    bands = len(mode)
    pixels = np.random.default_rng(2).integers(0, 256, (6, 7, bands), dtype=np.uint8)
    pixels[:, :3, -1] = [0, 255, 128]
    data = encoded(
        Image.frombytes(mode, (7, 6), pixels.tobytes()), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    alpha = pixels[..., -1:] / 255
    expected = np.broadcast_to(pixels[..., :-1] * alpha + 255 * (1 - alpha), (6, 7, 3))
    if channels == 1:
        expected = luma(expected)[..., None]
    assert np.abs(decode(data, channels=channels).transpose(1, 2, 0) - expected).max() <= 1.1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_lies_over_white(mode):
    pixels = NOISE if mode == "RGB" else NOISE[..., 0]
    key = tuple(NOISE[3, 4].tolist()) if mode == "RGB" else int(NOISE[3, 4, 0])
    shown = decode(encoded(pixels, transparency=key), channels=3).transpose(1, 2, 0)
    same = (key == NOISE).all(-1) if mode == "RGB" else NOISE[..., 0] == key
    assert np.array_equal(shown, np.where(same[..., None], 255, NOISE if mode == "RGB" else NOISE[..., :1].repeat(3, -1)))


def test_one_bit_is_black_and_white():
    bits = NOISE[..., 0] > 128
    data = encoded(Image.fromarray(bits))
    assert np.array_equal(decode(data, channels=1)[0], bits * 255)
    assert np.array_equal(decode(data, channels=3), np.repeat(bits[None] * 255, 3, axis=0))


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {})])
def test_of_an_animation_the_first_frame_counts(kind, options):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    pixels = decode(data, channels=3)
    assert pixels.shape == (3, 10, 20)
    assert (pixels.transpose(1, 2, 0) == [255, 0, 0]).all()


def test_a_phones_jpeg_of_several_pictures_is_the_first():
    frames = [Image.fromarray(SMOOTH), Image.new("RGB", (20, 10))]
    pixels = decode(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), channels=3)
    assert pixels.shape == (3, 40, 56)


# --- as Pillow reads them -----------------------------------------------------------------------------------------------


def by_pillow(data: bytes, mode: str) -> np.ndarray:
    """[C, H, W]; for files without orientation or transparency."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
kinds = st.sampled_from(
    [("PNG", {"compress_level": level}) for level in (0, 1, 9)]
    + [("JPEG", {"quality": quality, "subsampling": way}) for quality in (30, 75, 100) for way in (0, 1, 2)]
    + [("JPEG", {"progressive": True}), ("JPEG", {"icc_profile": bytes(range(256)) * 8})]
)


@settings(deadline=None, max_examples=200)
@given(shapes, kinds, st.sampled_from(["L", "RGB"]), st.sampled_from(["L", "RGB"]), st.integers(0, 99), st.booleans())
def test_every_pixel_is_pillows(shape, kind, stored, asked, seed, smooth):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    if smooth:
        pixels = (np.add.accumulate(pixels.astype(int), axis=1) // 7 % 256).astype(np.uint8)
    name, options = kind
    data = encoded(Image.fromarray(pixels).convert(stored), name, **options)
    assert np.array_equal(decode(data, channels=len(asked)), by_pillow(data, asked))


@pytest.mark.parametrize("filters", [[0] * 5, [1] * 5, [2] * 5, [3] * 5, [4] * 5, [4, 3, 2, 1, 0], [1, 0, 4, 2, 3]])
@pytest.mark.parametrize("colour", [0, 2])
def test_every_filter_of_a_png_is_pillows(filters, colour):
    rng = np.random.default_rng(1)
    rows = b"".join(bytes([kind]) + rng.bytes(7 * (1 if colour == 0 else 3)) for kind in filters)
    data = png(7, 5, 8, colour, rows)
    assert np.array_equal(decode(data, channels=3), by_pillow(data, "RGB"))


@pytest.mark.parametrize(
    ("least", "factor"),
    [
        (None, 1),
        ((640 * 480, 1), 1),
        ((320 * 240, 1), 2),
        ((160 * 120 + 1, 1), 2),
        ((160 * 120, 1), 4),
        ((1, 1), 8),
        ((1, 60), 8),
        ((1, 61), 4),
        ((1, 241), 1),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_may_come_smaller_as_long_as_it_keeps_the_pixels_asked_for(least, factor, orientation):
    rows, columns = np.mgrid[:480, :640]
    pixels = np.stack([rows // 2, columns // 3, (rows + columns) // 5], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels, "JPEG", quality=95, exif=exif)
    expected = np.asarray(Image.fromarray(pixels).reduce(factor)).transpose(2, 0, 1)
    if orientation == 6:  # stored turned by a quarter
        expected = expected.transpose(0, 2, 1)[:, :, ::-1]
    made = decode(data, channels=3, least_size=least)
    assert made.shape == expected.shape
    assert np.abs(made.astype(int) - expected).max() <= 6
    assert np.array_equal(decode(encoded(pixels), channels=3, least_size=least), pixels.transpose(2, 0, 1))


# --- refusals -----------------------------------------------------------------------------------------------------------


def bomb(kind: str, width: int, height: int) -> bytes:
    """A small file whose header promises width x height pixels."""
    if kind == "PNG":
        return png(width, height, 8, 2, bytes(100))
    if kind == "BMP":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, width, height, 1, 24, 0, 100, 1, 1, 0, 0) + bytes(100)
    if kind == "GIF":
        frame = b"," + struct.pack("<HHHHBB", 0, 0, width, height, 0, 8)
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame + bytes(100)
    jpeg = encoded(SMOOTH, "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
@pytest.mark.parametrize("side", [11600, 13000, 65500])
def test_headers_that_promise_too_many_pixels_are_refused_at_once(kind, side):
    assert side**2 > MAX_PIXELS
    with pytest.raises(UndecodableImage, match="pixels"):
        decode(bomb(kind, side, side), channels=3)


def test_the_limit_on_pixels_holds_where_pillows_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UndecodableImage, match=rf"4290250000 pixels\) exceeds limit of {MAX_PIXELS}"):
        decode(bomb("PNG", 65500, 65500), channels=3)


def test_a_text_chunk_that_swells_is_refused():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "b" * 2**21, zip=True)
    with pytest.raises(UndecodableImage, match=r"cannot be decoded: .+"):
        decode(encoded(NOISE, pnginfo=texts), channels=3)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"<svg/>", EPS]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_no_image_is_refused_with_a_reason(data, channels):
    with pytest.raises(UndecodableImage, match=r"^cannot be decoded: \w.+") as refusal:
        decode(data, channels=channels)
    assert " at 0x" not in str(refusal.value)  # a reason is kept with the results: it must be the same next time
    assert "\n" not in str(refusal.value)


def test_an_image_whose_checksum_is_wrong_is_refused():
    data = bytearray(encoded(NOISE))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(UndecodableImage):
        decode(bytes(data), channels=3)


WHOLE = {
    "jpeg": encoded(SMOOTH, "JPEG"),
    "progressive": encoded(SMOOTH, "JPEG", progressive=True, quality=90),
    "restart": encoded(NOISE, "JPEG", restart_marker_rows=1),
    "png": encoded(NOISE),
    "palette": encoded(palette_image()[0], transparency=3),
    "webp": encoded(SMOOTH, "WEBP"),
    "lossless": encoded(NOISE, "WEBP", lossless=True),
    "gif": encoded(Image.fromarray(NOISE), "GIF"),
    "bmp": encoded(NOISE, "BMP"),
}


def decoded_or_refused(data: bytes, channels: int = 3) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(data, channels=channels)
        except UndecodableImage:
            return None
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[0] == channels
    assert min(pixels.shape) >= 1
    return pixels


@pytest.mark.parametrize("fill", [False, True], ids=["pillow's default", "another library asks to fill"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_file_is_refused_or_has_every_pixel(name, fill, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", fill)
    data, whole = WHOLE[name], decode(WHOLE[name], channels=3)
    refused, lengths = 0, range(0, len(data), max(1, len(data) // 120))
    for length in lengths:
        pixels = decoded_or_refused(data[:length])
        refused += pixels is None
        assert pixels is None or np.array_equal(pixels, whole)
    assert refused > 0.8 * len(lengths)
    assert fill == ImageFile.LOAD_TRUNCATED_IMAGES


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_changed_bytes_give_an_array_or_a_refusal(name, changes):
    data = bytearray(WHOLE[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    decoded_or_refused(bytes(data))


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([data[:n] for data in WHOLE.values() for n in (0, 4, 12, 30, 60)]),
    st.binary(max_size=300),
    st.sampled_from([1, 3]),
)
@example(b"", b"", 1)
def test_random_bytes_after_any_head_give_an_array_or_a_refusal(head, tail, channels):
    decoded_or_refused(head + tail, channels)


# --- threads ------------------------------------------------------------------------------------------------------------


def test_threads_leave_the_settings_of_the_process_as_they_were():
    """Each thread saving and restoring by itself would, now and then, leave warnings ignored for good."""
    noisy = encoded(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    before, interval = list(warnings.filters), sys.getswitchinterval()
    start = threading.Barrier(4)

    def work(_) -> int:
        start.wait()
        return sum(decode(data, channels=3).size for data in [noisy, WHOLE["png"]] * 100)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(work, range(4)))) == 1
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(UserWarning, match="still heard"):
        warnings.warn("still heard", stacklevel=1)
