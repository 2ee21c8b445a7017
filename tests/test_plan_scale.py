"""What plans of real sizes cost, simulated: bytes read, requests, memory, and chunks in a step."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ssl_ray import plan as plans

MERGE_GAP_BYTES = 64 * 2**10


def planned(shards, per_shard, image_bytes, *, batch, lanes=64):
    """(plan, shard [chunks], first row [chunks]) of a data set of equal shards and images, all selected."""
    n = shards * per_shard
    rows, steps = plans.sizes(num_samples=n, num_selected=n, mean_bytes=image_bytes, batch=batch, lanes=lanes)
    chunks = plans.chunk_layout(np.full(shards, per_shard), rows)
    shard, first, stop = plans.chunk_bounds(chunks, np.arange(chunks.num_chunks))
    made = plans.make_plan(seed=1, batch=batch, lanes=lanes, steps_per_round=steps, chunks=chunks, selected=stop - first)
    return made, shard, first


def read_bytes(chunk, shard, row, image_bytes, *, across_chunks):
    """Bytes that a worker's requests of a round read: rows of a shard nearer than the gap share one request.

    across_chunks: also where the two rows are of different chunks; else those share one only if they are neighbours.
    """
    by_row = np.lexsort((row, shard))
    chunk, shard, row = chunk[by_row], shard[by_row], row[by_row]
    between = (row[1:] - row[:-1] - 1) * image_bytes
    merged = (shard[1:] == shard[:-1]) & (between <= MERGE_GAP_BYTES)
    if not across_chunks:
        merged &= chunk[1:] == chunk[:-1]
    return len(row) * image_bytes + int(between[merged].sum())


def amplification(made, shard, first, image_bytes, workers, *, across_chunks):
    """Bytes read over bytes needed: first, middle and last round, all workers."""
    order = plans.epoch_order(made, 0)
    last = (made.steps_per_epoch - 1) // made.steps_per_round
    read = needed = 0
    for round in sorted({0, last // 2, last}):
        for worker in range(workers):
            samples = plans.worker_round(made, order, round, plans.lanes_of(worker, workers, made.lanes))
            chunk = samples.chunks.ravel()
            row = first[chunk] + samples.ranks.ravel()
            read += read_bytes(chunk, shard[chunk], row, image_bytes, across_chunks=across_chunks)
            needed += samples.chunks.size * image_bytes
    return read / needed


# Shards, images in each, bytes of an image, batch.
DATA_SETS = {
    "digits": (1, 1_797, 200, 128),
    "Fashion-MNIST": (6, 10_000, 600, 128),
    "CIFAR": (10, 5_000, 3_000, 128),
    "ImageNet, batch 256": (1_281, 1_000, 110_000, 256),
    "ImageNet, batch 512": (1_281, 1_000, 110_000, 512),
    "10^7 small images": (1_000, 10_000, 3_000, 4_096),
    "10^6 images of 20 kB": (1_000, 1_000, 20_000, 256),
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_chunks_are_read_with_a_tenth_of_waste_at_most(name):
    shards, per_shard, image_bytes, batch = DATA_SETS[name]
    made, shard, first = planned(shards, per_shard, image_bytes, batch=batch)
    rows = made.chunks.counts[0] / (made.chunks.num_chunks / shards)
    print(f"\n{name}: {rows:.0f} rows a chunk, {rows * image_bytes / 2**10:.0f} KiB, K = {made.steps_per_round}")
    for workers in (1, 2, 3, 4, 8, 16, 64):
        apart, across = (amplification(made, shard, first, image_bytes, workers, across_chunks=each) for each in (False, True))
        print(f"  {workers:2d} workers: {apart:.3f}, with gaps between chunks read too {across:.3f}")
        assert apart <= 1.1
        # Chunks larger than the gap are never joined over another chunk.
        if rows * image_bytes > 2 * MERGE_GAP_BYTES:
            assert across <= 1.1


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_step_draws_from_about_as_many_chunks_as_lanes_or_more(name):
    shards, per_shard, image_bytes, batch = DATA_SETS[name]
    made, _, _ = planned(shards, per_shard, image_bytes, batch=batch)
    samples = plans.worker_round(made, plans.epoch_order(made, 0), 0, range(made.lanes))
    distinct = [len(np.unique(step)) for step in samples.chunks]
    print(f"\n{name}: {np.mean(distinct):.0f} chunks in a step of {batch}")
    assert np.mean(distinct) >= 0.95 * made.lanes


BILLION = """
import json, sys, time
import numpy as np
from ssl_ray import plan as plans

