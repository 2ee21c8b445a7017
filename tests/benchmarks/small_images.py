"""Shards of real 32 px images, made from the photographs that come with scikit-learn."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_ray import shards


def pixels(count: int, *, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]: crops of 48 to 128 px, resized."""
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    rng = np.random.default_rng(seed)
    made = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        photograph, side = photographs[i % len(photographs)], int(rng.integers(48, 129))
        x, y = rng.integers(photograph.width - side), rng.integers(photograph.height - side)
        made[i] = np.asarray(photograph.resize((size, size), box=(x, y, x + side, y + side)))
    return made


def encoded(image: np.ndarray, kind: str) -> bytes:
    """The file of an image, `jpeg` (quality 90) or `png`."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return sink.getvalue()


def write_shards(folder: Path, *, count: int, kind: str, size: int = 32) -> shards.Manifest:
    """Packs `count` images of ten classes below `folder`."""
    images = folder / "images"
    for i, image in enumerate(pixels(count, size=size)):
        at = images / str(i % 10) / f"{i:06d}.{kind}"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(encoded(image, kind))
    return shards.pack(shards.open_source(str(images), split="train", root=None, download=False), str(folder / "shards"))
