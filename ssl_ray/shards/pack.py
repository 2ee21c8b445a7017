"""Shards of our own: shuffled by a seed, written by webdataset's writer, with manifest and index."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from ssl_ray import storage
from ssl_ray.errors import UsageError
from ssl_ray.philox import PACK_ORDER, permutation
from ssl_ray.shards.index import Progress, ShardIndex, forget, index_shard, write_data_set
from ssl_ray.shards.manifest import Manifest
from ssl_ray.shards.sources import Source

_READ_AT_ONCE = 256


def pack(
    source: Source,
    uri: str,
    *,
    seed: int = 0,
    shard_bytes: int = 64 * 2**20,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes the images of `source` to shards of about `shard_bytes` below `uri`, in an order drawn from `seed`.

    The manifest comes last: an interrupted pack leaves none, and is begun again with `overwrite`.
    Raises UsageError if there are shards already and not `overwrite`, or nothing to pack; DataError if it cannot write.
    """
    if shard_bytes < 2**16:
        raise UsageError(f"--shard-mb: got {shard_bytes / 2**20:g}, expected 0.0625 or more.")
    if source.count == 0:
        raise UsageError(f"{source.name}: no images to pack.")
    there = [name for name in storage.list_names(uri) if name.endswith(".tar") or name == "manifest.parquet"]
    if there and not overwrite:
        raise UsageError(f"{uri}: there are shards already ({there[0]}). Use another place, or --overwrite to replace them.")
    forget(uri)
    for name in there:
        storage.remove(storage.join(uri, name))
    shards = _write_shards(source, uri, seed=seed, shard_bytes=shard_bytes, progress=progress)
    return write_data_set(
        uri,
        data_uri=uri,
        shards=shards,
        class_names=source.class_names,
        shuffled=True,
        progress=lambda shards_done: None,
    )


def _write_shards(
    source: Source, uri: str, *, seed: int, shard_bytes: int, progress: Progress
) -> Iterator[tuple[str, ShardIndex]]:
    """Writes shard after shard and yields the name and index of each."""
    from webdataset import TarWriter

    order = permutation(source.count, key=(seed, 0), purpose=PACK_ORDER)
    done = number = 0
    with tempfile.TemporaryDirectory(prefix="ssl-ray-pack-") as folder:
        while done < source.count:
            name = f"shard-{number:06d}.tar"
            local = Path(folder) / name
            with local.open("wb") as file:
                writer = TarWriter(file, mtime=0, user="", group="")
                while done < source.count and file.tell() < shard_bytes:
                    for key, data, extension, label in source.read(order[done : done + _READ_AT_ONCE]):
                        sample = {"__key__": key, extension: data}
                        writer.write(sample if label is None else sample | {"cls": str(label).encode()})
                        done += 1
                    progress(done, source.count)
                writer.close()
            with local.open("rb") as file:
                shard = index_shard(file, name, where=f"{source.name} packed as {name}")
            storage.upload(str(local), storage.join(uri, name))
            local.unlink()
            number += 1
            yield name, shard
