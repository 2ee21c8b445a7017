"""Features of a whole data set as a Parquet file, and a picture of images with their nearest neighbours."""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional

from ssl_ray import shards, storage
from ssl_ray.config import Config
from ssl_ray.each import Each, in_turn
from ssl_ray.errors import DataError
from ssl_ray.evaluate.images import Chosen, lowest
from ssl_ray.evaluate.pictures import neighbours_picture
from ssl_ray.model import Network
from ssl_ray.shards import Manifest
from ssl_ray.train import runs
from ssl_ray.train.readouts import encoded, find_checkpoint, frozen_network, plain_features, read_plain

FORMAT_VERSION = 1
ROWS = 1024
"""Most images whose features are made together, and so rows of a row group; never of two shards."""
PIECE = 32
"""So many row groups are stored as one piece, from which what was stopped or killed goes on."""
_NAME = re.compile(r"\d{8}-of-\d+\.parquet")
MAX_IMAGES = 50_000
"""Images among which neighbours are looked for."""


def _opened(uri: str, data_uri: str) -> tuple[Network, Config, Manifest, dict[str, Any]]:
    """An encoder, and what it is asked about; with what says which these are."""
    torch.set_num_threads(1)
    run, checkpoint = find_checkpoint(uri)
    record = runs.load_run(run)
    config = runs.config_of(record, run)
    manifest = shards.load_manifest(shards.located(data_uri))
    about = {
        "format_version": FORMAT_VERSION,
        "config_hash": record["hash"],
        "step": None if checkpoint is None else runs.checkpoint_step(checkpoint),
        "checkpoint": checkpoint,
        "data_digest": manifest.digest,
        "data_uri": manifest.uri,
        "class_names": manifest.class_names,
    }
    network = frozen_network(run, config, checkpoint=checkpoint)
    return network, config, manifest, about | {"dimensions": network.encoder.num_features}


