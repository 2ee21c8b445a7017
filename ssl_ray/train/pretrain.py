"""A run from its configuration to its summary: opens the data and the run, trains, reads out, sums up."""

import dataclasses
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any

from ssl_ray import plan, shards, storage, stream, views
from ssl_ray.config import Config, Train
from ssl_ray.errors import DataError, ResourceError, SslRayError, Stopped, TrainingError
from ssl_ray.train import cluster, gauges, lease, logs, loop, runs
from ssl_ray.train.capacity import Cpus, require_cpus
from ssl_ray.train.lease import Lease

QUIET_S = 10.0
"""Where no step comes for so long, it is looked whether the workers wait for machines."""
POLL_S = 0.5
"""Seconds between two looks at the run's files."""
ONE_REQUEST_S = 1.0
"""Signals within so many seconds are one request to stop: `timeout` sends it to the process and to its group."""

Progress = Callable[[str, dict[str, Any]], None]
"""Called with `stage` {text}, `note` {text, of what is beside the run}, `starts` {number: so many of the workers}, `step` (its
record), `evaluation` (read-outs)."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that is ready to train: its place, data and steps."""

    uri: str
    config: Config
    run_id: dict[str, Any]
    data: stream.TrainingData
    schedule: loop.Schedule
    resumed: bool
    lease: int | None = None
    """The number of this driver's."""


def plan_schedule(config: Config, steps_per_epoch: int) -> loop.Schedule:
    """The steps of a run: `train.steps`, or `train.epochs` whole epochs."""
    total = config.train.steps or config.train.epochs * steps_per_epoch
    every = config.evaluate.every_steps or config.evaluate.every_epochs * steps_per_epoch
    return loop.Schedule(total, steps_per_epoch, every or None)


def open_data(config: Config) -> tuple[stream.TrainingData, dict[str, str]]:
    """The training data of a run, and the digests that tie the run to its content."""
    manifest = shards.load_manifest(config.data.uri)
    digests = {"data.digest": manifest.digest, "data.excluded": shards.bad_digest(manifest)}
    if config.data.eval_uri is not None:
        digests["data.eval_digest"] = shards.load_manifest(config.data.eval_uri).digest
    data = stream.prepare(
        manifest,
        spec=config.views,
        seed=config.seed,
        fraction=config.data.fraction,
        balanced=config.data.balanced,
        held_out=config.data.eval_fraction if config.data.eval_uri is None else 0.0,
        batch=config.train.batch,
        lanes=config.train.num_lanes(),
        cache=shards.cache_at(config.data.cache_dir, config.data.cache_bytes),
    )
    return data, digests


def located(config: Config) -> Config:
    """`config` with the places of its data and weights as every process of a run finds them."""
    eval_uri = None if config.data.eval_uri is None else shards.located(config.data.eval_uri)
    data = dataclasses.replace(config.data, uri=shards.located(config.data.uri), eval_uri=eval_uri)
    init_from = None if config.train.init_from is None else storage.absolute(config.train.init_from)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, init_from=init_from))


def open_run(config: Config, *, resume: str) -> Opened:
    """Opens data and run; raises RunMismatchError if the run's URI holds another one, ResourceError if it is new and
    this machine has not the CPUs for it."""
    name = config.data.uri
    config = located(config)
    data, digests = open_data(config)
    run_id = runs.run_identity(config, data_digests=digests)
    uri = storage.absolute(config.run or runs.default_uri(name, run_id))
    if not storage.exists(storage.join(uri, "run.json")):
        _require_cpus(config)
        loop.make_network(config, group=None)  # refused before the run's folder belongs to an encoder that does not fit
    resumed = runs.open_run(uri, config, run_id, resume=resume)
    return Opened(uri, config, run_id, data, plan_schedule(config, data.plan.steps_per_epoch), resumed)


def _require_cpus(config: Config) -> None:
    """Raises ResourceError where a Ray of this machine, which counts no more CPUs than there are, could not run the workers."""
    if cluster.is_local():
        cpus = Cpus(0.0, 0.0, float(os.cpu_count() or 1))
        require_cpus(cpus, workers=config.train.workers, threads=config.train.threads)


