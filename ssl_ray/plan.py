"""Which samples are in which step: pure functions of counts and (seed, epoch). No I/O.

The epoch's order is: chunks (short runs of samples of one shard) permuted by (seed, epoch), the selected samples inside each
turned by (seed, epoch, chunk). Nothing of the size of the data set is stored: the chunks' counts (a few seconds to set up an
epoch of 10^9 samples), and the samples of a round when it is read.

A *round* is K steps of the global batch G, so K G consecutive positions of that order. It is dealt in L *lanes* of
c = K G / L consecutive positions, about five chunks each, in which the samples of each chunk are permuted; step k of the round
takes the k-th slice of G / L positions of every lane. A worker owns a contiguous block of lanes, so a contiguous run of the
round's positions. What a border between workers or rounds leaves of a chunk on either side lies side by side in its shard, up
to where it was turned, so that hardly anything is read twice, in few requests. Which samples a step holds depends neither on
the number of workers nor on where a run was interrupted.

A round holds at most about five chunks of 2 MiB for each lane in encoded bytes, 640 MiB with 64 lanes, unless its least eight
steps or its largest chunk are more; a worker reads its share.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ssl_ray.errors import UsageError
from ssl_ray.philox import CHUNK_ORDER, CHUNK_TURN, SAMPLE_ORDER, permutation, philox

CHUNK_BYTES = 2**21
"""About the size of a chunk where images are small or rounds long enough."""
CHUNKS_PER_LANE = 5
MIN_STEPS, MAX_STEPS = 8, 64
"""Bounds of the steps in a round."""
MAX_CHUNKS = 2**23


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of a data set, numbered in shard order: `of_shard[s]` to `of_shard[s + 1]` are those of shard s."""

    counts: np.ndarray
    """int64 [S]: samples in each shard."""
    of_shard: np.ndarray
    """int64 [S + 1]."""

    @property
    def num_chunks(self) -> int:
        return int(self.of_shard[-1])


@dataclasses.dataclass(frozen=True)
class Plan:
    seed: int
    batch: int
    """G: images in a step."""
    lanes: int
    """L, a divisor of G."""
    steps_per_round: int
    """K."""
    chunks: Chunks
    selected: np.ndarray
    """int64 [chunks]: samples of each chunk that are trained on."""
    num_selected: int

    @property
    def steps_per_epoch(self) -> int:
        """E; the remainder, smaller than a batch, is left out, another one each epoch."""
        return self.num_selected // self.batch

    @property
    def dropped(self) -> int:
        """Samples left out of each epoch."""
        return self.num_selected % self.batch


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The chunks in the order of an epoch, and where each ends among the epoch's positions."""

    epoch: int
    chunk: np.ndarray
    """int64 [chunks]."""
    end: np.ndarray
    """int64 [chunks], increasing."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Steps `first_k` to `stop_k` of a round."""

    epoch: int
    round: int
    first_k: int
    stop_k: int


@dataclasses.dataclass(frozen=True)
class RoundSamples:
    """A worker's samples of a round: [steps, lanes, G / L] int64 each."""

    chunks: np.ndarray
    ranks: np.ndarray
    """The sample's number among the selected ones of its chunk, in shard order."""


