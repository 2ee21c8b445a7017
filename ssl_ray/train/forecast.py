"""What a run would take, before it is started: counted from its plan, its time from a few steps in this process.

The data set need not be there: `planned` makes one of so many images, shards and bytes.
"""

import dataclasses
import os
import resource
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ssl_ray import plan, stream
from ssl_ray.config import Config
from ssl_ray.errors import UsageError
from ssl_ray.plan import EpochOrder, Plan
from ssl_ray.shards import Manifest
from ssl_ray.shards.manifest import OPEN_PARTS, ROWS_AT_ONCE
from ssl_ray.shards.read import GZIP_CACHE_BYTES, merge_ranges
from ssl_ray.train.loop import compute_loss, make_network, views_on
from ssl_ray.train.memory import worker_needs
from ssl_ray.train.optim import MOMENTS, build_optimizer
from ssl_ray.train.pretrain import Progress, located, open_data, plan_schedule

COMMIT_PUTS = 5
"""Objects of a checkpoint: weights, optimiser, state, the segment of metrics, the marker."""
COUNTED = 512
"""Shares of rounds whose requests are counted; of more, the rest is taken to be alike."""
PROBE_S = 20.0
"""The probe takes about so many seconds."""
GPUS = {  # operations a second in bfloat16 without sparsity, bytes of memory: NVIDIA's data sheets
    "l4": (121e12, 24e9),
    "a10g": (70e12, 24e9),
    "l40s": (362e12, 48e9),
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
}
UTILISATION = 0.2
"""Of a GPU's operations: what ResNet-50 at 224 px reaches on an A100 (about 2,500 images/s); smaller ones reach less."""
FEW = 2
"""Images of the steps that say how many images can be probed; fewer have no variance."""


def planned(config: Config, *, images: int, shards: int, mean_bytes: float) -> stream.TrainingData:
    """The data of a run on a data set that is not there yet. Raises UsageError if there are more shards than images."""
    if shards > images:
        raise UsageError(f"--shards: got {shards}, but there are {images} images, and no shard is empty.")
    share = config.data.fraction * (1 - (config.data.eval_fraction if config.data.eval_uri is None else 0.0))
    lanes, batch = config.train.num_lanes(), config.train.batch
    made = plan.even_plan(
        seed=config.seed, batch=batch, lanes=lanes, images=images, shards=shards, mean_bytes=mean_bytes, share=share
    )
    counts = made.chunks.counts
    manifest = Manifest(
        uri="",
        data_uri="",
        names=pa.array([f"shard-{i:07d}.tar" for i in range(shards)]),
        sizes=(counts * mean_bytes).astype(np.int64),
        counts=counts,
        sha256=pa.array(["0" * 64]).take(pa.array(np.zeros(shards, np.int64))),
        class_names=None,
        class_counts=None,
        mean_bytes=mean_bytes,
        digest="",
    )
    nothing = np.zeros(0, np.int64)
    return stream.TrainingData(manifest, stream.Selection(share, None, 0.0, (nothing, nothing)), made, config.views, None)


