"""Encoded bytes to pixels, once an image. One rule for each kind of file.

JPEG, PNG, WebP, GIF and BMP are read, whatever the file is called; other formats of Pillow are not, since some start
programs (EPS) or have no one meaning as 8-bit pixels.  EXIF orientation is applied where it can be read.  16-bit grey
becomes 8-bit by division by 257, rounded; of 16-bit colour Pillow keeps the high byte.  CMYK and palettes become RGB as
Pillow converts them.  Transparency is laid over white.  Of an animation the first frame counts.  Grey is repeated for three
channels; colour becomes luma (Rec. 601) for one.  Colour profiles are not applied.

A file whose pixels are not all there is refused, even where another library told Pillow to fill what is missing with grey.

Common JPEG and PNG files take a short way (libjpeg-turbo through simplejpeg; png.py) to the same pixels: 10 and 20 us for an
image of 32 px, where Pillow takes 55 and 45; PNGs that are not compressed, many at once, a shorter one (stored.py): 1 us.
Whatever these ways do not know or find fault with goes to Pillow, which decides.
"""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from ssl_ray.errors import ResourceError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**27
"""A larger image is refused before memory is taken for it: its header may be a lie. One as large takes up to 1.3 GB."""
MAX_SCANS = 100
"""A JPEG with more is refused, each being a pass over all pixels: a few kB would keep a core busy for hours. Usual are ten."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright that was stored in this EXIF orientation."""
_SCAN = b"\xff\xda"
"""The marker of a scan of a JPEG; other such bytes of its data have a zero between them."""


class UndecodableImage(ValueError):
    """Bytes that are no image that can be read; the message says why."""


