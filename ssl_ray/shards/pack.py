"""Shards of our own: shuffled by a seed, written by webdataset's writer, with manifest and index."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ssl_ray import storage
from ssl_ray.errors import SslRayError, UsageError
from ssl_ray.philox import PACK_ORDER, permutation
from ssl_ray.shards.index import SUFFIXES, Progress, ShardIndex, index_shard, write_data_set
from ssl_ray.shards.manifest import Manifest, clear, require_writable
from ssl_ray.shards.sources import Image, Source

_READ_AT_ONCE = 64


def pack(
    source: Source,
    uri: str,
    *,
    seed: int = 0,
    shard_bytes: int = 64 * 2**20,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes the images of `source` to shards below `uri`, in an order drawn from `seed`.

    A shard ends with the sample that brings it to `shard_bytes`.  The manifest comes last: a pack that was killed leaves
    none, and is begun again with `overwrite`; one that fails removes its shards.
    Raises UsageError if there are shards already and not `overwrite`, or nothing to pack; DataError if it cannot write.
    """
    if shard_bytes < 2**16:
        raise UsageError(f"--shard-mb: got {shard_bytes / 2**20:g}, expected 0.0625 or more.")
    if source.count == 0:
        raise UsageError(f"{source.name}: no images to pack.")
    if source.place is not None and _same_place(source.place, uri):
        raise UsageError(f"{uri}: the source itself, which must stay as it is. Give another place to write to.")
    there = [name for name in storage.list_names(uri) if name.endswith(SUFFIXES) or name == "manifest.parquet"]
    if there and not overwrite:
        raise UsageError(f"{uri}: there are shards already ({there[0]}). Use another place, or --overwrite to replace them.")
    require_writable(uri)
    clear(uri)
    for name in there:
        storage.remove(storage.join(uri, name))
    with contextlib.ExitStack() as undo:

        def upload(local: Path) -> None:
            at = storage.join(uri, local.name)
            undo.callback(_remove_if_possible, at)
            storage.upload(str(local), at)

        manifest = write_data_set(
            uri,
            data_uri=uri,
            shards=_write_shards(source, upload, seed=seed, shard_bytes=shard_bytes, progress=progress),
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


def _remove_if_possible(uri: str) -> None:
    with contextlib.suppress(SslRayError):  # the failure of the pack is what the user must see
        storage.remove(uri)


def _write_shards(
    source: Source, upload: Callable[[Path], None], *, seed: int, shard_bytes: int, progress: Progress
) -> Iterator[tuple[str, ShardIndex]]:
    """Writes and uploads shard after shard; yields the name and index of each."""
    images = _in_order(source, seed=seed)
    done = number = 0
    with storage.scratch_folder("pack") as folder:
        while done < source.count:
            local = Path(folder) / f"shard-{number:06d}.tar"
            with storage.storage_errors(str(local), "writing a shard; TMPDIR chooses the place"):
                done += _write_shard(local, images, shard_bytes=shard_bytes)
            with local.open("rb") as file:
                shard = index_shard(file, local.name, where=f"{source.name} packed as {local.name}")
            upload(local)
            local.unlink()
            number += 1
            progress(done, source.count)
            yield local.name, shard


def _in_order(source: Source, *, seed: int) -> Iterator[Image]:
    order = permutation(source.count, key=(seed, 0), purpose=PACK_ORDER)
    for start in range(0, source.count, _READ_AT_ONCE):
        yield from source.read(order[start : start + _READ_AT_ONCE])


def _write_shard(local: Path, images: Iterator[Image], *, shard_bytes: int) -> int:
    """Writes images until the shard has its size or none is left; returns how many."""
    from webdataset import TarWriter

    count = 0
    with local.open("wb") as file, TarWriter(file, mtime=0, user="", group="", format="PAX_FORMAT") as writer:
        for key, data, extension, label in images:
            sample = {"__key__": key, extension: data}
            writer.write(sample if label is None else sample | {"cls": str(label).encode()})
            count += 1
            if writer.tarstream.offset >= shard_bytes:
                break
    return count
