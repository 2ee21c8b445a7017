"""Runs a study: its trials as Ray Tune's, each a run of its own below STUDY/trials.

The files are the truth: a study goes on from them, and Tune begins anew each time with what is missing. One process, that which
holds the study's lease, writes study.json and trial.json; the trials write their runs.
"""

import contextlib
import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable
from typing import Any

from ssl_ray import config, storage
from ssl_ray.config import Config
from ssl_ray.errors import SslRayError, Stopped, UsageError
from ssl_ray.study import schema
from ssl_ray.study.results import Study, read_study, write_summary
from ssl_ray.study.schema import Head, Planned, State, trial_uri
from ssl_ray.study.spec import Spec, budgeted, cells, configured, trial_name
from ssl_ray.train import cluster, lease, pretrain
from ssl_ray.train.forecast import forecast
from ssl_ray.train.runs import ask_to_stop as ask_run_to_stop
from ssl_ray.train.runs import read_json

HEARTBEAT_S = 5.0
WAITS_CPUS = 0.01
"""Of a trial that only waits for its workers: Tune wants some."""
RESTARTS = 3
"""So often a trial whose process or machine dies is started again; `study resume` tries anew."""
ERROR_LINES = 12
PROBE_STEPS = 3
START_S = 8.0
"""Of a trial, for the start of its process and its last read-outs; of small ones the larger part."""
_MODES = {"linear_accuracy": "max", "knn_accuracy": "max", "alpha": "near", "rankme": "max"}
ALPHA_TARGET = 1.0
"""Of a good representation (alpha-ReQ)."""
SCORE = "score"
"""What Tune's scheduler is told of a read-out: larger is better."""

Progress = Callable[[str, dict[str, Any]], None]
"""Called with `stage` {text}, `trial` {name, status, ...}."""


# What there is to do -------------------------------------------------------------------------------------------------


