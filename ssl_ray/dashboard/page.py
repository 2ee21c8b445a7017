"""The page of a study's results: what it shows, as plain data, and the page around it.

One page, live and as a file: live it asks a server for the data (ssl_ray.dashboard.server), as a file it holds them
(ssl_ray.dashboard.report). Its script filters what was drawn of all trials; what a selection changes beyond that (means, fronts,
importance) the server draws anew.
"""

import base64
import binascii
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import numpy as np
import plotly

from ssl_ray.config import flatten
from ssl_ray.dashboard import figures
from ssl_ray.dashboard.drawing import SHORT
from ssl_ray.errors import UsageError, in_line
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial, shown_status

HERE = Path(__file__).parent
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
STYLE = "page.css"
SCRIPTS = ("filter.js", "table.js", "chosen.js", "plots.js", "tabs.js", "page.js")
POLL_S = 5.0
ERROR_CHARACTERS = 4000
"""Of an error, its end."""

Figure = Literal[
    "dim",
    "beta",
    "training-minutes",
    "training-views",
    "training-epochs",
    "pareto-minutes",
    "pareto-cost",
    "map-accuracy",
    "map-minutes",
    "representation",
    "loss",
    "throughput",
    "parallel",
    "importance",
]
FIGURES: tuple[Figure, ...] = get_args(Figure)


def draw(study: Study, name: Figure, *, target: float | None = None) -> dict[str, Any]:
    """The figure `name` of a study as plotly's script takes it: {"data": [...], "layout": {...}}."""
    match name:
        case "dim":
            return figures.accuracy_over_dim(study, target)
        case "beta":
            return figures.best_beta_over_dim(study)
        case "training-minutes":
            return figures.accuracy_over_training(study, target, x="minutes")
        case "training-views":
            return figures.accuracy_over_training(study, target, x="views")
        case "training-epochs":
            return figures.accuracy_over_training(study, target, x="epochs")
        case "pareto-minutes":
            return figures.pareto(study, target)
        case "pareto-cost":
            return figures.pareto(study, target, cost="cost")
        case "map-accuracy":
            return figures.fraction_map(study, target)
        case "map-minutes":
            return figures.fraction_map(study, target, show="minutes")
        case "representation":
            return figures.alpha_over_epochs(study)
        case "loss":
            return figures.loss_terms(study)
        case "throughput":
            return figures.throughput(study)
        case "parallel":
            return figures.parallel_coordinates(study)
        case "importance":
            return figures.importance_bars(study)


