"""What plans of real sizes cost, simulated: bytes read, requests, memory, and chunks in a step."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision

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


def test_an_even_plan_is_that_of_such_shards():
    made, _, _ = planned(7, 100, 50_000, batch=64, lanes=8)
    even = plans.even_plan(seed=1, batch=64, lanes=8, images=700, shards=7, mean_bytes=50_000, share=1.0)
    assert (even.seed, even.lanes, even.steps_per_round, even.num_selected) == (1, 8, made.steps_per_round, 700)
    assert np.array_equal(even.selected, made.selected)
    assert np.array_equal(even.chunks.of_shard, made.chunks.of_shard)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_an_even_plan_has_all_images_and_their_share_in_shards_that_differ_by_one(share):
    even = plans.even_plan(seed=0, batch=16, lanes=4, images=1003, shards=10, mean_bytes=1e5, share=share)
    assert sorted(set(even.chunks.counts.tolist())) == [100, 101]
    assert even.chunks.counts.sum() == 1003
    assert even.num_selected == int(1003 * share)
    _, first, stop = plans.chunk_bounds(even.chunks, np.arange(even.chunks.num_chunks))
    assert np.all((even.selected >= 0) & (even.selected <= stop - first))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rows_of_a_worker_are_distinct_and_inside_the_chunks_of_its_samples(share):
    even = plans.even_plan(seed=0, batch=32, lanes=8, images=5000, shards=5, mean_bytes=2e5, share=share)
    order = plans.epoch_order(even, 2)
    for worker in range(3):
        lanes = plans.lanes_of(worker, 3, 8)
        shard, row = plans.worker_rows(even, order, 1, lanes)
        assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == len(row)
        chunks = plans.worker_round(even, order, 1, lanes).chunks.ravel()
        assert sorted(plans.chunks_of_rows(even.chunks, shard, row).tolist()) == sorted(chunks.tolist())


FORECAST = """
import json, sys
from ssl_ray.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(code, next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def forecast(*arguments):
    """What `ssl-ray plan --json` says in a process of its own, and the MiB that it took at its peak."""
    command = [sys.executable, "-c", FORECAST, "plan", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak = done.stderr.split()[-2:]
    assert code == "0", done.stderr
    return json.loads(done.stdout), int(peak)


def test_requests_and_traffic_of_a_small_planned_run_are_those_counted_by_hand():
    # One worker reads both shards whole, chunk by chunk: 64 images of 1 MiB in 64 chunks of one image, which lie side by side.
    keys = ("optim.name=adam", "train.batch=8", "train.lanes=1", "train.workers=1", "data.eval_uri=x", "train.epochs=3")
    keys += ("checkpoint.every_s=60",)
    sizes = ("--images", "64", "--shards", "2", "--mean-bytes", str(2**20), "--images-per-s", "16")
    seen, _ = forecast(*sizes, *keys)
    assert [seen[name] for name in ("samples", "steps_per_epoch", "steps", "left_out_as_bad")] == [64, 8, 24, 0]
    assert seen["steps_per_round"] == 8  # so a round is the epoch, and each shard is read from its start to its end
    assert seen["read_per_epoch_bytes"] == seen["needed_per_epoch_bytes"] == 64 * 2**20
    assert seen["gets_per_epoch"] == 2 * 4  # 32 MiB in requests of 8 MiB
    assert seen["index_requests_per_epoch"] == 2
    assert (seen["epoch_s"], seen["estimated_s"], seen["images_each_second"]) == (4.0, 12.0, 16.0)
    assert seen["gets_each_second"] == (8 + 2) / 4
    assert seen["read_each_second_bytes"] == 16 * 2**20
    assert seen["checkpoint_bytes"] == 4 * 3 * seen["weights"]  # Adam's two moments
    assert seen["checkpoint_puts_per_hour"] == 60 * 5
    assert seen["checkpoints_written_per_hour_bytes"] == 60 * seen["checkpoint_bytes"]


def test_half_the_images_of_a_shard_are_asked_for_one_by_one_if_they_lie_apart():
    keys = ("train.batch=8", "train.lanes=1", "train.workers=1", "data.eval_uri=x", "data.fraction=0.5")
    seen, _ = forecast("--images", "64", "--shards", "2", "--mean-bytes", str(2**20), "--images-per-s", "16", *keys)
    assert seen["samples"] == 32
    assert seen["read_per_epoch_bytes"] == 32 * 2**20
    assert 16 <= seen["gets_per_epoch"] <= 32


def test_a_billion_images_for_1024_workers_are_planned_within_two_gigabytes():
    keys = ("train.batch=16384", "train.lanes=1024", "train.workers=1024", "data.eval_uri=x")
    seen, peak = forecast("--images", "1e9", "--shards", "1e6", "--mean-bytes", "110000", "--images-per-s", "500000", *keys)
    print(f"\n{peak} MiB, {seen}")
    assert peak < 2000
    assert seen["samples"] == 10**9
    assert seen["read_per_epoch_bytes"] <= 1.1 * seen["needed_per_epoch_bytes"]
    assert seen["plan_bytes"] + seen["plan_of_an_epoch_in_each_process_bytes"] < 400 * 2**20


def test_time_and_memory_on_a_gpu_are_those_of_the_operations_that_torchvision_tells():
    keys = ("train.workers=8", "train.batch=512", "data.eval_uri=x")
    seen, _ = forecast("-c", "imagenet", "--images", "1281167", "--gpu", "a100", *keys)
    of_a_view = 3 * 2e9 * torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]  # multiplications of a forward pass
    assert seen["operations_of_an_image"] == pytest.approx(4 * of_a_view, rel=0.02)  # the projector is as good as nothing
    assert seen["gpu_images_each_second"] == pytest.approx(0.2 * 312e12 / (4 * of_a_view), rel=0.02)
    assert seen["estimated_s"] == pytest.approx(seen["images"] / (8 * seen["gpu_images_each_second"]), rel=0.01)
    assert seen["gpu_memory_bytes"] == 80 * 10**9
    half, _ = forecast("-c", "imagenet", "--images", "1281167", "--gpu", "a100", *keys, "train.batch=256")
    weights = 4 * 4 * seen["weights"]
    assert seen["gpu_needed_bytes"] - weights == pytest.approx(2 * (half["gpu_needed_bytes"] - weights), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpu", "abacus", "--images", "500"], "expected one of l4, a10g"),
        (["--shards", "5"], "Say how many --images"),
        (["--images", "5", "--shards", "9"], "--shards: got 9, but there are 5 images"),
        (["--images", "1e99"], "expected a whole number"),
        (["--images", "5"], "train.batch"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments, part):
    command = [sys.executable, "-m", "ssl_ray", "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.splitlines()) <= 2


sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_scale  # noqa: E402


def test_the_simulation_asks_for_every_image_of_a_round_once():
    made = plans.even_plan(seed=0, batch=64, lanes=8, images=4000, shards=8, mean_bytes=1e5, share=1.0)
    lane, _, size = bench_scale.round_requests(made, plans.epoch_order(made, 0), 0, 100_000)
    assert size.sum() == made.steps_per_round * 64 * 100_000
    assert np.all(np.bincount(lane, weights=size) == made.steps_per_round * 8 * 100_000)


def test_the_simulation_has_as_many_requests_of_a_worker_under_way_as_it_has_threads():
    lane = np.repeat([0, 1], 20)
    begin, end = bench_scale.times(lane, np.full(40, 10**6), begin=5.0, seed=0)
    assert begin.min() == pytest.approx(5.0)
    assert np.all(end > begin)
    for worker in (0, 1):
        for look in begin[lane == worker]:
            assert (
                1
                <= np.count_nonzero((lane == worker) & (begin <= look + 1e-9) & (look + 1e-9 < end))
                <= bench_scale.REMOTE_THREADS
            )
