"""The files that say what a study is and where its trials stand, and what they hold: study.json and trial.json.

    STUDY/study.json              what the study is: written once, when it begins
    STUDY/trials/NAME/            a run (see ssl_ray.train.runs), and beside it
    STUDY/trials/NAME/trial.json  where the trial stands; absent as long as it is queued
    STUDY/summary.json            predicted against real, when every trial has ended

The dataclasses here are the schema: what they do not have is not read, what has no default there must be in the file.
"""

import contextlib
import dataclasses
import functools
import json
import types
import typing
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ssl_ray import __version__, storage
from ssl_ray.config import flatten
from ssl_ray.errors import DataError, SslRayError
from ssl_ray.train import runs

FORMAT_VERSION = 1

Objective = Literal["linear_accuracy", "knn_accuracy", "alpha", "rankme"]
Mode = Literal["max", "min", "near"]
Status = Literal["queued", "running", "complete", "failed", "stopped"]
ENDED: tuple[Status, ...] = ("complete", "failed", "stopped")


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A trial as study.json has it."""

    name: str
    """Of its folder, such as 0000-d64-b0.04-s0."""
    settings: dict[str, Any]
    """The swept keys and their values: {"model.projector_dim": 64}."""
    seed: int
    hash: str
    """Canonical hash of the identity of its configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What study.json says."""

    name: str
    hash: str
    created: float
    """Unix seconds."""
    objective: Objective
    mode: Mode
    """What is good: much, little, or near `target`."""
    base: dict[str, Any]
    """The whole configuration, nested, that the settings of a trial change."""
    swept: tuple[str, ...]
    """The keys that differ between trials, in the order of the sweep."""
    seeds: tuple[int, ...]
    trials: tuple[Planned, ...]
    target: float | None = None
    """With mode near: what the objective should be, 1 for alpha."""
    budget: dict[str, float] | None = None
    """{"views": n} or {"minutes": x} for each trial; None: as the configuration says."""
    search: dict[str, Any] | None = None
    """Where Optuna proposes the trials, of which there are more and more: the `sweep`, `draws` and `readouts` of the study."""
    asha: dict[str, float] | None = None
    """{"grace": part of the budget, "reduction": n} of the scheduler that ends bad trials early; None: all have their budget."""
    target_accuracy: float | None = None
    """0 to 1: that of which the minutes until it was reached are of interest."""
    prices: dict[str, float] | None = None
    """Of an hour of a trial, by what it may run on; the first is what the costs of trials are counted with."""
    currency: str | None = None
    predicted: dict[str, Any] | None = None
    """Before the start: trials, steps, minutes, cost (by the names of the prices)."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    ssl_ray: str = __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What trial.json says: where a trial stands."""

    status: Status = "queued"
    heartbeat: float | None = None
    """Unix seconds, changed every few seconds while the trial runs; so are the two below."""
    started: float | None = None
    ended: float | None = None
    seconds: float = 0.0
    """Wall-clock over all attempts, with starts and read-outs."""
    cost: float | None = None
    attempts: int = 0
    error: str | None = None
    """The last lines of why it failed."""
    reason: str | None = None
    """Why it was stopped."""


def swept_settings(head: Head, planned: Planned) -> dict[str, Any]:
    """Of a trial, without what follows from the budget alone."""
    return {key: planned.settings[key] for key in head.swept if key in planned.settings}


def costs(head: Head, seconds: float) -> dict[str, float] | None:
    """Of so many seconds of a trial, by the names of the prices."""
    return None if not head.prices else {name: price * seconds / 3600 for name, price in head.prices.items()}


