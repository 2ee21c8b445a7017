"""What the trials of a study have reached: read while they run, from the study's files alone.

Reading needs no cluster, no pickle and neither torch nor Ray. `read_study(uri, known=...)` asks the storage only for what may
have changed: complete trials are not looked at again, failed and stopped ones only whether they were begun anew, and of
running ones the segments and read-outs whose size or time of writing differ. Readers never write.

Memory: a trial's curve has at most CURVE_POINTS points, whatever its steps; only of running trials is every step kept.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_args

import numpy as np

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.study.schema import (
    ENDED,
    FORMAT_VERSION,
    Head,
    Planned,
    State,
    Status,
    costs,
    damaged,
    json_object,
    read_as,
    read_head,
    read_optional,
    require,
    swept_settings,
    trial_config,
    trial_uri,
)
from ssl_ray.train import runs

STALE_S = 60.0
"""A running trial whose heartbeat is older is shown as stale."""
CURVE_POINTS = 1000
"""A longer curve becomes means over runs of equally many steps."""
BETA_AUTO = 2.8
"""`loss.beta: auto` is this over d, as ssl_ray.losses.beta_auto has it, which needs torch."""
_READERS = 16
"""Threads that wait for a remote storage."""
_LOOKS = 4
"""So often a trial is listed anew, if a file goes between listing and reading: a resume removes what was not committed."""

K = TypeVar("K")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """What a trial's steps were like: arrays [p], p <= CURVE_POINTS, of one or more steps each."""

    step: np.ndarray
    """int64: steps done, from 1."""
    epoch: np.ndarray
    """Epochs done, with a fraction; NaN as long as the length of an epoch is not known."""
    views: np.ndarray
    """Views seen."""
    minutes: np.ndarray
    """Of training: the seconds of the steps, summed."""
    loss: np.ndarray
    """Mean over the point's steps, as are the terms."""
    terms: dict[str, np.ndarray]
    """By name, before their weights."""
    images_per_s: np.ndarray
    data_wait_share: np.ndarray
    """Of the time, 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Readouts:
    """A trial's evaluations by step, first that of the untrained network (step 0): arrays [e]. NaN: not to be had."""

    step: np.ndarray
    epoch: np.ndarray
    views: np.ndarray
    minutes: np.ndarray
    linear_accuracy: np.ndarray
    knn_accuracy: np.ndarray
    alpha: np.ndarray
    rankme: np.ndarray
    num_test: np.ndarray
    """Held-out images of the accuracies."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    name: str
    settings: dict[str, Any]
    """The swept keys alone: not what follows from a budget."""
    seed: int
    hash: str
    m: int
    """views.count"""
    d: int
    """model.projector_dim"""
    beta: float
    """The effective loss.beta; NaN where the loss has none."""
    fraction: float
    """data.fraction"""
    state: State
    curve: Curve
    readouts: Readouts
    bad_samples: int
    segments: dict[str, "_Read"] = dataclasses.field(default_factory=dict, repr=False)
    """Of the metrics, as they were read last; kept while the trial runs, as are the read-outs."""
    evaluations: dict[str, "_Read"] = dataclasses.field(default_factory=dict, repr=False)

    def result(self, objective: str) -> float:
        """That of the last read-out of trained weights, or NaN."""
        if not len(self.readouts.step) or self.readouts.step[-1] == 0:
            return math.nan
        return float(getattr(self.readouts, objective)[-1])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    uri: str
    head: Head
    trials: tuple[Trial, ...]
    """In the order of study.json."""
    summary: dict[str, Any] | None
    """What summary.json says; None: the study has not ended."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    stamp: tuple
    """Size and time (or tag) of the file when it was listed."""
    value: Any


# Pure ----------------------------------------------------------------------------------------------------------------


def shown_status(state: State, *, now: float) -> str:
    """The status, or `stale` if the trial runs and has not been heard of for STALE_S. now: unix seconds."""
    stale = state.status == "running" and not now - (state.heartbeat or 0) <= STALE_S
    return "stale" if stale else state.status


def counts(study: Study, *, now: float) -> dict[str, int]:
    """How many trials have which status, `stale` among them; no zeros."""
    shown = [shown_status(trial.state, now=now) for trial in study.trials]
    return {status: shown.count(status) for status in (*get_args(Status), "stale") if status in shown}


