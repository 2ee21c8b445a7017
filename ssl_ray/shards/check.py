"""Everything read again: shards against the manifest, samples against the index, images decoded; and counts."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.shards.index import Progress
from ssl_ray.shards.manifest import Manifest, bad_samples, index_rows, iter_index, load_manifest, write_bad_samples
from ssl_ray.shards.read import read_samples, shard_digest

THREADS = 4
_DECODE_AT_ONCE = 512
NEIGHBOURS = 200_000
"""At most so many pairs of neighbours are looked at to judge the order."""


def check(uri: str, *, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Reads and decodes all of the data set at `uri`; writes bad.parquet where samples are bad, removes it where none is.

    Returns {ok, shards, samples, bad_shards: [{shard, reason}], bad_samples: [{shard, key, reason}], notes: [text]}.
    """
    manifest = load_manifest(uri)
    bad_shards, bad_rows = [], []
    for shard in range(len(manifest.counts)):
        reason = _check_shard(manifest, shard)
        if reason is not None:
            bad_shards.append({"shard": manifest.names[shard].as_py(), "reason": reason})
        bad_rows += _check_samples(manifest, shard)
        progress(shard + 1, len(manifest.counts))
    if bad_rows:
        write_bad_samples(uri, bad_rows)
    else:
        storage.remove(storage.join(uri, "bad.parquet"))
    names = manifest.names
    bad = [{"shard": names[row["shard"]].as_py(), "key": row["key"], "reason": row["reason"]} for row in bad_rows]
    return {
        "ok": not bad_shards and not bad,
        "shards": len(manifest.counts),
        "samples": manifest.num_samples,
        "bad_shards": bad_shards,
        "bad_samples": bad,
        "notes": [] if order_is_random(manifest) else [NOT_RANDOM],
    }


NOT_RANDOM = (
    "the order is not random: samples of one class follow one another, so that a batch would hold few classes. "
    "Repack, which shuffles: ssl-ray data pack URI NEW_URI"
)


def _check_shard(manifest: Manifest, shard: int) -> str | None:
    """What is wrong with a shard's file as a whole."""
    try:
        size, sha256 = shard_digest(storage.join(manifest.data_uri, manifest.names[shard].as_py()))
    except DataError as error:
        return str(error)
    if size != manifest.sizes[shard]:
        return f"it has {size} bytes, the manifest says {manifest.sizes[shard]}"
    if sha256 != manifest.sha256[shard].as_py():
        return "its bytes changed since the manifest was made (sha256)"
    return None


def _check_samples(manifest: Manifest, shard: int) -> list[dict[str, Any]]:
    """The bad samples of a shard, as rows of BAD_SCHEMA."""
    found = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, int(manifest.counts[shard]), _DECODE_AT_ONCE):
            rows = np.arange(start, min(start + _DECODE_AT_ONCE, int(manifest.counts[shard])))
            samples = read_samples(manifest, np.full(len(rows), shard), rows)
            for i, reason in enumerate(pool.map(_decode_problem, samples.images)):
                reason = samples.problems.get(i, reason)
                if reason is not None:
                    found.append({"shard": shard, "row": int(rows[i]), "key": samples.keys[i], "reason": reason})
    return found


def _decode_problem(data: memoryview | None) -> str | None:
    if data is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
    except Exception as error:  # Pillow raises many kinds for broken files
        return f"cannot be decoded: {' '.join(str(error).split())}"
    return None


def order_is_random(manifest: Manifest) -> bool:
    """Whether neighbours share a class no more often than class counts predict (by five standard deviations)."""
    if manifest.class_counts is None or len(manifest.class_counts) < 2:
        return True
    same = pairs = 0
    for table in iter_index(manifest, ["shard", "label"]):
        shard, label = table["shard"].to_numpy(), table["label"].to_numpy()
        inside = shard[1:] == shard[:-1]
        same += int(np.count_nonzero((label[1:] == label[:-1]) & inside))
        pairs += int(np.count_nonzero(inside))
        if pairs >= NEIGHBOURS:
            break
    share = np.array(manifest.class_counts) / max(1, sum(manifest.class_counts))
    expected = float((share**2).sum())
    return pairs == 0 or same / pairs <= expected + 5 * np.sqrt(expected * (1 - expected) / pairs) + 0.02


def stats(uri: str) -> dict[str, Any]:
    """Counts of the data set at `uri`, sizes of some images, and whether its order is random."""
    manifest = load_manifest(uri)
    names = manifest.class_names or tuple(str(i) for i in range(len(manifest.class_counts or ())))
    return {
        "shards": len(manifest.counts),
        "samples": manifest.num_samples,
        "bytes": int(manifest.sizes.sum()),
        "mean_image_bytes": round(manifest.mean_bytes),
        "image_sizes_px": _image_sizes(manifest),
        "bad_samples": len(bad_samples(manifest)[0]),
        "order": "random" if order_is_random(manifest) else NOT_RANDOM,
        "classes": dict(zip(names, manifest.class_counts or (), strict=True)) or None,
    }


def _image_sizes(manifest: Manifest, *, count: int = 200) -> str:
    """Smallest and largest width x height among the first images of some shards."""
    shards = np.unique(np.linspace(0, len(manifest.counts) - 1, 10).astype(int))
    sizes = []
    for shard in shards:
        rows = np.arange(min(count // len(shards), index_rows(manifest, int(shard)).num_rows))
        for data in read_samples(manifest, np.full(len(rows), shard), rows).images:
            if data is not None and _decode_problem(data) is None:
                sizes.append(Image.open(io.BytesIO(data)).size)
    if not sizes:
        return "none could be read"
    low, high = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    return f"{low[0]}x{low[1]}" + ("" if low == high else f" to {high[0]}x{high[1]}") + f" (of {len(sizes)} looked at)"
