"""Figures of a study: pure functions from what was read of it to plotly figures, as plain values.

Each takes a study, or one with fewer trials (`select`), and returns a figure with all its axes labelled; where there is nothing
to show yet it says so. Nothing here reads, and the same study gives the same figure. `plotly.graph_objects.Figure(figure)` makes
it one of plotly's, which checks every value: with 2,000 trials that takes longer than all the rest. A colour means the same in
the figures of a study and of any selection of it.

What a page needs to filter without asking again: a trace of results has `meta["trials"]`, the names of its trials, and
`customdata`, for each point the positions in that list of the trials that it shows: a number, or a list where a point is a mean
over several. Guide lines have neither. What is not the mean of its trials alone says so in `meta["derived"]`: a band, the best of
several, a front. Points are plain lists, and None separates the curves of a trace.

Texts from results are escaped; names in `meta` and values in `customdata` are data and not. Final results are those of complete
trials only, since others have not had the same budget. Curves have at most 200 points (least and largest of equal parts).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ssl_ray.dashboard.curves import MANY, MOST_MARKED, Points, curves
from ssl_ray.dashboard.drawing import (
    COLOURS,
    GUIDE,
    SHORT,
    SYMBOLS,
    colour,
    guide_line,
    is_number,
    labelled_axis,
    levels,
    log_axis,
    number,
    of_trials,
    plain,
    powers_of_two,
    safe,
    setting,
    shown_value,
    sort_key,
    stacked_axes,
    stacked_height,
)
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial
from ssl_ray.study.schema import trial_config

_ACCURACIES = ("linear_accuracy", "knn_accuracy")
_PERCENT = ".3~%"
"""Of shares: .839 is shown as 83.9%."""
Figure = dict[str, Any]
"""{"data": traces, "layout": layout}"""
X = Literal["epochs", "views", "minutes"]
_X_FIELDS = {"epochs": "epoch", "views": "views", "minutes": "minutes"}
_X_TITLES = {"epochs": "training (epochs)", "views": "training (views seen)", "minutes": "training (minutes)"}
_TITLES = {
    "linear_accuracy": "linear accuracy (% of test images)",
    "knn_accuracy": "kNN accuracy (% of test images)",
    "alpha": "alpha (exponent)",
    "rankme": "RankMe (dimensions)",
}
MOST_BANDS = 8
"""With more lines than these their seed bands would hide each other."""
MOST_TICKS = 12
"""So many different values have a tick each."""
NO_RESULT = "No trial is complete and has a read-out yet."
NO_CURVE = "No trial has taken a step yet."
NO_READOUT = "No trial has a read-out yet."


# Study ---------------------------------------------------------------------------------------------------------------


def select(study: Study, names: Collection[str]) -> Study:
    """The study with the trials of these names only."""
    return dataclasses.replace(study, trials=tuple(trial for trial in study.trials if trial.name in names))


def accuracy_name(study: Study) -> str:
    """The objective if it is an accuracy, else the linear one."""
    return study.head.objective if study.head.objective == "knn_accuracy" else "linear_accuracy"


def _results(study: Study, objective: str) -> tuple[list[Trial], np.ndarray]:
    """The complete trials that have a value, and the values."""
    trials = [trial for trial in study.trials if trial.state.status == "complete" and math.isfinite(trial.result(objective))]
    return trials, np.array([trial.result(objective) for trial in trials])


def _without(trial: Trial, *keys: str) -> dict[str, Any]:
    return _less(trial.settings, *keys)


def _less(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _grouped(trials: Sequence[Trial], by: Callable[[Trial], Any]) -> list[list[int]]:
    return analysis.groups(by(trial) for trial in trials)


def _target(study: Study, target: float | None) -> float | None:
    return study.head.target_accuracy if target is None else target


# Parts of a figure ---------------------------------------------------------------------------------------------------


def _value_axis(objective: str, **more: Any) -> dict[str, Any]:
    percent = {"tickformat": _PERCENT} if objective in _ACCURACIES else {}
    return labelled_axis(_TITLES[objective], **percent, **more)


def _shown_result(objective: str, value: float) -> str:
    return f"{100 * value:.2f} %" if objective in _ACCURACIES else number(value)


def _shown_interval(objective: str, interval: analysis.Interval) -> str:
    text = f"{_shown_result(objective, interval.mean)}, {interval.n} trial{'s' * (interval.n != 1)}"
    if not math.isfinite(interval.low):
        return text
    return f"{text}, 95 % from {_shown_result(objective, interval.low)} to {_shown_result(objective, interval.high)}"


def _figure(traces: list[dict[str, Any]], *, empty: str, **layout: Any) -> Figure:
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


def _target_line(target: float | None, x: Iterable[float]) -> list[dict[str, Any]]:
    there = [value for value in x if math.isfinite(value)]
    if target is None or not there:
        return []
    return [guide_line([min(there), max(there)], [target, target], f"target {100 * target:.4g} %")]


def _band(
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


# Curves --------------------------------------------------------------------------------------------------------------


def accuracy_over_training(study: Study, target: float | None = None, *, x: X = "minutes") -> Figure:
    """Accuracy of each trial's read-outs over epochs, views or minutes, and where it reached the target."""
    objective, target = accuracy_name(study), _target(study, target)

    def points(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
        return getattr(trial.readouts, _X_FIELDS[x]), getattr(trial.readouts, objective)

    traces = curves(study, points, markers=True)
    if traces and target is not None:
        spanned = [each for trace in traces for each in trace["x"] if each is not None]
        traces += [*_target_line(target, spanned), *_reached(study, target, points, x)]
    return _figure(traces, empty=NO_READOUT, xaxis=labelled_axis(_X_TITLES[x], rangemode="tozero"), yaxis=_value_axis(objective))


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
    panels = stacked_axes([_value_axis("rankme"), _value_axis("alpha")])
    return _figure(traces + above, empty=NO_READOUT, xaxis=labelled_axis(_X_TITLES["epochs"]), height=stacked_height(2), **panels)


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
    return _figure(
        traces, empty=NO_CURVE, xaxis=labelled_axis("training (steps)"), height=stacked_height(len(axes)), **stacked_axes(axes)
    )


def throughput(study: Study) -> Figure:
    """Images per second, and the share of the time that workers waited for data, over minutes."""
    traces = curves(study, lambda trial: (trial.curve.minutes, trial.curve.data_wait_share))
    traces += curves(study, lambda trial: (trial.curve.minutes, trial.curve.images_per_s), axis="y2", first=False)
    wait = labelled_axis("data wait (% of time)", tickformat=_PERCENT, rangemode="tozero")
    speed = labelled_axis("throughput (images/s)", rangemode="tozero")
    return _figure(
        traces, empty=NO_CURVE, xaxis=labelled_axis(_X_TITLES["minutes"]), height=stacked_height(2), **stacked_axes([wait, speed])
    )


# Projector and beta --------------------------------------------------------------------------------------------------


def accuracy_over_dim(study: Study, target: float | None = None) -> Figure:
    """The objective over the projector's dimension: a line for each beta, and the best of each d.

    A point is the mean over seeds, the band its t interval (up to MOST_BANDS lines). Where more than d and beta differ, each
    of their combinations has a line of its own in the colour of its beta.
    """
    objective, head = study.head.objective, study.head
    trials, values = _results(study, objective)
    traces: list[dict[str, Any]] = []
    found: list[tuple[int, analysis.Interval, list[int]]] = []
    lines = _grouped(trials, lambda trial: _without(trial, "model.projector_dim"))
    lines.sort(key=lambda line: [sort_key(value) for value in _without(trials[line[0]], "model.projector_dim").values()])
    labels = [_line_label(trials[line[0]].settings) for line in lines]
    different = list(dict.fromkeys(_line_label(settings) for settings in _all_settings(study)))
    for label, line in sorted(zip(labels, lines, strict=True), key=lambda each: labels.index(each[0])):
        widths = sorted({trials[i].d for i in line})
        who = [[i for i in line if trials[i].d == d] for d in widths]
        cells = [analysis.mean_interval(values[each]) for each in who]
        found += zip(widths, cells, who, strict=True)
        name = setting(_without(trials[line[0]], "model.projector_dim")) or label
        shade = colour(different.index(label), len(different))
        if len(lines) <= MOST_BANDS:
            traces += _band(widths, cells, who, trials, fillcolor=shade, legendgroup=label)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": widths,
                "y": [cell.mean for cell in cells],
                "name": label,
                "legendgroup": label,
                "showlegend": label not in {trace.get("name") for trace in traces},
                "line": {"color": shade, "width": 2 if len(lines) <= MOST_BANDS else 1},
                "text": [f"d {d}, {name}: {_shown_interval(objective, cell)}" for d, cell in zip(widths, cells, strict=True)],
                "hoverinfo": "text",
            }
            | of_trials(trials, who)
        )
    if len(lines) > 1:
        traces.append(_best_line(found, trials, head.mode, head.target))
    if objective in _ACCURACIES:
        traces += _target_line(_target(study, target), [trial.d for trial in trials])
    axis = powers_of_two([trial.d for trial in trials], "projector dimension d (log2)")
    return _figure(traces, empty=NO_RESULT, xaxis=axis, yaxis=_value_axis(objective))