def _short(about: dict[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in ("dimensions", "step", "config_hash", "data_digest")}


def embed(
    uri: str, data_uri: str, output: str, *, each: Each = in_turn, progress: Callable[[int, int | None], None]
) -> dict[str, Any]:
    """Writes h of the plain view of every image of a data set to the Parquet file `output`, in the order of the data set.

    uri: the weights, as `find_checkpoint` takes them.  each: how parts of shards are gone through.  Images that cannot be read
    are left out, and counted.  Columns and metadata stand in docs/formats.md.
    What is done is kept in `output`.parts until all is: called again after it was stopped or killed, it goes on from there.
    Memory: a piece at a time, whatever the size of the data set; disk: the file, where TMPDIR says.
    progress: called with the images that are done and all of them.
    """
    network, config, manifest, about = _opened(uri, data_uri)
    filled = np.flatnonzero(manifest.counts)
    parts = [(int(shard), first) for shard in filled for first in range(0, int(manifest.counts[shard]), ROWS)]
    if not parts:
        raise DataError(f"{data_uri}: has no images.")
    kept = f"{output}.parts"
    pieces = {storage.join(kept, f"{i:08d}-of-{len(parts)}.parquet"): parts[i : i + PIECE] for i in range(0, len(parts), PIECE)}
    there = {storage.join(kept, name) for name in storage.list_names(kept) if _NAME.fullmatch(name)}
    missing = [at for at in pieces if at not in there or _piece(at, about) is None]
    done = manifest.num_samples - sum(_count(manifest, part) for at in missing for part in pieces[at])
    made = each(functools.partial(_part, network, config, manifest), [part for at in missing for part in pieces[at]])
    rows = 0
    with storage.scratch_folder("embed") as folder:
        local = f"{folder}/features.parquet"
        for at in missing:
            with _written(local) as write:
                for part, (h, positions) in zip(pieces[at], made, strict=False):
                    done += _count(manifest, part)
                    progress(done, manifest.num_samples)
                    write(_table(manifest, part[0], positions, h, about))
            storage.upload(local, at)
        with _written(local) as write:
            for at in pieces:
                piece = _piece(at, about)
                if piece is None:
                    raise DataError(f"{at}: changed while it was read. Do it again.")
                for table in piece:
                    rows += len(table)
                    if len(table):
                        write(table)
        if not rows:
            raise DataError(f"{data_uri}: none of its images can be read. Run `ssl-ray data check {data_uri}`.")
        storage.upload(local, output)
    for at in {*pieces, *there}:
        storage.remove(at)
    if storage.is_local(kept):
        with contextlib.suppress(OSError):  # something else is in it
            os.rmdir(storage.absolute(kept))
    return {"written": output, "images": rows, "unreadable": manifest.num_samples - rows} | _short(about)


def _count(manifest: Manifest, part: tuple[int, int]) -> int:
    return min(ROWS, int(manifest.counts[part[0]]) - part[1])


@contextlib.contextmanager
def _written(local: str) -> Iterator[Callable[[pa.Table], None]]:
    """Takes tables, each a row group of the local Parquet file."""
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        writer = writer or pq.ParquetWriter(local, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)

    with storage.storage_errors(local, "writing the features"):
        try:
            yield write
        finally:
            if writer is not None:
                writer.close()


def _piece(at: str, about: dict[str, Any]) -> list[pa.Table] | None:
    """The row groups of a stored piece of features; None where it is damaged, or of other weights or data."""
    try:
        found = pq.ParquetFile(pa.BufferReader(storage.read_bytes(at)), page_checksum_verification=True)
        tables = [found.read_row_group(i) for i in range(found.num_row_groups)]
    except (pa.ArrowException, OSError):  # OSError: pyarrow's for what it cannot read
        return None
    return tables if (found.schema_arrow.metadata or {}).get(b"ssl_ray") == json.dumps(about).encode() else None


def _part(network: Network, config: Config, manifest: Manifest, part: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """h [B, D] of a part of a shard, and their rows [B] in that."""
    shard, first = part
    rows = np.arange(first, first + _count(manifest, part))
    chosen = Chosen(manifest, np.full(len(rows), shard), rows, None)
    h, positions = encoded(network, chosen, config, slice(None))
    return h, rows[positions]


def _table(manifest: Manifest, shard: int, rows: np.ndarray, h: np.ndarray, about: dict[str, Any]) -> pa.Table:
    index = shards.index_rows(manifest, shard, ["key", "label"]).take(pa.array(rows))
    labels = index["label"].to_numpy()
    columns = {
        "key": index["key"],
        "shard": pa.array([manifest.names[shard].as_py()] * len(rows), pa.string()),
        "label": pa.array(labels, pa.int32(), mask=labels < 0),
        "h": pa.FixedSizeListArray.from_arrays(pa.array(h.ravel(), pa.float32()), about["dimensions"]),
    }
    return pa.table(columns).replace_schema_metadata({"ssl_ray": json.dumps(about)})


def draw_neighbours(uri: str, data_uri: str, *, num_images: int, k: int, each: Each = in_turn) -> tuple[bytes, dict[str, Any]]:
    """A PNG with a row for each of some images of a data set: the image, then its k nearest neighbours by cosine of h.

    The images are those of the lowest hashes, so an arbitrary choice that is always the same; neighbours are looked for among
    the MAX_IMAGES lowest hashes.  uri: the weights, as `find_checkpoint` takes them.
    """
    network, config, manifest, about = _opened(uri, data_uri)
    among = lowest(manifest, count=MAX_IMAGES)
    # With its position in the place of a label, each feature is known by it where images cannot be read.
    numbered = dataclasses.replace(among, labels=np.arange(len(among.rows)))
    h, positions, _ = plain_features(network, numbered, config, each)
    assert positions is not None
    first = lowest(manifest, count=num_images)
    wanted = set(zip(first.shards.tolist(), first.rows.tolist(), strict=True))
    names = zip(among.shards[positions].tolist(), among.rows[positions].tolist(), strict=True)
    asked = [i for i, name in enumerate(names) if name in wanted]
    if len(h) < 2 or not asked:
        raise DataError(f"{data_uri}: got {len(h)} readable images, expected two or more, to have neighbours.")
    units = functional.normalize(torch.from_numpy(h))
    similar = (units[asked] @ units.T).numpy()
    similar[np.arange(len(asked)), asked] = -np.inf
    near = np.argsort(-similar, axis=1, kind="stable")[:, : min(k, len(h) - 1)]
    shown = positions[np.concatenate([np.array(asked)[:, None], near], axis=1)]  # [images, 1 + k]
    picture = neighbours_picture(*_images(among, shown, config))
    return picture, {"images": len(asked), "neighbours": near.shape[1], "among": len(h)} | _short(about)


def _images(among: Chosen, shown: np.ndarray, config: Config) -> tuple[np.ndarray, list[list[str]]]:
    """uint8 [n, 1 + k, C, S, S] of the positions `shown` [n, 1 + k], and the names of their classes."""
    manifest = among.manifest
    at = Chosen(manifest, among.shards[shown.ravel()], among.rows[shown.ravel()], None)
    images, _ = read_plain(at, config, slice(None))
    rows = zip(at.shards.tolist(), at.rows.tolist(), strict=True)
    labels = [shards.index_rows(manifest, shard, ["label"])["label"][row].as_py() for shard, row in rows]
    names = ["" if i < 0 else manifest.class_names[i] if manifest.class_names else str(i) for i in labels]
    if len(images) != len(labels):
        raise DataError(f"{manifest.data_uri}: changed while it was read. Do it again.")
    titles = np.array(names, object).reshape(shown.shape).tolist()
    return images.reshape(*shown.shape, *images.shape[1:]), titles
