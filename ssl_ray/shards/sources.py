"""Where images come from before they are shards. Each source gives (key, encoded image, extension) by number."""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import math
import os
import shutil
import struct
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from ssl_ray import storage
from ssl_ray.each import Each, in_threads
from ssl_ray.errors import DataError, UsageError
from ssl_ray.shards.index import IMAGES, SUFFIXES, index, is_text
from ssl_ray.shards.manifest import INDEX_SCHEMA, Manifest, is_gzip, iter_index
from ssl_ray.shards.read import located_in, read_located

Image = tuple[str, bytes, str]
"""Key, encoded bytes, extension without the dot."""

T = TypeVar("T")
TORCHVISION = ("cifar10", "cifar100", "stl10")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of images before they are read; all of it, `read` too, may go to other processes."""

    name: str
    sizes: np.ndarray
    """int64 [n], bytes of each encoded image."""
    labels: np.ndarray
    """int64 [n], class numbers, -1 where there is none."""
    class_names: list[str] | None
    read: Callable[[np.ndarray], list[Image]]
    """The images of the given numbers, 0 to n - 1."""
    place: str | None = None
    """The folder or URI that is read when `read` is called, which must not be written to."""
    left_out: str | None = None
    """How many files in it are of other kinds, and which kinds."""
    on_this_machine: bool = False
    """Whether other machines could not read it, wherever it lies."""


def open_source(
    name: str, *, split: str = "train", root: str | None = None, download: bool = False, each: Each = in_threads
) -> Source:
    """`digits`, `fashion-mnist`, `cifar10`, `cifar100`, `stl10`, or a folder of images or of WebDataset shards.

    root: the folder of the files of fashion-mnist, cifar and stl10.  download: let torchvision fetch what is not there.
    each: how shards, which are all read once, are gone through, as for `index`.
    Raises UsageError for a name or split that does not exist, DataError for files that are not there.
    """
    if name == "digits":
        _check_split(name, split, ("train",))
        return _digits()
    if name == "fashion-mnist":
        _check_split(name, split, ("train", "test"))
        return _fashion_mnist(_root(name, root), split)
    if name in TORCHVISION:
        _check_split(name, split, ("train", "test", "unlabeled") if name == "stl10" else ("train", "test"))
        return _torchvision(name, _root(name, root), split, download)
    if "://" in name:
        return _shards(name, each)
    folder = Path(name)
    if not folder.is_dir():
        known = ", ".join(("digits", "fashion-mnist", *TORCHVISION))
        raise UsageError(f"{name}: no such source. Give one of {known}, or a folder of images or shards.")
    if any(entry.endswith(SUFFIXES) for entry in storage.list_names(name)):
        return _shards(name, each)
    return _image_folder(folder)


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise UsageError(f"--split: {name} has {', '.join(splits)}, got {split}.")


def _root(name: str, root: str | None) -> Path:
    if root is None:
        raise UsageError(f"{name}: say where its files are, with --root FOLDER.")
    return Path(root)


def stored_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W] or [H, W, 3] whose pixels are stored, not compressed or filtered: read several times as fast.

    Pillow filters rows even at compress_level=0.
    """
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # [H, 1 + W * C], the first byte for "no filter"
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes(), 0), b"IEND")
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def of_arrays(name: str, pixels: np.ndarray, labels: np.ndarray | None, class_names: list[str] | None) -> Source:
    """pixels uint8 [n, H, W] or [n, H, W, 3]; label -1 is none."""
    size = len(stored_png(pixels[0])) if len(pixels) else 0  # whatever its pixels are
    own = np.full(len(pixels), -1) if labels is None else labels.astype(np.int64)
    return Source(name, np.full(len(pixels), size), own, class_names, functools.partial(_read_pixels, name, pixels))


def _read_pixels(name: str, pixels: np.ndarray, numbers: np.ndarray) -> list[Image]:
    return [(f"{name}-{i:08d}", stored_png(pixels[i]), "png") for i in numbers.tolist()]