def _line_label(settings: dict[str, Any]) -> str:
    """beta where it is swept, else whatever is beside d."""
    if "loss.beta" in settings:
        return setting({"loss.beta": settings["loss.beta"]})
    return setting(_less(settings, "model.projector_dim")) or "all trials"


def _all_settings(study: Study) -> list[dict[str, Any]]:
    """Of the planned trials, whether they are selected or not; sorted by all but d, so that colours go with the values."""
    planned = [trial.settings for trial in study.head.trials]
    return sorted(planned, key=lambda settings: [sort_key(value) for value in _less(settings, "model.projector_dim").values()])


def _best_line(
    found: list[tuple[int, analysis.Interval, list[int]]], trials: list[Trial], mode: Any, target: float | None
) -> dict:
    best = []
    for d in sorted({d for d, _, _ in found}):
        cells = [(cell, who) for width, cell, who in found if width == d]
        good = analysis.goodness([cell.mean for cell, _ in cells], mode, target)
        best.append((d, *cells[int(np.argmax(good))]))
    trace = {"type": "scatter", "mode": "lines", "x": [d for d, _, _ in best], "y": [cell.mean for _, cell, _ in best]}
    line = {"color": GUIDE, "width": 5}
    return (
        trace
        | {"name": "best of each d", "line": line, "opacity": 0.6, "hoverinfo": "skip"}
        | of_trials(trials, [who for _, _, who in best], derived="best")
    )


