"""What a study is to do, from YAML: which keys are swept over which values, and what each trial may take.

    recipe: digits                        # of which every trial starts: a recipe, YAML file or run
    keys: {views.count: 2}                # changed for all trials
    sweep:                                # each combination is a cell
      model.projector_dim: {grid: [64, 256]}
      loss.beta: {log_uniform: [1.0e-4, 1.0e-2]}
    cells:                                # or these combinations of several keys, times the sweep
      - {views.count: 2, data.fraction: 1.0}
      - {views.count: 4, data.fraction: 0.5}
    draws: 8                              # of each cell, where something is drawn
    search: optuna                        # proposes what is drawn (pip install optuna)
    seeds: [0, 1, 2]
    budget: {views: 1.0e+6}               # or {minutes: 5}: of each trial
    readouts: 10                          # of each trial, evenly over its budget
    objective: linear_accuracy            # or knn_accuracy, alpha, rankme
    asha: {grace: 0.1, reduction: 3}      # ends bad trials early, after this part of the budget at the soonest
    target_accuracy: 0.9
    prices: {on-demand: 0.4, spot: 0.13}  # of an hour of what a trial has for itself; the first is counted in costs
    currency: USD

Everything random is a pure function of the study's own text.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from ssl_ray import config
from ssl_ray.config import Config
from ssl_ray.errors import UsageError
from ssl_ray.study.schema import Objective, trial_config

DRAWN = ("choice", "uniform", "log_uniform", "int")
KINDS = ("grid", *DRAWN)
MAX_TRIALS = 100_000
_OURS = {
    "seed": "the study's `seeds`",
    "run": "the place of the study",
    "evaluate.every_steps": "the study's `readouts`",
    "evaluate.every_epochs": "the study's `readouts`",
}
"""Keys of a configuration that a study sets, and from what."""
_BUDGETED = dict.fromkeys(("train.steps", "train.epochs"), "the study's `budget`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asha:
    grace: float = 0.1
    """The part of its budget that each trial has for sure."""
    reduction: int = 3
    """One trial in so many goes on at each rung."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    name: str
    recipe: str | None = "digits"
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    sweep: dict[str, dict[str, list[Any]]] = dataclasses.field(default_factory=dict)
    cells: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    draws: int = 1
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    budget: dict[Literal["views", "minutes"], float] | None = None
    readouts: int = 10
    objective: Objective = "linear_accuracy"
    asha: Asha | None = None
    search: Literal["optuna"] | None = None
    target_accuracy: float | None = None
    prices: dict[str, float] | None = None
    currency: str | None = None


def parse(values: dict[str, Any], *, source: str) -> Spec:
    """Raises UsageError that names the key, what was got and what was expected."""
    import jsonargparse

    known = {field.name for field in dataclasses.fields(Spec)}
    for key in values:
        if key not in known:
            raise UsageError(f"{key}: no such key of a study ({source}). There are: {', '.join(sorted(known))}.")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(Spec, "study")
    try:
        given = {"name": source} | values | {"asha": {}} if values.get("asha") is True else {"name": source} | values
        spec = parser.instantiate(parser.parse_object({"study": given})).study
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{source}: {' '.join(str(error).split())}") from error
    _check(spec, source)
    return spec


def _check(spec: Spec, source: str) -> None:
    def require(ok: bool, key: str, got: object, expected: str) -> None:
        if not ok:
            raise UsageError(f"{source}: {key}: got {got}, expected {expected}.")

    require(bool(spec.sweep or spec.cells), "sweep", "nothing", "keys and the values to try, or cells")
    require(spec.draws >= 1, "draws", spec.draws, "1 or more")
    require(len(set(spec.seeds)) == len(spec.seeds) > 0, "seeds", spec.seeds, "different numbers, one at least")
    require(spec.readouts >= 1, "readouts", spec.readouts, "1 or more")
    require(re.fullmatch(r"\w[\w.-]{0,99}", spec.name) is not None, "name", repr(spec.name), "letters, digits, _, - and .")
    budget = spec.budget or {}
    ok = spec.budget is None or (len(budget) == 1 and set(budget) <= {"views", "minutes"})
    require(ok and all(0 < value < math.inf for value in budget.values()), "budget", budget, "views or minutes, above 0")
    target = spec.target_accuracy
    require(target is None or 0 < target <= 1, "target_accuracy", target, "a number above 0, up to 1, as 0.9")
    require_free(spec, [*spec.keys, *spec.sweep, *(key for cell in spec.cells for key in cell)], source)
    for key, how in spec.sweep.items():
        require(len(how) == 1 and next(iter(how)) in KINDS, f"sweep.{key}", how, f"one of {', '.join(KINDS)}, with its values")
        ((kind, of),) = how.items()
        require(bool(of), f"sweep.{key}", how, "values")
        if kind in ("uniform", "log_uniform", "int"):
            ok = len(of) == 2 and all(isinstance(value, int | float) and abs(value) < 2**53 for value in of) and of[0] < of[1]
            require(ok and (kind != "log_uniform" or of[0] > 0), f"sweep.{key}.{kind}", of, "two increasing numbers")
    prices = spec.prices or {}
    require(all(0 <= price < math.inf for price in prices.values()), "prices", prices, "numbers of 0 or more")
    if spec.search is not None:
        drawn = {key for key, how in spec.sweep.items() if next(iter(how)) in DRAWN}
        require(drawn == set(spec.sweep) and not spec.cells, "search", spec.search, "keys that are drawn: no grid, no cells")
        require("views" in budget, "search", spec.search, "a budget in views")
        needs = sorted(drawn & {"train.workers", "train.threads"})
        require(not needs, "search", ", ".join(needs), "keys that do not change what CPUs a trial needs")
    if spec.asha is not None:
        require(0 < spec.asha.grace < 1, "asha.grace", spec.asha.grace, "a number above 0, below 1")
        require(spec.asha.reduction >= 2, "asha.reduction", spec.asha.reduction, "2 or more")
    twice = set(spec.sweep) & {key for cell in spec.cells for key in cell}
    require(not twice, "cells", ", ".join(sorted(twice)), "other keys than those of sweep")