def prepare(uri: str, spec: Spec, base: Config, *, progress: Progress) -> Head:
    """study.json of a new study, after a short probe of how long its trials take; a study of the same text is taken as it is.

    Raises UsageError if another study is at `uri`, or settings make no configuration.
    """
    digest = config.canonical_hash(dataclasses.asdict(spec) | {"base": config.identity(base)})
    if storage.exists(storage.join(uri, "study.json")):
        head = schema.read_head(uri)
        if head.hash != digest:
            raise UsageError(f"{uri} holds another study, {head.name}. Use another URI, or `ssl-ray study resume {uri}`.")
        return head
    nested = config.to_dict(base)
    settings = [(each, seed) for each in cells(spec) for seed in spec.seeds]
    made = [configured(nested, each, seed=seed, source=spec.name) for each, seed in settings]  # before the probe takes time
    rates = _probed(made, progress=progress)
    planned, seconds = [], 0.0
    for number, ((each, seed), one) in enumerate(zip(settings, made, strict=True)):
        step_s, steps = rates[_shape(one)]
        if spec.budget is not None:
            views, minutes = spec.budget.get("views"), spec.budget.get("minutes")
            per_step = one.train.batch * one.views.count
            steps = max(1, round(views / per_step if views is not None else 60 * (minutes or 0) / step_s))
        own = budgeted(each, steps=steps, readouts=spec.readouts)
        identity = config.identity(configured(nested, own, seed=seed, source=spec.name))
        name = trial_name(number, each, seed)
        planned.append(Planned(name=name, settings=own, seed=seed, hash=config.canonical_hash(identity)))
        seconds += steps * step_s + START_S
    price = spec.price_per_hour
    predicted = {"trials": len(planned), "steps": sum(trial.settings["train.steps"] for trial in planned)}
    predicted |= {"minutes": seconds / 60, "cost": None if price is None else price * seconds / 3600}
    head = Head(
        name=spec.name,
        hash=digest,
        created=time.time(),
        objective=spec.objective,
        mode=_MODES[spec.objective],  # type: ignore[arg-type]
        target=ALPHA_TARGET if spec.objective == "alpha" else None,
        base=nested,
        swept=tuple(dict.fromkeys(key for each, _ in settings for key in each)),
        seeds=tuple(spec.seeds),
        trials=tuple(planned),
        budget=None if spec.budget is None else {str(key): value for key, value in spec.budget.items()},
        asha=None if spec.asha is None else dataclasses.asdict(spec.asha),
        target_accuracy=spec.target_accuracy,
        price_per_hour=price,
        currency=spec.currency,
        predicted=predicted,
        machine={"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()},
    )
    schema.write_study(uri, head)
    return head


def _shape(made: Config) -> tuple:
    """What decides how long a step takes."""
    return made.views, made.model, made.train.batch, made.train.bf16, made.train.threads, made.train.workers, made.data.fraction


def _probed(made: list[Config], *, progress: Progress) -> dict[tuple, tuple[float, int]]:
    """Seconds of a step, and the steps that its configuration says, of each shape."""
    found: dict[tuple, tuple[float, int]] = {}
    for one in made:
        if _shape(one) not in found:
            progress("stage", {"text": f"probing: m={one.views.count}, d={one.model.projector_dim}, batch {one.train.batch}"})
            seen = forecast(one, probe_steps=PROBE_STEPS, images_per_s=None, progress=lambda kind, value: None)
            found[_shape(one)] = seen["estimated_s"] / seen["steps"], seen["steps"]
    return found


# A trial, in a process of Tune's --------------------------------------------------------------------------------------


def run_trial(given: dict[str, Any]) -> None:
    """Trains one trial to its end, from wherever its run stands, and reports each read-out of trained weights to Tune.

    A user's error is reported too, since Tune would start the trial again if it were raised.
    """
    from ray import tune

    head = schema.read_head(given["study"])
    planned = next(trial for trial in head.trials if trial.name == given["trial"])
    made = configured(head.base, planned.settings, seed=planned.seed, source=head.name)
    # One worker trains here: the result is the same, and a process for it would cost as much again.
    workers = 0 if made.train.workers == 1 else made.train.workers
    made = dataclasses.replace(
        made, run=trial_uri(given["study"], planned.name), train=dataclasses.replace(made.train, workers=workers)
    )
    views = made.train.batch * made.views.count

    def progress(kind: str, value: dict[str, Any]) -> None:
        if kind == "evaluation" and value["step"]:
            tune.report({SCORE: score(head, value), "views": value["step"] * views})

    try:
        if asked_to_stop(given["study"], planned.name):
            raise Stopped("stopped before it began.")
        pretrain.pretrain(made, resume="auto", leased=True, progress=progress, share=given["share"])
    except SslRayError as error:
        tune.report({"stopped" if isinstance(error, Stopped) else "error": str(error)})


def asked_to_stop(uri: str, name: str) -> bool:
    """Whether the study, or this trial of it, is to stop (`ask_to_stop`)."""
    return storage.exists(storage.join(uri, "stop")) or storage.exists(storage.join(uri, "stops", name))


def ask_to_stop(uri: str, name: str | None) -> None:
    """Has a study that runs stop with checkpoints, or end one trial of it for good."""
    names = [trial.name for trial in schema.read_head(uri).trials]
    if name is not None and name not in names:
        raise UsageError(f"{name}: no trial of {uri}. There are {len(names)}, the first is {names[0]}.")
    at = storage.join(uri, "stop") if name is None else storage.join(uri, "stops", name)
    storage.write_atomic(at, b"")


def score(head: Head, evaluation: dict[str, Any]) -> float:
    """How good a read-out is, as the study's objective says; NaN where there is none, as without labels."""
    value = evaluation.get(head.objective)
    if value is None:
        return float("nan")
    return -abs(value - (head.target or 0.0)) if head.mode == "near" else -value if head.mode == "min" else value


# The trials together --------------------------------------------------------------------------------------------------


def run(uri: str, *, progress: Progress) -> Study:
    """Runs all trials of the study at `uri` that have not ended, failed ones anew; returns what came of it.

    Raises Stopped on SIGINT or SIGTERM, or where `study stop` asked for it; ResourceError where a trial cannot run here.
    """
    with pretrain.signals() as asked:

        def wait(text: str) -> None:
            asked.stop_here("while it was seen whether another driver runs this study")
            progress("stage", {"text": text})

        with lease.held(uri, wait=wait):
            storage.remove(storage.join(uri, "stop"))
            head = schema.read_head(uri)
            study = read_study(uri)
            todo = [trial for trial in study.trials if trial.state.status not in ("complete", "stopped")]
            if todo:
                keeper = Keeper(uri, head, {trial.name: trial.state for trial in study.trials}, asked, progress)
                _tune(uri, head, study, [trial.name for trial in todo], keeper, asked=asked, progress=progress)
            study = read_study(uri)
            if all(trial.state.status in schema.ENDED for trial in study.trials):
                write_summary(uri, study)
                return read_study(uri)
            raise Stopped("stopped; `ssl-ray study resume` continues with what is missing.")


def alone(made: Config) -> bool:
    """Whether a trial trains in its own process, and is given its CPUs by Tune; else Ray Train gives them to its workers."""
    return made.train.most_workers() <= 1


def concurrency(available: dict[str, float], configs: list[Config]) -> int:
    """So many trials at a time, each with the CPUs of its threads, or for each of several workers as many again for its data; but
    one where there are parts of CPUs for it. Raises ResourceError where there are not.
    """
    there = available.get("CPU", 0.0)
    needs = max(made.train.threads * (1.0 if alone(made) else 2.0 * made.train.most_workers()) for made in configs)
    for made in configs:
        cluster.require_cpus(there, workers=made.train.workers, threads=made.train.threads)
    return max(1, int(there / needs))


def _tune(uri: str, head: Head, study: Study, names: list[str], keeper: "Keeper", *, asked: Any, progress: Progress) -> None:
    configs = [
        configured(head.base, trial.settings, seed=trial.seed, source=head.name) for trial in head.trials if trial.name in names
    ]

    def listen() -> None:
        asked.listen()
        asked.stop_here("while Ray started")

    # Read when Tune is imported: what a user sees is ours, and a read-out without labels has no score.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "1000000"}
    progress("stage", {"text": "starting Ray"})
    with cluster.ray_session(listen) as session:
        from ray import tune

        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        at_a_time = concurrency(session.available, configs)
        progress("stage", {"text": f"{len(names)} trials to run, {at_a_time} at a time"})
        cpus = max(min(made.train.threads, session.available["CPU"]) if alone(made) else WAITS_CPUS for made in configs)
        trainable = tune.with_resources(run_trial, {"CPU": cpus})
        tuner = tune.Tuner(
            trainable,
            param_space={"study": uri, "share": (1 - at_a_time * WAITS_CPUS) / at_a_time, "trial": tune.grid_search(names)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(head, study), max_concurrent_trials=at_a_time, reuse_actors=False, num_samples=1
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(session.folder / "tune"),
                verbose=0,
                stop=keeper.stopper(),
                callbacks=[keeper.callback()],
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
            ),
        )
        session.call(tuner.fit).result()


def _scheduler(head: Head, study: Study) -> Any:
    """ASHA over views seen, which is told what trials reached in earlier goes; or none."""
    from ray import tune

    if head.asha is None:
        return tune.schedulers.FIFOScheduler()
    longest = max(_views(head, trial) for trial in head.trials)
    scheduler = tune.schedulers.ASHAScheduler(
        time_attr="views",
        metric=SCORE,
        mode="max",
        max_t=longest,
        grace_period=max(1, int(longest * head.asha["grace"])),
        reduction_factor=head.asha["reduction"],
    )
    for trial in study.trials:
        if trial.state.status in ("complete", "stopped"):
            replay = _Replayed(trial.name)
            scheduler.on_trial_add(None, replay)  # type: ignore[arg-type]
            for i, step in enumerate(trial.readouts.step):
                if step:
                    value = float(getattr(trial.readouts, head.objective)[i])
                    result = {SCORE: score(head, {head.objective: value}), "views": int(trial.readouts.views[i])}
                    result["training_iteration"] = i
                    scheduler.on_trial_result(None, replay, result)  # type: ignore[arg-type]
    return scheduler


def _views(head: Head, trial: Planned) -> int:
    made = configured(head.base, trial.settings, seed=trial.seed, source=head.name)
    return trial.settings["train.steps"] * made.train.batch * made.views.count


@dataclasses.dataclass(frozen=True)
class _Replayed:
    """As much of a trial of Tune's as the scheduler looks at."""

    trial_id: str


class Keeper:
    """Writes trial.json of all trials as Tune tells of them, and passes on what `study stop` and signals ask for."""

    def __init__(self, uri: str, head: Head, states: dict[str, State], asked: Any, progress: Progress):
        self.uri, self.head, self.states, self.asked, self.progress = uri, head, states, asked, progress
        self.running: dict[str, float] = {}
        """Seconds that the trials that run had taken before, less the time of their start."""
        self.beaten = 0.0
        self.stopping = False
        self.said: dict[str, dict[str, str]] = {}
        """What trials reported of how they ended."""

    def _write(self, name: str, **changes: Any) -> None:
        now = time.time()
        state = dataclasses.replace(self.states[name], **changes)
        if name in self.running:
            seconds = time.monotonic() + self.running[name]
            price = self.head.price_per_hour
            cost = None if price is None else price * seconds / 3600
            state = dataclasses.replace(state, seconds=seconds, cost=cost, heartbeat=now)
        self.states[name] = state
        schema.write_state(self.uri, name, state)

    def _tell(self, name: str, **more: Any) -> None:
        ended = sum(state.status in schema.ENDED for state in self.states.values())
        status = self.states[name].status
        self.progress("trial", {"name": name, "status": status, "ended": ended, "trials": len(self.states), **more})

    def begins(self, name: str) -> None:
        state = self.states[name]
        self.running[name] = state.seconds - time.monotonic()
        started = state.started or time.time()
        self._write(name, status="running", started=started, attempts=state.attempts + 1, error=None, reason=None, ended=None)
        self._tell(name)

    def ends(self, name: str, status: schema.Status, *, error: str | None = None, reason: str | None = None, **told: Any) -> None:
        self._write(name, status=status, ended=time.time(), error=error, reason=reason)
        self.running.pop(name, None)
        self._tell(name, error=error, reason=reason, **told)

    def beat(self) -> None:
        """Now and then."""
        if time.monotonic() - self.beaten < HEARTBEAT_S:
            return
        self.beaten = time.monotonic()
        for name in list(self.running):
            with contextlib.suppress(SslRayError):  # a storage that is away: the next one may arrive
                self._write(name)
        with contextlib.suppress(SslRayError):
            stop = storage.exists(storage.join(self.uri, "stop"))
            if (stop or self.asked.came) and not self.stopping:
                storage.write_atomic(storage.join(self.uri, "stop"), b"")  # for trials that begin meanwhile
                self.stopping = True
                self.progress("stage", {"text": "stopping: waiting for checkpoints of the trials that run"})
            stops = storage.list_names(storage.join(self.uri, "stops"))
            for name in self.running:
                if self.stopping or name in stops:
                    ask_run_to_stop(trial_uri(self.uri, name))

    def callback(self) -> Any:
        from ray import tune

        keeper = self

        class Told(tune.Callback):
            def on_step_begin(self, iteration, trials, **info):
                keeper.beat()

            def on_trial_start(self, iteration, trials, trial, **info):
                keeper.begins(trial.config["trial"])

            def on_trial_result(self, iteration, trials, trial, result, **info):
                for key in ("error", "stopped"):
                    if key in result:
                        keeper.said[trial.config["trial"]] = {key: result[key]}

            def on_trial_complete(self, iteration, trials, trial, **info):
                keeper.completed(trial.config["trial"])

            def on_trial_error(self, iteration, trials, trial, **info):
                text = "\n".join(str(trial.get_error() or "its process died").strip().splitlines()[-ERROR_LINES:])
                keeper.ends(trial.config["trial"], "failed", error=text)

        return Told()

    def completed(self, name: str) -> None:
        said = self.said.pop(name, {})
        if "error" in said:
            self.ends(name, "failed", error=said["error"])
        elif "stopped" in said and (self.stopping or name not in storage.list_names(storage.join(self.uri, "stops"))):
            self._write(name, status="queued", reason="the study was stopped")  # it goes on with the study
            self.running.pop(name, None)
        elif "stopped" in said:
            self.ends(name, "stopped", reason="`ssl-ray study stop` asked for it")
        elif storage.exists(summary := storage.join(trial_uri(self.uri, name), "summary.json")):
            result = read_json(summary)[self.head.objective]
            self.ends(name, "complete", objective=self.head.objective, result=result)
        else:
            self.ends(name, "stopped", reason="the scheduler ended it: others were better after as many views")

    def stopper(self) -> Any:
        from ray import tune

        keeper = self

        class Stop(tune.Stopper):
            def __call__(self, trial_id: str, result: dict) -> bool:
                return False

            def stop_all(self) -> bool:
                return keeper.stopping and not keeper.running

        return Stop()
