"""Over the projector's dimension d: accuracy for each beta, and the best beta."""

import math
from typing import Any

import numpy as np

from ssl_ray.dashboard.drawing import (
    COLOURS,
    GUIDE,
    colour,
    guide_line,
    log_axis,
    number,
    of_trials,
    powers_of_two,
    setting,
    sort_key,
)
from ssl_ray.dashboard.figures.shared import (
    ACCURACIES,
    MOST_BANDS,
    MOST_BARS,
    MOST_TICKS,
    NO_RESULT,
    Figure,
    band,
    error_bars,
    figure,
    grouped,
    less,
    results_of,
    shown_interval,
    target_line,
    target_of,
    value_axis,
    without,
)
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial
from ssl_ray.study.schema import swept_settings


def accuracy_over_dim(study: Study, target: float | None = None) -> Figure:
    """The objective over the projector's dimension: a line for each beta, and the best of each d.

    A point is the mean over seeds, with its t interval as a band (up to MOST_BANDS lines) or bars (up to MOST_BARS).
    Where more than d and beta differ, each of their combinations has a line of its own in the colour of its beta.
    """
    objective, head = study.head.objective, study.head
    trials, values = results_of(study, objective)
    traces: list[dict[str, Any]] = []
    found: list[tuple[int, analysis.Interval, list[int]]] = []
    lines = grouped(trials, lambda trial: without(trial, "model.projector_dim"))
    lines.sort(key=lambda line: [sort_key(value) for value in without(trials[line[0]], "model.projector_dim").values()])
    labels = [_line_label(trials[line[0]].settings) for line in lines]
    different = list(dict.fromkeys(_line_label(settings) for settings in _all_settings(study)))
    for label, line in sorted(zip(labels, lines, strict=True), key=lambda each: labels.index(each[0])):
        widths = sorted({trials[i].d for i in line})
        who = [[i for i in line if trials[i].d == d] for d in widths]
        cells = [analysis.mean_interval(values[each], within=analysis.possible(objective)) for each in who]
        found += zip(widths, cells, who, strict=True)
        name = setting(without(trials[line[0]], "model.projector_dim")) or label
        shade = colour(different.index(label), len(different))
        few = len(lines) <= MOST_BANDS
        if few:
            traces += band(widths, cells, who, trials, fillcolor=shade, legendgroup=label)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": widths,
                "y": [cell.mean for cell in cells],
                "name": label,
                "legendgroup": label,
                "showlegend": label not in {trace.get("name") for trace in traces},
                "line": {"color": shade, "width": 2 if len(lines) <= len(COLOURS) else 1},
                "text": [f"d {d}, {name}: {shown_interval(objective, cell)}" for d, cell in zip(widths, cells, strict=True)],
                "hoverinfo": "text",
            }
            | ({"error_y": error_bars(cells, shade)} if not few and len(lines) <= MOST_BARS else {})
            | of_trials(trials, who)
        )
    if len(lines) > 1:
        traces.append(_best_line(found, trials, head.mode, head.target))
    if objective in ACCURACIES:
        traces += target_line(target_of(study, target), [trial.d for trial in trials])
    axis = powers_of_two([trial.d for trial in trials], "projector dimension d (log2)")
    return figure(traces, empty=NO_RESULT, xaxis=axis, yaxis=value_axis(objective))


def _line_label(settings: dict[str, Any]) -> str:
    """beta where it is swept, else whatever is beside d."""
    if "loss.beta" in settings:
        return setting({"loss.beta": settings["loss.beta"]})
    return setting(less(settings, "model.projector_dim")) or "all trials"


def _all_settings(study: Study) -> list[dict[str, Any]]:
    """Of the planned trials, whether they are selected or not; sorted by all but d, so that colours go with the values."""
    planned = [swept_settings(study.head, trial) for trial in study.head.trials]
    return sorted(planned, key=lambda settings: [sort_key(value) for value in less(settings, "model.projector_dim").values()])


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
    trials, values = results_of(study, objective)
    there = [i for i, trial in enumerate(trials) if math.isfinite(trial.beta)]
    trials, values = [trials[i] for i in there], values[there]
    traces: list[dict[str, Any]] = []
    all_best: list[analysis.BestBeta] = []
    d, beta = np.array([trial.d for trial in trials]), np.array([trial.beta for trial in trials])
    groups = grouped(trials, lambda trial: without(trial, "model.projector_dim", "loss.beta"))
    series = list(dict.fromkeys(_series(swept_settings(head, trial)) for trial in head.trials))
    for group in groups:
        best = analysis.best_beta(d[group], beta[group], values[group], mode=head.mode, target=head.target)
        all_best += best
        who = [[i for i in group if trials[i].d == each.d and trials[i].beta == each.beta] for each in best]
        name = _series(trials[group[0]].settings)
        text = [f"d {each.d}, β {number(each.beta)}, {name}: {shown_interval(objective, each.value)}" for each in best]
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
    return figure(traces, empty=NO_RESULT, xaxis=ticks, yaxis=betas)


def _series(settings: dict[str, Any]) -> str:
    return setting(less(settings, "model.projector_dim", "loss.beta")) or "best β"


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
