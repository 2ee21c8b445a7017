"""Encoded bytes to pixels, once an image. One rule for each kind of file.

JPEG, PNG, WebP, GIF and BMP are read, whatever the file is called; other formats of Pillow are not, since some start
programs (EPS) or have no one meaning as 8-bit pixels.  EXIF orientation is applied where it can be read.  16-bit grey
becomes 8-bit by division by 257, rounded; of 16-bit colour Pillow keeps the high byte.  CMYK and palettes become RGB as
Pillow converts them.  Transparency is laid over white.  Of an animation the first frame counts.  Grey is repeated for three
channels; colour becomes luma (Rec. 601) for one.  Colour profiles are not applied.

A file that ends too early is refused, even where another library told Pillow to fill what is missing with grey.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**27
"""A larger image is refused: its header may be a lie that would fill the memory. Below Pillow's own limit (about 1.8e8)."""
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


class UndecodableImage(ValueError):
    """Bytes that are no image that can be read; the message says why."""


def decode(data: bytes | memoryview, *, channels: int) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image, C = `channels`, 1 or 3. Raises UndecodableImage. Safe in threads.

    The colours of a pixel lie together in memory, as Pillow has them: that is what the views' kernel likes best, and planes
    would cost a copy, an eighth of the time of a JPEG of 500x375.
    """
    try:
        with _strict_pillow(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableImage(f"{image.width}x{image.height} px are more than {MAX_PIXELS} pixels")
            image.load()
            pixels = np.asarray(_eight_bit(_upright(image), "L" if channels == 1 else "RGB"))
    except UndecodableImage:
        raise
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise UndecodableImage(f"cannot be decoded: no {', '.join(FORMATS)} in its {len(data)} bytes") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImage(f"cannot be decoded: {reason}") from error
    # [H, W] or [H, W, 3] -> [C, H, W]
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


_lock = threading.Lock()
_inside = 0
_outside = contextlib.ExitStack()


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow neither warns nor accepts truncated files.

    Both are settings of the process: the first thread to come in changes them and the last to leave puts them back. Each
    thread for itself would put back what another had set, and leave it so for ever.
    """
    global _inside
    with _lock:
        if not _inside:
            _outside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _outside.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _outside.close()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF is no reason to lose good pixels; Pillow raises many kinds here too
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