def best_beta_over_dim(study: Study) -> Figure:
    """The best beta of each d, log-log, with beta = c / d through them and the line that fits best.

    A series for whatever else differs (m, fraction). Open where no beta beyond it was tried: a better one may lie there.
    """
    objective, head = study.head.objective, study.head
    trials, values = _results(study, objective)
    there = [i for i, trial in enumerate(trials) if math.isfinite(trial.beta)]
    trials, values = [trials[i] for i in there], values[there]
    traces: list[dict[str, Any]] = []
    all_best: list[analysis.BestBeta] = []
    d, beta = np.array([trial.d for trial in trials]), np.array([trial.beta for trial in trials])
    groups = _grouped(trials, lambda trial: _without(trial, "model.projector_dim", "loss.beta"))
    series = list(dict.fromkeys(_series(trial.settings) for trial in head.trials))
    for group in groups:
        best = analysis.best_beta(d[group], beta[group], values[group], mode=head.mode, target=head.target)
        all_best += best
        who = [[i for i in group if trials[i].d == each.d and trials[i].beta == each.beta] for each in best]
        name = _series(trials[group[0]].settings)
        text = [f"d {each.d}, β {number(each.beta)}, {name}: {_shown_interval(objective, each.value)}" for each in best]
        trace = {"type": "scatter", "mode": "markers", "x": [each.d for each in best], "y": [each.beta for each in best]}
        symbols = ["circle-open" if each.at_edge else "circle" for each in best]
        marker = {"color": colour(series.index(name), len(series)), "size": 10, "symbol": symbols, "line": {"width": 2}}
        traces.append(trace | {"name": name, "text": text, "hoverinfo": "text", "marker": marker} | of_trials(trials, who))
    traces += _laws(all_best)
    ticks = powers_of_two([each.d for each in all_best], "projector dimension d (log2)")
    different = sorted({each.beta for each in all_best})
    betas = log_axis("best β (no unit, log)", different)
    if len(different) <= MOST_TICKS:
        betas = betas | {"tickvals": different, "ticktext": [number(each) for each in different]}
    return _figure(traces, empty=NO_RESULT, xaxis=ticks, yaxis=betas)


