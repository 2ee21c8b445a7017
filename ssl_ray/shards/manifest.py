"""What describes a data set: the manifest (a row a shard) and the index (a row a sample). See docs/formats.md.

    URI/*.tar, *.tgz, *.tar.gz     WebDataset shards (the manifest may lie elsewhere and name their folder)
    URI/manifest.parquet           name, size_bytes, count, sha256 of each shard, in order of names
    URI/index/part-00000.parquet   shard, key, offset, size, label, hash, crc32 of each sample, in shard and tar order
    URI/bad.parquet                samples that a check found bad

A part of the index holds the rows of SHARDS_PER_PART shards; a row group never crosses a shard and has at most
GROUP_ROWS rows, so that the rows of a shard are one small read. Loading costs no Python work for each shard or sample.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_ray import storage
from ssl_ray.errors import DataError

FORMAT_VERSION = 1
SHARDS_PER_PART = 1024
GROUP_ROWS = 8192
ROWS_AT_ONCE = 2**18

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
MANIFEST_SCHEMA = pa.schema([("name", pa.string()), ("size_bytes", pa.int64()), ("count", pa.int64()), ("sha256", pa.string())])
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
    """string [S], hexadecimal, or null."""
    class_names: tuple[str, ...] | None
    """Names of the classes, or None where labels are numbers or absent."""
    class_counts: tuple[int, ...] | None
    """Samples of each class, or None without labels."""
    mean_bytes: float
    """Mean size of an encoded image."""
    digest: str
    """sha256 of the manifest's content (not of where it lies)."""
    shuffled: bool = False
    """Whether the order was drawn when the shards were packed; of other shards it is not known."""
    without_image: int = 0
    """Samples in the shards that have no image and are left out of the counts."""
    shards_per_part: int = SHARDS_PER_PART

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
    without_image: int,
    shuffled: bool,
) -> None:
    """Writes manifest.parquet, which makes a data set complete. The shards' place is recorded only if elsewhere."""
    count = int(table["count"].to_numpy().sum())
    about = {
        "format_version": FORMAT_VERSION,
        "num_samples": count,
        "without_image": without_image,
        "shards_per_part": SHARDS_PER_PART,
        "shuffled": shuffled,
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
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: not a readable Parquet file ({storage.one_line(error)}). {remedy}") from error


_DIGESTED_AT_ONCE = 2**14
_DIGESTED = ("format_version", "class_names", "class_counts", "mean_bytes")


def _digest(about: dict, table: pa.Table) -> str:
    """sha256 of what the manifest says of the data: texts with line breaks between, numbers as int64."""
    known = {name: about[name] for name in _DIGESTED}
    sha = hashlib.sha256(json.dumps({**known, "data_uri": None}, sort_keys=True).encode())
    for name in ("name", "sha256"):
        for start in range(0, len(table), _DIGESTED_AT_ONCE):
            texts = table[name].slice(start, _DIGESTED_AT_ONCE).fill_null("").to_pylist()
            sha.update(("\n" * (start > 0) + "\n".join(texts)).encode())
    for name in ("size_bytes", "count"):
        sha.update(table[name].to_numpy().tobytes())
    return sha.hexdigest()


def load_manifest(uri: str) -> Manifest:
    """The manifest at `uri`. Raises DataError if there is none, or it is damaged or of another format."""
    uri = storage.absolute(uri)  # a worker may have another working directory
    at = storage.join(uri, "manifest.parquet")
    remake = f"Make it again with: ssl-ray data index {uri}"
    if not storage.exists(at):
        raise DataError(f"{uri}: no manifest.parquet here. Make one with: ssl-ray data index {uri}")
    table = _read_parquet(at, remake)
    try:
        about = json.loads((table.schema.metadata or {}).get(b"ssl_ray", b"{}"))
    except ValueError as error:
        raise DataError(f"{at}: its metadata is damaged ({error}). {remake}") from error
    if about.get("format_version") != FORMAT_VERSION or table.schema.names != MANIFEST_SCHEMA.names:
        got = about.get("format_version")
        raise DataError(f"{at}: format_version is {got}, this ssl_ray reads {FORMAT_VERSION}. {remake}")
    if about.get("num_samples", table["count"].to_numpy().sum()) != table["count"].to_numpy().sum():
        raise DataError(f"{at}: num_samples is {about['num_samples']}, its shards have another sum. {remake}")
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
        digest=_digest(about, table),
        shuffled=about.get("shuffled", False),
        without_image=about.get("without_image", 0),
        shards_per_part=about.get("shards_per_part", SHARDS_PER_PART),
    )