def decode(data: bytes | memoryview, *, channels: int, least_size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image, C = `channels`, 1 or 3. Raises UndecodableImage, or ResourceError if the memory
    does not suffice. Safe in threads.

    least_size: a JPEG comes at 1/2, 1/4 or 1/8 of its sides, the smallest that leaves H W and the shorter side as large as
    these two, but CMYK, and colour for one channel, as it is; None: all as they are.
    The colours of a pixel lie together in memory, as decoders have them: that is what the views' kernel likes best, and
    planes would cost a copy, an eighth of the time of a JPEG of 500x375.
    """
    pixels = _decode_fast(data, channels=channels, least_size=least_size)
    if pixels is None:
        pixels = _decode_any(data, channels=channels)
    # [H, W] or [H, W, 3] -> [C, H, W]
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode_many(
    images: Sequence[bytes | memoryview | None], *, channels: int, least_size: tuple[int, int] | None = None
) -> list[np.ndarray | UndecodableImage | None]:
    """What `decode` gives for each of them, or the error it raises; None where there are no bytes.

    They may share memory: one that is kept keeps the others too.
    """
    from ssl_ray.views.stored import decode_stored  # here, since numba takes .3 s to import

    pngs = [data if data is not None and data[:1] == b"\x89" else b"" for data in images]  # the others need not be copied
    found: list[np.ndarray | UndecodableImage | None] = []
    for data, pixels in zip(images, decode_stored(pngs, channels=channels, max_pixels=MAX_PIXELS), strict=True):
        if pixels is not None or data is None:
            found.append(pixels)
            continue
        try:
            found.append(decode(data, channels=channels, least_size=least_size))
        except UndecodableImage as error:
            found.append(error)
    return found


PART_BYTES = 2**25
"""So many bytes of pixels are decoded together, one image at least."""
PIXEL_BYTES = 3
COMPRESSION = 64
"""A file that is no PNG, which says how large it is in its first bytes, rarely has more bytes of pixels for each of its own."""


def in_parts(images: Sequence[bytes | memoryview | None], positions: range) -> list[range]:
    """`positions` cut into runs of encoded images that are to be decoded together, of PART_BYTES at most."""
    parts, start, size = [], positions.start, 0
    for position in positions:
        more = _pixel_bytes(images[position] or b"")
        if position > start and size + more > PART_BYTES:
            parts.append(range(start, position))
            start, size = position, 0
        size += more
    return [*parts, range(start, positions.stop)] if len(positions) else []


def _pixel_bytes(data: bytes | memoryview) -> int:
    if data[:4] == b"\x89PNG":
        return PIXEL_BYTES * int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
    return COMPRESSION * len(data)


def _decode_fast(data: bytes | memoryview, *, channels: int, least_size: tuple[int, int] | None) -> np.ndarray | None:
    """The pixels of common files in a fraction of Pillow's time, the same as Pillow's, or None: then Pillow decides."""
    if data[:2] == b"\xff\xd8":
        data = bytes(data)
        if data.count(_SCAN) > MAX_SCANS:
            raise UndecodableImage(f"a JPEG of {data.count(_SCAN)} scans, more than {MAX_SCANS}")
        return _decode_jpeg(data, channels=channels, least_size=least_size)
    if data[:4] == b"\x89PNG":
        from ssl_ray.views.png import decode_png  # here, since numba takes .3 s to import

        pixels = decode_png(data, max_pixels=MAX_PIXELS)
        if pixels is not None and pixels.shape[2] <= channels:
            return np.repeat(pixels, 3, axis=2) if pixels.shape[2] < channels else pixels
    return None


def _decode_jpeg(data: bytes, *, channels: int, least_size: tuple[int, int] | None) -> np.ndarray | None:
    orientation = None
    try:
        if b"\xff\xe1" in data:  # an APP1 segment: EXIF or XMP
            with _strict_pillow(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                orientation = _orientation(image)
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or (space != "Gray" and (space != "YCbCr" or channels == 1)):
            return None
        factor = 1
        pixels, side = least_size or (math.inf, math.inf)
        while factor < 8 and height * width >= pixels * 4 * factor**2 and min(height, width) >= side * 2 * factor:
            factor *= 2
        sides = {} if factor == 1 else {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **sides)
    except Exception:  # a fault that Pillow shall name, or overlook
        return None
    pixels = pixels[..., 0] if channels == 1 else pixels
    return pixels if orientation is None else np.asarray(Image.fromarray(pixels).transpose(orientation))


def _decode_any(data: bytes | memoryview, *, channels: int) -> np.ndarray:
    try:
        with _strict_pillow(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _pixels(image, channels=channels)
    except MemoryError as error:  # the image may be good
        raise ResourceError(
            f"no memory to decode an image of {len(data)} bytes. Fewer processes at a time, or more memory."
        ) from error
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise UndecodableImage(f"cannot be decoded: no {', '.join(FORMATS)} in its {len(data)} bytes") from error
    except Exception as error:
        raise _undecodable(error) from error


def from_pillow(image: Image.Image, *, channels: int) -> np.ndarray:
    """uint8 [C, H, W] of an image of Pillow, C = `channels`, 1 or 3, by the rules for files. Raises UndecodableImage."""
    try:
        with _strict_pillow():
            pixels = _pixels(image, channels=channels)
    except Exception as error:
        raise _undecodable(error) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _pixels(image: Image.Image, *, channels: int) -> np.ndarray:
    image.load()
    orientation = _orientation(image)
    upright = image if orientation is None else image.transpose(orientation)
    return np.asarray(_eight_bit(upright, "L" if channels == 1 else "RGB"))


def _undecodable(error: Exception) -> UndecodableImage:
    """Of an error of Pillow's, which raises OSError, SyntaxError, ValueError, struct.error, ... for broken files."""
    return UndecodableImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}")


_lock = threading.Lock()
_inside = 0
_outside = contextlib.ExitStack()


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow neither warns nor accepts truncated files, and has our limit of pixels.

    These are settings of the process: the first thread to come in changes them and the last to leave puts them back. Each
    thread for itself would put back what another had set, and leave it so for ever.
    """
    global _inside
    with _lock:
        if not _inside:
            _outside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _outside.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            _outside.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # it warns from there on, and refuses from twice that
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _outside.close()


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, None if it is."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF is no reason to lose good pixels; Pillow raises many kinds here too
        return None


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if image.mode == mode else image.convert(mode)