def summarise(study: Study) -> dict[str, Any]:
    """What summary.json is to say. Raises ValueError if a trial has not ended."""
    open_trials = [trial.name for trial in study.trials if trial.state.status not in ENDED]
    if open_trials:
        raise ValueError(f"{len(open_trials)} trials have not ended, the first is {open_trials[0]}")
    seconds = sum(trial.state.seconds for trial in study.trials)
    real = {
        "trials": len(study.trials),
        "steps": sum(int(trial.curve.step[-1]) for trial in study.trials if len(trial.curve.step)),
        "minutes": seconds / 60,
        "cost": costs(study.head, seconds),
    }
    return {"predicted": study.head.predicted, "real": real, "counts": counts(study, now=0)}


def write_summary(uri: str, study: Study) -> dict[str, Any]:
    """Writes summary.json and returns what it says. Raises ValueError if a trial has not ended."""
    summary = {"format_version": FORMAT_VERSION} | summarise(study)
    runs.write_json(storage.join(uri, "summary.json"), summary)
    return summary


def rows(study: Study) -> list[dict[str, Any]]:
    """A row for each trial, for a terminal."""
    now = time.time()
    return [
        {"trial": trial.name, "status": shown_status(trial.state, now=now)}
        | {key: trial.settings[key] for key in study.head.swept if key in trial.settings}
        | {"seed": trial.seed, study.head.objective: trial.result(study.head.objective)}
        | {"minutes": round(trial.state.seconds / 60, 2), "why": trial.state.error or trial.state.reason or ""}
        for trial in study.trials
    ]


def list_studies(uri: str) -> list[dict[str, Any]]:
    """A row for each study that find_studies finds."""
    return [_listed(at) for at in find_studies(uri)]


def _listed(uri: str) -> dict[str, Any]:
    try:
        study = read_study(uri)
    except DataError as error:  # the others are to be seen
        return {"study": uri, "name": "", "trials": None, "ended": None, "objective": "", "why": str(error).partition("\n")[0]}
    ended = sum(trial.state.status in ENDED for trial in study.trials)
    named = {"study": uri, "name": study.head.name, "trials": len(study.trials)}
    return named | {"ended": ended, "objective": study.head.objective, "why": ""}


# Reading -------------------------------------------------------------------------------------------------------------


def find_studies(uri: str, *, levels: int = 2) -> list[str]:
    """`uri` itself if it is a study, else those up to `levels` folders below: the parts of `paper` are in one of their own."""
    if storage.exists(storage.join(uri, "study.json")):
        return [uri]
    below = storage.list_names(uri) if levels else []
    return [at for name in below for at in find_studies(storage.join(uri, name), levels=levels - 1)]


def read_study(uri: str, known: Study | None = None) -> Study:
    """The study at `uri` as it is now.

    known: what was read of it before; what has not changed since is taken from there. Raises DataError if there is no study,
    one of another format, or a file of it is damaged.
    """
    head = read_head(uri)
    same = known is not None and (known.uri, known.head.hash, known.head.created) == (uri, head.hash, head.created)
    before = {trial.name: trial for trial in known.trials} if known is not None and same else {}
    there = set(storage.list_names(storage.join(uri, "trials")))

    def trial(planned: Planned) -> Trial:
        return _read_trial(uri, head, planned, known=before.get(planned.name), there=planned.name in there)

    trials = _each(trial, head.trials, remote=not storage.is_local(uri))
    return Study(uri=uri, head=head, trials=tuple(trials), summary=read_optional(storage.join(uri, "summary.json")))


def _each(call: Callable[[K], T], of: Iterable[K], *, remote: bool) -> list[T]:
    if not remote:
        return [call(each) for each in of]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(call, of))