def trial_config(base: dict[str, Any], settings: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The flat configuration of a trial: {"views.count": 4, ...}. base: nested, as that of Head."""
    return flatten(base) | settings | {"seed": seed}


# Writing -------------------------------------------------------------------------------------------------------------


def trial_uri(uri: str, name: str) -> str:
    """Where the run of the trial `name` of the study at `uri` is."""
    return storage.join(uri, "trials", name)


def write_study(uri: str, head: Head) -> None:
    runs.write_json(storage.join(uri, "study.json"), {"format_version": FORMAT_VERSION} | dataclasses.asdict(head))


def write_state(uri: str, name: str, state: State) -> None:
    """trial.json of the trial `name` of the study at `uri`."""
    record = {"format_version": FORMAT_VERSION} | dataclasses.asdict(state)
    runs.write_json(storage.join(trial_uri(uri, name), "trial.json"), record)


# Reading -------------------------------------------------------------------------------------------------------------


def read_head(uri: str) -> Head:
    """What study.json of the study at `uri` says; DataError if there is none, or it is damaged or of another format."""
    at = storage.join(uri, "study.json")
    record = read_optional(at)
    if record is None:
        parts: list[str] = []  # of the first names alone: below may be thousands of runs
        with contextlib.suppress(SslRayError):  # where nothing may be listed
            parts += [name for name in storage.list_names(uri)[:20] if storage.exists(storage.join(uri, name, "study.json"))]
        found = f", but in {', '.join(parts)} below it" if parts else ""
        raise DataError(f"{uri}: no study here (no study.json){found}.\n`ssl-ray study list` shows the studies below a folder.")
    head = read_as(Head, record, at)
    require(head.mode != "near" or head.target is not None, at, "mode is near, but target is null")
    names = [trial.name for trial in head.trials]
    require(len(set(names)) == len(names), at, "two trials have the same name")
    for name in names:  # it becomes a part of a path
        require(name not in ("", ".", "..") and not set(name) & set("/\\\0"), at, f"{name!r} is no name of a trial")
    return head


def damaged(at: str, what: str) -> DataError:
    return DataError(f"{at}: damaged, {what}.\nRestore it, or run the study in another folder.")


def require(ok: bool, at: str, what: str) -> None:
    if not ok:
        raise damaged(at, what)


def read_optional(at: str) -> dict[str, Any] | None:
    """The object in a JSON file of format_version FORMAT_VERSION; None if it is absent."""
    data = storage.read_versioned(at)[0]
    if data is None:
        return None
    value = json_object(at, data)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{at}: format_version is {version}, this ssl_ray {__version__} reads {FORMAT_VERSION}.\n"
            "Read it with the ssl_ray that wrote it."
        )
    return value


def json_object(at: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(at, f"it is not JSON ({error})") from error
    require(isinstance(value, dict), at, "it holds no object")
    return value


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether it may be absent of each field of a dataclass."""
    hints, missing = get_type_hints(kind), dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return tuple((each.name, hints[each.name], (each.default, each.default_factory) != (missing, missing)) for each in fields)


def _made(kind: Any, value: Any, key: str) -> Any:
    """`value`, as JSON has it, as the type `kind`: a dataclass, tuple, dict, union, Literal or plain type.

    Keys that a dataclass does not have are left out. Raises ValueError that names the key.
    """
    of = get_args(kind)
    match get_origin(kind):
        case typing.Literal:
            if isinstance(value, str) and value in of:
                return value
        case types.UnionType:
            if value is None and NoneType in of:
                return None
            return _made(of[0], value, key)
        case _ if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_made(of[0], each, key) for each in value)
        case _ if get_origin(kind) is dict and isinstance(value, dict):
            return {name: each if of[1] is Any else _made(of[1], each, f"{key}.{name}") for name, each in value.items()}
        case _ if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            absent = [name for name, _, optional in _fields(kind) if not optional and name not in value]
            if absent:
                raise ValueError(f"{absent[0]} is absent")
            return kind(**{name: _made(hint, value[name], name) for name, hint, _ in _fields(kind) if name in value})
        case _ if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        case _ if kind in (int, str) and type(value) is kind:
            return value
    raise ValueError(f"{key} is {value!r:.100}")


def read_as(kind: type[T], record: dict[str, Any], at: str) -> T:
    """The dataclass `kind` from an object of the JSON file `at`; DataError if something is absent or of another type."""
    try:
        return _made(kind, record, "it")
    except (ValueError, ArithmeticError) as error:
        raise damaged(at, str(error)) from error
