"""Samples by shard and row: ranged requests, merged over small gaps, each image verified by its checksum.

A transient failure is tried again and then ends the read; only bytes that are wrong twice, or a shard that is gone or too
short, make a sample a problem.
"""

import dataclasses
import gzip
import hashlib
import threading
import time
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.shards.manifest import Manifest, index_rows, is_gzip

MERGE_GAP_BYTES = 64 * 2**10
"""Two samples this near are read by one request, with what lies between."""
REQUEST_BYTES = 8 * 2**20
THREADS = 4
ATTEMPTS = 5
_GZIP_CACHE_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Samples:
    """Encoded images in the order asked for; a problem stands in for one that cannot be had."""

    images: list[memoryview | None]
    labels: np.ndarray
    """int64 [n], -1 without."""
    hashes: np.ndarray
    """uint64 [n]."""
    keys: list[str]
    problems: dict[int, str]
    """Position to reason."""
    requests: int
    bytes_read: int


@dataclasses.dataclass(frozen=True)
class _Range:
    shard: int
    start: int
    stop: int
    positions: np.ndarray


class _Wrong(Exception):
    """A permanent fault of a shard: gone, or shorter than its manifest entry."""


def _shard_uri(manifest: Manifest, shard: int) -> str:
    return storage.join(manifest.data_uri, manifest.names[shard].as_py())


def _fetch(uri: str, start: int, stop: int) -> bytes:
    """Bytes start to stop. Raises _Wrong if they are not there, DataError after several failures."""
    filesystem, path = storage.open_storage(uri)
    for attempt in range(ATTEMPTS):
        try:
            data = filesystem.cat_file(path, start=start, end=stop)
        except FileNotFoundError as error:
            raise _Wrong("the shard is missing") from error
        except PermissionError as error:
            raise DataError(f"{uri}: no permission to read it.") from error
        except Exception as error:
            if _past_end(error):
                raise _Wrong("the shard is shorter than its index says") from error
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.1 * 4**attempt)
                continue
            message = " ".join(str(error).split())
            raise DataError(f"{uri}: reading failed {ATTEMPTS} times: {type(error).__name__}: {message}") from error
        if len(data) < stop - start:
            raise _Wrong("the shard is shorter than its index says")
        return data
    raise AssertionError


def _past_end(error: Exception) -> bool:
    return "InvalidRange" in str(error) or "416" in str(error)


_gzips: OrderedDict[str, bytes] = OrderedDict()
_gzips_lock = threading.Lock()


def _fetch_gzip(uri: str, size: int) -> bytes:
    """The decompressed content of a shard; the last ones used are kept."""
    with _gzips_lock:
        if uri in _gzips:
            _gzips.move_to_end(uri)
            return _gzips[uri]
    packed = _fetch(uri, 0, size)
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise _Wrong(f"the shard does not decompress ({error})") from error
    with _gzips_lock:
        _gzips[uri] = data
        while sum(map(len, _gzips.values())) > _GZIP_CACHE_BYTES and len(_gzips) > 1:
            _gzips.popitem(last=False)
    return data


