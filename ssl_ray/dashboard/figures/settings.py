"""Over all swept keys: parallel coordinates, and what the result depends on."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ssl_ray.dashboard.curves import MANY, MOST_MARKED
from ssl_ray.dashboard.drawing import (
    COLOURS,
    GUIDE,
    SHORT,
    colour,
    is_number,
    labelled_axis,
    levels,
    number,
    of_trials,
    plain,
    safe,
    setting,
    shown_value,
    sort_key,
)
from ssl_ray.dashboard.figures.shared import (
    MOST_TICKS,
    NO_RESULT,
    PERCENT,
    TITLES,
    Figure,
    figure,
    results_of,
    shown_result,
    taken,
)
from ssl_ray.study import analysis
from ssl_ray.study.results import Study


def parallel_coordinates(study: Study) -> Figure:
    """A line for each complete trial through its swept settings, its minutes and the objective, which gives the colour.

    Lines of plotly's plain kind: its own parallel coordinates need WebGL and a page that lets scripts make code.
    """
    objective = study.head.objective
    trials, values = results_of(study, objective)
    axes = [_coordinate(key, [trial.settings.get(key) for trial in trials]) for key in study.head.swept]
    axes.append(_measured("training (minutes)", np.array([taken(trial, "minutes") for trial in trials]), number))
    axes.append(_measured(TITLES[objective], values, lambda value: shown_result(objective, value)))
    places = np.array([_places(axis) for axis in axes]).reshape(len(axes), len(trials))  # [axes, trials], 0 to 1
    bins = _bins(values)
    traces: list[dict[str, Any]] = []
    for shade in sorted(set(bins)):
        mine = [i for i, each in enumerate(bins) if each == shade]
        texts = [f"{setting(trials[i].settings)}, seed {trials[i].seed}<br>{shown_result(objective, values[i])}" for i in mine]
        ends = [shown_result(objective, float(end)) for end in (values[mine].min(), values[mine].max())]
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
    return figure(
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
    trials, values = results_of(study, study.head.objective)
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
    title = f"explained variance of {TITLES[study.head.objective].partition(' (')[0]} (%)"
    empty = "Importance needs two complete trials with different results."
    return figure(
        traces,
        empty=empty,
        xaxis=labelled_axis(title, tickformat=PERCENT, range=[0, 1.1]),
        yaxis=labelled_axis("swept key", type="category", ticklabelstandoff=6),
    )
