"""Everything read again: shards against the manifest, samples against the index, images decoded; and counts."""

import functools
import io
import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssl_ray import storage
from ssl_ray.each import Each, in_turn
from ssl_ray.errors import DataError, SslRayError
from ssl_ray.shards.index import Progress
from ssl_ray.shards.manifest import Manifest, bad_samples, iter_index, load_manifest, write_bad_samples
from ssl_ray.shards.read import forget_kept, read_samples, shard_digest

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Those that views.decode reads, whatever a file is called."""
THREADS = 4
_DECODE_AT_ONCE = 512
NEIGHBOURS = 200_000
"""About so many pairs of neighbours are looked at to judge the order."""
NOT_RANDOM = (
    "the order is not random: samples of one class follow one another, so that a batch would hold few classes. "
    "Repack, which shuffles: ssl-ray data pack URI NEW_URI"
)


def open_image(data: memoryview) -> None:
    """Decodes all pixels; raises what Pillow raises."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.convert("RGB")


def check(
    uri: str,
    *,
    decode: Callable[[memoryview], object] = open_image,
    each: Each = in_turn,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Reads and decodes all of the data set at `uri`; writes bad.parquet where samples are bad, removes it where none is.

    decode: raises an error, whose text is the reason, for an image that is bad; what a run uses is views.decode.
    each: how the shards are gone through, e.g. over a cluster (ray_map.over_cluster).
    Returns {ok, shards, samples, bad_shards: [{shard, reason}], bad_samples: [{shard, key, reason}], notes: [text]}.
    """
    manifest = load_manifest(uri)
    bad_shards, bad_rows = [], []
    for shard, (reason, bad) in enumerate(each(functools.partial(_problems, manifest, decode), range(len(manifest.counts)))):
        if reason is not None:
            bad_shards.append({"shard": manifest.names[shard].as_py(), "reason": reason})
        bad_rows += bad
        progress(shard + 1, len(manifest.counts))
    note = order_note(manifest)
    notes = [] if note is None else [note]
    try:
        write_bad_samples(manifest.uri, bad_rows)
    except SslRayError as error:  # what was found must not be lost with the list
        notes.append(f"bad.parquet is not up to date, so runs will not leave the bad samples out: {error}")
    names = manifest.names
    bad_samples = [{"shard": names[row["shard"]].as_py(), "key": row["key"], "reason": row["reason"]} for row in bad_rows]
    return {
        "ok": not bad_shards and not bad_samples,
        "shards": len(manifest.counts),
        "samples": manifest.num_samples,
        "bad_shards": bad_shards,
        "bad_samples": bad_samples,
        "notes": notes,
    }


def _problems(manifest: Manifest, decode: Callable[[memoryview], object], shard: int) -> tuple[str | None, list[dict[str, Any]]]:
    """What is wrong with a shard as a whole, and its bad samples."""
    forget_kept()
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(THREADS) as pool:  # Pillow warns of odd files
        return _shard_problem(manifest, shard), _bad_rows(manifest, shard, pool, decode)


def _shard_problem(manifest: Manifest, shard: int) -> str | None:
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


def _bad_rows(
    manifest: Manifest, shard: int, pool: ThreadPoolExecutor, decode: Callable[[memoryview], object]
) -> list[dict[str, Any]]:
    """The bad samples of a shard, as rows of BAD_SCHEMA."""
    found = []
    for start in range(0, int(manifest.counts[shard]), _DECODE_AT_ONCE):
        rows = np.arange(start, min(start + _DECODE_AT_ONCE, int(manifest.counts[shard])))
        samples = read_samples(manifest, np.full(len(rows), shard), rows)
        for i, reason in enumerate(pool.map(_decode_problem, samples.images, itertools.repeat(decode))):
            reason = samples.problems.get(i, reason)
            if reason is not None:
                found.append({"shard": shard, "row": int(rows[i]), "key": samples.keys[i], "reason": reason})
    return found


def _decode_problem(data: memoryview | None, decode: Callable[[memoryview], object]) -> str | None:
    """Why an image cannot be decoded; None if it can, or is not there."""
    try:
        if data is not None:
            decode(data)
    except SslRayError:  # of this machine, not of the image
        raise
    except UnidentifiedImageError:  # its own words hold an address in memory
        return f"cannot be decoded: no {', '.join(FORMATS)}"
    except Exception as error:  # Pillow raises many kinds for broken files
        return f"cannot be decoded: {storage.one_line(error).removeprefix('cannot be decoded: ')}"
    return None


def order_note(manifest: Manifest) -> str | None:
    """What to do where the order of the samples is not random; None where it is, or nothing tells."""
    return None if _order_is_random(manifest) else NOT_RANDOM


def _order_is_random(manifest: Manifest) -> bool:
    """Whether neighbours differ in class about as often as class counts predict: less 5 %, and five standard deviations.

    Known of shards that we packed, which may be too few samples to judge by.
    """
    if manifest.shuffled or manifest.class_counts is None:
        return True
    differ = pairs = 0
    for table in iter_index(manifest, ["shard", "label"]):
        shard, label = table["shard"].to_numpy(), table["label"].to_numpy()
        neighbours = (shard[1:] == shard[:-1]) & (label[1:] >= 0) & (label[:-1] >= 0)
        differ += int(np.count_nonzero((label[1:] != label[:-1]) & neighbours))
        pairs += int(np.count_nonzero(neighbours))
        if pairs >= NEIGHBOURS:
            break
    share = np.array(manifest.class_counts) / sum(manifest.class_counts)
    chance = 1 - float((share**2).sum())
    return differ >= 0.95 * pairs * chance - 5 * np.sqrt(pairs * chance * (1 - chance))


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
        "without_image": manifest.without_image,
        "order": order_note(manifest) or "random",
        "classes": dict(zip(names, manifest.class_counts or (), strict=True)) or None,
    }


def _image_sizes(manifest: Manifest, *, count: int = 200) -> str:
    """Smallest and largest width x height, as stored, among the first images of some shards."""
    shards = np.unique(np.linspace(0, len(manifest.counts) - 1, 10).astype(int)).tolist()
    sizes = []
    for shard in shards:
        rows = np.arange(min(count // len(shards), manifest.counts[shard]))
        images = read_samples(manifest, np.full(len(rows), shard), rows).images
        sizes += [size for data in images if data is not None and (size := _size_px(data))]
    if not sizes:
        return "none could be read"
    low, high = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    return f"{low[0]}x{low[1]}" + ("" if low == high else f" to {high[0]}x{high[1]}") + f" (of {len(sizes)} looked at)"


def _size_px(data: memoryview) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # as in _decode_problem; `check` tells of it
        return None
