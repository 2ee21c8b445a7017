"""What a run would take, before it is started: counted from its plan, its time from a few steps in this process."""

import time
from typing import Any

import numpy as np
import torch

from ssl_ray import plan, stream
from ssl_ray.config import Config
from ssl_ray.train.loop import compute_loss, make_network
from ssl_ray.train.optim import build_optimizer
from ssl_ray.train.pretrain import located, open_data, plan_schedule


def forecast(config: Config, *, probe_steps: int) -> dict[str, Any]:
    """Steps, samples, bytes and memory of a run of `config`; with probe_steps > 0 also its time on one core's worker."""
    data, _ = open_data(located(config))
    made, spec = data.plan, config.views
    schedule = plan_schedule(config, made.steps_per_epoch)
    mean_bytes = data.manifest.mean_bytes
    step_bytes = made.batch * spec.count * spec.channels * spec.size_px**2
    workers = max(1, config.train.workers)
    network = make_network(config, group=None)
    weights = sum(p.numel() for p in network.parameters())
    result: dict[str, Any] = {
        "samples": made.num_selected,
        "steps": schedule.total_steps,
        "steps_per_epoch": made.steps_per_epoch,
        "dropped_per_epoch": made.num_selected % made.batch,
        "images": schedule.total_steps * made.batch,
        "views": schedule.total_steps * made.batch * spec.count,
        "steps_per_round": made.steps_per_round,
        "read_bytes_per_epoch": round(made.num_selected * mean_bytes),
        "read_bytes_in_flight_per_worker": round(3 * made.steps_per_round * made.batch * mean_bytes / workers),
        "view_bytes_per_step_and_worker": step_bytes // workers,
        "weights": weights,
        "checkpoint_bytes": 12 * weights,
    }
    if probe_steps:
        view_s, step_s = _probe(config, data, network, steps=probe_steps)
        result |= {"probe_view_seconds_per_step": view_s, "probe_train_seconds_per_step": step_s}
        # Views are made beside training where there are CPUs for both; on one core they add up.
        result["estimated_seconds"] = schedule.total_steps * max(step_s / workers, view_s / workers)
        result["estimated_seconds_on_one_core"] = schedule.total_steps * (step_s + view_s)
    return result


def _probe(config: Config, data: stream.TrainingData, network: Any, *, steps: int) -> tuple[float, float]:
    """Median seconds to make the views of a whole batch, and to train on it, on this machine with one worker."""
    torch.set_num_threads(config.train.threads)
    optim = config.optim
    optimizer = build_optimizer(optim.name, network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    lanes = plan.lanes_of(0, 1, data.plan.lanes)
    stop = min(steps + 1, data.plan.steps_per_epoch)
    batches = stream.local_batches(data, lanes=lanes, first_step=0, stop_step=stop)
    view_s, train_s = [], []
    network.train()
    while True:
        begun = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            break
        made = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16):
            z = network(torch.from_numpy(batch.views))
        compute_loss(z, config.loss, group=None).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        view_s.append(made - begun)
        train_s.append(time.monotonic() - made)
    return float(np.median(view_s[1:] or view_s)), float(np.median(train_s[1:] or train_s))
