"""What describes a data set: the manifest (a row a shard) and the index (a row a sample). The formats are in docs/formats.md.

    URI/*.tar, *.tgz, *.tar.gz     WebDataset shards (the manifest may lie elsewhere and name their folder)
    URI/manifest.parquet           name, size_bytes, count, sha256 of each shard, in order of names
    URI/index/part-00000.parquet   shard, key, offset, size, label, hash, crc32 of each sample, in shard and tar order
    URI/bad.parquet                samples that a check found bad

A part of the index holds the rows of SHARDS_PER_PART shards; a row group never crosses a shard and has at most GROUP_ROWS
rows, so that the rows of a shard are one small read. Nothing here costs Python work for each shard or sample.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_ray import storage
from ssl_ray.errors import DataError

FORMAT_VERSION = 1
SHARDS_PER_PART = 1024
GROUP_ROWS = 8192

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("hash", pa.uint64()),
        ("crc32", pa.uint32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [("name", pa.string()), ("size_bytes", pa.int64()), ("count", pa.int64()), ("sha256", pa.string())]
)
BAD_SCHEMA = pa.schema([("shard", pa.int32()), ("row", pa.int64()), ("key", pa.string()), ("reason", pa.string())])


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    uri: str
    """Where the manifest and the index are."""
    data_uri: str
    """Where the shards are."""
    names: pa.Array
    """string [S], relative to data_uri, sorted."""
    sizes: np.ndarray
    """int64 [S], bytes."""
    counts: np.ndarray
    """int64 [S], samples."""
    sha256: pa.Array
    """string [S], hexadecimal."""
    class_names: tuple[str, ...] | None
    """Names of the classes, or None where labels are numbers or absent."""
    class_counts: tuple[int, ...] | None
    """Samples of each class, or None without labels."""
    mean_bytes: float
    """Mean size of an encoded image."""
    digest: str
    """sha256 of the manifest's content (not of where it lies)."""

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())


def is_gzip(name: str) -> bool:
    return name.endswith("gz")


def write_manifest(
    uri: str,
    *,
    data_uri: str,
    table: pa.Table,
    class_names: list[str] | None,
    class_counts: list[int] | None,
    image_bytes: int,
) -> None:
    """Writes manifest.parquet: the act that makes a data set complete. The shards' place is recorded only if elsewhere."""
    count = sum(table["count"].to_pylist())
    about = {
        "format_version": FORMAT_VERSION,
        "class_names": class_names,
        "class_counts": class_counts,
        "mean_bytes": image_bytes / max(1, count),
        "data_uri": None if storage.absolute(data_uri) == storage.absolute(uri) else storage.absolute(data_uri),
    }
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"ssl_ray": json.dumps(about)}), sink, compression="zstd")
    storage.write_atomic(storage.join(uri, "manifest.parquet"), sink.getvalue())


def _read_parquet(uri: str, remedy: str) -> pa.Table:
    data = storage.read_bytes(uri)
    try:
        return pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: not a readable Parquet file ({error}). {remedy}") from error


def load_manifest(uri: str) -> Manifest:
    """The manifest at `uri`. Raises DataError if there is none, or it is damaged or of another format."""
    at = storage.join(uri, "manifest.parquet")
    remake = f"Make it again with: ssl-ray data index {uri}"
    if not storage.exists(at):
        raise DataError(f"{uri}: no manifest.parquet here. Make one with: ssl-ray data index {uri}")
    table = _read_parquet(at, remake)
    about = json.loads((table.schema.metadata or {}).get(b"ssl_ray", b"{}"))
    if about.get("format_version") != FORMAT_VERSION or table.schema.names != MANIFEST_SCHEMA.names:
        got = about.get("format_version")
        raise DataError(f"{at}: format_version is {got}, this ssl_ray reads {FORMAT_VERSION}. {remake}")
    sha = hashlib.sha256(json.dumps({**about, "data_uri": None}, sort_keys=True).encode())
    for name in ("name", "sha256"):
        sha.update("\n".join(table[name].to_pylist()).encode())
    for name in ("size_bytes", "count"):
        sha.update(table[name].to_numpy().tobytes())
    return Manifest(
        uri=uri,
        data_uri=about["data_uri"] or uri,
        names=table["name"].combine_chunks(),
        sizes=table["size_bytes"].to_numpy(),
        counts=table["count"].to_numpy(),
        sha256=table["sha256"].combine_chunks(),
        class_names=None if about["class_names"] is None else tuple(about["class_names"]),
        class_counts=None if about["class_counts"] is None else tuple(about["class_counts"]),
        mean_bytes=about["mean_bytes"],
        digest=sha.hexdigest(),
    )


# The index ----------------------------------------------------------------------------------------------------------


def _part_uri(uri: str, part: int) -> str:
    return storage.join(uri, "index", f"part-{part:05d}.parquet")


