"""Over the training: accuracy, alpha and RankMe, the loss and its terms, throughput."""

import math
from typing import Any, Literal

import numpy as np

from ssl_ray.dashboard.curves import Points, curves
from ssl_ray.dashboard.drawing import (
    GUIDE,
    guide_line,
    labelled_axis,
    log_axis,
    number,
    of_trials,
    safe,
    stacked_axes,
    stacked_height,
)
from ssl_ray.dashboard.figures.shared import (
    NO_CURVE,
    NO_READOUT,
    PERCENT,
    Figure,
    accuracy_name,
    figure,
    target_line,
    target_of,
    value_axis,
)
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial

X = Literal["epochs", "views", "minutes"]
_X_FIELDS = {"epochs": "epoch", "views": "views", "minutes": "minutes"}
_X_TITLES = {"epochs": "training (epochs)", "views": "training (views seen)", "minutes": "training (minutes)"}


def accuracy_over_training(study: Study, target: float | None = None, *, x: X = "minutes") -> Figure:
    """Accuracy of each trial's read-outs over epochs, views or minutes, and where it reached the target."""
    objective, target = accuracy_name(study), target_of(study, target)

    def points(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
        return getattr(trial.readouts, _X_FIELDS[x]), getattr(trial.readouts, objective)

    traces = curves(study, points, markers=True)
    if traces and target is not None:
        spanned = [each for trace in traces for each in trace["x"] if each is not None]
        traces += [*target_line(target, spanned), *_reached(study, target, points, x)]
    return figure(traces, empty=NO_READOUT, xaxis=labelled_axis(_X_TITLES[x], rangemode="tozero"), yaxis=value_axis(objective))


def _reached(study: Study, target: float, points: Points, x: X) -> list[dict[str, Any]]:
    times = [(trial, analysis.time_to_target(*points(trial), target)) for trial in study.trials]
    there = [(trial, time.x) for trial, time in times if time.reached]
    if not there:
        return []
    trials = [trial for trial, _ in there]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [time for _, time in there],
        "y": [target] * len(there),
        "name": f"{x} to the target",
        "text": [f"{number(time)} {x}: {safe(trial.name)}" for trial, time in there],
        "hoverinfo": "text",
        "marker": {"symbol": "line-ns-open", "size": 14, "color": GUIDE, "line": {"width": 2}},
    }
    return [trace | of_trials(trials, list(range(len(trials))))]


def alpha_over_epochs(study: Study) -> Figure:
    """Exponent alpha of the features' spectrum (1 is ideal) and RankMe at each read-out."""
    traces = curves(study, lambda trial: (trial.readouts.epoch, trial.readouts.rankme), markers=True)
    above = curves(study, lambda trial: (trial.readouts.epoch, trial.readouts.alpha), axis="y2", first=not traces, markers=True)
    epochs = [each for trace in above for each in trace["x"] if each is not None]
    if epochs:
        above.append(guide_line([min(epochs), max(epochs)], [1.0, 1.0], "alpha = 1") | {"yaxis": "y2"})
    panels = stacked_axes([value_axis("rankme"), value_axis("alpha")])
    return figure(traces + above, empty=NO_READOUT, xaxis=labelled_axis(_X_TITLES["epochs"]), height=stacked_height(2), **panels)


def loss_terms(study: Study) -> Figure:
    """The loss and its terms over steps, a panel each; logarithmic where all is above 0."""
    names = ["loss", *sorted({name for trial in study.trials for name in trial.curve.terms})]
    traces: list[dict[str, Any]] = []
    axes = []
    for i, name in enumerate(reversed(names)):

        def points(trial: Trial, name: str = name) -> tuple[np.ndarray, np.ndarray]:
            curve = trial.curve
            return curve.step, curve.loss if name == "loss" else curve.terms.get(name, np.full(len(curve.step), math.nan))

        panel = curves(study, points, axis="y" if i == 0 else f"y{i + 1}", first=i == 0)
        traces += panel
        title = "loss (no unit)" if name == "loss" else f"{safe(name).replace('_', ' ')} (no unit)"
        drawn = [each for trace in panel for each in trace["y"] if each is not None]
        axes.append(log_axis(title, drawn) if all(each > 0 for each in drawn) else labelled_axis(title))
    return figure(
        traces, empty=NO_CURVE, xaxis=labelled_axis("training (steps)"), height=stacked_height(len(axes)), **stacked_axes(axes)
    )


def throughput(study: Study) -> Figure:
    """Images per second, and the share of the time that workers waited for data, over minutes."""
    traces = curves(study, lambda trial: (trial.curve.minutes, trial.curve.data_wait_share))
    traces += curves(study, lambda trial: (trial.curve.minutes, trial.curve.images_per_s), axis="y2", first=False)
    wait = labelled_axis("data wait (% of time)", tickformat=PERCENT, rangemode="tozero")
    speed = labelled_axis("throughput (images/s)", rangemode="tozero")
    return figure(
        traces, empty=NO_CURVE, xaxis=labelled_axis(_X_TITLES["minutes"]), height=stacked_height(2), **stacked_axes([wait, speed])
    )
