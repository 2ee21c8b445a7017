"""Helpers of the tests of the command line: small images, tars and runs."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_ray.cli import main

SMALL = (
    "views.count=2",
    "views.size_px=8",
    "views.channels=1",
    "model.projector_dim=16",
    "train.batch=16",
    "train.steps=4",
    "train.workers=0",
)
"""Keys of a run of a second, in this process."""


def png(seed: int, *, label: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 64, (8, 8), np.uint8)
    pixels[2 * label : 2 * label + 2] += 128
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_images(folder: Path, *, count: int = 96, classes: int = 3) -> Path:
    for i in range(count):
        path = folder / f"class-{i % classes}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, label=i % classes))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack(source: Path, uri: Path) -> Path:
    assert main(["data", "pack", str(source), str(uri), "--shard-mb", "0.0625", "--json"]) == 0
    return uri
