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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_ray import storage
from ssl_ray.errors import DataError

FORMAT_VERSION = 1
SHARDS_PER_PART = 160
"""So that Arrow has the footer of a part, of some 392 bytes a shard, by its first request, of 64 KiB."""
OPEN_PARTS = 64
"""Parts whose footers a process keeps."""
GROUP_ROWS = 8192
ROWS_AT_ONCE = 2**18
MAX_SHARDS = 2**24
MAX_MEMBER = 2**28
"""Bytes of an image or a label as stored; one that says more is refused before it is read."""
MAX_UNPACKED = 2**31
"""Bytes of a gzip'd shard when decompressed: it is held in memory whole."""

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


_DAMAGED = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises for a file that is damaged."""


def _open_parquet(uri: str, remedy: str) -> pq.ParquetFile:
    data = storage.read_bytes(uri)
    try:
        return pq.ParquetFile(io.BytesIO(data))
    except _DAMAGED as error:
        raise DataError(f"{uri}: not a readable Parquet file ({storage.one_line(error)}). {remedy}") from error


def _read_table(file: pq.ParquetFile, schema: pa.Schema, *, uri: str, remedy: str, nulls: tuple[str, ...] = ()) -> pa.Table:
    """A table of MAX_SHARDS rows at most, with the columns of `schema`, values in all but those named in `nulls`."""
    rows, got = file.metadata.num_rows, file.schema_arrow
    if rows > MAX_SHARDS or not got.equals(schema):
        columns, expected = (", ".join(f"{field.name} {field.type}" for field in one) for one in (got, schema))
        raise DataError(f"{uri}: has {rows} rows of {columns[:200]}, expected at most {MAX_SHARDS} of {expected}. {remedy}")
    try:
        table = file.read()
        table.validate(full=True)
    except _DAMAGED as error:
        raise DataError(f"{uri}: damaged ({storage.one_line(error)}). {remedy}") from error
    if any(table[name].null_count for name in schema.names if name not in nulls):
        raise DataError(f"{uri}: damaged: values are missing. {remedy}")
    return table


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
        if storage.is_local(uri) and not storage.exists(uri):
            raise DataError(f"{uri}: there is no such folder. Give one of shards; `ssl-ray data pack` makes shards of images.")
        raise DataError(f"{uri}: no manifest.parquet here. Make one with: ssl-ray data index {uri}")
    file = _open_parquet(at, remake)
    about: Any
    try:
        about = json.loads((file.schema_arrow.metadata or {}).get(b"ssl_ray", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: its metadata is damaged ({error}). {remake}") from error
    got = about.get("format_version") if isinstance(about, dict) else about
    if not isinstance(about, dict) or got != FORMAT_VERSION:
        raise DataError(f"{at}: format_version is {str(got)[:40]}, this ssl_ray reads {FORMAT_VERSION}. {remake}")
    table = _read_table(file, MANIFEST_SCHEMA, uri=at, remedy=remake, nulls=("sha256",))
    total = int(table["count"].to_numpy().sum())
    about = {"num_samples": total, "without_image": 0, "shuffled": False, "shards_per_part": SHARDS_PER_PART} | about
    wrong = _wrong_shards(table) or _wrong_about(about)
    if wrong is not None:
        raise DataError(f"{at}: damaged: {wrong}. {remake}")
    if about["num_samples"] != total:
        raise DataError(f"{at}: num_samples is {about['num_samples']}, its shards have {total}. {remake}")
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
        shuffled=about["shuffled"],
        without_image=about["without_image"],
        shards_per_part=about["shards_per_part"],
    )


def _wrong_about(about: dict[str, Any]) -> str | None:
    """What is wrong with the metadata of a manifest."""
    names, counts = about.get("class_names"), about.get("class_counts")
    sound = {
        "num_samples": _whole(about.get("num_samples"), 0),
        "without_image": _whole(about.get("without_image"), 0),
        "shards_per_part": _whole(about.get("shards_per_part"), 1),
        "shuffled": isinstance(about.get("shuffled"), bool),
        "mean_bytes": isinstance(about.get("mean_bytes"), int | float) and 0 <= about["mean_bytes"] <= MAX_MEMBER,
        "data_uri": "data_uri" in about and isinstance(about["data_uri"] or "", str),
        "class_counts": counts is None
        or (isinstance(counts, list) and all(_whole(count, 0) for count in counts) and any(counts)),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
    }
    sound["class_names"] = sound["class_names"] and (names is None or len(names) == len(counts or ()))
    return next((f"{name} is {str(about.get(name))[:40]!r}" for name, well in sound.items() if not well), None)


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**62


def _wrong_shards(table: pa.Table) -> str | None:
    """What is wrong with the rows of a manifest. A name is that of a file, so that nothing is read from another folder."""
    names, sizes, counts = table["name"].combine_chunks(), table["size_bytes"].to_numpy(), table["count"].to_numpy()
    if len(names) and pc.any(pc.or_(pc.match_substring(names, "/"), pc.match_substring(names, "\0"))).as_py():
        return "a shard's name is no file name"
    if not pc.all(pc.less(names[:-1], names[1:]), min_count=0).as_py():
        return "its shards are not in the order of their names"
    for name, values in (("size_bytes", sizes), ("count", counts)):
        if len(values) and not 0 <= values.min() <= values.max() < 2**62 // len(values):
            return f"{name} is between {values.min()} and {values.max()}"
    if len(names) and sizes[pc.ends_with(names, "gz").to_numpy(zero_copy_only=False)].max(initial=0) > MAX_UNPACKED:
        return f"a gzip'd shard of more than {MAX_UNPACKED} bytes"
    return None


# The index ----------------------------------------------------------------------------------------------------------


_COMPACT: dict[str, Any] = {"compression": "zstd", "write_statistics": False, "use_dictionary": False}
"""Three quarters of the bytes of Arrow's own choice, half of the footer's."""


def _part_uri(uri: str, part: int) -> str:
    return storage.join(uri, "index", f"part-{part:05d}.parquet")


def _part_uris(uri: str) -> list[str]:
    """The parts of the index that are there; a folder of that name may hold files of others."""
    names = storage.list_names(storage.join(uri, "index"))
    return [storage.join(uri, "index", name) for name in names if re.fullmatch(r"part-\d+[.]parquet", name)]


def clear(uri: str) -> None:
    """Removes the manifest first, so that nothing is believed, then the index and the list of bad samples."""
    for at in (storage.join(uri, "manifest.parquet"), storage.join(uri, "bad.parquet"), *_part_uris(uri)):
        storage.remove(at)


class IndexWriter:
    """Writes the index of a data set, shard by shard in order. A part is made in a local file: it may be large.

    An earlier index, and its manifest, go when the first part is complete: a damaged shard before leaves them as they were.
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
                self._writer = pq.ParquetWriter(self._local, INDEX_SCHEMA, **_COMPACT)
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
                with pq.ParquetWriter(local, INDEX_SCHEMA, **_COMPACT) as writer:
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