def _series(settings: dict[str, Any]) -> str:
    return setting(_less(settings, "model.projector_dim", "loss.beta")) or "best β"


def _laws(best: list[analysis.BestBeta]) -> list[dict[str, Any]]:
    if not best:
        return []
    law = analysis.fit_power_law([each.d for each in best], [each.beta for each in best])
    ends = [float(min(each.d for each in best)), float(max(each.d for each in best))]
    bounds = f" ({number(law.c.low)} to {number(law.c.high)})" if math.isfinite(law.c.low) else ""
    lines = [guide_line(ends, [law.c.mean / d for d in ends], f"β = c / d, c = {number(law.c.mean)}{bounds}")]
    if math.isfinite(law.slope.mean):
        bounds = f" ({law.slope.low:.2f} to {law.slope.high:.2f})" if math.isfinite(law.slope.low) else ""
        lines.append(guide_line(ends, law(np.array(ends)).tolist(), f"fit, slope {law.slope.mean:.2f}{bounds}", dash="dash"))
    return lines


# Trade-offs ----------------------------------------------------------------------------------------------------------


def pareto(study: Study, target: float | None = None, *, cost: Literal["minutes", "cost"] = "minutes") -> Figure:
    """Error over minutes of training or cost: colour is m, symbol the fraction, the front is drawn, what it dominates is dim.

    A point is a setting, the mean over its seeds.
    """
    objective, target = accuracy_name(study), _target(study, target)
    trials, values = _results(study, objective)
    prices = np.array([_price(trial, cost) for trial in trials])
    who = _grouped(trials, lambda trial: trial.settings)
    x = np.array([np.mean(prices[each]) for each in who])
    cells = [analysis.mean_interval(1 - values[each]) for each in who]
    y = np.array([cell.mean for cell in cells])
    front = analysis.pareto_front(x, y)
    unit = "minutes" if cost == "minutes" else safe(study.head.currency or "no currency")
    configs = [trial_config(study.head.base, trial.settings, seed=0) for trial in study.head.trials]
    views = sorted({int(config["views.count"]) for config in configs})
    fractions = sorted({float(config["data.fraction"]) for config in configs})
    traces: list[dict[str, Any]] = []
    for (i, m), (j, fraction) in itertools.product(enumerate(views), enumerate(fractions)):
        mine = [k for k, each in enumerate(who) if (trials[each[0]].m, trials[each[0]].fraction) == (m, fraction)]
        mine = [k for k in mine if math.isfinite(x[k])]
        if mine:
            marker = {"color": colour(i, len(views)), "symbol": SYMBOLS[j % len(SYMBOLS)], "size": 10}
            texts = [
                f"{setting(trials[who[k][0]].settings)}<br>error {_shown_interval(objective, cells[k])}<br>{number(x[k])} {unit}"
                for k in mine
            ]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": x[mine].tolist(),
                    "y": y[mine].tolist(),
                    "name": f"m {m}, fraction {number(fraction)}",
                    "text": texts,
                    "hoverinfo": "text",
                    "marker": marker | {"opacity": [1.0 if front[k] else 0.35 for k in mine]},
                }
                | of_trials(trials, [who[k] for k in mine])
            )
    on_front = sorted(np.flatnonzero(front).tolist(), key=lambda k: (x[k], y[k]))
    if on_front:
        line = {"color": GUIDE, "width": 2, "shape": "hv"}
        trace = {"type": "scatter", "mode": "lines", "x": x[on_front].tolist(), "y": y[on_front].tolist(), "line": line}
        traces.append(
            trace | {"name": "front", "hoverinfo": "skip"} | of_trials(trials, [who[k] for k in on_front], derived="front")
        )
        if target is not None:
            spanned = x[np.isfinite(x)]
            ends = [float(spanned.min()), float(spanned.max())]
            traces.append(guide_line(ends, [1 - target] * 2, f"target {100 * (1 - target):.4g} %"))
    title = "training (minutes, log)" if cost == "minutes" else f"cost ({unit}, log)"
    error = labelled_axis(f"error (1 - {_TITLES[objective].partition(' (')[0]}, % of test images)", tickformat=_PERCENT)
    empty = NO_RESULT if cost == "minutes" else "No complete trial has a cost."
    return _figure(traces, empty=empty, xaxis=log_axis(title, x), yaxis=error)


