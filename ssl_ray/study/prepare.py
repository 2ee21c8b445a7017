"""Makes study.json: which trials a study has, and what they will take, from a short probe."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ssl_ray import config, storage
from ssl_ray.config import Config
from ssl_ray.errors import UsageError
from ssl_ray.study import schema
from ssl_ray.study.schema import Head, Objective, Planned
from ssl_ray.study.search import Proposals
from ssl_ray.study.spec import Spec, budgeted, cells, configured, trial_name
from ssl_ray.train.forecast import forecast
from ssl_ray.train.pretrain import located, open_data, plan_schedule

PROBE_STEPS = 3
START_S = 4.0
"""Of a trial, for the start of its process and its last read-outs; of small ones the larger part."""
PLACES = ("data.uri", "data.eval_uri", "data.cache_dir", "train.init_from")
_MODES: dict[Objective, schema.Mode] = {"linear_accuracy": "max", "knn_accuracy": "max", "alpha": "near", "rankme": "max"}
ALPHA_TARGET = 1.0
"""Of a good representation (alpha-ReQ)."""

Progress = Callable[[str, dict[str, Any]], None]


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
    nested = config.nest(_placed(config.flatten(config.to_dict(base))))
    settings = [(_placed(each), seed) for each in cells(spec) for seed in spec.seeds]
    made = [configured(nested, each, seed=seed, source=spec.name) for each, seed in settings]  # before the probe takes time
    _require_labels(made[0], spec.objective)
    rates = _probed(made, progress=progress)
    planned, seconds = [], 0.0
    for number, ((each, seed), one) in enumerate(zip(settings, made, strict=True)):
        step_s = rates[_shape(one)]
        steps = _steps(one, spec, step_s=step_s)
        planned.append(plan_trial(number, each, seed, nested, steps=steps, readouts=spec.readouts, source=spec.name))
        seconds += steps * step_s + START_S
    predicted = {
        "trials": len(planned),
        "steps": sum(trial.settings["train.steps"] for trial in planned),
        "minutes": seconds / 60,
    }
    head = Head(
        name=spec.name,
        hash=digest,
        created=time.time(),
        objective=spec.objective,
        mode=_MODES[spec.objective],
        target=ALPHA_TARGET if spec.objective == "alpha" else None,
        base=nested,
        swept=tuple(dict.fromkeys(key for each, _ in settings for key in each)),
        seeds=tuple(spec.seeds),
        trials=() if spec.search else tuple(planned),  # those that were drawn only tell what to expect
        budget=None if spec.budget is None else {str(key): value for key, value in spec.budget.items()},
        asha=None if spec.asha is None else dataclasses.asdict(spec.asha),
        target_accuracy=spec.target_accuracy,
        search=None if spec.search is None else {"sweep": spec.sweep, "draws": spec.draws, "readouts": spec.readouts},
        prices=spec.prices,
        currency=spec.currency,
        predicted=predicted,
        machine=_machine(),
    )
    head = dataclasses.replace(head, predicted=predicted | {"cost": schema.costs(head, seconds)})
    if spec.search is not None:
        Proposals(head)  # refused before there is a study
    schema.write_study(uri, head)
    return head


def _placed(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat `settings` with places as a trial finds them, whose process has another working directory."""
    found = {key: settings[key] for key in PLACES if settings.get(key) not in (None, "digits")}
    return settings | {key: storage.absolute(place) for key, place in found.items()}


def steps_of(made: Config, *, views: float) -> int:
    """Steps in which a trial sees so many views."""
    return max(1, round(views / (made.train.batch * made.views.count)))


def _machine() -> dict[str, Any]:
    """What the results were made with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    said = {"cores": os.cpu_count(), "cpu": cpu, "python": platform.python_version()}
    return said | {name: metadata.version(name) for name in ("torch", "ray")}


def plan_trial(
    number: int, settings: dict[str, Any], seed: int, base: dict[str, Any], *, steps: int, readouts: int, source: str
) -> Planned:
    own = budgeted(settings, steps=steps, readouts=readouts)
    identity = config.identity(configured(base, own, seed=seed, source=source))
    return Planned(name=trial_name(number, settings, seed), settings=own, seed=seed, hash=config.canonical_hash(identity))


def _steps(made: Config, spec: Spec, *, step_s: float) -> int:
    """Of a trial: what its configuration says, or as many as its budget pays for. A budget of minutes is an estimate of steps."""
    match spec.budget:
        case {"views": views}:
            least = made.train.batch * made.views.count
            if views < least:
                raise UsageError(f"{spec.name}: budget: got {views:g} views, expected {least} at least, which are one step's.")
            return steps_of(made, views=views)
        case {"minutes": minutes}:
            return max(1, round(60 * minutes / step_s))
    return made.train.steps or plan_schedule(made, open_data(located(made))[0].plan.steps_per_epoch).total_steps


def _require_labels(made: Config, objective: str) -> None:
    """Raises UsageError where the objective is an accuracy and the images have no labels."""
    if objective.endswith("accuracy") and open_data(located(made))[0].manifest.class_counts is None:
        raise UsageError(f"objective: got {objective}, but {made.data.uri} has no labels. Use alpha or rankme.")


def _shape(made: Config) -> tuple:
    """What decides how long a step takes."""
    return made.views, made.model, made.train.batch, made.train.bf16, made.train.threads, made.train.workers, made.data.fraction


def _probed(made: list[Config], *, progress: Progress) -> dict[tuple, float]:
    """Seconds of a step of each shape."""
    found: dict[tuple, float] = {}
    for one in made:
        if _shape(one) not in found:
            progress("stage", {"text": f"probing: m={one.views.count}, d={one.model.projector_dim}, batch {one.train.batch}"})
            seen = forecast(one, probe_steps=PROBE_STEPS, images_per_s=None, progress=lambda kind, value: None)
            found[_shape(one)] = seen["estimated_s"] / seen["steps"]
    return found