@functools.lru_cache(maxsize=OPEN_PARTS)
def _open_part(manifest: Manifest, part: int) -> pq.ParquetFile:
    at = _part_uri(manifest.uri, part)
    filesystem, path = storage.open_storage(at)
    with storage.storage_errors(at, "reading the index"):
        filesystem.invalidate_cache(path)  # the size of an earlier index would be taken for this one's
        try:
            # pyarrow asks for exactly the ranges of the row groups, so that nothing need be read ahead
            file = storage.ask(at, lambda: pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True))
        except FileNotFoundError as error:
            raise DataError(f"{at}: not there. {_remake(manifest)}") from error
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"{at}: damaged ({storage.one_line(error)}). {_remake(manifest)}") from error
    if not file.schema_arrow.equals(INDEX_SCHEMA):
        raise DataError(f"{at}: damaged: its columns are others. {_remake(manifest)}")
    counts = manifest.counts[part * manifest.shards_per_part : (part + 1) * manifest.shards_per_part]
    for what, found, expected in (
        ("samples", file.metadata.num_rows, counts.sum()),
        ("row groups", file.metadata.num_row_groups, _groups(counts).sum()),
    ):
        if found != expected:
            raise DataError(f"{at}: holds {found} {what}, expected {expected} by the manifest. {_remake(manifest)}")
    return file


