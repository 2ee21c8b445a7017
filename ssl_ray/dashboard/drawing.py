"""What all figures share: colours, texts that are safe to show, curves of few points, axes and traces as plain values."""

import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ssl_ray.study.results import Trial

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8C8C8C", "#F0E442")
"""Okabe and Ito's, which colour-blind people can tell apart; their black as a grey, which a dark page shows too."""
_MANY = ((0x2F, 0x6F, 0xC0), (0x8C, 0x8C, 0x8C), (0xD9, 0x9A, 0x00))
"""Ends and middle: blue to orange, which colour-blind people can tell apart and white and dark pages both show."""
GUIDE = "#888888"
"""Of lines that are no results: on white and on black it can be read."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
CURVE_POINTS = 200
"""At most so many of a curve are drawn."""
FIGURE_POINTS = 20_000
"""And about so many in a panel: with more than 100 trials a curve has fewer, but FEWEST_POINTS."""
FEWEST_POINTS = 10
LONGEST_TEXT = 120

SHORT = {"views.count": "m", "model.projector_dim": "d", "loss.beta": "β", "data.fraction": "fraction"}


def safe(text: Any) -> str:
    """A text from results for a figure: plotly reads some HTML, and takes %{...} for a number to put in.

    Characters that are not printable, among them those that turn the direction of text, are written as escapes; what is longer
    than LONGEST_TEXT ends in an ellipsis.
    """
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text)[: LONGEST_TEXT + 1])
    line = line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"
    return html.escape(line, quote=False).replace("%{", "%&#123;")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN and infinity are not


def number(value: float) -> str:
    """In four significant digits: 0.04, 1024, 1.5e+06."""
    return str(int(value)) if abs(value) < 1e5 and float(value).is_integer() else f"{value:.4g}"


def setting(settings: dict[str, Any]) -> str:
    """`d 64, β 0.04`, safe to show."""
    return ", ".join(f"{safe(SHORT.get(key, key))} {shown_value(value)}" for key, value in settings.items())


def shown_value(value: Any) -> str:
    return number(value) if is_number(value) else safe(value if isinstance(value, str) else json.dumps(value))


def sort_key(value: Any) -> tuple:
    """Numbers by size, then all else by its text."""
    return (0, float(value), "") if is_number(value) else (1, 0.0, json.dumps(value))


def levels(values: Iterable[Any]) -> list[Any]:
    """The different values, sorted."""
    return sorted({str(sort_key(value)): value for value in values}.values(), key=sort_key)


def plain(values: np.ndarray) -> list[float | None]:
    """For JSON: six significant digits, None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def points_per_curve(curves: int) -> int:
    return max(FEWEST_POINTS, min(CURVE_POINTS, FIGURE_POINTS // max(1, curves)))


def thinned(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` (>= 4) of the points x, y [n]: first and last, and the least and the largest y of equal parts between.

    So a spike stays one, whatever the length of the curve.
    """
    if len(x) <= most:
        return x, y
    inner = y[1:-1]
    size = -(-len(inner) // ((most - 2) // 2))
    parts = -(-len(inner) // size)
    padded = np.full(parts * size, math.nan)
    padded[: len(inner)] = inner
    rows = padded.reshape(parts, size)
    starts = 1 + size * np.arange(parts)
    least = starts + np.where(np.isnan(rows), math.inf, rows).argmin(axis=1)
    largest = starts + np.where(np.isnan(rows), -math.inf, rows).argmax(axis=1)
    kept = np.unique(np.concatenate([[0], least, largest, [len(x) - 1]]))
    return x[kept], y[kept]


# Traces and axes -----------------------------------------------------------------------------------------------------


def colour(position: int, count: int) -> str:
    """Of the one of `count` things that stands at `position`; more than there are colours go from blue to orange."""
    if count <= len(COLOURS):
        return COLOURS[position]
    channels = [np.interp(position / (count - 1), [0, 0.5, 1], each) for each in zip(*_MANY, strict=True)]
    return "#{:02X}{:02X}{:02X}".format(*(round(float(each)) for each in channels))


def of_trials(trials: Sequence[Trial], points: list, *, derived: str | None = None) -> dict[str, Any]:
    """Whose points they are. points: of each the position in `trials`, a list of positions, or lists of such, row by row.

    derived: what they are, if more than their trials' results: see ssl_ray.dashboard.figures.
    """
    used = sorted(set(_leaves(points)))
    place = {position: i for i, position in enumerate(used)}
    meta = {"trials": [trials[i].name for i in used]} | ({} if derived is None else {"derived": derived})
    return {"meta": meta, "customdata": _replaced(points, place)}


def _leaves(points: list | int) -> Iterator[int]:
    if isinstance(points, int):
        yield points
    else:
        for each in points:
            yield from _leaves(each)


def _replaced(points: list | int, place: dict[int, int]) -> Any:
    return place[points] if isinstance(points, int) else [_replaced(each, place) for each in points]


def labelled_axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, "gridcolor": "rgba(136,136,136,0.25)", "zeroline": False} | more


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5, or wherever plotly puts them if that would be too few."""
    there = [value for value in values if value > 0]  # no NaN
    wide = bool(there) and max(there) >= 10 * min(there)
    return labelled_axis(title, type="log", **({"dtick": "D2"} if wide else {}))


def powers_of_two(values: Iterable[float], title: str) -> dict[str, Any]:
    """A logarithmic axis with a tick at each power of two that the values span."""
    exponents = [math.log2(value) for value in values if value > 0]
    if not exponents:
        return labelled_axis(title, type="log")
    ticks = [2**e for e in range(math.floor(min(exponents)), math.ceil(max(exponents)) + 1)]
    return labelled_axis(title, type="log", tickvals=ticks, ticktext=[number(tick) for tick in ticks])


def guide_line(x: list[float], y: list[float], name: str, *, dash: str = "dot") -> dict[str, Any]:
    """A line that is no result: without trials."""
    line = {"color": GUIDE, "dash": dash, "width": 1.5}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": line, "hoverinfo": "name"}


def stacked_height(panels: int) -> int:
    """Of a figure of so many panels, in pixels."""
    return 80 + 190 * panels


def stacked_axes(titles: list[dict[str, Any]]) -> dict[str, Any]:
    """The y axes of panels that lie over each other, the first at the bottom: {"yaxis": ..., "yaxis2": ...}."""
    height = 1 / len(titles)
    axes = {}
    for i, axis in enumerate(titles):
        gap = 0.03 if len(titles) > 1 else 0
        axes["yaxis" if i == 0 else f"yaxis{i + 1}"] = axis | {"domain": [i * height + gap * (i > 0), (i + 1) * height - gap]}
    return axes
