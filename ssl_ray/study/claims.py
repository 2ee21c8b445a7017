"""The paper's claims (arXiv 2312.10725), judged by four studies of ours: a verdict is computed from an interval, never typed.

Every effect is a mean over seeds of what two arms that share the seed differ by, so of the same images held out and the same
initial weights where the shapes are equal; its interval is Student's over the seeds.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ssl_ray.study.analysis import Interval, best_beta, fit_power_law, mean_interval, time_to_target
from ssl_ray.study.results import Study, Trial

MARGIN = 0.005
"""Of accuracy: an arm that is less worse than this counts as good as the other. The paper's effects are about as large."""

Verdict = Literal["shown", "not shown", "opposite"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    part: str
    """a: projector and beta; b: best beta over d; c: time over views; d: images against views; e: time of recipes."""
    text: str
    measure: str
    effect: Interval
    threshold: float
    """The claim says that the effect is above it."""

    @property
    def verdict(self) -> Verdict:
        if self.effect.low > self.threshold:
            return "shown"
        return "opposite" if self.effect.high < self.threshold else "not shown"


def claims(projector: Study, views: Study, fraction: Study, recipe: Study) -> list[Claim]:
    """The verdicts of what has been trained so far: arms or seeds that are absent make an interval without bounds.

    projector: d times beta at m = 2.  views: cells of (m, d), of which the first, with m = 2 and the largest d, is the baseline.
    fraction: cells of (m, fraction), of which that with the fewest views of the largest fraction is the baseline.
    recipe: cells, of which the first is the baseline, as are those with other crops or colours alone.
    """
    return [*_projector(projector), *_slope(projector), *_sooner(views, "c"), *_fraction(fraction), *_sooner(recipe, "e")]


def as_rows(found: list[Claim]) -> list[dict[str, Any]]:
    """For a table or JSON."""
    return [
        {"claim": f"({claim.part}) {claim.text}", "verdict": claim.verdict, "measured": claim.measure}
        | {"effect": _known(claim.effect.mean), "low": _known(claim.effect.low), "high": _known(claim.effect.high)}
        | {"above": claim.threshold, "n": claim.effect.n}
        for claim in found
    ]


def as_markdown(found: list[Claim]) -> str:
    """A table, a row for each."""
    rows = ["| verdict | claim | measured, mean (95 % interval) | the claim: above | seeds |", "|---|---|---|---:|---:|"]
    for claim in found:
        number = ".4f" if abs(claim.threshold) < 0.1 else ".2f"
        known = claim.effect.mean, claim.effect.low, claim.effect.high
        mean, low, high = (format(value, number) if math.isfinite(value) else "unknown" for value in known)
        text = f"({claim.part}) {claim.text}"
        rows.append(
            f"| {claim.verdict} | {text} | {claim.measure}: {mean} ({low} to {high}) | {claim.threshold:g} | {claim.effect.n} |"
        )
    return "\n".join(rows) + "\n"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _results(study: Study, key: Callable[[Trial], Any]) -> dict[Any, dict[int, float]]:
    """The result of each seed, by what `key` says of a trial."""
    found: dict[Any, dict[int, float]] = {}
    for trial in study.trials:
        value = trial.result(study.head.objective)
        if math.isfinite(value):
            found.setdefault(key(trial), {})[trial.seed] = value
    return found


def _paired(one: dict[int, float], other: dict[int, float]) -> Interval:
    """Mean of one less other over the seeds that both have."""
    return mean_interval([one[seed] - other[seed] for seed in one if seed in other])


def _difference(arm: str, other: str) -> str:
    return f"accuracy of {arm} less that of {other}"


# (a), (b) ------------------------------------------------------------------------------------------------------------


def _chosen(cells: dict[float, dict[int, float]], seed: int) -> float:
    """The beta that is best on the other seeds, so that what it reaches on this one is not what it was chosen for."""
    betas = sorted(cells)
    others = [[value for other, value in cells[beta].items() if other != seed] for beta in betas]
    means = [float(np.mean(each)) if each else -math.inf for each in others]
    return betas[int(np.argmax(means))]


def _projector(study: Study) -> list[Claim]:
    of_cell = _results(study, lambda trial: (trial.d, trial.beta))
    by_d: dict[int, dict[float, dict[int, float]]] = {}
    for (d, beta), seeds in of_cell.items():
        by_d.setdefault(d, {})[beta] = seeds
    if not by_d:
        return []
    largest = max(by_d)
    best: dict[int, dict[int, float]] = {d: {} for d in by_d}
    fixed: dict[int, dict[int, float]] = {d: {} for d in by_d}
    for seed in study.head.seeds:
        of_largest = _chosen(by_d[largest], seed)
        for d, cells in by_d.items():
            for arm, beta in ((best, _chosen(cells, seed)), (fixed, of_largest)):
                if seed in cells.get(beta, {}):
                    arm[d][seed] = cells[beta][seed]
    found = []
    for d in sorted(by_d.keys() - {largest}):
        found.append(
            Claim(
                part="a",
                text=f"with the best beta of each, d = {d} is as good as d = {largest}",
                measure=_difference(f"d = {d}", f"d = {largest}"),
                effect=_paired(best[d], best[largest]),
                threshold=-MARGIN,
            )
        )
        found.append(
            Claim(
                part="a",
                text=f"d = {d} needs a larger beta than the best one of d = {largest}",
                measure=_difference("its best beta", f"the best beta of d = {largest}") + f", both with d = {d}",
                effect=_paired(best[d], fixed[d]),
                threshold=0.0,
            )
        )
    return found


def _slope(study: Study) -> list[Claim]:
    points = []
    for seed in study.head.seeds:
        trials = [trial for trial in study.trials if trial.seed == seed]
        values = [trial.result(study.head.objective) for trial in trials]
        points += best_beta([trial.d for trial in trials], [trial.beta for trial in trials], values)
    slope = fit_power_law([point.d for point in points], [point.beta for point in points]).slope
    falls = Interval(-slope.mean, -slope.high, -slope.low, slope.n)
    text = "the best beta falls with d (as 1/d: a slope of -1)"
    return [Claim(part="b", text=text, measure="log best beta over log d, fall", effect=falls, threshold=0.0)]


# (c), (d), (e) --------------------------------------------------------------------------------------------------------


_NAMES = {
    "views.count": "m",
    "views.crop_scale": "crops",
    "views.brightness": "colours",
    "model.projector_dim": "d",
    "optim.name": "optimiser",
    "loss.name": "loss",
}
_UNNAMED = ("optim.warmup_epochs",)
"""Keys that follow from others: as many steps are other epochs where there are more views of an image."""
_OF_VIEWS = ("views.crop_scale", "views.brightness", "views.contrast")


def _arm(trial: Trial) -> str:
    named = {key: value for key, value in trial.settings.items() if key not in _UNNAMED}
    if named.get("views.contrast") == named.get("views.brightness"):
        named.pop("views.contrast", None)
    return ", ".join(f"{_NAMES.get(key, key.rpartition('.')[2])} = {value}" for key, value in named.items())


def _sooner(study: Study, part: str) -> list[Claim]:
    """How many times as soon each arm is as good (MARGIN) as a baseline with the same seed is at its end.

    Baselines are the first arm and those that differ from it in nothing but how views are cropped and coloured.
    """
    if not study.trials:
        return []
    trials: dict[str, dict[int, Trial]] = {}
    for trial in study.trials:
        trials.setdefault(_arm(trial), {})[trial.seed] = trial
    first = study.trials[0]
    baselines = dict.fromkeys(_arm(trial) for trial in study.trials if _without_crops(trial) == _without_crops(first))
    found = []
    for baseline, arm in itertools.product(baselines, trials):
        if arm in (_arm(first), baseline):
            continue
        for unit in ("minutes", "views"):
            both = [(trials[baseline][seed], trials[arm][seed]) for seed in trials[baseline] if seed in trials[arm]]
            logs = [_log_ratio(*pair, unit, study.head.objective) for pair in both]
            reached = sum(map(math.isfinite, logs))
            log = mean_interval(logs if reached == len(logs) else [])
            there = f"{reached} of {len(logs)} seeds"
            found.append(
                Claim(
                    part=part,
                    text=f"{arm} needs fewer {unit} than {baseline}",
                    measure=f"{unit} of the latter by the former's, until as good as the latter's end ({there})",
                    effect=Interval(math.exp(log.mean), math.exp(log.low), math.exp(log.high), log.n),
                    threshold=1.0,
                )
            )
    return found


def _without_crops(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.settings.items() if key not in _OF_VIEWS}


def _log_ratio(baseline: Trial, arm: Trial, unit: str, objective: str) -> float:
    """log of what the baseline needs by what the arm needs; NaN where the arm does not get there."""
    target = baseline.result(objective) - MARGIN
    theirs, ours = (
        time_to_target(getattr(trial.readouts, unit), getattr(trial.readouts, objective), target) for trial in (baseline, arm)
    )
    return math.log(theirs.x / ours.x) if ours.reached and ours.x > 0 and theirs.x > 0 else math.nan


def _fraction(study: Study) -> list[Claim]:
    of_cell = _results(study, lambda trial: (trial.m, trial.fraction))
    if not of_cell:
        return []
    baseline = min(of_cell, key=lambda cell: (-cell[1], cell[0]))
    product = baseline[0] * baseline[1]
    found = []
    for m, fraction in sorted(of_cell.keys() - {baseline}):
        if not math.isclose(m * fraction, product):
            continue
        share = f"{fraction:.0%} of the images"
        found.append(
            Claim(
                part="d",
                text=f"m = {m} with {share} is as good as m = {baseline[0]} with {baseline[1]:.0%}",
                measure=_difference("the former", "the latter") + ", after equally many views",
                effect=_paired(of_cell[m, fraction], of_cell[baseline]),
                threshold=-MARGIN,
            )
        )
        if (baseline[0], fraction) in of_cell:
            found.append(
                Claim(
                    part="d",
                    text=f"with {share}, m = {m} is better than m = {baseline[0]}",
                    measure=_difference(f"m = {m}", f"m = {baseline[0]}") + ", after equally many views",
                    effect=_paired(of_cell[m, fraction], of_cell[baseline[0], fraction]),
                    threshold=0.0,
                )
            )
    return found
