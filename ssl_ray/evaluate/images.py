"""The images of the read-outs: chosen by key hash, so that every run of a data set is judged on the same ones."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ssl_ray import shards, views
from ssl_ray.config import Views
from ssl_ray.errors import DataError
from ssl_ray.shards import Cache, Manifest

MAX_TEST_IMAGES = 50_000
EPOCH = 2**32 - 1
"""Of augmented views for read-outs."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some samples of a data set, in its order, so that those of a shard are read together."""

    manifest: Manifest
    shards: np.ndarray
    rows: np.ndarray
    labels: np.ndarray | None
    """int64 [n], None where the data set has no labels."""


def lowest(manifest: Manifest, *, count: int, held_out: float = 0.0, wanted: bool = True, labelled: bool = False) -> Chosen:
    """The `count` lowest hashes among the samples whose being held out equals `wanted`. One pass over the index.

    held_out: the share that is; 0: all are chosen from.  labelled: among those with a label alone, and with their labels.
    """
    empty = np.zeros(0, np.int64)
    hashes, shard, row, label = np.zeros(0, np.uint64), empty, empty, empty
    bad = set(zip(*(part.tolist() for part in shards.bad_samples(manifest)), strict=True))
    first = np.concatenate([[0], np.cumsum(manifest.counts)])
    done = 0
    for table in shards.iter_index(manifest, ["shard", "hash", "label"]):
        of_shard = table["shard"].to_numpy().astype(np.int64)
        of_row = np.arange(done, done + table.num_rows) - first[of_shard]
        done += table.num_rows
        new_hashes, new_labels = table["hash"].to_numpy(), table["label"].to_numpy().astype(np.int64)
        fits = np.full(len(new_hashes), True) if not held_out else shards.held_out(new_hashes, held_out) == wanted
        if labelled:
            fits &= new_labels >= 0
        hashes = np.concatenate([hashes, new_hashes[fits]])
        shard, row = np.concatenate([shard, of_shard[fits]]), np.concatenate([row, of_row[fits]])
        label = np.concatenate([label, new_labels[fits]])
        keep = np.lexsort((row, shard, hashes))[: count + len(bad)]
        hashes, shard, row, label = hashes[keep], shard[keep], row[keep], label[keep]
    good = [i for i, name in enumerate(zip(shard.tolist(), row.tolist(), strict=True)) if name not in bad][:count]
    good.sort(key=lambda i: (shard[i], row[i]))
    return Chosen(manifest, shard[good], row[good], label[good] if labelled else None)


def choose(manifest: Manifest, eval_manifest: Manifest | None, *, held_out: float, max_images: int) -> tuple[Chosen, Chosen]:
    """Training and held-out samples for the read-outs.

    Training: the `max_images` lowest hashes of the (labelled) samples of `manifest` that are not held out, whatever
    share of them a run trains on.  Held out: all of `eval_manifest`, else the share `held_out` of `manifest`, at most
    MAX_TEST_IMAGES.  Labels are used only if both have them, and mean the same classes.
    Raises DataError if the two data sets name different classes, or nothing is held out.
    """
    labelled = manifest.class_counts is not None
    if eval_manifest is None:
        test = lowest(manifest, count=MAX_TEST_IMAGES, held_out=held_out, wanted=True, labelled=labelled)
    else:
        labelled = labelled and eval_manifest.class_counts is not None
        if labelled and manifest.class_names != eval_manifest.class_names:
            raise DataError(
                f"{eval_manifest.data_uri} has the classes {_some(eval_manifest.class_names)}, but "
                f"{manifest.data_uri} has {_some(manifest.class_names)}. Pack or index both with the same labels."
            )
        test = lowest(eval_manifest, count=MAX_TEST_IMAGES, held_out=0.0, wanted=True, labelled=labelled)
        held_out = 0.0
    if not len(test.rows):
        raise DataError(f"{manifest.data_uri}: no image is held out for the read-outs. Raise data.eval_fraction.")
    return lowest(manifest, count=max_images, held_out=held_out, wanted=False, labelled=labelled), test


def _some(names: tuple[str, ...] | None) -> str:
    return "(numbers)" if names is None else ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def plain_images(
    chosen: Chosen, part: slice, *, channels: int, size_px: int, cache: Cache | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, C, H, W] plain views of the samples in `part`, int64 [B] their positions; unreadable ones are left out."""
    made, positions = [np.zeros((0, channels, size_px, size_px), np.uint8)], [np.zeros(0, np.int64)]
    for images, _, where in _decoded(chosen, part, channels=channels, cache=cache):
        made.append(views.plain(images, size_px=size_px))
        positions.append(where)
    return np.concatenate(made), np.concatenate(positions)


_TOGETHER = 16  # images whose views are in memory


def augmented_images(
    chosen: Chosen, part: slice, *, spec: Views, seed: int, plain: bool, cache: Cache | None = None, epoch: int = EPOCH
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint8 [b, q, C, H, W] views of a few samples of `part` after the other, int64 [b] their positions; unreadable ones are
    left out. q is spec.count, and one more, which comes first, where the plain view is asked for.

    Drawn by `seed` in EPOCH, to which no training gets, or another one. All are made on the CPU, colours too.
    """
    for images, hashes, where in _decoded(chosen, part, channels=spec.channels, cache=cache):
        for first in range(0, len(images), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            made = views.make_views(images[some], hashes[some], spec=spec, seed=seed, epoch=epoch)
            if plain:
                made = np.concatenate([views.plain(images[some], size_px=spec.size_px)[:, None], made], axis=1)
            yield made, where[some]


def _decoded(
    chosen: Chosen, part: slice, *, channels: int, cache: Cache | None
) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """Images, hashes and positions of the readable samples of `part`, so many at a time as memory allows."""
    positions = np.arange(len(chosen.rows))[part]
    samples = shards.read_samples(chosen.manifest, chosen.shards[part], chosen.rows[part], cache=cache)
    for some in views.in_parts(samples.images, range(len(samples.images))):
        decoded = views.decode_many(samples.images[some.start : some.stop], channels=channels)
        good = np.array([isinstance(image, np.ndarray) for image in decoded])
        images = [image for image in decoded if isinstance(image, np.ndarray)]
        if images:
            yield images, samples.hashes[some.start : some.stop][good], positions[some.start : some.stop][good]
