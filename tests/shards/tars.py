"""Small shards made by Python's tarfile, and read by it and by webdataset: the independent truth of these tests."""

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, kind: str = "PNG", px: int = 8) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (px, px, 3), np.uint8)).save(sink, kind)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode or ("w:gz" if path.name.endswith("gz") else "w"), **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, *, label=None, seed: int = 0, extension: str = "cls") -> list[tuple[str, bytes]]:
    """Members of `count` samples with keys 000000, ...; label: number -> content of the label's file."""
    members = []
    for i in range(count):
        members.append((f"{i:06d}.png", picture(seed + i)))
        if label is not None:
            members.append((f"{i:06d}.{extension}", str(label(i)).encode()))
    return members


def read_tar(path: Path) -> dict[str, bytes]:
    """Content by name, as tarfile reads it."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def read_webdataset(folder: Path) -> list[dict]:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings(action="ignore"):  # it leaves files open
        return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
