"""Where the time of a step goes: a short run of a configuration, in which worker 0 is traced. Nothing of it is kept."""

import contextlib
import dataclasses
import functools
import os
import resource
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from ssl_ray import storage
from ssl_ray.config import Config
from ssl_ray.errors import Stopped
from ssl_ray.stream import MAKING, Batch
from ssl_ray.train import runs
from ssl_ray.train.loop import Schedule
from ssl_ray.train.pretrain import Progress, drive, made_ready, open_run, signals, start_record

FIRST = 5
"""Steps before the trace: allocators, the first blocks of data."""
STAGES = ("wait", "transfer", "forward", "loss", "backward", "optimizer")
"""What the loop names in a trace. All-reduces are inside forward (batch norm), loss (moments) and backward (gradients)."""


def profile(config: Config, *, steps: int, progress: Progress) -> dict[str, Any]:
    """Seconds a step, means over `steps` steps of worker 0: whole, by stage (`stages_s`), in all-reduces (`all_reduce_s`: until
    all workers are there), and what the data tasks needed to make its views (`making_s`); the most memory that it took.

    The run is a temporary one: beside `config.run` where that is given, which workers of other machines need, else on this
    machine. On a GPU, kernels run one by one (CUDA_LAUNCH_BLOCKING), so that their time counts where they are launched.
    """
    # Kineto speaks of devices that are not there, and when its first trace is in another thread than this one.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _trace():
        pass
    with signals() as asked, _place(config) as uri:
        opened = open_run(dataclasses.replace(config, run=uri), resume="never")
        opened = dataclasses.replace(opened, schedule=Schedule(FIRST + steps + 1, opened.schedule.steps_per_epoch, None))
        progress("start", start_record(opened, 0) | {"complete": False})
        watch = functools.partial(traced, run=uri, steps=steps)
        with made_ready(opened, asked, progress, watch=watch, environment={"CUDA_LAUNCH_BLOCKING": "1"}) as ready:
            try:
                drive(opened, ready, asked, progress)
            except Stopped as error:
                raise Stopped("stopped; nothing of a profile is kept.") from error
        return {"workers": config.train.most_workers()} | runs.read_json(_result(uri))


@contextlib.contextmanager
def _place(config: Config) -> Iterator[str]:
    if config.run is None:
        with storage.scratch_folder("profile") as folder:
            yield os.path.join(folder, "run")
        return
    uri = f"{config.run.rstrip('/')}-profile-{uuid.uuid4().hex[:8]}"
    try:
        yield uri
    finally:
        storage.remove(uri)


def _result(run: str) -> str:
    return storage.join(run, "profile.json")


def traced(batches: Iterator[Batch], *, run: str, steps: int) -> Iterator[Batch]:
    """Hands the batches of worker 0 on, from step 0; traces what its loop does with `steps` of them, and writes the result."""
    trace = _trace()
    begun, making = 0.0, torch.zeros(len(MAKING), dtype=torch.float64)
    for batch in batches:
        if batch.step == FIRST:
            trace.start()
            begun = time.perf_counter()
        elif batch.step == FIRST + steps:
            seconds = time.perf_counter() - begun
            trace.stop()
            runs.write_json(_result(run), _summary(trace, seconds, making, steps))
        if FIRST <= batch.step < FIRST + steps:
            making += torch.from_numpy(batch.seconds)
        yield batch


def _trace() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def _summary(trace: torch.profiler.profile, seconds: float, making: torch.Tensor, steps: int) -> dict[str, Any]:
    spent = {event.key: event.cpu_time_total / 1e6 for event in trace.key_averages()}
    stages = {name: spent.get(name, 0.0) / steps for name in STAGES}
    return {
        "steps": steps,
        "step_s": seconds / steps,
        "stages_s": stages | {"other": seconds / steps - sum(stages.values())},
        "all_reduce_s": sum(took for name, took in spent.items() if name.endswith(":all_reduce")) / steps,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "making_s": dict(zip(MAKING, (making / steps).tolist(), strict=True)),
    }
