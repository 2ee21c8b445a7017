"""What a store sees of 1,024 workers on 10^9 images in 10^6 shards: simulated from the plan alone, no data, no network.

docs/scale.md and docs/scale.png are written anew; tests/test_plan_scale.py counts small cases by hand.
"""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import timing

from ssl_ray import cli, plan
from ssl_ray.shards.read import MERGE_GAP_BYTES, REMOTE_THREADS, REQUEST_BYTES

DOCS = timing.ROOT / "docs"
IMAGES, SHARDS, IMAGE_BYTES = 10**9, 10**6, 110_000
WORKERS, BATCH, IMAGES_PER_S = 1024, 16_384, 500_000
LATENCY_S, BYTES_PER_S = 0.03, 2e8
"""Of an answer: an exponential time to its first byte, and the rate of the rest; of no store in particular."""
SECONDS = 40
LOOK_S = 0.05
LONGER = (24, 40)
"""Steps of a round that the plan could have instead; with 40 a share of a round is five chunks."""
PER_PREFIX = 1000
"""Shards with one prefix of the key, as shard-0123 of shard-0123456.tar."""


@dataclasses.dataclass(frozen=True)
class Load:
    """How even the load is: of requests under way on a shard, and of requests a second on a prefix."""

    what: str
    get_bytes: float
    on_a_shard: np.ndarray
    """Looks at a shard (all shards, all looks) with 0, 1, 2, ... requests under way."""
    per_prefix: np.ndarray
    """[seconds, prefixes]: requests begun."""


