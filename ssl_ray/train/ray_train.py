"""A run on Ray: worker groups of Ray Train around the loop, streams of Ray Data beneath it.

Ray restarts the workers when one dies. Where they go on is read from the run's commit marker, once, when the streams
are made; each worker asserts it. Ray's own checkpoints and reports are not used.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray.exceptions import RayTaskError

from ssl_ray import plan, ray_stream, stream
from ssl_ray.config import Config
from ssl_ray.errors import ResourceError, SslRayError, TrainingError
from ssl_ray.train import runs
from ssl_ray.train.cluster import require_cpus

if TYPE_CHECKING:
    # Imported where they are used: the actor that makes the streams needs this module, and no torch, which takes a second.
    from ssl_ray.train import loop

IDLE_STARTS = 5
"""So many starts in a row without a new checkpoint end the run."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What each worker, each stream and a read-out may use, in Ray's units."""

    worker_cpus: float
    stream_cpus: float
    evaluate_cpus: float
    stream_store: int
    """Bytes of the object store."""
    gpus: bool


def plan_resources(available: dict[str, float], *, workers: int, threads: int) -> Resources:
    """Shares the cluster's CPUs out: half to the workers, the rest to their streams but for a read-out's part. Of the object
    store the streams have half.

    Raises ResourceError, saying what is missing and what to set, where half a CPU or a GPU a worker is not there.
    """
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    require_cpus(cpus, workers=workers)
    if 0 < gpus < workers:
        raise ResourceError(
            f"train.workers={workers} needs a GPU for each; the cluster has {gpus:g} free. Set train.workers={int(gpus)}."
        )
    worker = min(float(threads), cpus / (2 * workers))
    evaluate = min(1.0, cpus / 8)
    share = (cpus - workers * worker - evaluate) / workers
    worker, share, evaluate = (int(value * 1000) / 1000 for value in (worker, share, evaluate))  # Ray's precision is .0001
    store = int(available.get("object_store_memory", 0.0) / (2 * workers))
    return Resources(worker, share, evaluate, store, gpus=gpus >= workers)


class StreamConfig(ray.train.DataConfig):
    """Makes the workers' streams at every start of the worker group, from the committed position."""

    def __init__(self, run: str, lease: int | None, reference: Any, total_steps: int, resources: Resources):
        super().__init__(datasets_to_split=[])
        self.run, self.lease, self.reference, self.total_steps, self.resources = run, lease, reference, total_steps, resources

    def configure(self, datasets, world_size, worker_handles=None, worker_node_ids=None, **_):
        marker = runs.begin_attempt(self.run, lease=self.lease)
        if marker.idle > IDLE_STARTS:
            raise TrainingError(
                f"the workers died {IDLE_STARTS} times at step {marker.step} without a new checkpoint. "
                f"{runs.newest_failure(self.run)}\n"
                "Ray's logs are in /tmp/ssl-ray-*/session_latest/logs on their machines. Lower memory use or checkpoint.every_s."
            )
        data = ray_stream.fetch(self.reference)
        shares = [plan.lanes_of(rank, world_size, data.plan.lanes) for rank in range(world_size)]
        return [{"train": self._stream(data, lanes, marker.step).iterator()} for lanes in shares]

    def _stream(self, data: stream.TrainingData, lanes: range, first_step: int):
        return ray_stream.ray_stream(
            self.reference,
            lanes=lanes,
            first_step=first_step,
            stop_step=self.total_steps,
            cpus=self.resources.stream_cpus,
            store=stream.store_bytes(data, len(lanes), share=self.resources.stream_store),
        )


class KeepFailures(ray.train.UserCallback):
    """Writes down why workers died, for the user and for the error that ends a run whose workers die again and again."""

    def __init__(self, run: str):
        self.run = run

    def after_exception(self, run_context, worker_exceptions):
        runs.write_failure(self.run, {rank: str(error) for rank, error in worker_exceptions.items()})


def _work(given: dict[str, Any]) -> "loop.Outcome":
    """What a Ray Train worker runs. A user's error is returned, since Ray would start the workers again if it were raised."""
    try:
        return _work_or_raise(given)
    except SslRayError as error:
        # One from the actor that makes the streams is of a class that Ray derived, which only Ray can unpickle.
        from ssl_ray.train import loop

        cause = error.cause if isinstance(error, RayTaskError) else error
        return loop.Outcome(runs.read_marker(given["run"]).step, cause)


def _work_or_raise(given: dict[str, Any]) -> "loop.Outcome":
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from ssl_ray.train import loop

    config: Config = given["config"]
    run: str = given["run"]
    torch.set_num_threads(config.train.threads)
    context = ray.train.get_context()
    group = dist.group.WORLD if context.get_world_size() > 1 else None
    shard = ray.train.get_dataset_shard("train")  # comes first: this start of the workers is counted when it is made
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    batches, rank = ray_stream.ray_batches(tables), context.get_world_rank()
    return loop.run_worker(
        config,
        given["schedule"],
        given["watch"](batches) if rank == 0 else batches,
        run=run,
        marker=runs.read_marker(run),
        group=group,
        rank=rank,
        device=get_device(),
    )


def evaluate(uri: str, checkpoint: str | None, *, cpus: float) -> "Future[dict[str, Any]]":
    """The read-outs of a checkpoint, in a task beside the workers."""
    from ssl_ray.train.readouts import evaluate_run

    remote: Any = ray.remote  # its annotation knows no keyword-only arguments
    return remote(evaluate_run).options(num_cpus=cpus).remote(uri, checkpoint=checkpoint).future()


def train(
    config: Config,
    data: stream.TrainingData,
    schedule: "loop.Schedule",
    *,
    run: str,
    lease: int | None,
    resources: Resources,
    scratch: str,
    watch: Callable[[Iterator[stream.Batch]], Iterator[stream.Batch]],
    environment: dict[str, str],
) -> "loop.Outcome":
    """Trains the run at `run` on the cluster that is joined; returns how it ended. Workers that die are started again.

    lease: the number of the driver's.
    scratch: a folder for what Ray Train notes of its own.  watch: what hands on the batches of worker 0.
    environment: variables of the workers.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    reference = ray.put(data)
    work: Any = _work  # Ray passes on what it returns, which its annotation does not foresee
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config, "run": run, "schedule": schedule, "watch": watch},
        datasets={"train": ray.data.range(1)},
        dataset_config=StreamConfig(run, lease, reference, schedule.total_steps, resources),
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=resources.gpus,
            resources_per_worker={"CPU": resources.worker_cpus} | ({"GPU": 1} if resources.gpus else {}),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # that of Train v2
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": environment} if environment else None,
            callbacks=[KeepFailures(run)],  # type: ignore[list-item]  # as its documentation says
        ),
    )
    result: Any = trainer.fit()
    return result.return_value