def _groups(counts: np.ndarray) -> np.ndarray:
    return -(-counts // GROUP_ROWS)


def _read_groups(manifest: Manifest, part: int, groups: range, shard: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Row groups of a part, the index rows of the shards int64 [n]."""
    file, at = _open_part(manifest, part), _part_uri(manifest.uri, part)
    with storage.storage_errors(at, "reading the index"), _reading:
        try:
            rows = storage.ask(at, lambda: file.read_row_groups(list(groups), columns=columns, use_threads=False))
            rows.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"{at}: damaged ({storage.one_line(error)}). {_remake(manifest)}") from error
    wrong = _wrong_rows(manifest, rows, shard)
    if wrong is not None:
        raise DataError(f"{at}: damaged: {wrong}. {_remake(manifest)}")
    return rows


def _wrong_rows(manifest: Manifest, rows: pa.Table, shard: np.ndarray) -> str | None:
    """What is wrong with index rows that are to be those of the shards int64 [n]."""
    if rows.num_rows != len(shard) or any(rows[name].null_count for name in rows.column_names):
        return "values are missing"
    if not len(shard):
        return None
    column = {name: rows[name].to_numpy() for name in rows.column_names if name != "key"}
    if "shard" in column and not np.array_equal(column["shard"], shard):
        return "its rows are of other shards"
    classes = len(manifest.class_counts or ())
    if "label" in column and not -1 <= column["label"].min() <= column["label"].max() < classes:
        return f"its labels are not those of {classes} classes"
    if "offset" in column and "size" in column:
        distinct, of = np.unique(shard, return_inverse=True)
        gzipped = np.array([is_gzip(manifest.names[number].as_py()) for number in distinct.tolist()])
        end = np.where(gzipped, MAX_UNPACKED, manifest.sizes[distinct])[of]
        offset, size = column["offset"], column["size"]
        if offset.min() < 0 or size.min() < 0 or size.max() > MAX_MEMBER or (offset > end - size).any():
            return "an image lies beyond its shard"
    return None


@functools.lru_cache(maxsize=64)
def _shard_rows(manifest: Manifest, shard: int) -> pa.Table:
    part, per_part = shard // manifest.shards_per_part, manifest.shards_per_part
    first = int(_groups(manifest.counts[part * per_part : shard]).sum())
    number = int(_groups(manifest.counts[shard : shard + 1])[0])
    return _read_groups(manifest, part, range(first, first + number), np.full(manifest.counts[shard], shard)).combine_chunks()


def index_rows(manifest: Manifest, shard: int, columns: list[str] | None = None) -> pa.Table:
    """The index rows of one shard, in tar order; those of the last shards asked for are kept."""
    table = _shard_rows(manifest, shard)
    return table if columns is None else table.select(columns)


def iter_index(manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    """The whole index in order, a bounded table at a time."""
    for part in range(-(-len(manifest.counts) // manifest.shards_per_part)):
        counts = manifest.counts[part * manifest.shards_per_part : (part + 1) * manifest.shards_per_part]
        if not counts.sum():
            continue
        _open_part(manifest, part)  # which believes no count
        # Row groups until about ROWS_AT_ONCE rows: with many small shards a group at a time would be slow.
        per_group = np.full(int(_groups(counts).sum()), GROUP_ROWS)
        per_group[np.cumsum(_groups(counts)) - 1] = counts - (_groups(counts) - 1) * GROUP_ROWS
        together = (np.cumsum(per_group) - 1) // ROWS_AT_ONCE
        borders = np.flatnonzero(np.diff(together, prepend=-1, append=together[-1] + 1))
        of_group = np.repeat(np.arange(len(counts)), _groups(counts)) + part * manifest.shards_per_part
        for first, stop in itertools.pairwise(borders.tolist()):
            of_row = np.repeat(of_group[first:stop], per_group[first:stop])
            yield _read_groups(manifest, part, range(first, stop), of_row, columns)


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
    remake = f"Make it again with: ssl-ray data check {manifest.uri}"
    table = _read_table(_open_parquet(at, remake), BAD_SCHEMA, uri=at, remedy=remake)
    shard, row = table["shard"].to_numpy().astype(np.int64), table["row"].to_numpy()
    known = (shard >= 0) & (shard < len(manifest.counts))
    if not known.all() or (row < 0).any() or (row >= manifest.counts[shard]).any():
        raise DataError(f"{at}: names samples that the data set does not have. {remake}")
    return shard, row


def bad_digest(manifest: Manifest) -> str:
    """sha256 of the list of bad samples; empty without any."""
    shards, rows = bad_samples(manifest)
    order = np.lexsort((rows, shards))
    return hashlib.sha256(np.stack([shards, rows])[:, order].tobytes()).hexdigest() if len(rows) else ""
