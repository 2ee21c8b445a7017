"""The index of WebDataset shards that are there: one streaming pass over each.

A sample is the members of a tar that share a key: the path up to the first dot of the file name, so that sub-folders
are part of it. Its image is the first of .jpg, .jpeg, .png, .webp that it has; its label comes from .cls, else (if there
is .json) from "label" in it, else from .txt if that is one short line. Labels are class numbers, or class names, which are
then numbered in alphabetical order over the whole data set.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ssl_ray import storage
from ssl_ray.each import Each, in_threads
from ssl_ray.errors import DataError
from ssl_ray.shards.manifest import (
    INDEX_SCHEMA,
    MANIFEST_SCHEMA,
    MAX_MEMBER,
    MAX_UNPACKED,
    IndexWriter,
    Manifest,
    is_gzip,
    load_manifest,
    renumber_labels,
    write_manifest,
)
from ssl_ray.shards.select import sample_hash

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json", "txt")
SUFFIXES = (".tar", ".tgz", ".tar.gz")
MAX_CLASS_NAME = 64
"""Longer text is a caption, not a class."""
MAX_LABEL = 999_999
"""Larger numbers are ids, not classes; the manifest holds a count for each class up to the largest."""
MAX_NAME = 1024
"""Characters of a member's name or a class's, as of a key in S3."""
_HEADERS = 2**20
"""Bytes of headers before a member: a longer name, sparse map or the like is no name, but fills the memory."""
_TAIL = 2**16

Progress = Callable[[int, int | None], None]


class _Hashing:
    """A stream that hashes what is read from it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data


class _Tail:
    """A stream that keeps its last bytes: tarfile reads up to one record (10 KiB) beyond the end of the archive.

    It ends with an error beyond `limit`, and where tarfile skips on and on after the end, as a header of 2^60 bytes asks for.
    """

    def __init__(self, file: Any, *, most: int | None):
        self.file, self.size, self.last = file, 0, b""
        self.most, self.ended = most, False
        self.limit: float = _HEADERS

    def read(self, size: int = -1) -> bytes:
        if self.ended:
            raise EOFError("it ends within a member")
        data = self.file.read(size)
        self.size, self.ended = self.size + len(data), not data
        if self.most is not None and self.size > self.most:
            raise tarfile.ReadError(f"more than {self.most} bytes when decompressed: repack it in smaller shards")
        if self.size > self.limit:
            raise tarfile.ReadError(f"headers of more than {_HEADERS} bytes")
        self.last = data if len(data) >= _TAIL else (self.last + data)[-_TAIL:]
        return data


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What one pass over a shard finds."""

    rows: pa.Table
    """INDEX_SCHEMA, but for `label`: -1 where `labels` has a name."""
    labels: list[int | str | None]
    without_image: int
    sha256: str
    size_bytes: int


def shard_names(uri: str) -> list[str]:
    """Names of the shards directly below `uri`, sorted. Raises DataError if there are none."""
    names = [name for name in storage.list_names(uri) if name.endswith(SUFFIXES)]
    for name in names:
        if not is_text(name):
            raise DataError(f"{uri}: the name of {name!r} is not UTF-8. Rename it.")
    if not names:
        raise DataError(f"{uri}: no shards here (*.tar, *.tgz, *.tar.gz). Give the folder that holds them.")
    return names


_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
"""Key and extension, by WebDataset's rule: 'a.b/c.d.jpg' is ('a.b/c', 'd.jpg'). Others, as '.c.jpg', are no samples."""


def _members(stream: _Tail, where: str) -> Iterator[tuple[str, str, int, bytes]]:
    """(key, extension, offset of the data, data) of each file in a tar that is read from start to end.

    The data of files that are neither image nor label is not read: b"".
    """
    try:
        tar: Any = tarfile.open(fileobj=stream, mode="r|")  # type: ignore[call-overload]  # noqa: SIM115
        for member in tar:
            stream.limit = tar.offset + _HEADERS
            tar.members = []  # else they pile up
            if len(member.name) > MAX_NAME:
                raise DataError(
                    f"{where}: the name {member.name[:40]!r}... has {len(member.name)} characters, expected at most {MAX_NAME}. "
                    "Write the shard again with shorter names."
                )
            fits = _NAME.match(member.name)
            if fits is None or member.isdir():
                continue
            key, extension = fits[1], fits[2].lower()
            wanted = extension in IMAGES or extension in LABELS
            if wanted and (member.issparse() or not member.isreg()):
                raise DataError(
                    f"{where}: {member.name} is a link or a sparse file, which holds no bytes to read. "
                    "Make the tar again with --hard-dereference and --dereference, without --sparse."
                )
            if wanted and not 0 <= member.size <= MAX_MEMBER:
                raise DataError(
                    f"{where}: {member.name} has {member.size} bytes, expected at most {MAX_MEMBER}. "
                    "Leave it out, or write the shard again with a smaller image."
                )
            data = tar.extractfile(member).read() if wanted else b""
            if wanted and len(data) != member.size:
                raise DataError(f"{where}: truncated inside {member.name}. Copy the shard again from its source.")
            yield key, extension, member.offset_data, data
        end = tar.offset
        stream.limit = float("inf")
        # tarfile takes a broken header, or none, after the first for the end: only zeros are the end.
        clean = not stream.last[max(0, len(stream.last) - (stream.size - end)) :].strip(b"\0")
        while clean and not stream.ended:
            clean = not stream.read(2**20).strip(b"\0")
    # Of damaged headers tarfile raises many kinds.
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, LookupError, TypeError, ArithmeticError,
            AttributeError, RecursionError) as error:  # fmt: skip
        reason = storage.one_line(error)
        raise DataError(f"{where}: truncated or not a tar ({reason}). Copy the shard again from its source.") from error
    if stream.size - end < tarfile.BLOCKSIZE or not clean:
        raise DataError(f"{where}: truncated or damaged: no end-of-archive mark after {end} bytes. Copy it again.")