def overrides(spec: Spec) -> list[str]:
    """Its `keys`, as the command line has them."""
    return [f"{key}={'null' if value is None else value}" for key, value in spec.keys.items()]


def require_free(spec: Spec, keys: Iterable[str], source: str) -> None:
    """Raises UsageError for a key that the study itself sets."""
    ours = _OURS | (_BUDGETED if spec.budget is not None else {})
    for key in keys:
        if key in ours:
            raise UsageError(f"{source}: {key} follows from {ours[key]}, and cannot be set.")


def cells(spec: Spec) -> list[dict[str, Any]]:
    """The settings of all trials but for their seeds, in the order of the study's text, none twice."""
    drawn = [key for key, how in spec.sweep.items() if next(iter(how)) in DRAWN]
    grids = {key: how["grid"] for key, how in spec.sweep.items() if key not in drawn}
    draws = spec.draws if drawn else 1
    trials = max(1, len(spec.cells)) * math.prod(map(len, grids.values())) * draws * len(spec.seeds)
    if trials > MAX_TRIALS:
        raise UsageError(f"{spec.name}: {trials:,} trials, expected {MAX_TRIALS:,} at most.")
    found: dict[str, dict[str, Any]] = {}
    products = itertools.product(spec.cells or [{}], itertools.product(*grids.values()))
    for number, (cell, values) in enumerate(products):
        for draw in range(draws):
            random = np.random.default_rng([number, draw])
            settings = cell | dict(zip(grids, values, strict=True))
            settings |= {key: _draw(random, *next(iter(spec.sweep[key].items()))) for key in drawn}
            found.setdefault(json.dumps(settings), settings)
    return list(found.values())


def _draw(random: np.random.Generator, kind: str, of: list[Any]) -> Any:
    match kind:
        case "choice":
            return of[int(random.integers(len(of)))]
        case "uniform":
            return float(random.uniform(*of))
        case "int":
            return int(random.integers(of[0], of[1] + 1))
    # Four digits: they stand in names and tables.
    return float(f"{math.exp(random.uniform(math.log(of[0]), math.log(of[1]))):.4g}")


def budgeted(settings: dict[str, Any], *, steps: int, readouts: int) -> dict[str, Any]:
    """The settings of a trial that takes so many steps, with read-outs evenly over them."""
    return settings | {"train.steps": steps, "evaluate.every_steps": max(1, -(-steps // readouts))}


def configured(base: dict[str, Any], settings: dict[str, Any], *, seed: int, source: str) -> Config:
    """The configuration of a trial. base: nested, as that of Head.  Raises UsageError for settings that make none."""
    return config.build(config.nest(trial_config(base, settings, seed=seed)), source=source)


def trial_name(number: int, settings: dict[str, Any], seed: int) -> str:
    """Of a trial's folder, such as 0003-d64-beta0.04-s0: says the setting, as far as it is short."""
    short = {"views.count": "m", "model.projector_dim": "d", "data.fraction": "f"}
    parts = [
        f"{short.get(key, key.rpartition('.')[2])}{value}" for key, value in settings.items() if isinstance(value, int | float)
    ]
    safe = "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in part) for part in parts)
    return f"{number:04d}-{safe[:60]}-s{seed}" if safe else f"{number:04d}-s{seed}"
