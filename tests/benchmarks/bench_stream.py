"""The stream of views through Ray Data against the same stream in this process, everything on one core."""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import photographs
from timing import Row, row, use_cores

from ssl_ray import plan, stream, views
from ssl_ray.config import build
from ssl_ray.train import cluster
from ssl_ray.train.pretrain import open_data

TURNS = 5
STOP = 10**6
"""Steps of the run that the streams are of."""


def rows() -> list[Row]:
    use_cores(1)  # before Ray starts: all its processes stay there too
    views.load()
    with tempfile.TemporaryDirectory() as folder, cluster.ray_session():
        small = _compare(Path(folder) / "32", size=32, images=50_000, source_px=32, batch=128, warm=570, steps=570)
        large = _compare(Path(folder) / "224", size=224, images=512, source_px=400, batch=32, warm=70, steps=70)
        return [small, large]


def _compare(folder: Path, *, size: int, images: int, source_px: int, batch: int, warm: int, steps: int) -> Row:
    manifest = photographs.write_shards(folder, count=images, kind="jpeg", size=source_px)
    keys = [f"views.size_px={size}", "views.count=8", f"train.batch={batch}", f"views.blur={0.5 if size > 64 else 0}"]
    data, _ = open_data(build({"data": {"uri": manifest.uri}}, keys))
    makers = {"twin": functools.partial(_local, data), "ray": functools.partial(_through_ray, data)}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(TURNS):
        for name, make in makers.items():
            seconds[name].append(_seconds_per_step(make(), warm=warm, steps=steps))
    what = f"stream of {size} px, m = 8, {batch} images a step, from {source_px} px JPEG"
    return row(what, seconds["ray"], seconds["twin"], peer="the in-process twin", unit="step")


def _local(data: stream.TrainingData) -> Iterator[stream.Batch]:
    return stream.local_batches(data, lanes=plan.lanes_of(0, 1, data.plan.lanes), first_step=0, stop_step=STOP)


def _through_ray(data: stream.TrainingData) -> Iterator[stream.Batch]:
    import ray

    from ssl_ray import ray_stream  # only now: when ray is imported it reads what the session sets

    lanes = plan.lanes_of(0, 1, data.plan.lanes)
    store = stream.store_bytes(data, len(lanes))
    # Ray counts two CPUs, whatever core it is kept on: nearly all of them are for one task at a time, with one thread.
    found = ray_stream.ray_stream(ray.put(data), lanes=lanes, first_step=0, stop_step=STOP, cpus=1.9, store=store)
    return ray_stream.ray_batches(found.iterator().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))


def _seconds_per_step(batches: Iterator[stream.Batch], *, warm: int, steps: int) -> float:
    """Of `steps` steps, after `warm` in which processes start and what is made ahead fills up."""
    for _ in range(warm):
        next(batches)
    begun = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return (time.perf_counter() - begun) / steps
