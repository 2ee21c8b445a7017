"""Images for the benchmarks: the photographs that come with scikit-learn and scikit-image, at the size that is asked for."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_ray import shards
from ssl_ray.shards.sources import of_arrays

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
"""Of scikit-image."""
EXTENSIONS = {"jpeg": "jpg", "png": "png", "arrays": "png"}
"""Of the images that write_shards writes, by kind."""


def photographs() -> list[Image.Image]:
    """Six of 300 to 512 pixels in height; the two of scikit-learn alone where scikit-image is not installed."""
    found = list(load_sample_images().images)
    try:
        from skimage import data
    except ImportError:
        pass
    else:
        found += [getattr(data, name)() for name in NAMES]
    return [Image.fromarray(pixels) for pixels in found]


def pieces(count: int, width: int, height: int, *, smallest: float) -> Iterator[Image.Image]:
    """Of each photograph by turns: a piece of it with the ratio width : height, at least `smallest` of the largest possible."""
    rng, all_of_them = np.random.default_rng(0), photographs()
    for i in range(count):
        photograph = all_of_them[i % len(all_of_them)]
        unit = min(photograph.width / width, photograph.height / height) * rng.uniform(smallest, 1)
        left, top = rng.uniform(0, photograph.width - width * unit), rng.uniform(0, photograph.height - height * unit)
        box = (left, top, left + width * unit, top + height * unit)
        yield photograph.resize((width, height), Image.Resampling.LANCZOS, box=box)


def large(count: int) -> list[bytes]:
    """JPEG of 500x375 pixels, quality 90: the usual size of an image of ImageNet."""
    return [_encoded(piece, "JPEG", quality=90) for piece in pieces(count, 500, 375, smallest=0.9)]


def small(count: int) -> list[bytes]:
    """PNG of 32x32 pixels, compressed as Pillow does it."""
    return [_encoded(piece, "PNG") for piece in pieces(count, 32, 32, smallest=0.2)]


def write_shards(folder: Path, *, count: int, kind: str, size: int = 32, shard_bytes: int = 2**26) -> shards.Manifest:
    """Packs pieces of `size` pixels of ten classes below `folder`: files, `jpeg` of quality 90 or `png`, or `arrays`."""
    made = pieces(count, size, size, smallest=0.2)
    if kind == "arrays":
        source = of_arrays("pieces", np.stack([np.asarray(piece) for piece in made]), np.arange(count) % 10, None)
    else:
        images, options = folder / "images", {"quality": 90} if kind == "jpeg" else {}
        for i, piece in enumerate(made):
            at = images / str(i % 10) / f"{i:06d}.{EXTENSIONS[kind]}"
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(_encoded(piece, kind, **options))
        source = shards.open_source(str(images))
    return shards.pack(source, str(folder / "shards"), shard_bytes=shard_bytes)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()