def _price(trial: Trial, cost: str) -> float:
    if cost == "minutes":
        return float(trial.readouts.minutes[-1])
    return math.nan if trial.state.cost is None else trial.state.cost


def fraction_map(study: Study, target: float | None = None, *, show: Literal["accuracy", "minutes"] = "accuracy") -> Figure:
    """Accuracy, or minutes to the target, for each m and fraction; framed where m times fraction is the most frequent product.

    A cell is the mean over its trials, seeds and whatever else differs between them: select those of one d and beta first.
    Where one of them did not reach the target, the cell has no colour and says so.
    """
    objective, target = accuracy_name(study), _target(study, target)
    trials, values = _results(study, objective)
    if show == "minutes" and target is None:
        trials, values = [], values[:0]
    table = analysis.views_by_fraction([trial.m for trial in trials], [trial.fraction for trial in trials], values)
    shape = table.mean.shape
    z, texts, who = np.full(shape, math.nan), np.full(shape, "", object), np.full(shape, None, object)
    for i, j in np.ndindex(shape):
        mine = [k for k, t in enumerate(trials) if (t.m, t.fraction) == (table.m[i], table.fraction[j])]
        who[i, j] = mine
        if not mine:
            continue
        if show == "accuracy" or target is None:
            z[i, j] = table.mean[i, j]
            half = table.high[i, j] - table.mean[i, j]
            texts[i, j] = f"{100 * z[i, j]:.1f} %" + (f"<br>± {100 * half:.1f}" if math.isfinite(half) else "")
        else:
            read = (trials[k].readouts for k in mine)
            time = analysis.mean_time(analysis.time_to_target(r.minutes, getattr(r, objective), target) for r in read)
            z[i, j] = math.nan if time.censored else time.time.mean
            texts[i, j] = f"{'> ' * bool(time.censored)}{time.time.mean:.3g} min"
    x, y = [number(each) for each in table.fraction], [str(each) for each in table.m]
    bar = "linear accuracy (%)" if objective == "linear_accuracy" else "kNN accuracy (%)"
    if show == "minutes":
        bar = "minutes" if target is None else f"minutes to {100 * target:.4g} %"
    traces: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    if trials:
        format_ = {"tickformat": _PERCENT} if show == "accuracy" else {}
        heat = {
            "type": "heatmap",
            "x": x,
            "y": y,
            "z": [plain(row) for row in z],
            "text": texts.tolist(),
            "texttemplate": "%{text}",
        }
        heat |= {"colorscale": "Cividis", "reversescale": show == "minutes", "colorbar": {"title": {"text": bar}} | format_}
        traces.append(heat | {"name": bar, "hoverinfo": "text", "xgap": 3, "ygap": 3} | of_trials(trials, who.tolist()))
        name = f"m x fraction = {number(table.product)}"
        for i, j in np.argwhere(table.on_product & (table.n > 0)).tolist():  # a category's place is its number
            corners = {"x0": j - 0.48, "x1": j + 0.48, "y0": i - 0.48, "y1": i + 0.48}
            frame = {"type": "rect", "name": name, "legendgroup": "product", "line": {"color": COLOURS[1], "width": 4}}
            frames.append(frame | corners | {"showlegend": not frames})
    empty = NO_RESULT if target is not None or show == "accuracy" else "The study has no target accuracy."
    xaxis = labelled_axis("fraction of the images (share)", type="category", showgrid=False)
    yaxis = labelled_axis("views per image m (count)", type="category", showgrid=False)
    return _figure(traces, empty=empty, xaxis=xaxis, yaxis=yaxis, shapes=frames, legend={"orientation": "h", "y": 1.1})