def merge_ranges(offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [n]: the number of the request that each of n ranges, sorted by offset, belongs to."""
    ends = np.maximum.accumulate(offsets + sizes)
    new = np.concatenate([[True], offsets[1:] - ends[:-1] > MERGE_GAP_BYTES])
    group = np.cumsum(new) - 1
    # Too long ones are cut: by how many whole requests lie before each range within its group.
    starts = offsets[new][group]
    part = (offsets + sizes - starts - 1) // REQUEST_BYTES
    return np.unique(np.stack([group, part]), axis=1, return_inverse=True)[1].reshape(-1)


def read_samples(manifest: Manifest, shards: np.ndarray, rows: np.ndarray) -> Samples:
    """The samples at (shard, row), int64 [n] each; requests run in a few threads.

    Raises DataError if the storage keeps failing or forbids reading.
    """
    count = len(shards)
    columns = {name: np.zeros(count, kind) for name, kind in _COLUMNS.items()}
    keys = [""] * count
    ranges: list[_Range] = []
    for shard in np.unique(shards):
        where = np.flatnonzero(shards == shard)
        table = index_rows(manifest, int(shard)).take(rows[where])
        for name, column in columns.items():
            column[where] = table[name].to_numpy()
        for position, key in zip(where, table["key"].to_pylist(), strict=True):
            keys[position] = key
        by_offset = where[np.argsort(columns["offset"][where], kind="stable")]
        groups = merge_ranges(columns["offset"][by_offset], columns["size"][by_offset])
        for positions in np.split(by_offset, np.flatnonzero(np.diff(groups)) + 1):
            start = int(columns["offset"][positions[0]])
            stop = int((columns["offset"][positions] + columns["size"][positions]).max())
            ranges.append(_Range(int(shard), start, stop, positions))
    images: list[memoryview | None] = [None] * count
    problems: dict[int, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for each in pool.map(lambda one: _read_range(manifest, one, columns), ranges):
            for position, image in each.items():
                if isinstance(image, str):
                    problems[position] = image
                else:
                    images[position] = image
    size = sum(one.stop - one.start for one in ranges)
    return Samples(
        images, columns["label"].astype(np.int64), columns["hash"], keys, problems, len(ranges), bytes_read=size
    )


_COLUMNS = {"offset": np.int64, "size": np.int64, "label": np.int64, "hash": np.uint64, "crc32": np.uint32}


def _read_range(
    manifest: Manifest, one: _Range, columns: dict[str, np.ndarray]
) -> dict[int, memoryview | str]:
    """The image of each position in a range, or what is wrong with it."""
    uri = _shard_uri(manifest, one.shard)
    gzipped = is_gzip(uri)
    found: dict[int, memoryview | str] = {}
    missing = one.positions
    for _ in range(2):  # wrong bytes are read once more: they may have been wrong on the way only
        try:
            if gzipped:
                data, base = memoryview(_fetch_gzip(uri, int(manifest.sizes[one.shard]))), 0
            else:
                data, base = memoryview(_fetch(uri, one.start, one.stop)), one.start
        except _Wrong as error:
            if len(one.positions) > 1 and not gzipped:
                return _read_apart(manifest, one, columns)
            return {int(position): str(error) for position in one.positions}
        wrong = []
        for position in missing:
            offset, size = int(columns["offset"][position]) - base, int(columns["size"][position])
            image = data[offset : offset + size]
            if len(image) == size and zlib.crc32(image) == columns["crc32"][position]:
                found[int(position)] = image
            else:
                wrong.append(position)
        missing = np.array(wrong, np.int64)
        if not len(missing):
            return found
        with _gzips_lock:
            _gzips.pop(uri, None)
    return found | {int(position): "its bytes changed since they were indexed (crc32)" for position in missing}


def _read_apart(
    manifest: Manifest, one: _Range, columns: dict[str, np.ndarray]
) -> dict[int, memoryview | str]:
    """Each sample of a range by itself: a shard that was cut short still has those before the cut."""
    found: dict[int, memoryview | str] = {}
    for position in one.positions:
        start, size = int(columns["offset"][position]), int(columns["size"][position])
        found |= _read_range(manifest, _Range(one.shard, start, start + size, np.array([position])), columns)
    return found


def shard_digest(uri: str) -> tuple[int, str]:
    """Size and sha256 of a file, read in pieces. Raises DataError."""
    filesystem, path = storage.open_storage(uri)
    sha256, size = hashlib.sha256(), 0
    with storage.storage_errors(uri, "reading"), filesystem.open(path, "rb", block_size=2**22) as file:
        while data := file.read(2**22):
            sha256.update(data)
            size += len(data)
    return size, sha256.hexdigest()