def _read_trial(uri: str, head: Head, planned: Planned, *, known: Trial | None, there: bool) -> Trial:
    if known is not None and (known.settings, known.seed, known.hash) != (planned.settings, planned.seed, planned.hash):
        known = None
    if known is not None and known.state.status == "complete":
        return known
    at = trial_uri(uri, planned.name)
    # Before the listing: whoever says that it has ended had written all else.
    file = storage.join(at, "trial.json")
    record = read_optional(file) if there else None
    state = State() if record is None else read_as(State, record, file)
    if known is not None and known.state == state and state.status != "running":
        return known
    segments: dict[str, _Read] = {}
    evaluations: dict[str, _Read] = {}
    if record is not None:
        for look in range(_LOOKS):
            try:
                listed = _listing(at)
                segments = _changed(at, "metrics", listed, {} if known is None else known.segments, _segment)
                evaluations = _changed(at, "evaluations", listed, {} if known is None else known.evaluations, _evaluation)
                break
            except DataError as error:
                if look == _LOOKS - 1 or not isinstance(error.__cause__, FileNotFoundError):
                    raise
    m, d, beta, fraction = _short(head, planned, storage.join(uri, "study.json"))
    columns = _joined({name: read.value for name, read in segments.items()})
    steps_per_epoch = _steps_per_epoch(
        columns, trial_config(head.base, planned.settings, seed=planned.seed), complete=state.status == "complete"
    )
    curve = _totals(columns, steps_per_epoch)
    running = state.status == "running"
    return Trial(
        **vars(planned) | {"settings": swept_settings(head, planned)},
        m=m,
        d=d,
        beta=beta,
        fraction=fraction,
        state=state,
        curve=_thinned(curve, columns),
        readouts=_readouts([read.value for _, read in sorted(evaluations.items())], curve),
        bad_samples=int(np.nanmax(np.append(columns.get("bad_samples", []), 0))),
        segments=segments if running else {},
        evaluations=evaluations if running else {},
    )


def _short(head: Head, planned: Planned, at: str) -> tuple[int, int, float, float]:
    """m, d, beta, fraction"""
    config = trial_config(head.base, planned.settings, seed=planned.seed)
    try:
        m, d, fraction = int(config["views.count"]), int(config["model.projector_dim"]), float(config["data.fraction"])
        beta = math.nan if config["loss.name"] != "barlow_twins" else config["loss.beta"]
        return m, d, BETA_AUTO / d if beta == "auto" else float(beta), fraction
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(at, f"the configuration of {planned.name!r} is not whole ({error!r})") from error


# Files of a run ------------------------------------------------------------------------------------------------------


def _listing(at: str) -> dict[str, tuple]:
    """Size and time of writing of the files in metrics/ and evaluations/ of the run at `at`: {"metrics/NAME": stamp}."""
    found: dict[str, tuple] = {}
    if storage.is_local(at):
        path = storage.absolute(at)
        for folder in ("metrics", "evaluations"):
            with storage.storage_errors(storage.join(at, folder), "listing"):
                try:
                    entries = list(os.scandir(os.path.join(path, folder)))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                for entry in entries:
                    there = entry.stat()
                    found[f"{folder}/{entry.name}"] = (there.st_size, there.st_mtime_ns, there.st_ino)
        return found
    filesystem, path = storage.open_storage(at)
    with storage.storage_errors(at, "listing"):
        filesystem.invalidate_cache()  # of what is below `path` too, which a name would leave
        # All below the run in one request (checkpoints too, of which there are few), instead of one a folder.
        for name, info in storage.ask(at, lambda: filesystem.find(path, detail=True)).items():
            when = info.get("ETag") or info.get("LastModified") or info.get("mtime")
            found[name.removeprefix(path).lstrip("/")] = (info.get("size"), str(when))
    return found


def _changed(
    at: str, folder: str, listed: dict[str, tuple], known: dict[str, _Read], parse: Callable[[str, bytes], Any]
) -> dict[str, _Read]:
    """The parsed files of `folder` by name: those of the same stamp from `known`, the others read."""
    wanted = re.compile(r"\d{10}-\d{6}\.jsonl" if folder == "metrics" else r"(untrained|\d{10})\.json")
    read = {}
    for path, stamp in sorted(listed.items()):
        name = path.removeprefix(f"{folder}/")
        if name == path or not wanted.fullmatch(name):
            continue
        if name in known and known[name].stamp == stamp:
            read[name] = known[name]
        else:
            file = storage.join(at, path)
            read[name] = _Read(stamp, parse(file, storage.read_bytes(file)))
    return read


def _evaluation(at: str, data: bytes) -> dict[str, float]:
    """Numbers of a read-out, NaN for null."""
    value = json_object(at, data)
    try:
        given = {field.name: value.get(field.name) for field in dataclasses.fields(Readouts)}
        return {key: math.nan if each is None else float(each) for key, each in given.items()} | {"step": int(value["step"] or 0)}
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(at, f"it is no read-out ({error!r})") from error


