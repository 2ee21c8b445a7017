"""The eigenspectrum of a trial's features at each of its read-outs, where they hold it, with the line that alpha is the slope of.

A read-out holds it as `spectrum`: [[rank, eigenvalue], ...], ranks from 1. It is read for one trial when it is asked for.
"""

import math
from typing import Any

import numpy as np

from ssl_ray import storage
from ssl_ray.dashboard.drawing import colour, guide_line, labelled_axis, number, plain
from ssl_ray.study.schema import json_object, trial_uri

NOT_STORED = "The read-outs of this trial do not store the eigenspectrum, only alpha and RankMe."
DRAWN_STEPS = 12
"""First and last, and about equally many between."""


def read_spectra(uri: str, trial: str) -> list[dict[str, Any]]:
    """Of each read-out that has one, by step: {"step", "rank", "eigenvalue", "alpha", "range"}; step 0 is before training."""
    at = storage.join(trial_uri(uri, trial), "evaluations")
    found = []
    for name in storage.list_names(at):
        if not name.endswith(".json"):
            continue
        value = json_object(storage.join(at, name), storage.read_bytes(storage.join(at, name)))
        try:
            pairs = np.array(value["spectrum"], dtype=np.float64).reshape(-1, 2)
            between = value.get("alpha_fit_range")
            between = None if between is None else [float(end) for end in between]
            alpha = None if value.get("alpha") is None else float(value["alpha"])
            step = int(value["step"] or 0)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            continue  # of another kind: as good as not stored
        pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs > 0).all(axis=1)]
        found.append({"step": step, "rank": pairs[:, 0], "eigenvalue": pairs[:, 1], "alpha": alpha, "range": between})
    return sorted(found, key=lambda each: each["step"])


def eigenspectrum(spectra: list[dict[str, Any]]) -> dict[str, Any]:
    """Eigenvalue over rank, log-log, a line a read-out, and over the range of its fit the line of slope -alpha."""
    spectra = [each for each in spectra if len(each["rank"])]
    if len(spectra) > DRAWN_STEPS:
        spectra = [spectra[i] for i in np.unique(np.linspace(0, len(spectra) - 1, DRAWN_STEPS).round().astype(int)).tolist()]
    traces: list[dict[str, Any]] = []
    for position, each in enumerate(spectra):
        name = f"step {each['step']}" if each["step"] else "untrained"
        fit = _fit(each)
        if fit is not None:
            name += f", alpha {number(each['alpha'])} (ranks {number(each['range'][0])} to {number(each['range'][1])})"
        line = {"color": colour(position, len(spectra)), "width": 2}
        x, y = plain(each["rank"]), plain(each["eigenvalue"])
        traces.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "legendgroup": name, "line": line})
        if fit is not None:
            traces.append(guide_line(*fit, f"fit of {name}", dash="dash") | {"legendgroup": name, "showlegend": False})
    layout: dict[str, Any] = {"margin": {"l": 60, "r": 20, "t": 30, "b": 50}, "hovermode": "closest"}
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    if not traces:
        middle = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
        layout["annotations"] = [middle | {"text": NOT_STORED, "font": {"size": 14}}]
    axes = {"xaxis": labelled_axis("rank (log)", type="log"), "yaxis": labelled_axis("eigenvalue (log)", type="log")}
    return {"data": traces, "layout": layout | axes}


def _fit(each: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Ends of the line of slope -alpha through the middle of the eigenvalues that alpha was fitted to, x and y."""
    if each["alpha"] is None or each["range"] is None or len(each["range"]) != 2 or not math.isfinite(each["alpha"]):
        return None
    low, high = each["range"]
    inside = (each["rank"] >= low) & (each["rank"] <= high)
    if low <= 0 or inside.sum() < 2:
        return None
    level = float(np.mean(np.log(each["eigenvalue"][inside]) + each["alpha"] * np.log(each["rank"][inside])))
    return [low, high], np.exp(level - each["alpha"] * np.log([low, high])).tolist()
