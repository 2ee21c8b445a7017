"""What figures of different subjects share: which trials they show, their axes, intervals and targets."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from ssl_ray.dashboard.drawing import GUIDE, guide_line, labelled_axis, number, of_trials, plain
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial

ACCURACIES = ("linear_accuracy", "knn_accuracy")
PERCENT = ".3~%"
"""Of shares: .839 is shown as 83.9%."""
Figure = dict[str, Any]
"""{"data": traces, "layout": layout}"""
TITLES = {
    "linear_accuracy": "linear accuracy (% of test images)",
    "knn_accuracy": "kNN accuracy (% of test images)",
    "alpha": "alpha (exponent)",
    "rankme": "RankMe (dimensions)",
}
MOST_BANDS = 3
"""With more lines than these their seed bands would hide each other."""
MOST_BARS = 20
"""And bars."""
MOST_TICKS = 12
"""So many different values have a tick each."""
NO_RESULT = "No trial is complete and has a read-out yet."
NO_CURVE = "No trial has taken a step yet."
NO_READOUT = "No trial has a read-out yet."


def select(study: Study, names: Collection[str]) -> Study:
    """The study with the trials of these names only."""
    return dataclasses.replace(study, trials=tuple(trial for trial in study.trials if trial.name in names))


def accuracy_name(study: Study) -> str:
    """The objective if it is an accuracy, else the linear one."""
    return study.head.objective if study.head.objective == "knn_accuracy" else "linear_accuracy"


def results_of(study: Study, objective: str) -> tuple[list[Trial], np.ndarray]:
    """The complete trials that have a value, and the values."""
    trials = [trial for trial in study.trials if trial.state.status == "complete" and math.isfinite(trial.result(objective))]
    return trials, np.array([trial.result(objective) for trial in trials])


def without(trial: Trial, *keys: str) -> dict[str, Any]:
    return less(trial.settings, *keys)


def less(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def grouped(trials: Sequence[Trial], by: Callable[[Trial], Any]) -> list[list[int]]:
    return analysis.groups(by(trial) for trial in trials)


def target_of(study: Study, target: float | None) -> float | None:
    return study.head.target_accuracy if target is None else target


def taken(trial: Trial, cost: str) -> float:
    if cost == "minutes":
        return float(trial.readouts.minutes[-1])
    return math.nan if trial.state.cost is None else trial.state.cost


def value_axis(objective: str, **more: Any) -> dict[str, Any]:
    percent = {"tickformat": PERCENT} if objective in ACCURACIES else {}
    return labelled_axis(TITLES[objective], **percent, **more)


def shown_result(objective: str, value: float) -> str:
    return f"{100 * value:.2f} %" if objective in ACCURACIES else number(value)


def shown_interval(objective: str, interval: analysis.Interval) -> str:
    text = f"{shown_result(objective, interval.mean)}, {interval.n} trial{'s' * (interval.n != 1)}"
    if not math.isfinite(interval.low):
        return text
    return f"{text}, 95 % from {shown_result(objective, interval.low)} to {shown_result(objective, interval.high)}"


def figure(traces: list[dict[str, Any]], *, empty: str, **layout: Any) -> Figure:
    """layout: xaxis, yaxis and more; `empty` is shown without a trace."""
    base: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "legend": {"itemsizing": "constant"},
        "hovermode": "closest",
    }
    if not traces:
        middle = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
        base["annotations"] = [middle | {"text": empty, "font": {"size": 16, "color": GUIDE}}]
    return {"data": traces, "layout": base | layout}


def target_line(target: float | None, x: Iterable[float]) -> list[dict[str, Any]]:
    there = [value for value in x if math.isfinite(value)]
    if target is None or not there:
        return []
    return [guide_line([min(there), max(there)], [target, target], f"target {100 * target:.4g} %")]


def error_bars(cells: list[analysis.Interval], shade: str) -> dict[str, Any]:
    """The bounds of the intervals at each point, where bands would hide each other."""
    above, below = (np.array([[cell.high - cell.mean, cell.mean - cell.low] for cell in cells])).T
    bars = {"type": "data", "symmetric": False, "array": plain(above), "arrayminus": plain(below)}
    return bars | {"color": shade, "thickness": 1, "width": 3}


def band(
    x: Sequence[float], cells: list[analysis.Interval], who: list[list[int]], trials: list[Trial], **more: Any
) -> list[dict]:
    """The area between the bounds of the intervals, where they have bounds."""
    bounded = [i for i, cell in enumerate(cells) if math.isfinite(cell.low)]
    if len(bounded) < 2:
        return []
    around = bounded + bounded[::-1]
    y = [cells[i].high for i in bounded] + [cells[i].low for i in bounded[::-1]]
    trace = {"type": "scatter", "mode": "lines", "x": [x[i] for i in around], "y": y, "fill": "toself", "hoverinfo": "skip"}
    return [
        trace
        | {"line": {"width": 0}, "opacity": 0.2, "showlegend": False}
        | of_trials(trials, [who[i] for i in around], derived="band")
        | more
    ]