def _digits() -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    return of_arrays("digits", pixels, data.target, [str(digit) for digit in range(10)])


FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def _fashion_mnist(root: Path, split: str) -> Source:
    prefix = {"train": "train", "test": "t10k"}[split]
    pixels = _idx(root, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _idx(root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(pixels) != len(labels):
        raise DataError(f"{root}: {len(pixels)} {split} images but {len(labels)} labels. Fetch the files again.")
    if len(labels) and labels.max() >= len(FASHION_CLASSES):
        raise DataError(f"{root}: label out of range: got {labels.max()}, expected 0 to 9. Fetch the files again.")
    return of_arrays(f"fashion-mnist-{split}", pixels, labels.astype(np.int64), FASHION_CLASSES)


_MAX_IDX = 2**28
"""Bytes of such a file, decompressed; the largest has 47 MB."""


def _idx(root: Path, name: str, *, dimensions: int) -> np.ndarray:
    """uint8 array of an IDX file, gzip'd or not (the format is described at yann.lecun.com/exdb/mnist)."""
    path = next((at for at in (root / f"{name}.gz", root / name) if at.is_file()), None)
    if path is None:
        raise DataError(f"{root}: no {name}.gz here. Debian has it: apt install dataset-fashion-mnist.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_IDX + 1)
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fetch the file again.") from error
    header = 4 * (1 + dimensions)
    if magic != 0x800 + dimensions or len(data) != header + math.prod(shape):
        raise DataError(f"{path}: not an IDX file of {dimensions} dimensions, or truncated. Fetch the file again.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _torchvision(name: str, root: Path, split: str, download: bool) -> Source:
    from torchvision import datasets

    try:
        if name == "stl10":
            data = datasets.STL10(str(root), split=split, download=download)
            pixels = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))  # [n, 3, H, W] -> [n, H, W, 3]
            return of_arrays(f"stl10-{split}", pixels, np.asarray(data.labels), list(data.classes))
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        data = kind(str(root), train=split == "train", download=download)
        return of_arrays(f"{name}-{split}", data.data, np.asarray(data.targets), list(data.classes))
    except (RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        raise DataError(f"{name}: {root}: {message} Give the folder with --root, or --download.") from error


def _image_folder(root: Path) -> Source:
    """Every image below `root`; its first-level sub-folder is its class, or none has a class where there are no folders."""
    found = sorted(_files(root))
    paths = [path for path in found if _kind(path) in IMAGES]
    others = Counter(_kind(path) for path in found if _kind(path) not in IMAGES)
    if not paths:
        raise DataError(f"{root}: no image below it (.jpg .jpeg .png .webp).")
    relative = [path.relative_to(root) for path in paths]
    inside = {path.parts[0] for path in relative if len(path.parts) > 1}
    labelled = all(len(path.parts) > 1 for path in relative)
    if inside and not labelled:
        loose = next(path for path in relative if len(path.parts) == 1)
        raise DataError(f"{root}: {loose} lies beside class folders. Put every image in a sub-folder, or none.")
    class_names = sorted(inside)
    number = {name: i for i, name in enumerate(class_names)}

    # A dot ends the key in WebDataset; the extension stays in the key, so that a.png and a.jpg are two samples.
    keys = _distinct("/".join((*path.parent.parts, path.name.replace(".", "_"))) for path in relative)
    labels = np.array([number[path.parts[0]] if labelled else -1 for path in relative], np.int64)
    sizes = np.array([_of_file(path, os.path.getsize) for path in paths], np.int64)
    read = functools.partial(_read_files, paths, keys)
    kinds = ", ".join(f".{kind}" if kind else "no extension" for kind, _ in others.most_common(5))
    left_out = f"{others.total()} files that are not .jpg .jpeg .png .webp ({kinds})" if others else None
    return Source(str(root), sizes, labels, class_names if labelled else None, read, place=str(root), left_out=left_out)


def _read_files(paths: list[Path], keys: list[str], numbers: np.ndarray) -> list[Image]:
    return [(keys[i], _of_file(paths[i], Path.read_bytes), _kind(paths[i])) for i in numbers.tolist()]


def _of_file(path: Path, ask: Callable[[Path], T]) -> T:
    try:
        return ask(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Mend or remove it, and pack again.") from error


def _kind(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _files(root: Path) -> Iterator[Path]:
    """The files below `root`, through linked folders too, but for hidden ones."""
    seen: set[str] = set()
    with storage.storage_errors(str(root), "listing"):
        for at, folders, names in os.walk(root, followlinks=True, onerror=_raise):
            seen.add(os.path.realpath(at))  # a link to a folder above would lead round for ever
            folders[:] = [name for name in folders if name[0] != "." and os.path.realpath(f"{at}/{name}") not in seen]
            for name in names:
                if name[0] == ".":
                    continue
                if not is_text(f"{at}/{name}"):
                    raise DataError(f"{at!r}: the name of {name!r} is not UTF-8. Rename it.")
                yield Path(at) / name


def _raise(error: OSError) -> None:
    raise error


def _distinct(keys: Iterable[str]) -> list[str]:
    """The keys, with -2, -3, ... behind those that were there before: of a.b.png and a_b.png."""
    found: dict[str, None] = {}
    for key in keys:
        names = itertools.chain([key], (f"{key}-{n}" for n in itertools.count(2)))
        found[next(name for name in names if name not in found)] = None
    return list(found)


def _shards(uri: str, each: Each) -> Source:
    """The samples of WebDataset shards that are there. Their keys get the shard's name before them, to be unique."""
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(storage.scratch_folder("index"))
        manifest = index(uri, output=folder, each=each)
        rows = pa.concat_tables(iter_index(manifest, INDEX_SCHEMA.names)).combine_chunks()
        stems = [name.replace(".", "_") for name in manifest.names.to_pylist()]
        unpack = any(is_gzip(name) for name in manifest.names.to_pylist())
        if unpack:
            manifest = _unpacked(manifest, folder)
        read = functools.partial(_read_rows, manifest, rows, stems)
        weakref.finalize(read, undo.pop_all().close)
    return Source(
        uri,
        rows["size"].to_numpy(),
        rows["label"].to_numpy().astype(np.int64),
        list(manifest.class_names or []) or None,
        read,
        place=uri,
        on_this_machine=unpack,
    )


def _read_rows(manifest: Manifest, rows: pa.Table, stems: list[str], numbers: np.ndarray) -> list[Image]:
    own = rows.take(pa.array(numbers))
    samples = read_located(manifest, located_in(own))
    found: list[Image] = []
    for shard, key, image in zip(own["shard"].to_pylist(), samples.keys, samples.images, strict=True):
        if image is None:
            raise DataError(f"{manifest.data_uri}: {key}: {samples.problems[len(found)]}. Copy the shard again.")
        found.append((f"{stems[shard]}/{key}", bytes(image), _extension(image)))
    return found


def _unpacked(manifest: Manifest, folder: str) -> Manifest:
    """The same shards as plain tars in `folder`: in a random order, samples cannot be had from gzip'd ones."""
    names = []
    for number, name in enumerate(manifest.names.to_pylist()):
        at = storage.join(manifest.data_uri, name)
        filesystem, path = storage.open_storage(at)
        names.append(f"{number}.tar")
        with (
            storage.storage_errors(f"{folder}/{number}.tar", f"unpacking {at}; TMPDIR chooses the place"),
            filesystem.open(path, "rb", block_size=2**22) as packed,
            gzip.GzipFile(fileobj=packed) if is_gzip(name) else packed as plain,
            open(f"{folder}/{number}.tar", "wb") as file,
        ):
            shutil.copyfileobj(plain, file, 2**20)
    sizes = np.array([os.path.getsize(f"{folder}/{name}") for name in names], np.int64)
    return dataclasses.replace(manifest, data_uri=folder, names=pa.array(names), sizes=sizes)


def _extension(image: memoryview) -> str:
    if image[:4] == b"\x89PNG":
        return "png"
    return "webp" if image[8:12] == b"WEBP" else "jpg"
