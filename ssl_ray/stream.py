"""The batches of one worker, in the order of the plan, made in this process; ray_stream.py makes them through Ray Data.

Both run the same generator, `round_blocks`: it reads a round's samples by ranged requests, decodes each image once,
makes its views and yields them in blocks of some steps. Which samples and views a batch holds follows from the plan alone, so
the stream may begin at any step, for any share of the lanes, in any process.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssl_ray import errors, plan, shards, views
from ssl_ray.config import Views
from ssl_ray.errors import DataError
from ssl_ray.plan import EpochOrder, Plan
from ssl_ray.shards import Cache, Manifest, Samples

BLOCK_BYTES = 64 * 2**20
"""Steps share a block up to this size: each block costs about 10 ms of CPU in Ray, however small."""


MAKING = ("read", "decode", "views")
"""What the making of a step's views consists of."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which samples of a data set a run trains on."""

    fraction: float
    class_bounds: np.ndarray | None
    """uint64 [classes]: a sample of class c is in if its hash is below class_bounds[c]; None: `fraction` decides alone."""
    held_out: float
    """Share of the samples kept for evaluation; 0 where other shards are."""
    excluded: tuple[np.ndarray, np.ndarray]
    """Shards and rows, int64 each, that `data check` found bad."""

    def mask(self, shard: np.ndarray, row: np.ndarray, *, hashes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """bool [n]: whether each sample is trained on."""
        chosen = shards.in_fraction(hashes, self.fraction)
        if self.class_bounds is not None:
            chosen = hashes < self.class_bounds[labels]
        if self.held_out:
            chosen &= ~shards.held_out(hashes, self.held_out)
        if len(self.excluded[0]):
            out = self.excluded[0] << np.int64(32) | self.excluded[1]
            chosen &= ~np.isin(np.asarray(shard, np.int64) << np.int64(32) | row, out)
        return chosen


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """All that decides which batch is at a step."""

    manifest: Manifest
    selection: Selection
    plan: Plan
    views: Views
    cache: Cache | None
    """Where shards are kept on the machines that read them, which changes no batch."""


@dataclasses.dataclass(frozen=True)
class BadSample:
    shard: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's share of the batch of a step: its lanes in order."""

    step: int
    views: np.ndarray
    """uint8 [B, m, C, H, W]; crops of them where the worker does the rest (views.photometric_on)."""
    hashes: np.ndarray
    """uint64 [B]: of the samples that the plan names, in order."""
    bad: list[BadSample]
    """Those of them that another image stands in for."""
    seconds: np.ndarray
    """float64 [3]: what its making took, as MAKING names it."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One worker's share of n consecutive steps, made together."""

    first_step: int
    views: np.ndarray
    """uint8 [n, B, m, C, H, W]."""
    hashes: np.ndarray
    """uint64 [n, B]."""
    bad: list[list[BadSample]]
    """Of each step."""
    seconds: np.ndarray
    """float64 [n, 3]: what the making of each step took, as MAKING names it."""

    def batches(self) -> Iterator[Batch]:
        for i, bad in enumerate(self.bad):
            yield Batch(self.first_step + i, self.views[i], self.hashes[i], bad, self.seconds[i])


def prepare(
    manifest: Manifest,
    *,
    spec: Views,
    seed: int,
    fraction: float,
    balanced: bool,
    held_out: float,
    batch: int,
    lanes: int,
    cache: Cache | None,
) -> TrainingData:
    """Selects the samples and plans the run: one pass over the index (hashes, labels).

    Raises UsageError if fewer samples are selected than a batch has, or classes are balanced without labels.
    """
    excluded = shards.bad_samples(manifest)
    bounds = None
    if balanced:
        if manifest.class_counts is None:
            raise errors.UsageError(f"data.balanced: the samples of {manifest.data_uri} have no labels. Leave data.balanced out.")
        table = pa.concat_tables(shards.iter_index(manifest, ["hash", "label"]))
        labels = table["label"].to_numpy()
        bounds = shards.balanced_thresholds(table["hash"].to_numpy(), labels, len(manifest.class_counts), fraction)
    selection = Selection(fraction, bounds, held_out, excluded)
    expected = max(1, round(manifest.num_samples * fraction * (1 - held_out)))
    rows, steps_per_round = plan.sizes(
        num_samples=manifest.num_samples,
        num_selected=expected,
        mean_bytes=manifest.mean_bytes,
        batch=batch,
        lanes=lanes,
    )
    whole = pc.ends_with(manifest.names, "gz").to_numpy(zero_copy_only=False)
    chunks = plan.chunk_layout(manifest.counts, rows, whole=whole)
    selected, done = np.zeros(chunks.num_chunks, np.int64), 0
    first = np.concatenate([[0], np.cumsum(manifest.counts)])
    for table in shards.iter_index(manifest, ["shard", "hash", "label"]):
        shard = table["shard"].to_numpy().astype(np.int64)
        row = np.arange(done, done + table.num_rows) - first[shard]
        chosen = selection.mask(shard, row, hashes=table["hash"].to_numpy(), labels=table["label"].to_numpy())
        of_chunk = plan.chunks_of_rows(chunks, shard[chosen], row[chosen])
        selected += np.bincount(of_chunk, minlength=chunks.num_chunks)
        done += table.num_rows
    made = plan.make_plan(seed=seed, batch=batch, lanes=lanes, steps_per_round=steps_per_round, chunks=chunks, selected=selected)
    return TrainingData(manifest, selection, made, spec, cache)


def _locate(data: TrainingData, chunks: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row, int64, of the sample numbered `ranks` among the selected ones of each of `chunks` (same shapes)."""
    distinct, inverse = np.unique(chunks, return_inverse=True)
    shard, first, stop = plan.chunk_bounds(data.plan.chunks, distinct)
    full = data.plan.selected[distinct] == stop - first
    rows = first[inverse].reshape(ranks.shape) + ranks
    for i in np.flatnonzero(~full):
        table = shards.index_rows(data.manifest, int(shard[i]), ["hash", "label"]).slice(first[i], stop[i] - first[i])
        row = np.arange(first[i], stop[i])
        chosen = data.selection.mask(
            np.full(len(row), shard[i]), row, hashes=table["hash"].to_numpy(), labels=table["label"].to_numpy()
        )
        here = inverse.reshape(ranks.shape) == i
        rows[here] = row[chosen][ranks[here]]
    return shard[inverse].reshape(ranks.shape), rows


class _Round:
    """The samples of a worker's round: read on construction from step `first_k` on, decoded when asked for."""

    def __init__(self, data: TrainingData, where: tuple[np.ndarray, np.ndarray], *, first_k: int):
        self.data, self.first_k = data, first_k
        self.shards, self.rows = where  # [steps, lanes, G / L]
        _, self.lanes, self.per_lane = self.shards.shape
        self.least_size = views.least_size(data.views)
        self.samples = self._read(slice(first_k, None))

    def _read(self, steps: slice) -> Samples:
        where = self.shards[steps].ravel(), self.rows[steps].ravel()
        return shards.read_samples(self.data.manifest, *where, cache=self.data.cache)

    @functools.cached_property
    def _earlier(self) -> Samples:
        return self._read(slice(0, self.first_k))

    def _step(self, k: int) -> tuple[Samples, int]:
        """The samples among which those of a step lie, lane after lane, and where they begin."""
        samples, step = (self.samples, k - self.first_k) if k >= self.first_k else (self._earlier, k)
        return samples, step * self.lanes * self.per_lane

    def _decoded(self, k: int, positions: range) -> list[np.ndarray | str]:
        """uint8 [C, H, W] of each of those at `positions` of a step, or why there is none."""
        samples, first = self._step(k)
        where = range(first + positions.start, first + positions.stop)
        decoded = views.decode_many(
            samples.images[where.start : where.stop], channels=self.data.views.channels, least_size=self.least_size
        )
        found: list[np.ndarray | str] = []
        for at, image in zip(where, decoded, strict=True):
            found.append(image if isinstance(image, np.ndarray) else samples.problems[at] if image is None else str(image))
        return found

    def stand_in(self, k: int, lane: int, j: int, *, reason: str) -> np.ndarray:
        """The image for a sample that is bad: the nearest good one in its lane's slice of the step, else in its lane's round.

        reason: what is wrong with the sample, for the error where there is none.
        """
        own = k * self.per_lane + j
        run = np.arange(self.shards.shape[0] * self.per_lane)
        for nearest in run[np.lexsort((run, abs(run - own), run // self.per_lane != k))].tolist():
            position = lane * self.per_lane + nearest % self.per_lane
            (image,) = self._decoded(nearest // self.per_lane, range(position, position + 1))
            if not isinstance(image, str):
                return image
        name = self.data.manifest.names[int(self.shards[k, lane, j])]
        raise DataError(
            f"{name}: no sample near the one that is needed can be read ({reason}). "
            f"Run `ssl-ray data check {self.data.manifest.uri}`."
        )

    def parts(self, k: int, positions: range) -> list[range]:
        """`positions` of a step cut into those that are decoded together."""
        samples, first = self._step(k)
        return views.in_parts(samples.images[first : first + self.lanes * self.per_lane], positions)

    def images(self, k: int, positions: range) -> tuple[list[np.ndarray], list[BadSample]]:
        """Those at `positions` of a step, uint8 [C, H, W] each, and which of them are stand-ins."""
        samples, first = self._step(k)
        images: list[np.ndarray] = []
        bad: list[BadSample] = []
        for position, image in zip(positions, self._decoded(k, positions), strict=True):
            if isinstance(image, str):
                lane, j = divmod(position, self.per_lane)
                name = self.data.manifest.names[int(self.shards[k, lane, j])].as_py()
                bad.append(BadSample(name, samples.keys[first + position], image))
                image = self.stand_in(k, lane, j, reason=image)
            images.append(image)
        return images, bad

    def hashes(self, k: int) -> np.ndarray:
        """uint64 [B]: of the samples of a step."""
        samples, first = self._step(k)
        return samples.hashes[first : first + self.lanes * self.per_lane]


def step_bytes(data: TrainingData, lanes: int) -> int:
    """Of the views of a step, for a worker with so many lanes."""
    spec = data.views
    return lanes * data.plan.batch // data.plan.lanes * spec.count * spec.channels * spec.size_px**2


def steps_in_block(data: TrainingData, lanes: int, *, store: int) -> int:
    """Steps that a worker with so many lanes gets at a time through Ray, where `store` bytes of views may wait.

    Of blocks there must be room for eight: the trainer is at one and fetches two ahead before it begins another.
    """
    return max(1, min(data.plan.steps_per_round, min(BLOCK_BYTES, store // 8) // step_bytes(data, lanes)))


def store_bytes(data: TrainingData, lanes: int, *, share: int | None = None) -> int:
    """Views of a worker with so many lanes that may wait in Ray's object store: four rounds, at least four full blocks.

    While one round is trained on, the next can be made whole: of two rounds Ray Data keeps half for other ends, and the second
    task waits.
    share: the worker's part of the object store, which is not to be exceeded but for eight steps.
    """
    step = step_bytes(data, lanes)
    wanted = 4 * max(data.plan.steps_per_round * step, BLOCK_BYTES)
    return wanted if share is None else max(8 * step, min(share, wanted))


def round_blocks(
    data: TrainingData,
    order: EpochOrder,
    *,
    round: int,
    first_k: int,
    stop_k: int,
    lanes: range,
    steps: int,
    threads: int,
    reuse: bool,
) -> Iterator[Block]:
    """Steps `first_k` to `stop_k` of a round for a range of lanes, `steps` in a block. `order` is that of the epoch.

    threads: they share the images of each step.  reuse: a block's memory is that of the block before, which is no longer needed:
    pages that the system gives anew cost as much as what is written on them.
    """
    begun = time.perf_counter()
    where = plan.worker_round(data.plan, order, round, lanes)
    samples = _Round(data, _locate(data, where.chunks, where.ranks), first_k=first_k)
    read_s = (time.perf_counter() - begun) / (stop_k - first_k)
    before = order.epoch * data.plan.steps_per_epoch + round * data.plan.steps_per_round
    spec = data.views if data.views.photometric_on == "data" else views.crops_only(data.views)
    per_step = len(lanes) * data.plan.batch // data.plan.lanes
    threads = min(threads, per_step)
    shares = [range(per_step)[i * per_step // threads : (i + 1) * per_step // threads] for i in range(threads)]

    def make(k: int, hashes: np.ndarray, out: np.ndarray, share: range) -> tuple[list[BadSample], float, float]:
        bad, decode_s, views_s = [], 0.0, 0.0
        for part in samples.parts(k, share):
            begun = time.perf_counter()
            images, found = samples.images(k, part)
            decoded, some = time.perf_counter(), slice(part.start, part.stop)
            views.make_views(images, hashes[some], spec=spec, seed=data.plan.seed, epoch=order.epoch, out=out[some])
            bad += found
            decode_s, views_s = decode_s + decoded - begun, views_s + time.perf_counter() - decoded
        return bad, decode_s, views_s

    room = np.empty((0,), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for first in range(first_k, stop_k, steps):
            ks = range(first, min(first + steps, stop_k))
            if not len(room) or not reuse:
                room = np.empty((len(ks), per_step, spec.count, spec.channels, spec.size_px, spec.size_px), np.uint8)
            made, hashes = room[: len(ks)], np.empty((len(ks), per_step), np.uint64)
            bad, seconds = [], np.empty((len(ks), len(MAKING)))
            for i, k in enumerate(ks):
                hashes[i] = samples.hashes(k)
                each = functools.partial(make, k, hashes[i], made[i])
                parts = list(pool.map(each, shares)) if threads > 1 else [each(shares[0])]
                bad.append([sample for found, _, _ in parts for sample in found])
                seconds[i] = read_s, sum(decode_s for _, decode_s, _ in parts), sum(views_s for _, _, views_s in parts)
            yield Block(before + first, made, hashes, bad, seconds)


def local_batches(data: TrainingData, *, lanes: range, first_step: int, stop_step: int) -> Iterator[Batch]:
    """The batches of the steps from `first_step` to `stop_step`, made in this process."""
    order: EpochOrder | None = None
    for work in plan.rounds_of(data.plan, first_step, stop_step):
        if order is None or order.epoch != work.epoch:
            order = plan.epoch_order(data.plan, work.epoch)
        part = {"round": work.round, "first_k": work.first_k, "stop_k": work.stop_k}
        for block in round_blocks(data, order, **part, lanes=lanes, steps=1, threads=1, reuse=False):
            yield from block.batches()


def draw_preview(uri: str, *, spec: Views, seed: int, num_images: int) -> bytes:
    """A PNG with a row for each of the first `num_images` images of a data set: the plain view and its views in epoch 0."""
    manifest = shards.load_manifest(shards.located(uri))
    shard, row = np.nonzero(np.arange(num_images) < manifest.counts[:num_images, None])
    samples = shards.read_samples(manifest, shard[:num_images].astype(np.int64), row[:num_images].astype(np.int64))
    images = []
    for position, data in enumerate(samples.images):
        try:
            if data is None:
                raise views.UndecodableImage(samples.problems[position])
            images.append(views.decode(data, channels=spec.channels, least_size=views.least_size(spec)))
        except views.UndecodableImage as error:
            raise DataError(f"{uri}: {samples.keys[position]}: {error}. Run `ssl-ray data check {uri}`.") from error
    return views.preview(images, views.make_views(images, samples.hashes, spec=spec, seed=seed, epoch=0))