def _segment(at: str, data: bytes) -> dict[str, np.ndarray]:
    """The numbers of the records, as float64 [n] by key."""
    try:
        records = json.loads(b"[" + b",".join(data.splitlines()) + b"]")  # a third of the time of a line each
        keys = sorted(set().union(*records) - {"digest"})
        columns = {key: np.array([record.get(key) for record in records], dtype=np.float64) for key in keys}
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise damaged(at, f"it is not lines of JSON with numbers ({error})") from error
    whole = not records or (columns.keys() >= set(runs.EVERY_STEP) and np.isfinite(columns["step"]).all())
    require(bool(whole), at, "a line is no record of a step")
    return columns


# Numbers -------------------------------------------------------------------------------------------------------------


def _joined(segments: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All steps in order. Where a start of the workers began, what earlier ones wrote ends (as in runs.read_metrics)."""
    parts = []
    for name, columns in sorted(segments.items()):
        number = runs.segment_number(name)
        later = [runs.segment_step(other) for other in segments if runs.segment_number(other) > number]
        if columns:
            kept = columns["step"] < min(later, default=math.inf)
            parts.append({key: values[kept] for key, values in columns.items()})
    keys = sorted(set().union(*parts))
    absent = [np.full(len(part["step"]), math.nan) for part in parts]
    return {key: np.concatenate([part.get(key, nan) for part, nan in zip(parts, absent, strict=True)]) for key in keys}


def _steps_per_epoch(columns: dict[str, np.ndarray], config: dict[str, Any], *, complete: bool) -> float:
    """NaN where the records do not tell: before the second epoch of a trial that may end within its first."""
    if not columns or not len(columns["step"]):
        return math.nan
    later = np.flatnonzero(columns["epoch"] >= 1)
    if len(later):
        return float(columns["step"][later[0]] / columns["epoch"][later[0]])
    whole = complete and config.get("train.steps") is None
    return len(columns["step"]) / config.get("train.epochs", math.nan) if whole else math.nan


@dataclasses.dataclass(frozen=True, eq=False)
class _Totals:
    """After each step, [n]."""

    step: np.ndarray
    epoch: np.ndarray
    views: np.ndarray
    minutes: np.ndarray


def _totals(columns: dict[str, np.ndarray], steps_per_epoch: float) -> _Totals:
    if not columns:
        return _Totals(*np.zeros((4, 0)))
    step = columns["step"] + 1
    return _Totals(step, step / steps_per_epoch, np.cumsum(columns["views"]), np.cumsum(columns["seconds"]) / 60)


def _thinned(totals: _Totals, columns: dict[str, np.ndarray]) -> Curve:
    steps = len(totals.step)
    starts = np.arange(0, steps, max(1, -(-steps // CURVE_POINTS)))
    ends = np.append(starts[1:], steps)[: len(starts)]

    def total(key: str) -> np.ndarray:
        return np.add.reduceat(columns[key], starts) if steps else np.zeros(0)

    def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
        return np.divide(over, under, out=np.full(len(starts), math.nan), where=under > 0)

    each = ends - starts
    return Curve(
        step=totals.step[ends - 1].astype(np.int64),
        epoch=totals.epoch[ends - 1],
        views=totals.views[ends - 1],
        minutes=totals.minutes[ends - 1],
        loss=total("loss") / each,
        terms={key: total(key) / each for key in columns if key not in runs.NO_TERMS},
        images_per_s=ratio(total("images"), total("seconds")),
        data_wait_share=ratio(total("data_wait_s"), total("seconds")),
    )


def _readouts(evaluations: list[dict[str, float]], totals: _Totals) -> Readouts:
    evaluations = sorted(evaluations, key=lambda each: each["step"])
    columns = {
        field.name: np.array([each[field.name] for each in evaluations], dtype=np.float64)
        for field in dataclasses.fields(Readouts)
    }
    done = columns["step"]
    at = np.searchsorted(totals.step, done)
    for name in ("epoch", "views", "minutes"):  # read-outs do not hold them
        values = np.append(getattr(totals, name), math.nan)
        exact = np.append(totals.step, -1)[at] == done
        columns[name] = np.where(done == 0, 0.0, np.where(exact, values[at], math.nan))
    return Readouts(**columns | {"step": done.astype(np.int64)})
