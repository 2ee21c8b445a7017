"""Shards of our own: shuffled by a seed, written by webdataset's writer, with manifest and index."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_ray import storage
from ssl_ray.each import Each, in_threads
from ssl_ray.errors import DataError, SslRayError, UsageError
from ssl_ray.philox import PACK_ORDER, permutation
from ssl_ray.shards.index import SUFFIXES, Progress, ShardIndex, index_shard, write_data_set
from ssl_ray.shards.manifest import Manifest, clear
from ssl_ray.shards.sources import Source

_READ_AT_ONCE = 64
_BLOCK = 512
"""Of a tar: a header is one, and what follows it begins a new one."""


def pack(
    source: Source,
    uri: str,
    *,
    seed: int = 0,
    shard_bytes: int = 64 * 2**20,
    overwrite: bool = False,
    each: Each = in_threads,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes the images of `source` to shards below `uri`, in an order drawn from `seed`.

    A shard ends with the sample that brings it to `shard_bytes`, so that all are known before one is written: `each` makes
    them, in this process or over a cluster (ray_map.over_cluster), with the same bytes.
    The manifest comes last: a pack that was killed leaves none, and is begun again with `overwrite`; one that fails removes
    its shards.
    Raises UsageError if there are shards already and not `overwrite`, or nothing to pack; DataError if it cannot write.
    """
    if shard_bytes < 2**16:
        raise UsageError(f"--shard-mb: got {shard_bytes / 2**20:g}, expected 0.0625 or more.")
    if not len(source.sizes):
        raise UsageError(f"{source.name}: no images to pack.")
    if source.place is not None and _same_place(source.place, uri):
        raise UsageError(f"{uri}: the source itself, which must stay as it is. Give another place to write to.")
    there = [name for name in storage.list_names(uri) if name.endswith(SUFFIXES) or name == "manifest.parquet"]
    if there and not overwrite:
        raise UsageError(f"{uri}: there are shards already ({there[0]}). Use another place, or --overwrite to replace them.")
    storage.require_writable(uri)
    clear(uri)
    for name in there:
        storage.remove(storage.join(uri, name))
    order = permutation(len(source.sizes), key=(seed, 0), purpose=PACK_ORDER)
    borders = _borders(source, order, shard_bytes)
    write = functools.partial(_write_shard, source, uri, order, borders)

    made = each(write, range(len(borders) - 1))

    def written() -> Iterator[tuple[str, ShardIndex]]:
        for number, shard in enumerate(made):
            if not storage.exists(storage.join(uri, _name(number))):
                raise DataError(f"{uri}: {_name(number)}, which another machine wrote, is not here. Give a place that all see.")
            progress(int(borders[number + 1]), len(order))
            yield _name(number), shard

    with contextlib.ExitStack() as undo:
        undo.callback(_remove_shards, uri)
        undo.callback(made.close)
        manifest = write_data_set(
            uri,
            data_uri=uri,
            shards=written(),
            class_names=source.class_names,
            shuffled=True,
            progress=lambda shards_done: None,
        )
        undo.pop_all()
    return manifest


def _same_place(first: str, second: str) -> bool:
    one, other = (
        os.path.realpath(storage.absolute(uri)) if storage.is_local(uri) else uri.rstrip("/") for uri in (first, second)
    )
    return one == other


def _remove_shards(uri: str) -> None:
    with contextlib.suppress(SslRayError):  # the failure of the pack is what the user must see
        for name in storage.list_names(uri):
            if name.endswith(SUFFIXES):
                storage.remove(storage.join(uri, name))


def _borders(source: Source, order: np.ndarray, shard_bytes: int) -> np.ndarray:
    """int64 [S + 1]: shard s holds the images order[borders[s]:borders[s + 1]].

    What a sample takes are a header and an image, and again for a label; longer names take more, which is not counted.
    """
    taken = _BLOCK + -(-source.sizes // _BLOCK) * _BLOCK + np.where(source.labels >= 0, 2 * _BLOCK, 0)
    ends = np.cumsum(taken[order])
    borders, filled = [0], 0
    while borders[-1] < len(order):
        borders.append(min(int(np.searchsorted(ends, filled + shard_bytes)) + 1, len(order)))
        filled = int(ends[borders[-1] - 1])
    return np.array(borders)


def _name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _write_shard(source: Source, uri: str, order: np.ndarray, borders: np.ndarray, number: int) -> ShardIndex:
    """Writes and uploads a shard; what an index says of it."""
    from webdataset import TarWriter

    numbers = order[borders[number] : borders[number + 1]]
    with storage.scratch_folder("pack") as folder:
        local = Path(folder) / _name(number)
        with (
            storage.storage_errors(str(local), "writing a shard; TMPDIR chooses the place"),
            local.open("wb") as file,
            TarWriter(file, mtime=0, user="", group="", format="PAX_FORMAT") as writer,
        ):
            for start in range(0, len(numbers), _READ_AT_ONCE):
                some = numbers[start : start + _READ_AT_ONCE]
                for (key, data, extension), label in zip(source.read(some), source.labels[some].tolist(), strict=True):
                    sample = {"__key__": key, extension: data}
                    writer.write(sample if label < 0 else sample | {"cls": str(label).encode()})
        with local.open("rb") as packed:
            shard = index_shard(packed, local.name, where=f"{source.name} packed as {local.name}")
        storage.upload(str(local), storage.join(uri, local.name))
    return shard
