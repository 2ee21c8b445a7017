"""Encoded bytes to pixels, once an image. One rule for each kind of file.

EXIF orientation is applied.  16-bit grey becomes 8-bit by division by 257, rounded.  CMYK and palettes become RGB as Pillow
converts them.  Transparency is laid over white.  Of an animation the first frame counts.  Grey is repeated for three
channels; colour becomes luma (Rec. 601) for one.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**28
"""A larger image is refused: its header may be a lie that would fill the memory."""


class UndecodableImage(ValueError):
    """Bytes that are no image that can be read; the message says why."""


def decode(data: bytes | memoryview, *, channels: int) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image, C = `channels`, 1 or 3. Raises UndecodableImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UndecodableImage(f"{image.width}x{image.height} px are more than {MAX_PIXELS} pixels")
                pixels = np.asarray(_eight_bit(_upright(image), "L" if channels == 1 else "RGB"))
    except UndecodableImage:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise UndecodableImage(f"cannot be decoded: {' '.join(str(error).split())}") from error
    # [H, W] or [H, W, 3] -> [C, H, W]
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image)


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UndecodableImage(f"pixels of kind {image.mode} outside 0 to 65535")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if image.mode == mode else image.convert(mode)