def pretrain(config: Config, *, resume: str, leased: bool, progress: Progress, share: float = 1.0) -> dict[str, Any]:
    """Runs `config` to its end, from wherever its run stands; returns the summary, which is also RUN/summary.json.

    leased: refuse to train a run that another driver trains (see lease.py).
    share: of what the cluster has free, or of all of it where this process is part of it, as a trial of a study is.
    Raises the SslRayError that ended the run early; Stopped on SIGINT or SIGTERM, with a checkpoint.
    """
    with signals() as asked:
        opened = open_run(config, resume=resume)
        summary_at = storage.join(opened.uri, "summary.json")
        step = runs.read_marker(opened.uri).step
        complete = step == opened.schedule.total_steps and storage.exists(summary_at)
        progress("start", start_record(opened, step) | {"complete": complete})
        if complete:
            return runs.read_json(summary_at)
        with _held(opened, asked, progress) if leased else nullcontext() as held:
            if held is not None:
                opened = dataclasses.replace(opened, lease=held.number)
            storage.remove(storage.join(opened.uri, "stop"))
            with made_ready(opened, asked, progress, share=share) as ready, observed(opened, step, progress) as told:
                readouts = _Readouts(opened.uri, ready.evaluate, told)

                def beside() -> None:
                    if held is not None and held.lost:
                        raise ResourceError(f"{opened.uri}: another driver has taken over this run; this one has stopped.")
                    readouts.advance()

                drive(opened, ready, asked, told, beside=beside)
                told("stage", {"text": "reading out"})
                readouts.finish(asked)
            summary = summarise(opened)
            runs.write_json(summary_at, summary)
        return summary


@contextmanager
def observed(opened: Opened, step: int, progress: Progress) -> Iterator[Progress]:
    """`progress`, of which Prometheus and this process's log are told too, where it has joined Ray."""
    at = step

    def tell(kind: str, value: dict[str, Any]) -> None:
        nonlocal at
        telling(kind, value)
        if kind == "step":
            at = value["step"] + 1
        elif kind == "stage":
            log.info("%s", value["text"])
        elif kind == "evaluation":
            log.info("read out %s", f"step {value['step']}" if value["step"] else "the untrained network")

    rank = "driver" if opened.config.train.workers else 0
    total = opened.schedule.total_steps
    with (
        logs.kept(opened.uri, rank=rank, step=lambda: at),
        gauges.exported(progress, run=opened.uri, step=step, total_steps=total) as telling,
    ):
        yield tell


@contextmanager
def _held(opened: Opened, asked: "_Asked", progress: Progress) -> Iterator[Lease]:
    """The run's lease; the run is looked at again under it, since another driver may have made it at the same time."""
    told: list[str] = []

    def wait(text: str) -> None:
        asked.stop_here("while it was seen whether another driver trains this run")
        if text not in told:
            progress("stage", {"text": text})
            told.append(text)

    with lease.held(opened.uri, wait=wait) as held:
        runs.open_run(opened.uri, opened.config, opened.run_id, resume="auto")
        yield held


def start_record(opened: Opened, step: int) -> dict[str, Any]:
    made, schedule = opened.data.plan, opened.schedule
    return {
        "run": opened.uri,
        "resumed": opened.resumed,
        "step": step,
        "total_steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "images": made.num_selected,
        "dropped_per_epoch": made.dropped,
    }