# Settings ------------------------------------------------------------------------------------------------------------


def parallel_coordinates(study: Study) -> Figure:
    """A line for each complete trial through its swept settings, its minutes and the objective, which gives the colour.

    Lines of plotly's plain kind: its own parallel coordinates need WebGL and a page that lets scripts make code.
    """
    objective = study.head.objective
    trials, values = _results(study, objective)
    axes = [_coordinate(key, [trial.settings.get(key) for trial in trials]) for key in study.head.swept]
    axes.append(_measured("training (minutes)", np.array([_price(trial, "minutes") for trial in trials]), number))
    axes.append(_measured(_TITLES[objective], values, lambda value: _shown_result(objective, value)))
    places = np.array([_places(axis) for axis in axes]).reshape(len(axes), len(trials))  # [axes, trials], 0 to 1
    bins = _bins(values)
    traces: list[dict[str, Any]] = []
    for shade in sorted(set(bins)):
        mine = [i for i, each in enumerate(bins) if each == shade]
        texts = [f"{setting(trials[i].settings)}, seed {trials[i].seed}<br>{_shown_result(objective, values[i])}" for i in mine]
        ends = [_shown_result(objective, float(end)) for end in (values[mine].min(), values[mine].max())]
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers" if len(trials) <= MOST_MARKED else "lines",
            "x": [x for _ in mine for x in (*range(len(axes)), None)],
            "y": [y for i in mine for y in (*plain(places[:, i]), None)],
            "text": [text for text in texts for _ in range(len(axes) + 1)],
            "hoverinfo": "text",
            "name": ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}",
            "line": {"color": colour(shade, len(COLOURS) + 1), "width": 1.5 if len(trials) <= MANY else 0.8},
            "marker": {"size": 4},
            "connectgaps": False,
        }
        traces.append(trace | of_trials(trials, [i for i in mine for _ in range(len(axes) + 1)]))
    labels = labelled_axis(
        "settings and results (a line is a trial)",
        tickvals=list(range(len(axes))),
        ticktext=[axis["label"].replace(" (", "<br>(") for axis in axes],
        range=[-0.1, len(axes) - 0.6],
        showgrid=False,
    )
    lines = [{"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "line": {"color": GUIDE, "width": 1}} for i in range(len(axes))]
    return _figure(
        traces,
        empty=NO_RESULT,
        xaxis=labels,
        yaxis=labelled_axis("place on the axis (share)", range=[-0.05, 1.05], visible=False),
        shapes=lines if traces else [],
        **({"annotations": [note for i, axis in enumerate(axes) for note in _tick_notes(i, axis)]} if traces else {}),
    )


def _bins(values: np.ndarray) -> list[int]:
    """For each value which of up to as many parts of their range as there are colours, and one, it lies in."""
    if not len(values):
        return []
    spread = float(values.max() - values.min()) or 1.0
    return [min(len(COLOURS), int((value - values.min()) / spread * (len(COLOURS) + 1))) for value in values.tolist()]


def _measured(label: str, values: np.ndarray, show: Callable[[float], str]) -> dict[str, Any]:
    """The axis of a result: least, middle and largest value have ticks."""
    there = values[np.isfinite(values)]
    ticks = np.unique([there.min(), (there.min() + there.max()) / 2, there.max()]).tolist() if len(there) else []
    return {"label": label, "values": values.tolist(), "tickvals": ticks, "ticktext": [show(tick) for tick in ticks]}


def _places(axis: dict[str, Any], values: list[float | None] | None = None) -> np.ndarray:
    """Where `values`, by default those of the trials, stand on an axis, 0 to 1."""
    given = np.array([*axis["values"], *axis.get("tickvals", [])], dtype=np.float64)
    there = given[np.isfinite(given)]
    wanted = np.array(axis["values"] if values is None else values, dtype=np.float64)
    if not len(there) or there.max() == there.min():
        return np.where(np.isfinite(wanted), 0.5, math.nan)
    return (wanted - there.min()) / (there.max() - there.min())


def _tick_notes(place: int, axis: dict[str, Any]) -> list[dict[str, Any]]:
    note = {"x": place, "xanchor": "left", "xshift": 5, "yshift": 7, "showarrow": False, "font": {"size": 11}}
    at = _places(axis, axis["tickvals"]).tolist()
    return [note | {"y": y, "text": text} for y, text in zip(at, axis["ticktext"], strict=True)]


def _coordinate(key: str, values: list[Any]) -> dict[str, Any]:
    """The axis of a swept key: numbers that are far apart on a log2 scale, what is no number by its place."""
    label = safe(SHORT.get(key, key))
    different = levels(values)
    if different and all(map(is_number, different)):
        numbers = np.array(values, dtype=np.float64)
        spread = bool(numbers.min() > 0 and numbers.max() / numbers.min() >= 4)
        scaled = np.log2(numbers) if spread else numbers
        made: dict[str, Any] = {"label": f"{label} (log2)" if spread else label, "values": plain(scaled)}
        if len(different) <= MOST_TICKS:
            at = np.array(different, dtype=np.float64)
            made |= {"tickvals": plain(np.log2(at) if spread else at), "ticktext": [number(value) for value in different]}
        else:
            at = np.linspace(scaled.min(), scaled.max(), 6)
            made |= {"tickvals": plain(at), "ticktext": [number(value) for value in (2**at if spread else at)]}
        return made
    place = {str(sort_key(value)): i for i, value in enumerate(different)}
    ticks = {"tickvals": list(range(len(different))), "ticktext": [shown_value(value) for value in different]}
    return {"label": label, "values": [place[str(sort_key(value))] for value in values]} | ticks


def importance_bars(study: Study) -> Figure:
    """The share of the objective's variance that each swept key explains alone (main effects), and what they leave."""
    trials, values = _results(study, study.head.objective)
    made = analysis.importance({key: [trial.settings.get(key) for trial in trials] for key in study.head.swept}, values)
    traces: list[dict[str, Any]] = []
    if math.isfinite(made.residual):
        bars = sorted(made.share.items(), key=lambda item: item[1])
        names = ["seeds and combinations", *(safe(SHORT.get(key, key)) for key, _ in bars)]
        shares = [made.residual, *(share for _, share in bars)]
        trace: dict[str, Any] = {
            "type": "bar",
            "orientation": "h",
            "x": shares,
            "y": names,
            "text": [f"{100 * share:.1f} %" for share in shares],
            "textposition": "outside",
            "cliponaxis": False,
        }
        marker = {"color": [GUIDE, *[COLOURS[0]] * len(bars)]}
        trace |= {
            "marker": marker,
            "hoverinfo": "text",
            "name": "explained",
            "meta": {"trials": [trial.name for trial in trials]},
        }
        traces.append(trace)
    title = f"explained variance of {_TITLES[study.head.objective].partition(' (')[0]} (%)"
    empty = "Importance needs two complete trials with different results."
    return _figure(
        traces,
        empty=empty,
        xaxis=labelled_axis(title, tickformat=_PERCENT, range=[0, 1.1]),
        yaxis=labelled_axis("swept key", type="category", ticklabelstandoff=6),
    )
