"""Samples by shard and row: ranged requests, merged over small gaps, each image verified by its checksum.

A transient failure is tried again and then ends the read; only bytes that are wrong twice, or a shard that is gone or
too short, make a sample a problem. A gzip'd shard is read and decompressed whole; the last ones are kept.
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import threading
import time
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.shards.manifest import Manifest, index_rows, is_gzip

MERGE_GAP_BYTES = 64 * 2**10
"""Two samples this near are read by one request, with what lies between."""
REQUEST_BYTES = 8 * 2**20
"""A request is not longer than this, unless one sample is."""
THREADS = 4
ATTEMPTS = 5
"""For a transient failure, 8.5 s in all, after the retries of the storage's own client."""
ATTEMPTS_GONE = 3
"""For a shard that is not there: network file systems may see a file late."""
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
    """Position to reason, in order of positions."""
    requests: int
    """Those answered, repeated ones too."""
    bytes_read: int
    """In these answers: with gaps, and compressed where a shard is."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """Samples of one shard that are read together, in the order of their offsets."""

    shard: int
    positions: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray


class _Permanent(Exception):
    """A fault of a shard as a whole that trying again does not mend."""


MISSING = "the shard is missing"
SHORT = "the shard is shorter than its index says"
CHANGED = "its bytes changed since they were indexed (crc32)"


def merge_ranges(offsets: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Runs [first, stop) of ranges, sorted by offset, that one request each reads."""
    if not len(offsets):
        return []
    ends = np.maximum.accumulate(offsets + sizes)
    gaps = np.flatnonzero(offsets[1:] - ends[:-1] > MERGE_GAP_BYTES) + 1
    runs = []
    for first, last in itertools.pairwise([0, *gaps.tolist(), len(offsets)]):
        while first < last:
            fit = int(np.searchsorted(ends, offsets[first] + REQUEST_BYTES, side="right"))
            stop = min(max(fit, first + 1), last)
            runs.append((first, stop))
            first = stop
    return runs


def read_samples(manifest: Manifest, shards: np.ndarray, rows: np.ndarray) -> Samples:
    """The samples at (shard, row), int64 [n] each, in any order and number; requests run in a few threads.

    Raises DataError if the storage keeps failing or forbids reading.
    """
    count = len(shards)
    labels, hashes, keys = np.zeros(count, np.int64), np.zeros(count, np.uint64), [""] * count
    requests: list[_Request] = []
    order = np.lexsort((rows, shards))
    for where in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if count else []:
        shard, own = int(shards[where[0]]), rows[where]
        table = index_rows(manifest, shard)
        labels[where], hashes[where] = table["label"].to_numpy()[own], table["hash"].to_numpy()[own]
        for position, key in zip(where.tolist(), table["key"].take(pa.array(own)).to_pylist(), strict=True):
            keys[position] = key
        offsets, sizes, crc32 = (table[name].to_numpy()[own] for name in ("offset", "size", "crc32"))
        whole = is_gzip(manifest.names[shard].as_py())
        for first, stop in [(0, len(own))] if whole else merge_ranges(offsets, sizes):
            some = slice(first, stop)
            requests.append(_Request(shard, where[some], offsets[some], sizes[some], crc32[some]))
    images: list[memoryview | None] = [None] * count
    problems: dict[int, str] = {}
    answered = bytes_read = 0
    read = functools.partial(_read, manifest)
    with ThreadPoolExecutor(THREADS) as pool:
        # To start a thread for a single request would take as long as to read a hundred small samples.
        for found, wrong, answers, size in (pool.map if len(requests) > 1 else map)(read, requests):
            for position, image in found:
                images[position] = image
            problems |= wrong
            answered, bytes_read = answered + answers, bytes_read + size
    return Samples(images, labels, hashes, keys, dict(sorted(problems.items())), answered, bytes_read)


