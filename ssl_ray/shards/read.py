"""Samples by shard and row: ranged requests, merged over small gaps, each image verified by its checksum.

A transient failure is tried again and then ends the read; only bytes that are wrong twice, or a shard that is gone or
too short, make a sample a problem. A gzip'd shard is read and decompressed whole; the last ones are kept.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from zlib_ng import zlib_ng

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.shards import cache as kept
from ssl_ray.shards.cache import Cache
from ssl_ray.shards.fetch import Gone, fetch, forget_sizes
from ssl_ray.shards.manifest import INDEX_SCHEMA, MAX_UNPACKED, Manifest, index_rows, is_gzip

MERGE_GAP_BYTES = 64 * 2**10
"""Two samples this near are read by one request, with what lies between."""
REQUEST_BYTES = 8 * 2**20
"""A request is not longer than this, unless one sample is."""
LOCAL_THREADS = 4
REMOTE_THREADS = 8
GZIP_CACHE_BYTES = 512 * 2**20


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
class Located:
    """Where samples are, and what the index knows of them: arrays [n]."""

    keys: list[str]
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray


_COLUMNS = ("shard", "offset", "size", "crc32", "label", "hash")


def located_in(rows: pa.Table) -> Located:
    """The samples in rows of an index."""
    return Located(rows["key"].to_pylist(), *(rows[name].to_numpy() for name in _COLUMNS))


@dataclasses.dataclass(frozen=True)
class _Request:
    """Samples of one shard that are read together, in the order of their offsets."""

    shard: int
    positions: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray

    @property
    def start(self) -> int:
        return int(self.offsets[0])

    @property
    def stop(self) -> int:
        return int((self.offsets + self.sizes).max())

    def part(self, which: slice | np.ndarray) -> "_Request":
        return _Request(self.shard, self.positions[which], self.offsets[which], self.sizes[which], self.crc32[which])

    def requests(self) -> "list[_Request]":
        """Those that read its samples."""
        return [self.part(slice(first, stop)) for first, stop in merge_ranges(self.offsets, self.sizes)]


@dataclasses.dataclass
class _Answer:
    """What became of the samples of a request."""

    found: list[tuple[int, memoryview]] = dataclasses.field(default_factory=list)
    """Position and image of the good ones."""
    problems: dict[int, str] = dataclasses.field(default_factory=dict)
    """Reasons of the others."""
    requests: int = 0
    bytes_read: int = 0


class _Permanent(Exception):
    """A fault of a shard as a whole that trying again does not mend."""


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


def read_samples(manifest: Manifest, shards: np.ndarray, rows: np.ndarray, *, cache: Cache | None = None) -> Samples:
    """The samples at (shard, row), int64 [n] each, in any order and number; requests run in a few threads.

    cache: where what is read is kept, and looked for first; shards on local disks are not.
    Raises DataError if the storage keeps failing or forbids reading.
    """
    count = len(shards)
    columns = {name: np.zeros(count, INDEX_SCHEMA.field(name).type.to_pandas_dtype()) for name in _COLUMNS}
    keys = [""] * count
    for where in _by_shard(shards, rows):
        table, own = index_rows(manifest, int(shards[where[0]])), rows[where]
        for name, values in columns.items():
            values[where] = table[name].to_numpy()[own]
        for position, key in zip(where.tolist(), table["key"].take(pa.array(own)).to_pylist(), strict=True):
            keys[position] = key
    return read_located(manifest, Located(keys, *columns.values()), cache=cache)


def _by_shard(shards: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Positions of the samples of each shard, in the order of `rows`."""
    order = np.lexsort((rows, shards))
    return np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(shards) else []


def read_located(manifest: Manifest, located: Located, *, cache: Cache | None = None) -> Samples:
    """`read_samples` where the rows of the index are at hand, of which nothing is read."""
    count, shards = len(located.shards), located.shards
    local = storage.is_local(manifest.data_uri)
    requests: list[_Request] = []
    for where in _by_shard(shards, located.offsets):
        shard = int(shards[where[0]])
        everything = _Request(shard, where, located.offsets[where], located.sizes[where], located.crc32[where])
        requests += [everything] if is_gzip(manifest.names[shard].as_py()) else everything.requests()
    images: list[memoryview | None] = [None] * count
    problems: dict[int, str] = {}
    answered = bytes_read = 0
    read = functools.partial(_read, manifest, None if local else cache)
    with ThreadPoolExecutor(LOCAL_THREADS if local else REMOTE_THREADS) as pool:
        # To start a thread for a single request would take as long as to read a hundred small samples.
        for answer in (pool.map if len(requests) > 1 else map)(read, requests):
            for position, image in answer.found:
                images[position] = image
            problems |= answer.problems
            answered, bytes_read = answered + answer.requests, bytes_read + answer.bytes_read
    labels, problems = located.labels.astype(np.int64), dict(sorted(problems.items()))
    return Samples(images, labels, located.hashes, located.keys, problems, answered, bytes_read)