def index_shard(file: BinaryIO, name: str, *, where: str) -> ShardIndex:
    """Reads the shard `name`, which lies at `where`, from start to end.

    Raises DataError for a truncated shard, one without images, a key that appears again after another (interleaved) or
    twice with the same extension, or a label that is no label; each names shard and key.
    """
    outer = _Hashing(file)
    inner = gzip.GzipFile(fileobj=outer, mode="rb") if is_gzip(name) else outer  # type: ignore[call-overload]
    stream = _Tail(inner, most=MAX_UNPACKED if is_gzip(name) else None)
    columns: dict[str, list[Any]] = {field: [] for field in ("key", "offset", "size", "hash", "crc32")}
    labels: list[int | str | None] = []
    without_image = 0
    seen: set[str] = set()
    key, parts = None, {}  # type: tuple[str | None, dict[str, tuple[int, bytes]]]

    def end_sample() -> None:
        nonlocal without_image
        image = next((parts[extension] for extension in IMAGES if extension in parts), None)
        if key is None or image is None:
            without_image += key is not None
            return
        offset, data = image
        values = (key, offset, len(data), sample_hash(name, key), zlib.crc32(data))
        for field, value in zip(columns, values, strict=True):
            columns[field].append(value)
        labels.append(_label(parts, f"{where}: {key}"))

    for own, extension, offset, data in _members(stream, where):
        if own != key:
            end_sample()
            if own in seen:
                raise DataError(
                    f"{where}: key {own} appears again after {key}: interleaved or double samples. "
                    "Write the members of a sample side by side, each key once, or pack from the images."
                )
            if not is_text(own):
                raise DataError(f"{where}: the name of {own!r} is not UTF-8. Rename it and make the tar again.")
            seen.add(own)
            key, parts = own, {}
        if extension in parts:
            raise DataError(f"{where}: key {own} has two .{extension} members. Write each key once within a shard.")
        if extension in IMAGES or extension in LABELS:
            parts[extension] = (offset, data)
    end_sample()
    while outer.read(1 << 20):
        pass
    if not labels:
        raise DataError(f"{where}: no image in it (.jpg .jpeg .png .webp). Leave this file out of the folder.")
    columns |= {"shard": [0] * len(labels), "label": [-1] * len(labels)}
    rows = pa.table({field.name: pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA})
    return ShardIndex(rows, labels, without_image, outer.sha256.hexdigest(), outer.size)