class IndexWriter:
    """Writes the index of a data set, shard by shard in order."""

    def __init__(self, uri: str):
        self.uri, self.num_shards = uri, 0
        self._sink, self._writer = io.BytesIO(), None  # type: tuple[io.BytesIO, pq.ParquetWriter | None]

    def add(self, rows: pa.Table) -> None:
        """The rows of the next shard, of INDEX_SCHEMA."""
        if self._writer is None:
            self._sink = io.BytesIO()
            self._writer = pq.ParquetWriter(self._sink, INDEX_SCHEMA, compression="zstd")
        if rows.num_rows:
            self._writer.write_table(rows, row_group_size=GROUP_ROWS)
        self.num_shards += 1
        if self.num_shards % SHARDS_PER_PART == 0:
            self._end_part()

    def close(self) -> None:
        if self._writer is not None:
            self._end_part()

    def _end_part(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        part = (self.num_shards - 1) // SHARDS_PER_PART
        storage.write_atomic(_part_uri(self.uri, part), self._sink.getvalue())


def renumber_labels(uri: str, new: np.ndarray) -> None:
    """Replaces every label i >= 0 of the index at `uri` by new[i], part by part."""
    for name in storage.list_names(storage.join(uri, "index")):
        at = storage.join(uri, "index", name)
        file, sink = pq.ParquetFile(io.BytesIO(storage.read_bytes(at))), io.BytesIO()
        with pq.ParquetWriter(sink, INDEX_SCHEMA, compression="zstd") as writer:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                old = rows["label"].to_numpy()
                column = pa.array(np.where(old >= 0, new[old], -1), pa.int32())
                writer.write_table(rows.set_column(rows.schema.get_field_index("label"), "label", column))
        storage.write_atomic(at, sink.getvalue())


@functools.lru_cache(maxsize=4)
def _open_part(uri: str, digest: str, part: int) -> pq.ParquetFile:
    at = _part_uri(uri, part)
    filesystem, path = storage.open_storage(at)
    with storage.storage_errors(at, "reading the index"):
        try:
            return pq.ParquetFile(filesystem.open(path, "rb"))
        except pa.ArrowInvalid as error:
            raise DataError(f"{at}: damaged ({error}). Make it again with: ssl-ray data index {uri}") from error


def _groups(counts: np.ndarray) -> np.ndarray:
    return -(-counts // GROUP_ROWS)


@functools.lru_cache(maxsize=64)
def _shard_rows(manifest: Manifest, shard: int) -> pa.Table:
    part = shard // SHARDS_PER_PART
    before = manifest.counts[part * SHARDS_PER_PART : shard]
    first, number = int(_groups(before).sum()), int(_groups(manifest.counts[shard : shard + 1])[0])
    file, at = _open_part(manifest.uri, manifest.digest, part), _part_uri(manifest.uri, part)
    with storage.storage_errors(at, "reading the index"):
        table = file.read_row_groups(list(range(first, first + number)))
    if table.num_rows != manifest.counts[shard]:
        raise DataError(
            f"{at}: holds {table.num_rows} samples of {manifest.names[shard]}, the manifest {manifest.counts[shard]}. "
            f"Make it again with: ssl-ray data index {manifest.uri}"
        )
    return table


def index_rows(manifest: Manifest, shard: int, columns: list[str] | None = None) -> pa.Table:
    """The index rows of one shard, in tar order; those of the last shards asked for are kept."""
    table = _shard_rows(manifest, shard)
    return table if columns is None else table.select(columns)


def iter_index(manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    """The whole index in order, a bounded table at a time."""
    for part in range(-(-len(manifest.counts) // SHARDS_PER_PART)):
        file, at = _open_part(manifest.uri, manifest.digest, part), _part_uri(manifest.uri, part)
        with storage.storage_errors(at, "reading the index"):
            for batch in file.iter_batches(batch_size=1 << 18, columns=columns):
                yield pa.Table.from_batches([batch])


def write_bad_samples(uri: str, rows: list[dict]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=BAD_SCHEMA), sink)
    storage.write_atomic(storage.join(uri, "bad.parquet"), sink.getvalue())


def bad_samples(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Shards and rows, int64, of the samples that a check found bad; they are left out of runs that begin."""
    at = storage.join(manifest.uri, "bad.parquet")
    if not storage.exists(at):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    table = _read_parquet(at, f"Make it again with: ssl-ray data check {manifest.uri}")
    return table["shard"].to_numpy().astype(np.int64), table["row"].to_numpy().astype(np.int64)


def bad_digest(manifest: Manifest) -> str:
    """sha256 of the list of bad samples; empty without any."""
    shards, rows = bad_samples(manifest)
    order = np.lexsort((rows, shards))
    return hashlib.sha256(np.stack([shards, rows])[:, order].tobytes()).hexdigest() if len(rows) else ""