# The index ----------------------------------------------------------------------------------------------------------


def _part_uri(uri: str, part: int) -> str:
    return storage.join(uri, "index", f"part-{part:05d}.parquet")


def _part_uris(uri: str) -> list[str]:
    """The parts of the index that are there; a folder of that name may hold files of others."""
    names = storage.list_names(storage.join(uri, "index"))
    return [storage.join(uri, "index", name) for name in names if re.fullmatch(r"part-\d+[.]parquet", name)]


def require_writable(uri: str) -> None:
    """Raises DataError where `uri` cannot be written to, before the work of hours and not after."""
    probe = storage.join(uri, ".writing-test")
    storage.write_atomic(probe, b"")
    storage.remove(probe)


def clear(uri: str) -> None:
    """Removes the manifest first, so that nothing is believed, then the index and the list of bad samples."""
    for at in (storage.join(uri, "manifest.parquet"), storage.join(uri, "bad.parquet"), *_part_uris(uri)):
        storage.remove(at)


class IndexWriter:
    """Writes the index of a data set, shard by shard in order. A part is made in a local file: it may be large.

    An earlier index, and its manifest, go when the first part is complete: a damaged shard of 1024 leaves them as they were.
    """

    def __init__(self, uri: str):
        self.uri, self.num_shards = uri, 0
        self._undo = contextlib.ExitStack()
        self._local = f"{self._undo.enter_context(storage.scratch_folder('index'))}/part.parquet"
        self._writer: pq.ParquetWriter | None = None

    def add(self, rows: pa.Table) -> None:
        """The rows of the next shard, of INDEX_SCHEMA."""
        with storage.storage_errors(self._local, "writing the index"):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._local, INDEX_SCHEMA, compression="zstd")
            self._writer.write_table(rows, row_group_size=GROUP_ROWS)
        self.num_shards += 1
        if self.num_shards % SHARDS_PER_PART == 0:
            self._end_part()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._writer is not None:
                self._end_part()
        finally:
            with self._undo, contextlib.suppress(OSError):  # what ended the work is what the user must see
                if self._writer is not None:
                    self._writer.close()

    def _end_part(self) -> None:
        assert self._writer is not None
        with storage.storage_errors(self._local, "writing the index"):
            self._writer.close()
        self._writer = None
        part = (self.num_shards - 1) // SHARDS_PER_PART
        if part == 0:
            clear(self.uri)
        storage.upload(self._local, _part_uri(self.uri, part))


def renumber_labels(uri: str, new: np.ndarray) -> None:
    """Replaces every label i >= 0 of the index at `uri` by new[i], group by group, part by part."""
    for at in _part_uris(uri):
        filesystem, path = storage.open_storage(at)
        with storage.scratch_folder("index") as folder:
            local = f"{folder}/part.parquet"
            with storage.storage_errors(at, "numbering the classes"), filesystem.open(path, "rb") as stream:
                file = pq.ParquetFile(stream)
                with pq.ParquetWriter(local, INDEX_SCHEMA, compression="zstd") as writer:
                    for group in range(file.num_row_groups):
                        rows = file.read_row_group(group)
                        old = rows["label"].to_numpy()
                        labels = pa.array(np.where(old >= 0, new[old], -1), pa.int32())
                        writer.write_table(rows.set_column(rows.schema.get_field_index("label"), "label", labels))
            storage.upload(local, at)