def forecast(
    config: Config,
    *,
    data: stream.TrainingData | None = None,
    probe_steps: int,
    images_per_s: float | None,
    gpu: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Steps, samples, requests, bytes and memory of a run of `config`; with a rate, a GPU or probe_steps > 0 also its time.

    data: that of `planned`; None: what config.data names.  images_per_s: of all workers; None: as estimated for the GPU, or
    tried on this machine, if there is data and probe_steps.  gpu: that of each worker, a name in GPUS.
    Names say the unit: `_bytes`, `_s`; the rest are counts. Raises UsageError for a GPU that is not known.
    """
    if gpu is not None and gpu not in GPUS:
        raise UsageError(
            f"--gpu: got {gpu}, expected one of {', '.join(GPUS)}.\nOr say how many --images-per-s all workers take."
        )
    there = data is None
    data = open_data(located(config))[0] if data is None else data
    made, spec = data.plan, config.views
    schedule = plan_schedule(config, made.steps_per_epoch)
    mean_bytes = data.manifest.mean_bytes
    workers = max(1, config.train.fewest_workers())
    # The busiest worker has the most lanes; the others wait for it at every step.
    lanes = max(len(plan.lanes_of(rank, workers, made.lanes)) for rank in range(workers))
    busiest = lanes * made.batch // made.lanes
    network = make_network(config, group=None)
    weights = sum(p.numel() for p in network.parameters())
    begun = time.perf_counter()
    order = plan.epoch_order(made, 0)
    setup_s = time.perf_counter() - begun
    asked = requests(data, order, workers=workers)
    checkpoint_bytes = 4 * (1 + MOMENTS[config.optim.name]) * weights
    result: dict[str, Any] = {
        "samples": made.num_selected,
        "left_out_as_bad": len(data.selection.excluded[0]),
        "dropped_per_epoch": made.dropped,
        "steps": schedule.total_steps,
        "steps_per_epoch": made.steps_per_epoch,
        "steps_per_round": made.steps_per_round,
        "images": schedule.total_steps * made.batch,
        "views": schedule.total_steps * made.batch * spec.count,
        "images_per_step_of_the_busiest_worker": busiest,
        "weights": weights,
        "needed_per_epoch_bytes": round(made.num_selected * mean_bytes),
        **asked,
        "reads_in_flight_per_worker_bytes": _reads_in_flight(data, asked, share=busiest * made.steps_per_round),
        "views_per_step_and_worker_bytes": stream.step_bytes(data, lanes),
        "views_in_flight_per_worker_bytes": _views_in_flight(config, data, lanes),
        "object_store_per_worker_bytes": stream.store_bytes(data, lanes) if config.train.workers else 0,
        "plan_bytes": _plan_bytes(data),
        "plan_of_an_epoch_in_each_process_bytes": order.chunk.nbytes + order.end.nbytes,
        "set_up_of_an_epoch_s": setup_s,
        "checkpoint_bytes": checkpoint_bytes,
    }
    if gpu is not None:
        on_gpu = _on_gpu(config, gpu, busiest=busiest)
        result |= on_gpu
        images_per_s = images_per_s or workers * on_gpu["gpu_images_each_second"]
    if images_per_s is None and probe_steps and there:
        share, total = busiest / made.batch, schedule.total_steps
        result |= _time(config, data, network, steps=probe_steps, share=share, total=total, progress=progress)
        images_per_s = total * made.batch / result["estimated_s"]
    if images_per_s is not None:
        result |= _rates(result, made, images_per_s=images_per_s)
        result["estimated_s"] = schedule.total_steps * made.batch / images_per_s
    every_s = config.checkpoint.every_s
    if config.checkpoint.every_steps is not None and images_per_s is not None:
        every_s = min(every_s, config.checkpoint.every_steps * made.batch / images_per_s)
    per_hour = 3600 / every_s
    return result | {
        "checkpoints_per_hour": round(per_hour, 1),
        "checkpoint_puts_per_hour": round(per_hour * COMMIT_PUTS),
        "checkpoints_written_per_hour_bytes": round(per_hour * checkpoint_bytes),
    }


def _on_gpu(config: Config, gpu: str, *, busiest: int) -> dict[str, Any]:
    """An estimate from the operations of an image: without float32's they are half as many a second (TF32)."""
    needs, (flops, there) = worker_needs(config), GPUS[gpu]
    if not config.train.bf16:
        flops /= 2
    return {
        "gpu": gpu,
        "operations_of_an_image": round(needs.image_flops),
        "gpu_images_each_second": round(UTILISATION * flops / needs.image_flops, 1),
        "gpu_needed_bytes": round(busiest * needs.image_bytes + needs.weights_bytes),
        "gpu_memory_bytes": round(there),
    }


def requests(data: stream.TrainingData, order: EpochOrder, *, workers: int) -> dict[str, int]:
    """GETs and bytes of an epoch, and those of the index: counted over COUNTED shares of rounds, all of them if they are so few.

    As if the images of a shard were equal and lay evenly in it.  A gzip'd shard is read whole.
    """
    made, manifest = data.plan, data.manifest
    rounds = -(-made.steps_per_epoch // made.steps_per_round)
    shares = np.unique(np.linspace(0, rounds * workers - 1, COUNTED).astype(np.int64))
    gets = read = index = images = 0
    for round, worker in zip(*(part.tolist() for part in np.divmod(shares, workers)), strict=True):
        shard, row = plan.worker_rows(made, order, round, plan.lanes_of(worker, workers, made.lanes))
        images += len(row)
        for some in np.split(np.arange(len(row)), np.flatnonzero(np.diff(shard)) + 1):
            number = int(shard[some[0]])
            index += 1
            if manifest.names[number].as_py().endswith("gz"):
                gets, read = gets + 1, read + int(manifest.sizes[number])
                continue
            apart = manifest.sizes[number] / manifest.counts[number]
            offsets = (row[some] * apart).astype(np.int64)
            sizes = np.full(len(some), min(manifest.mean_bytes, apart), np.int64)
            for first, stop in merge_ranges(offsets, sizes):
                gets, read = gets + 1, read + int(offsets[stop - 1] + sizes[stop - 1] - offsets[first])
    whole = made.steps_per_epoch * made.batch / images
    parts = -(-len(manifest.counts) // manifest.shards_per_part)
    in_part = -(-manifest.num_samples // parts)
    opened = 1 if parts <= OPEN_PARTS else 3  # size and footer of a part are asked for again, where it is not one of the last
    return {
        "gets_per_epoch": round_up(gets * whole),
        "read_per_epoch_bytes": round_up(read * whole),
        "index_requests_per_epoch": round_up(index * whole * opened),
        "index_requests_at_start": 3 + parts * (2 + -(-in_part // ROWS_AT_ONCE)),
    }


def round_up(value: float) -> int:
    return int(np.ceil(value - 1e-6))


def _rates(counts: dict[str, Any], made: Plan, *, images_per_s: float) -> dict[str, Any]:
    epoch_s = made.steps_per_epoch * made.batch / images_per_s
    return {
        "images_each_second": round(images_per_s, 1),
        "epoch_s": epoch_s,
        "gets_each_second": round((counts["gets_per_epoch"] + counts["index_requests_per_epoch"]) / epoch_s, 1),
        "read_each_second_bytes": round(counts["read_per_epoch_bytes"] / epoch_s),
    }


def _plan_bytes(data: stream.TrainingData) -> int:
    """Of manifest and plan: once in the driver, once in the object store of each machine."""
    manifest, made = data.manifest, data.plan
    arrays = (manifest.sizes, made.chunks.counts, made.chunks.of_shard, made.selected, manifest.names, manifest.sha256)
    return sum(array.nbytes for array in arrays)


def _reads_in_flight(data: stream.TrainingData, asked: dict[str, int], *, share: int) -> int:
    """Of three rounds with `share` images each: that which is made, the one that waits beside it, one more whose task ends.

    The answers to requests are held whole, with the gaps that were read over; of gzip'd shards what is kept decompressed besides.
    """
    made, manifest = data.plan, data.manifest
    if manifest.names[0].as_py().endswith("gz"):
        return round(3 * share * manifest.mean_bytes) + 2 * GZIP_CACHE_BYTES
    return round(3 * share * asked["read_per_epoch_bytes"] / (made.steps_per_epoch * made.batch))


def _views_in_flight(config: Config, data: stream.TrainingData, lanes: int) -> int:
    """The most there are at a time: what waits in the object store, a block in each of two tasks, and the trainer's."""
    step = stream.step_bytes(data, lanes)
    if config.train.workers == 0:
        return 2 * step  # that which is trained on, and the next
    store = stream.store_bytes(data, lanes)
    return store + 3 * stream.steps_in_block(data, lanes, store=store) * step


def _time(
    config: Config, data: stream.TrainingData, network: Any, *, steps: int, share: float, total: int, progress: Progress
) -> dict[str, Any]:
    """The time of `total` steps; `share` of each is the busiest worker's. Start-up and read-outs come on top."""
    images, view_s, train_s = _probe(config, data, network, steps=steps, progress=progress)
    batch = data.plan.batch
    view_s, train_s = batch * view_s, batch * train_s
    if config.train.workers == 0:
        step_s = view_s + train_s
    else:  # views are made beside training, as far as there are CPUs for both
        step_s = max(share * train_s, (view_s + train_s) / len(os.sched_getaffinity(0)))
    found: dict[str, Any] = {
        "probed_images_per_step": images,
        "probed_views_per_step_s": view_s,
        "probed_training_per_step_s": train_s,
    }
    if images == batch:  # that of fewer says little
        found["probed_peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"estimated_s": total * step_s}


def _probe(
    config: Config, data: stream.TrainingData, network: Any, *, steps: int, progress: Progress
) -> tuple[int, float, float]:
    """How many images of a batch were tried, as many as PROBE_S allows, and the median seconds to make the views of one and
    to train on it, on this machine with one worker."""
    torch.set_num_threads(config.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    optim, made = config.optim, data.plan
    network = network.to(device).train()
    optimizer = build_optimizer(optim.name, network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)

    def train_on(batch: stream.Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16):
            z = network(views_on(device, batch, spec=config.views, seed=config.seed, epoch=0))
        loss = compute_loss(z, config.loss, group=None).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a device

    def seconds(images: int, steps: int) -> tuple[float, float]:
        """A step's seconds an image, of its views and of training, the median without the first, which warms up."""
        lanes = range(-(-images * made.lanes // made.batch))  # so many hold them
        view_s, train_s = [], []
        begun = time.monotonic()
        for batch in stream.local_batches(data, lanes=lanes, first_step=0, stop_step=min(steps, made.steps_per_epoch)):
            view_s.append((time.monotonic() - begun) / len(batch.views))
            begun = time.monotonic()
            train_on(dataclasses.replace(batch, views=batch.views[:images], hashes=batch.hashes[:images]))
            train_s.append((time.monotonic() - begun) / images)
            begun = time.monotonic()
        return float(np.median(view_s[1:] or view_s)), float(np.median(train_s[1:] or train_s))

    progress("stage", {"text": f"trying a step of {FEW} images"})
    an_image_s = sum(seconds(FEW, 2))
    images = max(FEW, min(made.batch, int(PROBE_S / (steps + 1) / an_image_s)))
    progress("stage", {"text": f"trying {steps + 1} steps of {images} images (of {made.batch})"})
    return images, *seconds(images, steps + 1)
