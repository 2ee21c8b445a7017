"""Curves of trials as traces: a line for each, those of one colour and status in one trace. Plain values, no plotly."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ssl_ray.dashboard.drawing import SHORT, colour, levels, of_trials, plain, points_per_curve, safe, shown_value, thinned
from ssl_ray.study.results import Study, Trial

MANY = 50
"""With more trials their lines are thinner."""
MOST_MARKED = 200
"""With more trials their points have no markers: a browser draws each as an element of its own."""
Points = Callable[[Trial], tuple[np.ndarray, np.ndarray]]
"""x and y of a trial's curve, [n]."""


def _varying(study: Study) -> list[str]:
    """The swept keys that differ between the planned trials, whether they are selected or not."""
    given = {key: [trial.settings.get(key) for trial in study.head.trials] for key in study.head.swept}
    return [key for key, values in given.items() if any(value != values[0] for value in values)]


def _colour_key(study: Study) -> str | None:
    """What the colour of a curve tells: m where it differs, else the first swept key that does."""
    varying = _varying(study)
    return "views.count" if "views.count" in varying else next(iter(varying), None)


_DASHES = {"complete": "solid", "running": "dash"}


def curves(study: Study, points: Points, *, axis: str = "y", first: bool = True, markers: bool = False) -> list[dict[str, Any]]:
    """A line for each trial; those of one colour and status are one trace, which None cuts in curves.

    Running trials are dashed, failed and stopped ones dotted. first: the panel whose traces are in the legend.
    """
    key = _colour_key(study)
    given = [None if key is None else trial.settings.get(key) for trial in study.trials]
    values = [None] if key is None else levels(trial.settings.get(key) for trial in study.head.trials)
    most = points_per_curve(len(study.trials))
    traces = []
    for position, value in enumerate(values):
        mine = [trial for trial, own in zip(study.trials, given, strict=True) if own == value]
        for status, dash in [*_DASHES.items(), ("ended", "dot")]:
            group = [trial for trial in mine if (trial.state.status if trial.state.status in _DASHES else "ended") == status]
            drawn: dict[str, list] = {"x": [], "y": [], "who": [], "text": []}
            for who, trial in enumerate(group):
                x, y = points(trial)
                there = np.isfinite(x) & np.isfinite(y)
                x, y = thinned(x[there], y[there], most)
                if not len(x):
                    continue
                drawn["x"] += [*plain(x), None]
                drawn["y"] += [*plain(y), None]
                drawn["who"] += [who] * (len(x) + 1)
                drawn["text"] += [safe(trial.name)] * (len(x) + 1) if markers else []
            if not drawn["x"]:
                continue
            label = "all trials" if key is None else f"{safe(SHORT.get(key, key))} = {shown_value(value)}"
            label += {"running": ", running", "ended": ", failed or stopped"}.get(status, "")
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if markers and len(study.trials) <= MOST_MARKED else "lines",
                    "x": drawn["x"],
                    "y": drawn["y"],
                    "yaxis": axis,
                    "name": label,
                    "legendgroup": label,
                    "showlegend": first,
                    "line": {
                        "color": colour(position, len(values)),
                        "dash": dash,
                        "width": 1.5 if len(study.trials) <= MANY else 0.8,
                    },
                    "connectgaps": False,
                }
                | ({"text": drawn["text"], "marker": {"size": 5}} if markers else {})
                | of_trials(group, drawn["who"])
            )
    return traces