def _read(manifest: Manifest, request: _Request) -> tuple[list[tuple[int, memoryview]], dict[int, str], int, int]:
    """(position, image) of the good samples, reasons of the others, answers and bytes of the storage."""
    uri = storage.join(manifest.data_uri, manifest.names[request.shard].as_py())
    found: list[tuple[int, memoryview]] = []
    problems: dict[int, str] = {}
    answers = size = 0
    todo = request
    for _ in range(2):  # wrong bytes are read once more: they may have been wrong on the way only
        problems = {}
        try:
            if is_gzip(uri):
                data, fresh = _fetch_gzip(manifest, uri, int(manifest.sizes[request.shard]))
                base, length = 0, int(manifest.sizes[request.shard])
            else:
                base, fresh = int(todo.offsets[0]), True
                data = _fetch(uri, base, int((todo.offsets + todo.sizes).max()))
                length = len(data)
        except _Permanent as error:
            return found, dict.fromkeys(todo.positions.tolist(), str(error)), answers, size
        answers, size = answers + fresh, size + length * fresh
        view, starts, stops = memoryview(data), todo.offsets - base, todo.offsets - base + todo.sizes
        images = [view[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        short = stops > len(data)
        wrong = short | (np.fromiter(map(zlib.crc32, images), np.uint32, len(images)) != todo.crc32)
        found += zip(todo.positions[~wrong].tolist(), itertools.compress(images, (~wrong).tolist()), strict=True)
        if not wrong.any():
            break
        problems = {int(todo.positions[i]): SHORT if short[i] else CHANGED for i in np.flatnonzero(wrong)}
        _forget_gzip(manifest, uri)
        todo = _Request(todo.shard, todo.positions[wrong], todo.offsets[wrong], todo.sizes[wrong], todo.crc32[wrong])
    return found, problems, answers, size


def _fetch(uri: str, start: int, stop: int) -> bytes:
    """Bytes start to stop, fewer only where the file ends before.

    Raises _Permanent if there is no such file, DataError if it may not be read or keeps failing.
    """
    filesystem, path = storage.open_storage(uri)
    for attempt in itertools.count(1):
        try:
            data = b""
            try:
                data = filesystem.cat_file(path, start=start, end=stop)
            except Exception as error:
                if not _past_end(error):
                    raise
            if len(data) == stop - start:
                return data
            # Cut off on the way, or by the end of the file? Only the second makes a sample bad.
            filesystem.invalidate_cache(path)
            end = filesystem.info(path)["size"]
            if end == start + len(data) or (not data and end <= start):
                return data
            failure: Exception = EOFError(f"{len(data)} bytes came, {stop - start} were asked for")
        except FileNotFoundError as error:
            if attempt >= ATTEMPTS_GONE:
                raise _Permanent(MISSING) from error
            failure = error
        except PermissionError as error:
            raise DataError(f"{uri}: no permission to read it. Check owner or credentials.") from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise DataError(f"{uri}: not a file ({error.strerror}). Put the shard back, or index again.") from error
        except Exception as error:
            failure = error
        if attempt >= ATTEMPTS:
            reason = f"{type(failure).__name__}: {storage.one_line(failure)}"
            raise DataError(f"{uri}: reading failed {ATTEMPTS} times ({reason}). Check the storage and the network.") from failure
        time.sleep(0.1 * 4 ** (attempt - 1))
    raise AssertionError


def _past_end(error: BaseException | None) -> bool:
    """Whether the storage said that the range begins after the end: HTTP 416, S3 InvalidRange. Never told by a text,
    which may hold any number (shard-000416.tar)."""
    while error is not None:
        if 416 in (getattr(error, name, None) for name in ("status", "code", "status_code")):
            return True
        response = getattr(error, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return True
        error = error.__cause__
    return False


# Shards that are compressed -----------------------------------------------------------------------------------------

_gzips: OrderedDict[tuple[str, str], bytes] = OrderedDict()
_gzips_lock = threading.Lock()


def _fetch_gzip(manifest: Manifest, uri: str, size: int) -> tuple[bytes, bool]:
    """The decompressed content of a shard of `size` bytes, and whether it was read for this call; the last are kept.

    Raises _Permanent if it is gone or does not decompress, DataError as _fetch does.
    """
    name = (manifest.digest, uri)
    with _gzips_lock:
        if name in _gzips:
            _gzips.move_to_end(name)
            return _gzips[name], False
    try:
        data = gzip.decompress(_fetch(uri, 0, size))
    except (OSError, EOFError, zlib.error) as error:
        raise _Permanent(f"the shard does not decompress ({storage.one_line(error)})") from error
    with _gzips_lock:
        _gzips[name] = data
        while sum(map(len, _gzips.values())) > _GZIP_CACHE_BYTES and len(_gzips) > 1:
            _gzips.popitem(last=False)
    return data, True


def forget_kept() -> None:
    """Makes the next reads of gzip'd shards ask the storage again."""
    with _gzips_lock:
        _gzips.clear()


def _forget_gzip(manifest: Manifest, uri: str) -> None:
    with _gzips_lock:
        _gzips.pop((manifest.digest, uri), None)


def shard_digest(uri: str) -> tuple[int, str]:
    """Size and sha256 of a file, read in pieces. Raises DataError."""
    filesystem, path = storage.open_storage(uri)
    sha256, size = hashlib.sha256(), 0
    with storage.storage_errors(uri, "reading"), filesystem.open(path, "rb", block_size=2**22) as file:
        while data := file.read(2**22):
            sha256.update(data)
            size += len(data)
    return size, sha256.hexdigest()
