"""What is paid for an accuracy: error over minutes or cost, views times images."""

import itertools
import math
from typing import Any, Literal

import numpy as np

from ssl_ray.dashboard.drawing import (
    COLOURS,
    GUIDE,
    SYMBOLS,
    colour,
    guide_line,
    labelled_axis,
    log_axis,
    number,
    of_trials,
    plain,
    safe,
    setting,
)
from ssl_ray.dashboard.figures.shared import (
    NO_RESULT,
    PERCENT,
    TITLES,
    Figure,
    accuracy_name,
    figure,
    grouped,
    results_of,
    shown_interval,
    taken,
    target_of,
)
from ssl_ray.study import analysis
from ssl_ray.study.results import Study
from ssl_ray.study.schema import trial_config


def pareto(study: Study, target: float | None = None, *, cost: Literal["minutes", "cost"] = "minutes") -> Figure:
    """Error over minutes of training or cost: colour is m, symbol the fraction, the front is drawn, what it dominates is dim.

    A point is a setting, the mean over its seeds.
    """
    objective, target = accuracy_name(study), target_of(study, target)
    trials, values = results_of(study, objective)
    prices = np.array([taken(trial, cost) for trial in trials])
    who = grouped(trials, lambda trial: trial.settings)
    x = np.array([np.mean(prices[each]) for each in who])
    cells = [analysis.mean_interval(1 - values[each], within=(0, 1)) for each in who]
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
                f"{setting(trials[who[k][0]].settings)}<br>error {shown_interval(objective, cells[k])}<br>{number(x[k])} {unit}"
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
    error = labelled_axis(f"error (1 - {TITLES[objective].partition(' (')[0]}, % of test images)", tickformat=PERCENT)
    empty = NO_RESULT if cost == "minutes" else "No complete trial has a cost."
    return figure(traces, empty=empty, xaxis=log_axis(title, x), yaxis=error)


def fraction_map(study: Study, target: float | None = None, *, show: Literal["accuracy", "minutes"] = "accuracy") -> Figure:
    """Accuracy, or minutes to the target, for each m and fraction; framed where m times fraction is the most frequent product.

    A cell is the mean over its trials, seeds and whatever else differs between them: select those of one d and beta first.
    Where one of them did not reach the target, the cell has no colour and says so.
    """
    objective, target = accuracy_name(study), target_of(study, target)
    trials, values = results_of(study, objective)
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
        format_ = {"tickformat": PERCENT} if show == "accuracy" else {}
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
    return figure(traces, empty=empty, xaxis=xaxis, yaxis=yaxis, shapes=frames, legend={"orientation": "h", "y": 1.1})
