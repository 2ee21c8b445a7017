"""A run on Ray: worker groups of Ray Train around the loop, streams of Ray Data beneath it.

Ray restarts the workers when one dies. Where they go on is read from the run's commit marker, once, when the streams
are made; each worker asserts it. Ray's own checkpoints and reports are not used.

How many workers there are is decided at each start of them, from the machines that are there. Before a machine is taken away, and
when there is room for more workers, they make way: they leave a checkpoint, end, and are started again.
"""

import contextlib
import dataclasses
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.exceptions import RayError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.exceptions import ControllerError
from ray.train.v2.api.preemption import PreemptionInfo

from ssl_ray import plan, ray_stream, storage, stream
from ssl_ray.config import Config, Workers
from ssl_ray.errors import ResourceError, SslRayError, TrainingError
from ssl_ray.train import logs, runs
from ssl_ray.train.capacity import ROUNDING, Capacity, Node, Where, cpus_of, gpus_of, of_cluster, require_cpus, selector
from ssl_ray.train.cluster import answers

if TYPE_CHECKING:
    # Imported where they are used: the actor that makes the streams needs this module, and no torch, which takes a second.
    from ssl_ray.train import loop

IDLE_STARTS = 5
"""So many starts in a row without a new checkpoint end the run."""
GROW_EVERY_S = 30.0
"""Seconds between two looks for room for more workers: each growth costs a start."""
GROW_AGAIN_S = 600.0
"""Where a start with as many workers as there seems to be room for did not succeed, it is tried again after so long."""
LEAVE_S = 600.0
"""Workers that are asked to make way have so long for a step and its checkpoint, then they are killed."""
WAIT_S = 1.0
"""Seconds between two looks for room, where there is too little for a start."""
ASK_EVERY_S, ASK_FOR_S = 20.0, 180.0
"""Seconds between two requests for nodes, and for which one counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What each worker, each stream and a read-out may use, in Ray's units, and where."""

    worker_cpus: float
    stream_cpus: float
    evaluate_cpus: float
    gpus: bool
    where: Where
    most_stream_cpus: float
    """A stream has what is left of the nodes that are there at a start of the workers, `stream_cpus` at least, this at most."""
    share: float
    """Of the cluster, for this run."""

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.worker_cpus} | ({"GPU": 1} if self.gpus else {})


def plan_resources(config: Config, there: Capacity, *, share: float = 1.0) -> Resources:
    """Shares the CPUs out: half to the workers, the rest to their streams but for a read-out's part. A worker has `train.threads`
    CPUs, or less where there are too few, and its stream as many at least, so that a start needs no more where nodes come and go.

    share: of the CPUs, for this run.
    Raises ResourceError, saying what is missing and what to set, where half a CPU or a GPU a worker is not there, nor comes.
    """
    workers, threads = config.train.workers, float(config.train.threads)
    where = Where(train=config.train.label, data=config.data.label)
    elastic, fewest = isinstance(workers, Workers), config.train.fewest_workers()
    cpus = cpus_of(there.most, where) * share
    require_cpus(cpus, workers=workers, threads=config.train.threads, where=where, grown=bool(there.coming))
    gpus = gpus_of(there.most, where.train)
    if 0 < gpus < fewest:
        raise ResourceError(
            f"{fewest} workers (train.workers) need a GPU each; the cluster has {gpus} free. Set train.workers={gpus}."
        )
    changes = elastic or bool(there.coming)
    worker, evaluate = threads, min(1.0, (cpus.data + cpus.both) / 8, threads / 4 if changes else math.inf)
    if not elastic:
        worker = min(threads, (cpus.train + cpus.both / 2) / fewest)
    left = (cpus.left(fewest * worker) - (0 if changes else evaluate)) / fewest
    worker, stream, evaluate = (_rounded(value) for value in (worker, min(threads, left), evaluate))
    planned = Resources(
        worker_cpus=worker,
        stream_cpus=stream,
        evaluate_cpus=evaluate,
        gpus=gpus >= fewest,
        where=where,
        most_stream_cpus=math.inf if changes else _rounded(left),
        share=share,
    )
    if there.coming and room(there.most, planned) < fewest:
        raise ResourceError(
            f"train.workers={workers} needs {_each(planned)}, each; with all nodes that may be added, the cluster has room "
            f"for {room(there.most, planned)}. Lower train.workers or train.threads, or let it have larger or more nodes."
        )
    return planned