def sizes(*, num_samples: int, num_selected: int, mean_bytes: float, batch: int, lanes: int) -> tuple[int, int]:
    """Rows of a chunk and steps of a round.

    Rounds are as long as lanes of five chunks of 2 MiB ask for, between 8 and 64 steps and no longer than an epoch;
    then chunks are a fifth of a lane. Where few samples are selected a chunk has more rows for as many samples.
    """
    steps_per_epoch = max(1, num_selected // batch)
    wanted = max(1, round(CHUNK_BYTES / max(1.0, mean_bytes)))
    least_rows = -(-num_samples // MAX_CHUNKS)
    # With 10^9 samples of 3 kB and 256 a step, 64 steps would hold two chunks a lane, of the size of a border.
    longest = max(MAX_STEPS, -(-CHUNKS_PER_LANE * least_rows * num_selected * lanes // (max(1, num_samples) * batch)))
    steps = min(max(round(CHUNKS_PER_LANE * wanted * lanes / batch), MIN_STEPS), longest, steps_per_epoch)
    # Quotients of integers are rounded alike on all machines (IEEE 754), so these are too.
    samples = max(1, steps * batch // (CHUNKS_PER_LANE * lanes))
    rows = round(samples * num_samples / max(1, num_selected))
    return max(1, rows, least_rows), steps


def chunk_layout(counts: np.ndarray, rows: int, *, whole: np.ndarray | None = None) -> Chunks:
    """Cuts each shard into the fewest chunks of at most `rows` rows, equal but for one; `whole` bool [S] are not cut."""
    counts = np.asarray(counts, np.int64)
    pieces = -(-counts // rows)
    if whole is not None:
        pieces = np.where(whole, np.minimum(pieces, 1), pieces)
    return Chunks(counts, np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64))


def chunk_bounds(chunks: Chunks, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, first row and row after the last, int64, of the chunks `ids`."""
    ids = np.asarray(ids, np.int64)
    shard = np.searchsorted(chunks.of_shard, ids, side="right") - 1
    piece, rows = ids - chunks.of_shard[shard], chunks.counts[shard]
    pieces = chunks.of_shard[shard + 1] - chunks.of_shard[shard]
    return shard, piece * rows // pieces, (piece + 1) * rows // pieces


def chunks_of_rows(chunks: Chunks, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64: the chunk of each (shard, row)."""
    pieces = chunks.of_shard[shards + 1] - chunks.of_shard[shards]
    return chunks.of_shard[shards] + ((rows + 1) * pieces - 1) // chunks.counts[shards]


def even_plan(*, seed: int, batch: int, lanes: int, images: int, shards: int, mean_bytes: float, share: float) -> Plan:
    """The plan of a data set that is not there yet: shards alike but for one image, of each chunk its `share` selected."""
    rows, steps_per_round = sizes(
        num_samples=images, num_selected=max(1, int(images * share)), mean_bytes=mean_bytes, batch=batch, lanes=lanes
    )
    ends = np.arange(1, shards + 1) * images // shards
    chunks = chunk_layout(np.diff(ends, prepend=0), rows)
    selected = np.empty(chunks.num_chunks, np.int64)
    for begin in range(0, len(selected), 2**20):  # a bounded part at a time
        ids = np.arange(begin, min(begin + 2**20, len(selected)))
        shard, first, stop = chunk_bounds(chunks, ids)
        before = ends[shard] - chunks.counts[shard]
        selected[ids] = ((before + stop) * share).astype(np.int64) - ((before + first) * share).astype(np.int64)
    return make_plan(seed=seed, batch=batch, lanes=lanes, steps_per_round=steps_per_round, chunks=chunks, selected=selected)


def worker_rows(plan: Plan, order: EpochOrder, round: int, lanes: range) -> tuple[np.ndarray, np.ndarray]:
    """Shards and rows, int64 [n] each and sorted, of a worker's samples of a round.

    Where not all samples of a chunk are selected, as if those that are lay evenly in it.
    """
    samples = worker_round(plan, order, round, lanes)
    chunk, rank = samples.chunks.ravel(), samples.ranks.ravel()
    shard, first, stop = chunk_bounds(plan.chunks, chunk)
    row = first + rank * (stop - first) // plan.selected[chunk]
    by_row = np.lexsort((row, shard))
    return shard[by_row], row[by_row]


def make_plan(*, seed: int, batch: int, lanes: int, steps_per_round: int, chunks: Chunks, selected: np.ndarray) -> Plan:
    """Raises UsageError if fewer samples are selected than a batch has."""
    num_selected = int(selected.sum())
    if num_selected < batch:
        raise UsageError(
            f"train.batch: got {batch}, but only {num_selected} samples are selected for training. Use a smaller "
            "train.batch, a larger data.fraction, or more data."
        )
    steps_per_round = min(steps_per_round, num_selected // batch)
    return Plan(seed, batch, lanes, steps_per_round, chunks, np.asarray(selected, np.int64), num_selected)


def lanes_of(worker: int, num_workers: int, lanes: int) -> range:
    """The block of lanes of one worker; blocks differ by at most one lane."""
    if num_workers > lanes:
        raise UsageError(
            f"train.workers: got {num_workers}, but there are {lanes} lanes and each worker needs one. Use at most "
            f"{lanes} workers, or begin a run with more train.lanes."
        )
    return range(worker * lanes // num_workers, (worker + 1) * lanes // num_workers)


def rounds_of(plan: Plan, first_step: int, stop_step: int) -> Iterator[Work]:
    """The rounds, or parts of them, that hold the global steps from `first_step` to `stop_step`."""
    step = first_step
    while step < stop_step:
        epoch, within = divmod(step, plan.steps_per_epoch)
        round, k = divmod(within, plan.steps_per_round)
        stop_k = min(_steps_in_round(plan, round), k + stop_step - step)
        yield Work(epoch, round, k, stop_k)
        step += stop_k - k


def _steps_in_round(plan: Plan, round: int) -> int:
    return min(plan.steps_per_round, plan.steps_per_epoch - round * plan.steps_per_round)


def epoch_order(plan: Plan, epoch: int) -> EpochOrder:
    """The order of an epoch; costs a sort of the chunks, to be kept while the epoch lasts."""
    order = permutation(plan.chunks.num_chunks, key=(plan.seed, epoch), purpose=CHUNK_ORDER)
    return EpochOrder(epoch, order, np.cumsum(plan.selected[order]))


def worker_round(plan: Plan, order: EpochOrder, round: int, lanes: range) -> RoundSamples:
    """The samples of a whole round that are dealt to `lanes`.

    sample(step k, lane l, j) is the position  round K G + l c + k G/L + j  of the epoch's order, c = steps G / L.
    """
    steps, per_step = _steps_in_round(plan, round), plan.batch // plan.lanes
    per_lane = steps * per_step
    first = round * plan.steps_per_round * plan.batch + lanes.start * per_lane
    stop = first + len(lanes) * per_lane
    low, high = np.searchsorted(order.end, [first, stop - 1], side="right")
    ids, ends = order.chunk[low : high + 1], order.end[low : high + 1]
    counts = plan.selected[ids]
    starts = ends - counts
    owner = np.repeat(np.arange(len(ids)), np.minimum(ends, stop) - np.maximum(starts, first))
    index = np.arange(first, stop) - starts[owner]
    lane = np.repeat(np.arange(len(lanes)), per_lane)
    words = _words(plan.seed, order.epoch, ids[owner], index, SAMPLE_ORDER)
    index = index[np.lexsort((*words, owner, lane))]
    turn = _words(plan.seed, order.epoch, ids, 0, CHUNK_TURN)[0].astype(np.int64)
    ranks = (index + turn[owner]) % counts[owner]
    # [positions] -> [lanes, steps, G / L] -> [steps, lanes, G / L]
    shape = (len(lanes), steps, per_step)
    chunk = ids[owner].reshape(shape).swapaxes(0, 1)
    return RoundSamples(np.ascontiguousarray(chunk), np.ascontiguousarray(ranks.reshape(shape).swapaxes(0, 1)))


def _words(seed: int, epoch: int, chunk: np.ndarray, index: np.ndarray | int, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random words, uint32, for each (chunk, index)."""
    chunk = np.asarray(chunk, np.uint64)
    low, high, _, _ = philox(index, chunk & np.uint64(0xFFFFFFFF), purpose, chunk >> np.uint64(32), key=(seed, epoch))
    return low, high