def is_text(name: str) -> bool:
    """False where bytes that are no UTF-8 were taken into a string as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(parts: dict[str, tuple[int, bytes]], where: str) -> int | str | None:
    if "cls" in parts:
        text = _text(parts["cls"][1], where)
        if not text or "\n" in text:
            raise DataError(f"{where}: .cls holds {text[:40]!r}, expected a class number or name. Write it again.")
    elif "json" in parts:
        try:
            value = json.loads(parts["json"][1])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: .json is not JSON ({error}). Write the shard again.") from error
        value = value.get("label") if isinstance(value, dict) else None
        if value is None or isinstance(value, bool) or not isinstance(value, int | str):
            return None
        text = str(value)
    elif "txt" in parts:
        text = _text(parts["txt"][1], where)
        if not text or "\n" in text or len(text) > MAX_CLASS_NAME:
            return None
    else:
        return None
    if not _INTEGER.fullmatch(text):
        if len(text) > MAX_NAME or not is_text(text):
            raise DataError(f"{where}: the class {text[:40]!r}... is no text of at most {MAX_NAME} characters. Write it again.")
        return text
    if len(text) > 20 or not 0 <= int(text) <= MAX_LABEL:
        raise DataError(f"{where}: label out of range: got {text[:40]}, expected 0 to {MAX_LABEL}. Number the classes.")
    return int(text)


_INTEGER = re.compile(r"[+-]?[0-9]+")
"""Not int(), to which the class name 1_000 is a number."""


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the label is not UTF-8 text. Write it again as UTF-8.") from error


# Data sets ----------------------------------------------------------------------------------------------------------


def _pass_over(uri: str, name: str) -> ShardIndex:
    at = storage.join(uri, name)
    filesystem, path = storage.open_storage(at)
    with storage.storage_errors(at, "reading"), filesystem.open(path, "rb", block_size=2**22) as file:
        return index_shard(file, name, where=at)


def index(
    uri: str, *, output: str | None = None, each: Each = in_threads, progress: Progress = lambda done, total: None
) -> Manifest:
    """Makes manifest and index for the shards below `uri`, there or below `output`; replaces earlier ones when it succeeds.

    each: how the shards are gone through, e.g. over a cluster (ray_map.over_cluster).
    A manifest of the very same shards hands its names of numbered classes on, which `data pack` wrote into it alone.
    Raises DataError as index_shard does, and where some labels are numbers and others names.
    """
    names, output = shard_names(uri), output or uri
    earlier = _manifest_at(uri) or _manifest_at(output)
    try:
        storage.require_writable(output)
    except DataError as error:
        raise DataError(f"{error} Manifest and index may lie elsewhere: -o OTHER_URI.") from error
    return write_data_set(
        output,
        data_uri=uri,
        shards=zip(names, each(functools.partial(_pass_over, uri), names), strict=True),
        class_names=None,
        shuffled=False,
        earlier=earlier,
        progress=lambda done: progress(done, len(names)),
    )


def _manifest_at(uri: str) -> Manifest | None:
    with contextlib.suppress(DataError):  # none, or a damaged one
        return load_manifest(uri)
    return None


def write_data_set(
    uri: str,
    *,
    data_uri: str,
    shards: Iterator[tuple[str, ShardIndex]],
    class_names: list[str] | None,
    shuffled: bool,
    earlier: Manifest | None = None,
    progress: Callable[[int], None],
) -> Manifest:
    """Writes index and manifest from the passes over the shards, by name in order, as they come.

    class_names: of labels that are numbers; where labels are names, they are numbered in alphabetical order instead.
    earlier: a manifest that knows `class_names` and `shuffled`, if its shards have the same bytes.
    """
    found: dict[str, int] = {}
    has_numbers, image_bytes, without_image = False, 0, 0
    columns: dict[str, list[Any]] = {field.name: [] for field in MANIFEST_SCHEMA}
    counts = np.zeros(len(class_names or ()), np.int64)
    with IndexWriter(uri) as writer:
        for number, (name, shard) in enumerate(shards):
            texts = {label for label in shard.labels if isinstance(label, str)}
            has_numbers = has_numbers or any(isinstance(label, int) for label in shard.labels)
            if has_numbers and (texts or found):
                one = next(iter(texts or found))
                raise DataError(
                    f"{data_uri}: some labels are numbers, others names ({one!r}, by {name}). Use one kind for all shards."
                )
            for text in sorted(texts - found.keys()):
                found[text] = len(found)
            numbers = [found[label] if isinstance(label, str) else -1 if label is None else label for label in shard.labels]
            labels = np.array(numbers, np.int32)
            own = np.bincount(labels[labels >= 0], minlength=len(counts))
            counts = own + np.pad(counts, (0, len(own) - len(counts)))
            rows = _set(shard.rows, "label", labels)
            writer.add(_set(rows, "shard", np.full(rows.num_rows, number, np.int32)))
            image_bytes += int(rows["size"].to_numpy().sum())
            without_image += shard.without_image
            for field, value in zip(columns, (name, shard.size_bytes, rows.num_rows, shard.sha256), strict=True):
                columns[field].append(value)
            progress(number + 1)
    if found:
        class_names = sorted(found)
        place = {text: i for i, text in enumerate(class_names)}
        new = np.array([place[text] for text in found], np.int32)
        renumber_labels(uri, new)
        counts = counts[np.argsort(new)]
    table = pa.table(columns, schema=MANIFEST_SCHEMA)
    if earlier is not None and _same_shards(table, earlier):
        class_names = None if earlier.class_names is None else list(earlier.class_names)
        shuffled = earlier.shuffled
        counts = np.pad(counts, (0, len(class_names or counts) - len(counts)))
    labelled = bool(counts.sum())
    write_manifest(
        uri,
        data_uri=data_uri,
        table=table,
        class_names=class_names if labelled else None,
        class_counts=counts.tolist() if labelled else None,
        image_bytes=image_bytes,
        without_image=without_image,
        shuffled=shuffled,
    )
    return load_manifest(uri)


def _same_shards(table: pa.Table, manifest: Manifest) -> bool:
    columns = (table["name"].combine_chunks(), table["sha256"].combine_chunks())
    return columns[0].equals(manifest.names) and columns[1].equals(manifest.sha256)


def _set(rows: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), INDEX_SCHEMA.field(name), pa.array(values))