def dumped(value: Any) -> str:
    """JSON without spaces; null for what is not finite."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return finite(value.tolist())
    raise TypeError(f"{type(value).__name__} is no JSON")


# Data ----------------------------------------------------------------------------------------------------------------


def studied(study: Study, *, now: float) -> dict[str, Any]:
    """All that the page says of a study but its figures. now: unix seconds."""
    head = study.head
    base = flatten(head.base)
    said = {
        "uri": in_line(study.uri),
        "name": head.name,
        "hash": head.hash,
        "created": head.created,
        "objective": head.objective,
        "mode": head.mode,
        "accuracy": figures.accuracy_name(study),
        "target": head.target,
        "target_accuracy": head.target_accuracy,
        "swept": list(head.swept),
        "seeds": list(head.seeds),
        "budget": head.budget,
        "prices": head.prices,
        "currency": head.currency,
        "predicted": head.predicted,
        "summary": study.summary,
        "machine": head.machine,
        "ssl_ray": head.ssl_ray,
        "base": base,
        "settings": [trial.settings for trial in study.trials],
    }
    return finite(said) | {"columns": _columns(study, base, now=now), "version": version(study)}


def finite(value: Any) -> Any:
    """As JSON can say it: null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def version(study: Study) -> str:
    """Changes with whatever a figure shows; a heartbeat does not change it."""
    trials = [
        [t.state.status, t.state.cost, len(t.curve.step) and int(t.curve.step[-1]), len(t.readouts.step), t.settings, t.seed]
        for t in study.trials
    ]
    said = json.dumps([study.uri, study.head.hash, study.head.created, trials], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _columns(study: Study, base: dict[str, Any], *, now: float) -> list[dict[str, Any]]:
    """The columns of the trial table: key, label, kind (text, number, percent), whether shown at first, and a value a trial."""
    trials, head = study.trials, study.head

    def column(key: str, label: str, kind: str, values: Any, *, shown: bool = False) -> dict[str, Any]:
        return {"key": key, "label": label, "kind": kind, "shown": shown, "values": finite(list(values))}

    def result(name: str, label: str, kind: str) -> dict[str, Any]:
        return column(name, label, kind, [trial.result(name) for trial in trials], shown=name == head.objective)

    kind = "percent" if head.objective.endswith("accuracy") else "number"
    cells = over_seeds(study)
    unit = head.currency or "no currency"
    made = [
        column("name", "trial", "text", [trial.name for trial in trials], shown=True),
        column("status", "status", "text", [shown_status(trial.state, now=now) for trial in trials], shown=True),
    ]
    for key in head.swept:
        values = [trial.settings.get(key, base.get(key)) for trial in trials]
        made.append(column(key, SHORT.get(key, key), "number" if all(map(_is_number, values)) else "text", values, shown=True))
    made += [
        column("seed", "seed", "number", [trial.seed for trial in trials], shown=True),
        result("linear_accuracy", "linear accuracy (%)", "percent"),
        result("knn_accuracy", "kNN accuracy (%)", "percent"),
        result("alpha", "alpha", "number"),
        result("rankme", "RankMe (dimensions)", "number"),
        column("mean", "mean over seeds" + " (%)" * (kind == "percent"), kind, [cell.mean for cell in cells], shown=True),
        column(
            "half",
            "± 95 %" + " (points)" * (kind == "percent"),
            "points" if kind == "percent" else "number",
            [cell.high - cell.mean for cell in cells],
            shown=True,
        ),
        column("n", "complete seeds", "number", [cell.n for cell in cells]),
        column("epochs", "epochs", "number", [_last(trial.curve.epoch) for trial in trials], shown=True),
        column("views", "views seen", "number", [_last(trial.curve.views) for trial in trials]),
        column("steps", "steps", "number", [_last(trial.curve.step) for trial in trials]),
        column("minutes", "training (min)", "number", [_last(trial.curve.minutes) for trial in trials], shown=True),
        column("wall", "wall-clock (min)", "number", [trial.state.seconds / 60 for trial in trials]),
        column("to_target", "to target (min)", "number", [_to_target(study, trial) for trial in trials]),
        column("cost", f"cost ({unit})", "number", [trial.state.cost for trial in trials]),
        column("readout_minutes", "minutes at the last read-out", "number", [_last(trial.readouts.minutes) for trial in trials]),
        column("attempts", "attempts", "number", [trial.state.attempts for trial in trials]),
        column("bad", "bad samples", "number", [trial.bad_samples for trial in trials]),
        column("heartbeat", "heard of (unix s)", "number", [trial.state.heartbeat for trial in trials]),
        column("hash", "configuration hash", "text", [trial.hash for trial in trials]),
        column("why", "why it ended", "text", [_why(trial) for trial in trials]),
    ]
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


def _why(trial: Trial) -> str | None:
    why = trial.state.error if trial.state.status == "failed" else trial.state.reason
    return None if why is None else why[-ERROR_CHARACTERS:]


def _to_target(study: Study, trial: Trial) -> float:
    """Minutes until the study's target accuracy; NaN where there is none or it was not reached."""
    if study.head.target_accuracy is None:
        return math.nan
    accuracy = getattr(trial.readouts, figures.accuracy_name(study))
    time = analysis.time_to_target(trial.readouts.minutes, accuracy, study.head.target_accuracy)
    return time.x if time.reached else math.nan


def over_seeds(study: Study) -> list[analysis.Interval]:
    """For each trial the objective of the complete trials of its setting."""
    objective = study.head.objective
    cells: list[analysis.Interval] = [analysis.mean_interval([])] * len(study.trials)
    for group in analysis.groups(trial.settings for trial in study.trials):
        mine = [study.trials[i] for i in group]
        cell = analysis.mean_interval([trial.result(objective) for trial in mine if trial.state.status == "complete"])
        for i in group:
            cells[i] = cell
    return cells


# Selections ----------------------------------------------------------------------------------------------------------


def chosen(study: Study, bits: str) -> Study:
    """The study with the trials of `bits` only: URL-safe base64 of a bit a trial, in the order of the study, lowest bit first."""
    try:
        packed = base64.b64decode(bits.replace("-", "+").replace("_", "/") + "=" * (-len(bits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("only: no selection of trials. Open the page anew.") from error
    there = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: len(study.trials)]
    return figures.select(study, {trial.name for trial, bit in zip(study.trials, there.tolist(), strict=False) if bit})


# Page ----------------------------------------------------------------------------------------------------------------


def render(*, title: str, live: bool, poll_s: float = POLL_S, inlined: dict[str, Any] | None = None) -> str:
    """The page. inlined: the data that it is to show without a server, with all scripts and styles in it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(HERE))
    parts: dict[str, Any] = {"title": title, "live": live, "poll_s": poll_s, "scripts": SCRIPTS, "style": STYLE}
    if inlined is not None:
        code = [PLOTLY_JS.read_text(encoding="utf-8"), *((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)]
        code = [text.replace("</script", "<\\/script") for text in code]
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code)
        parts |= {"css": (HERE / STYLE).read_text(encoding="utf-8"), "code": code, "hashes": hashes, "data": in_script(inlined)}
    return environment.get_template("page.html").render(parts)


def in_script(value: Any) -> str:
    """JSON that may stand in a script element: no text of it can end the element or begin a comment."""
    text = dumped(value)  # ASCII, so without line separators of Unicode
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