image_bytes, batch = int(sys.argv[1]), int(sys.argv[2])
shards, per_shard, lanes = 10**6, 1000, 64
n = shards * per_shard
times = {}

def timed(name, call):
    begun = time.perf_counter()
    result = call()
    times[name] = time.perf_counter() - begun
    return result

def peak_mb():
    # Not getrusage: its maximum includes what the parent held before exec.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

rows, steps = plans.sizes(num_samples=n, num_selected=n, mean_bytes=image_bytes, batch=batch, lanes=lanes)
chunks = plans.chunk_layout(np.full(shards, per_shard), rows)
selected = np.zeros(chunks.num_chunks, np.int64)
for begin in range(0, len(selected), 2**20):  # as from an index that is read piece by piece
    ids = np.arange(begin, min(begin + 2**20, len(selected)))
    _, first, stop = plans.chunk_bounds(chunks, ids)
    selected[ids] = stop - first
made = plans.make_plan(seed=1, batch=batch, lanes=lanes, steps_per_round=steps, chunks=chunks, selected=selected)
order = timed("set-up of an epoch", lambda: plans.epoch_order(made, 3))

last = (made.steps_per_epoch - 1) // made.steps_per_round
read = {}
for workers in (1, 8, 64):
    needed = got = 0
    for round in (0, last // 3, last - 1, last):
        for worker in range(workers):
            block = plans.lanes_of(worker, workers, lanes)
            samples = timed(f"a round of 1/{workers}", lambda: plans.worker_round(made, order, round, block))
            assert samples.chunks.nbytes == samples.ranks.nbytes == 8 * len(samples.chunks) * len(block) * batch // lanes
            chunk = samples.chunks.ravel()
            shard, first, _ = plans.chunk_bounds(chunks, chunk)
            row = first + samples.ranks.ravel()
            by_row = np.lexsort((row, shard))
            shard, row = shard[by_row], row[by_row]
            between = (row[1:] - row[:-1] - 1) * image_bytes
            merged = (shard[1:] == shard[:-1]) & (between <= 64 * 2**10)
            needed += len(row) * image_bytes
            got += len(row) * image_bytes + int(between[merged].sum())
    read[workers] = got / needed
arrays = {"counts": chunks.counts, "of_shard": chunks.of_shard, "selected": made.selected}
arrays |= {"chunk": order.chunk, "end": order.end}
print(json.dumps({
    "peak_mb": peak_mb(), "times": times, "read": read, "rows": rows, "steps": steps,
    "num_chunks": chunks.num_chunks, "longest_array": max(map(len, arrays.values())),
    "held_mb": sum(array.nbytes for array in arrays.values()) / 2**20,
}))
"""


@pytest.mark.parametrize(("image_bytes", "batch"), [(110_000, 4096), (3_000, 256), (3_000, 1024)])
def test_a_billion_samples_in_a_million_shards_fit_in_a_gigabyte(image_bytes, batch):
    command = [sys.executable, "-c", BILLION, str(image_bytes), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(f"\n{seen}")
    assert seen["peak_mb"] < 1000
    assert seen["num_chunks"] <= 2**23 + 10**6
    assert seen["longest_array"] <= seen["num_chunks"] + 1
    assert max(seen["read"].values()) <= 1.1