def round_requests(made: plan.Plan, order: plan.EpochOrder, round: int, image_bytes: int) -> tuple[np.ndarray, ...]:
    """(lane, shard, bytes) of the GETs of a round, each lane a worker; images of a shard lie side by side."""
    samples = plan.worker_round(made, order, round, range(made.lanes))
    lane = np.broadcast_to(np.arange(made.lanes)[None, :, None], samples.chunks.shape).ravel()
    chunk = samples.chunks.ravel()
    shard, first, stop = plan.chunk_bounds(made.chunks, chunk)
    row = first + samples.ranks.ravel() * (stop - first) // made.selected[chunk]
    by_row = np.lexsort((row, shard, lane))
    lane, shard, row = lane[by_row], shard[by_row], row[by_row]
    gap = (row[1:] - row[:-1] - 1) * image_bytes
    begins = np.r_[True, (lane[1:] != lane[:-1]) | (shard[1:] != shard[:-1]) | (gap > MERGE_GAP_BYTES)]
    at = np.flatnonzero(begins)
    last = np.r_[at[1:], len(row)] - 1
    size = (row[last] - row[at] + 1) * image_bytes
    pieces = -(-size // REQUEST_BYTES)
    return np.repeat(lane[at], pieces), np.repeat(shard[at], pieces), np.repeat(size // pieces, pieces)


def times(lane: np.ndarray, size: np.ndarray, *, begin: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each request: all workers begin a round together, each with REMOTE_THREADS requests under way."""
    took = np.random.default_rng(seed).exponential(LATENCY_S, len(lane)) + size / BYTES_PER_S
    number = np.arange(len(lane)) - np.searchsorted(lane, lane)  # among those of its lane, which lie together
    queue = lane * REMOTE_THREADS + number % REMOTE_THREADS
    by_queue = np.lexsort((number, queue))
    done = np.cumsum(took[by_queue])
    starts = np.flatnonzero(np.diff(queue[by_queue], prepend=-1))
    before = np.repeat((done - took[by_queue])[starts], np.diff(np.r_[starts, len(queue)]))
    end = np.empty(len(lane))
    end[by_queue] = begin + done - before
    return end - took, end


def loads(made: plan.Plan, order: plan.EpochOrder, *, image_bytes: int, images_per_s: float, seconds: float) -> list[Load]:
    """The load of the plan, and of as many requests at the same times that fall on shards at random: none can be more even
    without the workers telling each other."""
    shards = len(made.chunks.counts)
    period = made.steps_per_round * made.batch / images_per_s
    found = []
    for round in range(int(seconds / period)):
        lane, shard, size = round_requests(made, order, round, image_bytes)
        found.append((shard, size, *times(lane, size, begin=round * period, seed=round)))
    shard, size, begin, end = (np.concatenate(parts) for parts in zip(*found, strict=True))
    at_random = np.random.default_rng(0).integers(0, shards, len(shard))
    names = (f"rounds of {made.steps_per_round} steps", "as many at random")
    return [
        Load(what, float(size.mean()), *_load(of, begin, end, shards, seconds))
        for what, of in zip(names, (shard, at_random), strict=True)
    ]


def _load(shard: np.ndarray, begin: np.ndarray, end: np.ndarray, shards: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(1, np.int64)
    for look in np.arange(seconds / 4, seconds - 1, LOOK_S):
        here = np.bincount(np.bincount(shard[(begin <= look) & (look < end)], minlength=shards))
        counts = np.pad(counts, (0, max(0, len(here) - len(counts))))
        counts[: len(here)] += here
    prefixes = -(-shards // PER_PREFIX)
    per_prefix = np.zeros((int(seconds), prefixes), np.int64)
    inside = begin < int(seconds)
    np.add.at(per_prefix, (begin[inside].astype(int), shard[inside] // PER_PREFIX), 1)
    return counts, per_prefix


def rows() -> tuple[str, list[Load]]:
    """What `ssl-ray plan` says, and the loads."""
    made = plan.even_plan(seed=0, batch=BATCH, lanes=WORKERS, images=IMAGES, shards=SHARDS, mean_bytes=IMAGE_BYTES, share=1.0)
    order = plan.epoch_order(made, 0)
    each = [made, *(dataclasses.replace(made, steps_per_round=steps) for steps in LONGER)]
    fixed = {"image_bytes": IMAGE_BYTES, "images_per_s": IMAGES_PER_S, "seconds": SECONDS}
    return _planned(), [load for one in each for load in loads(one, order, **fixed)]


COMMAND = ["plan", "-c", "imagenet", "--images", "1e9", "--shards", "1e6", "--images-per-s", f"{IMAGES_PER_S}"]
COMMAND += [f"train.batch={BATCH}", f"train.lanes={WORKERS}", f"train.workers={WORKERS}"]


def _planned() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(COMMAND) == 0
    return out.getvalue()


def figures(load: Load) -> dict[str, float]:
    """Maxima over means."""
    busy = np.arange(len(load.on_a_shard)) @ load.on_a_shard / load.on_a_shard.sum()
    steady = load.per_prefix[1:-1]
    return {
        "kB of a GET": load.get_bytes / 1000,
        "mean on a shard": float(busy),
        "most on a shard": len(load.on_a_shard) - 1,
        "looks with two or more": float(load.on_a_shard[2:].sum() / load.on_a_shard.sum()),
        "mean of a prefix in a second": float(steady.mean()),
        "most of a prefix in a second": int(steady.max()),
        "most over mean": float(steady.max() / steady.mean()),
    }


def show(found: tuple[str, list[Load]], *, as_json: bool) -> None:
    planned, both = found
    if as_json:
        print(json.dumps({"plan": planned, "loads": {load.what: figures(load) for load in both}}, indent=1))
        return
    text = page(planned, both)
    print(text)
    (DOCS / "scale.md").write_text(text)
    plot(both, DOCS / "scale.png")


def page(planned: str, both: list[Load]) -> str:
    """docs/scale.md."""
    names = list(figures(both[0]))
    table = [f"| {name} | " + " | ".join(f"{figures(load)[name]:.3g}" for load in both) + " |" for name in names]
    return PAGE.format(
        command=" ".join(["ssl-ray", *COMMAND]),
        planned=planned.rstrip(),
        head=" | ".join(load.what for load in both),
        rule="---|" * len(both),
        table="\n".join(table),
        seconds=SECONDS,
        threads=REMOTE_THREADS,
        latency=1000 * LATENCY_S,
        rate=BYTES_PER_S / 1e6,
        per_prefix=PER_PREFIX,
        look=1000 * LOOK_S,
    )


PAGE = """# Scale

What a run on 10^9 images of 110 kB in 10^6 shards asks of its machines and of the store, with 1,024 workers and 16,384 images a
step: counted from the plan, no data was read. `python tests/benchmarks scale` makes this page.

```
$ {command}
{planned}
```

How each line is counted:

- *gets* and *read per epoch*: the ranges that a worker asks for in a round, merged as the reader merges them, over 512 shares of
  rounds spread over the epoch; images of a shard are taken to be equal and to lie side by side.
- *index requests*: a worker asks for the rows of every shard of its round, once a round, 23 kB of 1,000 images. Of a data set
  of more than 64 parts of the index (10,240 shards) it asks for the size of the part and its last 64 KiB again, too. Here that
  is two thirds of the requests, and less than one percent of the bytes.
- *index requests at start*: the driver reads shard, hash and label of all samples once, some 10 bytes a sample.
- *plan*: in the driver, and once in the object store of each machine; *plan of an epoch*: in each process that makes or counts
  rounds, which sets it up once an epoch.
- *object store per worker*: the views that wait, four rounds or four full blocks of them.
- *checkpoints*: worker 0 writes weights, optimiser, state, metrics and marker, every `checkpoint.every_s` seconds.

A plan has at most 2^23 chunks, so those of 10^9 images have 120 images each. A worker's share of a round of eight steps is 128
images, about one chunk: parts of two, in each of which they lie side by side.

## Is the load even?

A worker's requests of a round begin at the same time as those of all other workers, {threads} at a time; each is answered after
{latency:.0f} ms on average (exponential) and at {rate:.0f} MB/s.
{seconds} seconds of that, looked at every {look:.0f} ms; beside it
rounds that are longer than the plan's, and as many requests at the same times on shards drawn at random:

| | {head} |
|---|{rule}
{table}

![requests under way on a shard; requests a second on a prefix](scale.png)

*On a shard*: requests under way. *Of a prefix*: keys with the same beginning, {per_prefix:,} shards each, by which object stores
split their load; S3 answers some 5,500 GETs a second for a prefix before it splits it.

It is even in that no shard or prefix stays busy: the epoch's order is drawn anew over all chunks, and a prefix gets less
than twice what it would if each request chose a shard by itself. What a worker has of a chunk is asked for at a time, in a few
GETs, so that a shard may have these under way at once, and seldom those of a second worker. The most that a prefix gets in a
second is far below what a store gives. Longer rounds have larger GETs, for memory: with 40 steps a worker has five times the
bytes in flight.
"""


def plot(both: list[Load], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for load, shift in zip(both[:2], (-0.2, 0.2), strict=True):
        share = load.on_a_shard / load.on_a_shard.sum()
        left.bar(np.arange(len(share)) + shift, share, width=0.4, label=load.what)
        steady = load.per_prefix[1:-1]
        (line,) = right.plot(steady.max(1), label=f"{load.what}: most and least of a prefix")
        right.plot(steady.min(1), color=line.get_color())
        right.plot(steady.mean(1), color="black", linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_xlabel("requests under way on a shard")
    left.set_ylabel("share of looks")
    right.set_xlabel("second")
    right.set_ylabel("requests a second on a prefix")
    right.set_ylim(bottom=0)
    for cell in (left, right):
        cell.grid(alpha=0.3)
        cell.legend(frameon=False)
    figure.savefig(path, dpi=110)
