"""What was read of shards, kept on a local disk: a file for each shard, with holes where nothing was read.

Nothing that the files hold is believed: a sample counts if its bytes have the checksum of the index, and those of a hole, of a
torn or of a garbled write have not. Then they are read from the storage again, and written anew. So there is nothing to lock,
to commit or to sync, any number of processes may share a folder, and a hit costs what a local shard costs. Since only what was
asked for is read and kept, a small fraction of the samples takes as little of the disk.
"""

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
import threading
import time

from ssl_ray import storage

TOUCH_S = 60
"""A file's time says to so many seconds when it was used."""
LOOK_SHARE = 64
"""A process looks how much there is, and makes room, after it wrote this part of max_bytes: so much more there may be."""
KEEP_SHARE = 0.9
"""Of max_bytes, or of a full disk, is kept when room is made: what was used longest ago goes."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cache:
    folder: str
    """On a local disk of each machine; made when it is needed. Files of others in it are left alone."""
    max_bytes: int


def cache_at(folder: str | None, max_bytes: int) -> Cache | None:
    """That of a configuration (data.cache_dir, data.cache_bytes), which may have none."""
    return None if folder is None else Cache(storage.absolute(folder), max_bytes)


_lock, _full = threading.Lock(), threading.Lock()
_since_look: dict[str, int] = {}
"""Bytes that this process wrote to a folder since it looked how much there is."""
_unusable: set[str] = set()
"""Folders that could not be written to, even after room was made."""


def _path(cache: Cache, digest: str, shard: str) -> str:
    """digest: of the manifest, so that shards that were made anew are others."""
    name = hashlib.blake2b(f"{digest}/{shard}".encode(), digest_size=16).hexdigest()
    return os.path.join(cache.folder, f"{name}.shard")


def read(cache: Cache, digest: str, shard: str, start: int, stop: int) -> bytes | None:
    """Bytes start to stop of a shard, zeros where they are not there, fewer where nothing follows; None if nothing is there."""
    try:
        with open(_path(cache, digest, shard), "rb", buffering=0) as file:
            descriptor = file.fileno()
            if os.lseek(descriptor, start, os.SEEK_DATA) >= stop:
                return None
            if time.time() - os.fstat(descriptor).st_mtime > TOUCH_S:
                os.utime(descriptor)
            return os.pread(descriptor, stop - start, start)
    except OSError:  # not there, nothing behind `start`, a disk that fails: the storage has it
        return None


def write(cache: Cache, digest: str, shard: str, start: int, data: bytes) -> None:
    """Keeps the bytes of a shard from `start` on. Where that cannot be, it is said once, and the work goes on without."""
    if cache.folder in _unusable:
        return
    path = _path(cache, digest, shard)
    try:
        try:
            _write(path, start, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _write_on_full_disk(cache, path, start, data)
    except OSError as error:
        with _lock:
            if cache.folder not in _unusable:
                _unusable.add(cache.folder)
                _log.warning("data.cache_dir: %s cannot be written to (%s); going on without.", path, storage.one_line(error))
        return
    with _lock:
        _since_look[cache.folder] = _since_look.get(cache.folder, cache.max_bytes) + len(data)
        look = _since_look[cache.folder] >= cache.max_bytes // LOOK_SHARE
        if look:
            _since_look[cache.folder] = 0
    if look:
        _make_room(cache, full=False)


def _write_on_full_disk(cache: Cache, path: str, start: int, data: bytes) -> None:
    """Raises OSError if making room does not help: others may have filled the disk, or take what is freed."""
    with _full:
        for last in (False, False, True):
            if not _make_room(cache, full=True):
                last = True
            try:
                return _write(path, start, data)
            except OSError as error:
                if last or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise


def _write(path: str, start: int, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, start)
            view, start = view[written:], start + written
    finally:
        os.close(descriptor)


def _make_room(cache: Cache, *, full: bool) -> int:
    """Removes files if there is more than max_bytes, or the disk is full; returns the bytes that they had.

    A process that writes to a file of which another has just removed the name writes for nothing, and that is all.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(cache.folder) as entries:
        for entry in entries:
            if re.fullmatch(r"[0-9a-f]{32}\.shard", entry.name):
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    found.append((about.st_mtime, 512 * about.st_blocks, entry.path))
    total = sum(size for _, size, _ in found)
    if not full and total <= cache.max_bytes:
        return 0
    left = total
    for _, size, path in sorted(found):
        if left <= KEEP_SHARE * min(total, cache.max_bytes):
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            left -= size
    return total - left