def _rounded(cpus: float) -> float:
    """Down to what Ray's precision of .0001 can hold."""
    return int(cpus * 1000) / 1000


def _each(planned: Resources) -> str:
    """What a worker needs, in words."""
    at, beside = (f" on a node with {label}" if label else "" for label in (planned.where.train, planned.where.data))
    gpu = " and a GPU" if planned.gpus else ""
    return f"{planned.worker_cpus:g} CPUs{at}, {planned.stream_cpus:g} more for data{beside}{gpu}"


def fit_resources(planned: Resources, nodes: list[Node], *, workers: int) -> tuple[float, int]:
    """CPUs and bytes of the object store that each of so many workers' streams may use on these nodes: what is left and theirs;
    never more than a node has beside a worker, for a task needs it in one place."""
    where, makers = planned.where, [node for node in nodes if node.cpus and node.has(planned.where.data)]
    left = (cpus_of(nodes, where) * planned.share).left(workers * planned.worker_cpus) - planned.evaluate_cpus
    cpus = max(planned.stream_cpus, min(planned.most_stream_cpus, left / workers))
    store = planned.share * sum(node.resources.get("object_store_memory", 0.0) for node in makers)
    beside = [max(node.cpus - planned.worker_cpus, node.cpus / 2) if node.has(where.train) else node.cpus for node in makers]
    return _rounded(min(cpus, max(beside, default=cpus))), int(store / (2 * workers))


def room(nodes: list[Node], planned: Resources) -> int:
    """The most workers that fit these nodes, their streams, whose tasks may be on any of those that are for them, counted too."""
    needs = planned.per_worker.items()
    train = [node.resources for node in nodes if node.has(planned.where.train)]
    fitting = sum(int(min(node.get(name, 0.0) / need for name, need in needs) + ROUNDING) for node in train)
    return min(fitting, int(cpus_of(nodes, planned.where).count(planned.worker_cpus, planned.stream_cpus) + ROUNDING))