class _Asked:
    """Whether SIGINT or SIGTERM came. One that comes later, when the first had its time to work, ends the process at once."""

    def __init__(self) -> None:
        self.first: float | None = None

    @property
    def came(self) -> bool:
        return self.first is not None

    def _note(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
        elif now - self.first > ONE_REQUEST_S:
            os.write(2, b"\nssl-ray: stopped at once; the same command continues from the last checkpoint.\n")
            os._exit(Stopped.exit_code)

    def listen(self) -> dict[int, Any]:
        """Takes over both signals; returns the handlers that were there. In another thread than the main one none are heard."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop_here(self, where: str) -> None:
        """Raises Stopped if a signal came."""
        if self.came:
            raise Stopped(f"stopped {where}; the same command continues.")


@contextmanager
def signals() -> Iterator[_Asked]:
    """Takes SIGINT and SIGTERM as requests to stop, for as long as it lasts.

    Raises Stopped for whatever Ray fails with after one: a scheduler signals all processes of a job, Ray's too.
    """
    asked = _Asked()
    before = asked.listen()
    try:
        yield asked
    except Exception as error:
        if isinstance(error, SslRayError) or not asked.came:
            raise
        raise Stopped(_STOPPED_EARLY) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOPPED_EARLY = "stopped without a checkpoint of the last steps; the same command continues."


# Training in a side thread, while this one watches, reads out and listens ---------------------------------------------

Evaluate = Callable[[str, str | None], "Future[dict[str, Any]]"]
Watch = Callable[[Iterator[stream.Batch]], Iterator[stream.Batch]]
"""Hands on the batches of worker 0."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """What trains and what reads out."""

    train: Callable[[], "Future[loop.Outcome]"]
    evaluate: Evaluate
    alive: Callable[[], bool] | None
    """Whether Ray is still there; None where training is in this process, and has to be waited for."""
    missing: "Callable[[], Future[str]] | None"
    """What the workers wait for before they can start; empty: nothing. None where there are none."""


@contextmanager
def made_ready(
    opened: Opened,
    asked: _Asked,
    progress: Progress,
    *,
    watch: Watch = iter,
    environment: dict[str, str] | None = None,
    share: float = 1.0,
) -> Iterator[Ready]:
    """Makes ready on Ray (which runs as long as the context) or, with train.workers=0, in this process.

    environment: variables of the workers.
    """
    config = opened.config
    if config.train.workers == 0:
        os.environ |= environment or {}
        free = threading.Event()
        """Set while nothing is read out."""
        free.set()

        def evaluate(uri: str, checkpoint: str | None) -> Future[dict[str, Any]]:
            if share < 1:  # else there is a core for it
                free.clear()
            try:
                return _evaluate_here(uri, checkpoint)
            finally:
                free.set()

        with ThreadPoolExecutor(1, thread_name_prefix="train") as pool:
            yield Ready(lambda: pool.submit(_train_here, opened, watch, free), evaluate, alive=None, missing=None)
        return
    _require_cpus(config)
    progress("stage", {"text": "starting Ray"})
    views.load()  # once here, or all tasks of a new machine would compile at the same time

    def listen() -> None:
        asked.listen()  # again: Ray's C++ puts a handler of its own in the place of ours
        asked.stop_here("while Ray started")

    with cluster.ray_session(listen) as session:
        from ssl_ray.train import ray_train

        resources = ray_train.plan_resources(config, session.capacity, share=share)
        ray_train.require_memory(config, opened.data)
        progress("stage", {"text": f"starting {_counted(config.train)}"})
        train = functools.partial(
            ray_train.train,
            config,
            opened.data,
            opened.schedule,
            run=opened.uri,
            lease=opened.lease,
            resources=resources,
            scratch=str(session.folder / "train"),
            watch=watch,
            environment=environment or {},
        )
        yield Ready(
            lambda: session.call(train),
            functools.partial(ray_train.evaluate, resources=resources),
            alive=lambda: cluster.answers(session.address),
            missing=lambda: session.call(functools.partial(ray_train.missing, resources, workers=config.train.workers)),
        )


def _counted(train: Train) -> str:
    fewest, most = train.fewest_workers(), train.most_workers()
    return (f"{most}" if fewest == most else f"{fewest} to {most}") + " worker" + "s" * (most > 1)


def _train_here(opened: Opened, watch: Watch, free: threading.Event) -> loop.Outcome:
    """free: set while this process does nothing else; waited for before each step, so that its seconds are its own."""
    import torch

    from ssl_ray.train.watchdog import Watchdog

    uri, schedule = opened.uri, opened.schedule
    marker = runs.begin_attempt(uri, lease=opened.lease)
    lanes = plan.lanes_of(0, 1, opened.data.plan.lanes)

    def stalled(text: str) -> None:
        """Nothing can be done about a thread of this process that hangs."""
        runs.write_failure(uri, {0: text})
        os.write(2, f"\nssl-ray: {text}\nThe same command continues from the last checkpoint.\n".encode())
        os._exit(TrainingError.exit_code)

    def wait_for_turn(step: int) -> float:
        began = time.monotonic()
        while not free.wait(timeout=1.0):
            watchdog.at("pause", step)
        return time.monotonic() - began

    batches = stream.local_batches(opened.data, lanes=lanes, first_step=marker.step, stop_step=schedule.total_steps)
    with closing(Watchdog(opened.config.train.stall_s, step=marker.step, group=None, stalled=stalled)) as watchdog:
        return loop.run_worker(
            opened.config,
            schedule,
            watch(batches),
            run=uri,
            marker=marker,
            group=None,
            rank=0,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            watchdog=watchdog,
            wait_for_turn=wait_for_turn,
        )


def _evaluate_here(uri: str, checkpoint: str | None) -> "Future[dict[str, Any]]":
    from ssl_ray.train.readouts import evaluate_run

    done: Future[dict[str, Any]] = Future()
    done.set_result(evaluate_run(uri, checkpoint=checkpoint))
    return done


def drive(opened: Opened, ready: Ready, asked: _Asked, progress: Progress, *, beside: Callable[[], None] = lambda: None) -> None:
    """Trains, and from the first step on calls `beside` now and then until it is to stop; raises what ended the run early."""
    uri = opened.uri
    watch = _Watch(uri, progress)
    waiting = None if ready.missing is None else _Waiting(ready.missing, progress)
    training = ready.train()
    told: int | None = None
    """The start of the workers that was asked to stop."""
    while not training.done():
        with suppress(DataError):  # whether a storage that is away ends the run is for the workers to say
            watch.look()
        if waiting is not None:
            waiting.look(watch.seen)
        if asked.came and ready.alive is not None:  # is there anything to wait for?
            if not watch.begun:
                raise Stopped("stopped before the first step; the same command continues.")
            if not ready.alive():
                raise Stopped(_STOPPED_EARLY)
        if asked.came and told is None:
            progress("stage", {"text": "stopping: waiting for the step to end and its checkpoint to be stored"})
        if asked.came and (marker := runs.read_marker(uri)).number != told:  # they may have just been started
            if opened.lease is None or marker.lease == opened.lease:  # else another driver has taken over
                runs.ask_to_stop(uri, marker)
            told = marker.number
        if watch.begun and not asked.came:
            beside()
        wait([training], timeout=POLL_S)
    watch.look()
    outcome = training.result()
    storage.remove(storage.join(uri, "stop"))
    if outcome.error is not None:
        raise outcome.error


class _Watch:
    """Hands on the records of steps that were not committed yet, and deaths of workers, from the run's own files."""

    def __init__(self, uri: str, progress: Progress):
        self.uri, self.progress = uri, progress
        marker = runs.read_marker(uri)
        self.seen, self.starts, self.number = marker.step - 1, marker.number, marker.number
        self.failures = runs.failure_names(uri)
        self.begun = False
        """Whether a step was seen."""

    def look(self) -> None:
        failures = runs.failure_names(self.uri)
        if failures != self.failures:
            self.failures = failures
            step = runs.read_marker(self.uri).step
            text = f"workers ended ({runs.newest_failure(self.uri)}): starting them again from step {step}"
            self.progress("stage", {"text": text})
        names = [name for name in runs.segment_names(self.uri) if runs.segment_number(name) > self.starts]
        if not names:
            return
        newest = max(map(runs.segment_number, names))
        if newest != self.number:
            self.number = newest
            self.progress("starts", {"number": newest})
        mine = [name for name in names if runs.segment_number(name) == newest]
        first = max((name for name in mine if runs.segment_step(name) <= self.seen + 1), default=mine[0])
        for record in runs.read_metrics(self.uri, first_segment=first):
            if record["step"] > self.seen:
                self.progress("step", record)
                self.seen, self.begun = record["step"], True


class _Waiting:
    """Says, once, what workers wait for that do not start."""

    def __init__(self, missing: "Callable[[], Future[str]]", progress: Progress):
        self.missing, self.progress = missing, progress
        self.step, self.since, self.told = -1, time.monotonic(), ""
        self.asking: Future[str] | None = None

    def look(self, step: int) -> None:
        """step: the newest."""
        if step != self.step:
            self.step, self.since, self.told = step, time.monotonic(), ""
        if self.asking is None and time.monotonic() - self.since > QUIET_S:
            self.asking = self.missing()
        if self.asking is not None and self.asking.done():
            text = "" if self.asking.exception() else self.asking.result()  # of a Ray that is gone it is heard elsewhere
            self.asking, self.since = None, time.monotonic()
            if text and text != self.told:
                self.progress("stage", {"text": text})
            self.told = text


class _Readouts:
    """Evaluates checkpoints that ask for it, one at a time; the untrained network first."""

    def __init__(self, uri: str, evaluate: Evaluate, progress: Progress):
        self.uri, self.evaluate, self.progress = uri, evaluate, progress
        self.running: Future[dict[str, Any]] | None = None

    def _due(self) -> list[str | None]:
        names = storage.list_names(storage.join(self.uri, "checkpoints"))
        asked: list[str | None] = [name for name in names if runs.awaits_evaluation(self.uri, name)]
        untrained = storage.exists(runs.evaluation_uri(self.uri, None))
        return asked if untrained else [None, *asked]

    def advance(self, *, last: bool = False) -> None:
        """Takes a finished read-out, begins the next. One that finds no storage is begun again, but for the `last` time."""
        if self.running is not None and self.running.done():
            done, self.running = self.running, None
            try:
                self.progress("evaluation", done.result())
            except SslRayError as error:
                # One from a task is of a class that Ray derived, whose text is a traceback.
                cause = getattr(error, "cause", error)
                if last or not isinstance(cause, DataError):
                    raise cause from error
                self.progress("stage", {"text": f"a read-out failed, and is tried again: {cause}"})
        if self.running is None:
            with suppress(DataError):  # a storage that is away; `finish` says so if it stays away
                for checkpoint in self._due()[:1]:
                    self.running = self.evaluate(self.uri, checkpoint)

    def finish(self, asked: _Asked) -> None:
        """All that are due. Raises Stopped if a signal comes."""
        while self.running is not None or self._due():
            asked.stop_here("during the read-outs, after all steps")
            if self.running is not None:
                wait([self.running], timeout=POLL_S)
            self.advance(last=True)


def summarise(opened: Opened) -> dict[str, Any]:
    """The summary of a complete run, from its files."""
    uri, made = opened.uri, opened.data.plan
    records = runs.read_metrics(uri)
    steps = [record["step"] for record in records]
    assert steps == list(range(opened.schedule.total_steps)), f"{uri}/metrics does not hold every step once"
    untrained = runs.read_json(runs.evaluation_uri(uri, None))
    final = runs.read_json(runs.evaluation_uri(uri, opened.schedule.total_steps))
    seconds = sum(record["seconds"] for record in records)
    images = sum(record["images"] for record in records)
    accuracies = {name: final[name] for name in ("linear_accuracy", "knn_accuracy")}
    accuracies |= {f"{name}_untrained": untrained[name] for name in accuracies}
    return {
        "run": uri,
        "hash": runs.load_run(uri)["hash"],
        "steps": len(records),
        "images": images,
        "views": sum(record["views"] for record in records),
        "seconds": seconds,
        "images_per_s": images / seconds,
        "data_wait_share": sum(record["data_wait_s"] for record in records) / seconds,
        "loss": records[-1]["loss"],
        **accuracies,
        "alpha": final["alpha"],
        "rankme": final["rankme"],
        "num_train": final["num_train"],
        "num_test": final["num_test"],
        "best_step": runs.best_step(uri),
        "bad_samples": records[-1]["bad_samples"],
        "dropped_samples": made.dropped * (len(records) // made.steps_per_epoch),
        "restarts": runs.read_marker(uri).number - 1,
    }