def _read(manifest: Manifest, cache: Cache | None, request: _Request) -> _Answer:
    name, answer = manifest.names[request.shard].as_py(), _Answer()
    if cache is None or is_gzip(name):
        _read_storage(manifest, cache, name, request, answer)
        return answer
    data = kept.read(cache, manifest.digest, name, request.start, request.stop)
    missing = request if data is None else request.part(_verify(request, data, request.start, answer) != "")
    for part in missing.requests():
        _read_storage(manifest, cache, name, part, answer)
    return answer


def _verify(request: _Request, data: bytes, base: int, answer: _Answer) -> np.ndarray:
    """Adds the samples whose bytes are right to `answer`; str [n]: what is wrong with each, empty where nothing is.

    data: the shard's bytes from `base` on.
    """
    view, starts, stops = memoryview(data), request.offsets - base, request.offsets - base + request.sizes
    images = [view[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    changed = np.fromiter(map(zlib_ng.crc32, images), np.uint32, len(images)) != request.crc32
    wrong = np.where(stops > len(data), SHORT, np.where(changed, CHANGED, ""))
    good = wrong == ""
    answer.found += zip(request.positions[good].tolist(), itertools.compress(images, good.tolist()), strict=True)
    return wrong


def _read_storage(manifest: Manifest, cache: Cache | None, name: str, request: _Request, answer: _Answer) -> None:
    """Adds the samples of a request, or what is wrong with them, to `answer`."""
    uri, size = storage.join(manifest.data_uri, name), int(manifest.sizes[request.shard])
    todo, wrong = request, np.array([""])
    for again in (False, True):  # wrong bytes are read once more: they may have been wrong on the way only
        try:
            if is_gzip(name):
                base, (data, came) = 0, _fetch_gzip(manifest, cache, name, size, anew=again)
            else:
                base, data = todo.start, fetch(uri, todo.start, todo.stop)
                came = len(data)
        except (_Permanent, Gone) as error:
            answer.problems |= dict.fromkeys(todo.positions.tolist(), str(error))
            return
        answer.requests, answer.bytes_read = answer.requests + (came is not None), answer.bytes_read + (came or 0)
        wrong = _verify(todo, data, base, answer)
        bad = wrong != ""
        if cache is not None and not is_gzip(name) and not bad.all():
            kept.write(cache, manifest.digest, name, base, data)
        if not bad.any():
            return
        todo, wrong = todo.part(bad), wrong[bad]
        forget_sizes()
    answer.problems |= dict(zip(todo.positions.tolist(), wrong.tolist(), strict=True))


# Shards that are compressed -----------------------------------------------------------------------------------------

_NO_GZIP = (OSError, EOFError, zlib.error)
_gzips: OrderedDict[tuple[str, str], bytes] = OrderedDict()
_gzips_lock = threading.Lock()


def _fetch_gzip(manifest: Manifest, cache: Cache | None, name: str, size: int, *, anew: bool) -> tuple[bytes, int | None]:
    """The decompressed content of a shard of `size` bytes, and how many were read for it, None if it was at hand.

    anew: whatever is at hand is wrong.  Raises Gone, _Permanent if it does not decompress, DataError as fetch does.
    """
    at = (manifest.digest, storage.join(manifest.data_uri, name))
    with _gzips_lock:
        if anew:
            _gzips.pop(at, None)
        if at in _gzips:
            _gzips.move_to_end(at)
            return _gzips[at], None
    if cache is not None and not anew and (packed := kept.read(cache, manifest.digest, name, 0, size)) is not None:
        with contextlib.suppress(*_NO_GZIP):
            return _keep(at, _unpack(packed)), None
    packed = fetch(at[1], 0, size)
    try:
        data = _unpack(packed)
    except _NO_GZIP as error:
        raise _Permanent(f"the shard does not decompress ({storage.one_line(error)})") from error
    if cache is not None:
        kept.write(cache, manifest.digest, name, 0, packed)
    return _keep(at, data), len(packed)


def _unpack(packed: bytes) -> bytes:
    """Raises what _NO_GZIP names, also where more than MAX_UNPACKED bytes come out."""
    data = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(MAX_UNPACKED + 1)
    if len(data) > MAX_UNPACKED:
        raise EOFError(f"more than {MAX_UNPACKED} bytes")
    return data


def _keep(at: tuple[str, str], data: bytes) -> bytes:
    with _gzips_lock:
        _gzips[at] = data
        while sum(map(len, _gzips.values())) > GZIP_CACHE_BYTES and len(_gzips) > 1:
            _gzips.popitem(last=False)
    return data


def forget_kept() -> None:
    """Makes the next reads ask the storage again: for gzip'd shards, and for the sizes of others."""
    with _gzips_lock:
        _gzips.clear()
    forget_sizes()


def shard_digest(uri: str) -> tuple[int, str]:
    """Size and sha256 of a file, read in pieces. Raises DataError."""
    sha256, size = hashlib.sha256(), 0
    while True:
        try:
            data = fetch(uri, size, size + REQUEST_BYTES)
        except Gone as error:
            raise DataError(f"{uri}: not there (reading). Check the path.") from error
        sha256.update(data)
        size += len(data)
        if len(data) < REQUEST_BYTES:
            return size, sha256.hexdigest()