def _remake(manifest: Manifest) -> str:
    elsewhere = "" if manifest.uri == manifest.data_uri else f" -o {manifest.uri}"
    return f"Make it again with: ssl-ray data index {manifest.data_uri}{elsewhere}"


_reading = threading.Lock()
"""A ParquetFile is kept and used by one thread at a time: what it buffers ahead belongs to one call."""


@functools.lru_cache(maxsize=4)
def _open_part(manifest: Manifest, part: int) -> pq.ParquetFile:
    at = _part_uri(manifest.uri, part)
    filesystem, path = storage.open_storage(at)
    with storage.storage_errors(at, "reading the index"):
        filesystem.invalidate_cache(path)  # the size of an earlier index would be taken for this one's
        try:
            # pyarrow asks for exactly the ranges of the row groups, so that nothing need be read ahead
            file = storage.ask(at, lambda: pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True))
        except pa.ArrowException as error:
            raise DataError(f"{at}: damaged ({storage.one_line(error)}). {_remake(manifest)}") from error
    counts = manifest.counts[part * manifest.shards_per_part : (part + 1) * manifest.shards_per_part]
    if file.metadata.num_rows != counts.sum() or file.metadata.num_row_groups != _groups(counts).sum():
        raise DataError(f"{at}: holds {file.metadata.num_rows} samples, the manifest has {counts.sum()}. {_remake(manifest)}")
    return file


def _groups(counts: np.ndarray) -> np.ndarray:
    return -(-counts // GROUP_ROWS)


def _read_groups(manifest: Manifest, part: int, groups: range, columns: list[str] | None = None) -> pa.Table:
    file, at = _open_part(manifest, part), _part_uri(manifest.uri, part)
    with storage.storage_errors(at, "reading the index"), _reading:
        try:
            return storage.ask(at, lambda: file.read_row_groups(list(groups), columns=columns, use_threads=False))
        except pa.ArrowException as error:
            raise DataError(f"{at}: damaged ({storage.one_line(error)}). {_remake(manifest)}") from error


@functools.lru_cache(maxsize=64)
def _shard_rows(manifest: Manifest, shard: int) -> pa.Table:
    part, per_part = shard // manifest.shards_per_part, manifest.shards_per_part
    first = int(_groups(manifest.counts[part * per_part : shard]).sum())
    number = int(_groups(manifest.counts[shard : shard + 1])[0])
    return _read_groups(manifest, part, range(first, first + number)).combine_chunks()


def index_rows(manifest: Manifest, shard: int, columns: list[str] | None = None) -> pa.Table:
    """The index rows of one shard, in tar order; those of the last shards asked for are kept."""
    table = _shard_rows(manifest, shard)
    return table if columns is None else table.select(columns)


def iter_index(manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    """The whole index in order, a bounded table at a time."""
    for part in range(-(-len(manifest.counts) // manifest.shards_per_part)):
        counts = manifest.counts[part * manifest.shards_per_part : (part + 1) * manifest.shards_per_part]
        # Row groups until about ROWS_AT_ONCE rows: with many small shards a group at a time would be slow.
        per_group = np.full(int(_groups(counts).sum()), GROUP_ROWS)
        per_group[np.cumsum(_groups(counts)) - 1] = counts - (_groups(counts) - 1) * GROUP_ROWS
        together = (np.cumsum(per_group) - 1) // ROWS_AT_ONCE
        borders = np.flatnonzero(np.diff(together, prepend=-1, append=together[-1] + 1))
        for first, stop in itertools.pairwise(borders.tolist()):
            yield _read_groups(manifest, part, range(first, stop), columns)


def write_bad_samples(uri: str, rows: list[dict]) -> None:
    """Writes bad.parquet; without any rows there is to be none."""
    if not rows:
        storage.remove(storage.join(uri, "bad.parquet"))
        return
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