def staying_nodes() -> list[Node]:
    """Each node that is there and is not being taken away, with all its resources.

    A node that has just gone is alive to Ray for ten seconds more: each is asked for an answer.
    """
    leaving = ray._private.state.state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(min(64, len(nodes) + 1)) as pool:
        there = pool.map(lambda node: answers(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"), nodes)
        return [Node(node["Resources"], node["Labels"]) for node, answered in zip(nodes, there, strict=True) if answered]


def missing(planned: Resources, *, workers: int | Workers) -> str:
    """What is missing of the cluster for so many workers, or for the fewest; empty: nothing."""
    fewest, there = workers.min if isinstance(workers, Workers) else workers, room(staying_nodes(), planned)
    if there >= fewest:
        return ""
    return f"waiting for machines: there is room for {there} of {fewest} workers, which need {_each(planned)}, each"


def require_memory(config: Config, data: stream.TrainingData) -> None:
    """Raises ResourceError where so few workers as train.workers allows would not fit the memory of the largest machine.

    That of GPUs is not known before a worker is there.
    """
    from ssl_ray.train.memory import worker_needs

    workers, made = config.train.workers, data.plan
    nodes = [node for node in staying_nodes() if node.cpus and node.has(config.train.label)]
    if not isinstance(workers, Workers) or not nodes or any(node.resources.get("GPU") for node in nodes):
        return
    there = max(node.resources.get("memory", 0.0) for node in nodes)
    an_image, weights, _ = worker_needs(config)

    def share(workers: int) -> int:
        return len(plan.lanes_of(0, workers, made.lanes)) * made.batch // made.lanes

    images = share(workers.min)
    needs = images * an_image + weights
    if needs > there:
        fitting = (n for n in range(workers.min + 1, workers.max + 1) if share(n) * an_image + weights <= there)
        enough = next(fitting, None)
        raise ResourceError(
            f"train.workers={workers}: {workers.min} would have {images} images of a step each, which take {needs / 1e9:.1f} GB "
            f"(what a pass of two images keeps, in proportion, and the weights); the largest machine has {there / 1e9:.1f} GB.\n"
            + (f"Set min to {enough} or more, or lower" if enough else "Lower")
            + " train.batch or views.count."
        )


def requests(planned: Resources, *, workers: int) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Resources and label selectors of what so many workers and their streams need. A stream's is asked for in parts of a CPU,
    since they may be on several nodes."""
    parts = math.ceil(planned.stream_cpus - ROUNDING)
    asked = [(planned.per_worker, selector(planned.where.train))]
    asked += [({"CPU": planned.stream_cpus / parts}, selector(planned.where.data))] * parts
    return asked * workers


class Scaling(ElasticScalingPolicy):
    """How many workers are started, and what is asked of the autoscaler. Ray's own policies know nothing of streams, ask for
    machines that are being taken away, and learn of those that are gone up to 20 s later (Ray 2.60)."""

    def __init__(self, scaling_config: Any, planned: Resources):
        super().__init__(scaling_config)
        self.planned = planned
        self.tried: int | None = None
        """Workers of a start that has not succeeded yet."""
        self.seen = 0
        """For so many there was room at the newest start."""
        self.asked = -math.inf
        """When the newest request for nodes was made."""

    def _count(self) -> int:
        return min(room(staying_nodes(), self.planned), self.scaling_config.max_workers)

    def _send_resource_request(self) -> None:
        """Has the autoscaler keep, or bring, nodes for the workers and their streams; for no more than it can, since it does
        nothing about a request that is too large."""
        self.asked = time.monotonic()
        assert self._coordinator_client is not None
        coordinator: Any = self._coordinator_client._autoscaling_coordinator
        with contextlib.suppress(RayError):  # the next one may arrive
            possible = room(of_cluster(free=False).most, self.planned)
            count = max(self.scaling_config.min_workers, min(self.scaling_config.max_workers, possible))
            bundles = requests(self.planned, workers=count)
            sent = coordinator.request_resources.remote(
                requester_id=self._requester_id,
                resources=[resources for resources, _ in bundles],
                label_selectors=[labels for _, labels in bundles],
                expire_after_s=ASK_FOR_S,
                priority=ResourceRequestPriority.HIGH,
            )
            ray.get(sent, timeout=5)

    def _maybe_send_resource_request(self) -> None:
        if time.monotonic() - self.asked >= ASK_EVERY_S:
            self._send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        count, fewest = self._count(), self.scaling_config.min_workers
        if count < fewest:
            time.sleep(WAIT_S)  # the controller would ask again at once
            return NoopDecision()
        self.seen = count
        if self.tried is not None and self.tried > fewest:  # what is free may be less than what is there
            count = min(count, self.tried - 1)
        self.tried = count
        return self._get_resize_decision(count)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        self._maybe_send_resource_request()
        self.tried = None
        now, started = time.monotonic(), worker_group_state.start_time
        if now - max(started, self._latest_monitor_time) >= GROW_EVERY_S:
            self._latest_monitor_time = now
            known = self.seen if now - started < GROW_AGAIN_S else worker_group_state.num_workers
            if self._count() > known:
                asked = PreemptionInfo(int(1000 * (time.time() + LEAVE_S)), {})
                for worker in worker_group_state.workers:
                    worker.actor.mark_preempt.remote(asked)
        return NoopDecision()


class StreamConfig(ray.train.DataConfig):
    """Makes the workers' streams at every start of the worker group, from the committed position."""

    def __init__(self, run: str, lease: int | None, reference: Any, total_steps: int, resources: Resources):
        super().__init__(datasets_to_split=[])
        self.run, self.lease, self.reference, self.total_steps = run, lease, reference, total_steps
        self.resources = resources

    def configure(self, datasets, world_size, worker_handles=None, worker_node_ids=None, **_):
        marker = runs.begin_attempt(self.run, lease=self.lease)
        if marker.idle > IDLE_STARTS:
            raise TrainingError(
                f"the workers died {IDLE_STARTS} times at step {marker.step} without a new checkpoint. "
                f"{runs.newest_failure(self.run)}\n"
                "Ray's logs are in /tmp/ssl-ray-*/session_latest/logs on their machines. Lower memory use or checkpoint.every_s."
            )
        data = ray_stream.fetch(self.reference)
        cpus, store = fit_resources(self.resources, staying_nodes(), workers=world_size)

        def made(lanes: range) -> Any:
            return ray_stream.ray_stream(
                self.reference,
                lanes=lanes,
                first_step=marker.step,
                stop_step=self.total_steps,
                cpus=cpus,
                store=stream.store_bytes(data, len(lanes), share=store),
                selector=selector(self.resources.where.data),
            )

        return [{"train": made(plan.lanes_of(rank, world_size, data.plan.lanes)).iterator()} for rank in range(world_size)]


def last_resort_s(stall_s: float) -> float:
    """Ray's own time-outs come after the watchdog, whose message says more; they count where it hangs with its worker."""
    return stall_s + 30


class KeepFailures(ray.train.UserCallback):
    """Writes down why workers died, for the user and for the error that ends a run whose workers die again and again."""

    def __init__(self, run: str):
        self.run = run

    def after_exception(self, run_context, worker_exceptions):
        # Those that died come first: the others have lost their connection to them.
        died = {rank: error for rank, error in worker_exceptions.items() if isinstance(error, WorkerHealthCheckFailedError)}
        reasons = {rank: storage.one_line(error.health_check_failure) for rank, error in died.items()}
        runs.write_failure(
            self.run, reasons | {rank: str(error) for rank, error in worker_exceptions.items() if rank not in died}
        )


def _work(given: dict[str, Any]) -> "loop.Outcome":
    """What a Ray Train worker runs. A user's error is returned, since Ray would start the workers again if it were raised."""
    try:
        return _work_or_raise(given)
    except SslRayError as error:
        # One from the actor that makes the streams is of a class that Ray derived, which only Ray can unpickle.
        from ssl_ray.train import loop

        cause = error.cause if isinstance(error, RayTaskError) else error
        return loop.Outcome(runs.read_marker(given["run"]).step, cause)


def _raise_in_worker(text: str) -> None:
    """Has Ray Train see an error of this worker, whose own thread hangs: all workers are killed and started again."""
    runner = get_train_context().execution_context.training_thread_runner
    runner.get_exception_queue().put(UserExceptionWithTraceback(TrainingError(text), traceback_str=text))


def _work_or_raise(given: dict[str, Any]) -> "loop.Outcome":
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from ssl_ray.train import loop
    from ssl_ray.train.watchdog import Watchdog

    config: Config = given["config"]
    run: str = given["run"]
    torch.set_num_threads(config.train.threads)
    context = ray.train.get_context()
    group = dist.group.WORLD if context.get_world_size() > 1 else None
    rank, asked = context.get_world_rank(), get_train_context().preemption_context
    step = runs.read_marker(run).step
    with (
        contextlib.closing(Watchdog(config.train.stall_s, step=step, group=group, stalled=_raise_in_worker)) as watchdog,
        logs.kept(run, rank=rank, step=lambda: watchdog.step),
    ):
        shard = ray.train.get_dataset_shard("train")  # comes first: this start of the workers is counted when it is made
        tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        batches = ray_stream.ray_batches(tables)
        outcome = loop.run_worker(
            config,
            given["schedule"],
            given["watch"](batches) if rank == 0 else batches,
            run=run,
            marker=runs.read_marker(run),
            group=group,
            rank=rank,
            device=get_device(),
            watchdog=watchdog,
            leaving=lambda: asked.preemption_info is not None,
        )
    if outcome.left and rank == 0:
        gone = asked.preemption_info.preempted_ranks if asked.preemption_info else []
        text = f"left its machine, which is being taken away, after step {outcome.step}"
        more = {0: f"made way for more workers after step {outcome.step}"}
        runs.write_failure(run, dict.fromkeys(gone, text) or more)
    return outcome


def evaluate(uri: str, checkpoint: str | None, *, resources: Resources) -> "Future[dict[str, Any]]":
    """The read-outs of a checkpoint, in a task where views are made; of a trial too, whose own CPUs are too few for it."""
    from ssl_ray.train.readouts import evaluate_run

    remote: Any = ray.remote  # its annotation knows no keyword-only arguments
    task = remote(evaluate_run).options(
        num_cpus=resources.evaluate_cpus,
        scheduling_strategy="DEFAULT",
        label_selector=selector(resources.where.data),
    )
    return task.remote(uri, checkpoint=checkpoint).future()


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
    reference = ray.put(data)
    # Ray passes these on to the processes that need them.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(last_resort_s(config.train.stall_s))
    if ray._private.services.get_webui_url_from_internal_kv():  # a dashboard, whose Train page a process of its own fills
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    at, failed = -1, 0
    while True:
        step = runs.read_marker(run).step
        at, failed = step, failed if step == at else 0
        try:
            outcome = _train_once(config, schedule, run, lease, reference, resources, scratch, watch, environment)
        except ControllerError as error:  # as when a machine goes while workers find each other
            failed += 1
            if failed == IDLE_STARTS:
                raise TrainingError(f"the workers did not start {failed} times at step {step}. {_last_line(error)}") from error
            runs.write_failure(run, {0: _last_line(error)})
            continue
        if not outcome.left:
            return outcome


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _train_once(
    config: Config,
    schedule: "loop.Schedule",
    run: str,
    lease: int | None,
    reference: Any,
    resources: Resources,
    scratch: str,
    watch: Callable[[Iterator[stream.Batch]], Iterator[stream.Batch]],
    environment: dict[str, str],
) -> "loop.Outcome":
    """Trains until the run ends, or its workers make way."""
    from ray.train.torch import TorchTrainer

    from ssl_ray.train.rendezvous import OwnAddress

    work: Any = _work  # Ray passes on what it returns, which its annotation does not foresee
    workers = config.train.workers
    # Without GPUs views stay where they are made, and not all workers are lost with a node.
    packed = resources.gpus if config.train.pack is None else config.train.pack
    trainer: Any = TorchTrainer(
        work,
        train_loop_config={"config": config, "run": run, "schedule": schedule, "watch": watch},
        datasets={"train": ray.data.range(1)},
        dataset_config=StreamConfig(run, lease, reference, schedule.total_steps, resources),
        torch_config=OwnAddress(timeout_s=int(last_resort_s(config.train.stall_s))),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # that of Train v2
            num_workers=(workers.min, workers.max) if isinstance(workers, Workers) else workers,  # type: ignore[arg-type]
            use_gpu=resources.gpus,
            resources_per_worker=resources.per_worker,
            placement_strategy="PACK" if packed else "SPREAD",
            label_selector=selector(config.train.label) or None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # that of Train v2
            name=f"{logs.short_name(run)}-{uuid.uuid4().hex[:8]}",  # on Ray's pages; Ray would continue one that it knows
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": environment} if environment else None,
            callbacks=[KeepFailures(run)],  # type: ignore[list-item]  # as its documentation says
        ),
    )
    begin, policy = trainer._initialize_and_run_controller, Scaling(trainer.scaling_config, resources)
    trainer._initialize_and_run_controller = lambda **given: begin(**given | {"scaling_policy": policy})
    return trainer.fit().return_value
