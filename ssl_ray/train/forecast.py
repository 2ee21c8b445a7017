"""What a run would take, before it is started: counted from its plan, its time from a few steps in this process."""

import dataclasses
import os
import resource
import time
from typing import Any

import numpy as np
import torch

from ssl_ray import plan, stream
from ssl_ray.config import Config
from ssl_ray.train.loop import compute_loss, make_network, views_on
from ssl_ray.train.optim import build_optimizer
from ssl_ray.train.pretrain import Progress, located, open_data, plan_schedule

_COPIES = {"adam": 3, "adamw": 3, "sgd": 2, "lars": 2}
"""Numbers that a checkpoint holds for each weight: itself and the optimiser's moments."""
PROBE_S = 20.0
"""The probe takes about so many seconds."""
FEW = 2
"""Images of the steps that say how many images can be probed; fewer have no variance."""


def forecast(config: Config, *, probe_steps: int, progress: Progress) -> dict[str, Any]:
    """Steps, samples, bytes and memory of a run of `config`; with probe_steps > 0 also its time on this machine.

    Names say the unit: `_bytes`, `_s`; the rest are counts.
    """
    data, _ = open_data(located(config))
    made, spec = data.plan, config.views
    schedule = plan_schedule(config, made.steps_per_epoch)
    mean_bytes = data.manifest.mean_bytes
    # The busiest worker has the most lanes; the others wait for it at every step.
    lanes = max(
        len(plan.lanes_of(rank, max(1, config.train.workers), made.lanes)) for rank in range(max(1, config.train.workers))
    )
    busiest = lanes * made.batch // made.lanes
    network = make_network(config, group=None)
    weights = sum(p.numel() for p in network.parameters())
    result: dict[str, Any] = {
        "samples": made.num_selected,
        "dropped_per_epoch": made.dropped,
        "steps": schedule.total_steps,
        "steps_per_epoch": made.steps_per_epoch,
        "steps_per_round": made.steps_per_round,
        "images": schedule.total_steps * made.batch,
        "views": schedule.total_steps * made.batch * spec.count,
        "images_per_step_of_the_busiest_worker": busiest,
        "weights": weights,
        "read_per_epoch_bytes": round(made.num_selected * mean_bytes),
        "reads_in_flight_per_worker_bytes": round(3 * made.steps_per_round * busiest * mean_bytes),
        "views_per_step_and_worker_bytes": stream.step_bytes(data, lanes),
        "views_in_flight_per_worker_bytes": _views_in_flight(config, data, lanes),
        "checkpoint_bytes": 4 * _COPIES[config.optim.name] * weights,
    }
    if probe_steps:
        share, total = busiest / made.batch, schedule.total_steps
        result |= _time(config, data, network, steps=probe_steps, share=share, total=total, progress=progress)
    return result


def _views_in_flight(config: Config, data: stream.TrainingData, lanes: int) -> int:
    """The most there are at a time: what waits in the object store, a block in each of two tasks, and the trainer's."""
    step = stream.step_bytes(data, lanes)
    if config.train.workers == 0:
        return step
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
