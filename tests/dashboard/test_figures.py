"""Figures as data: traces, axes, labels, values. They are looked at in a browser elsewhere."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from synthetic import complete, running

from ssl_ray.dashboard import drawing
from ssl_ray.dashboard import figures as drawn
from ssl_ray.dashboard.figures import select
from ssl_ray.study import analysis, schema
from ssl_ray.study.results import Study, Trial, read_study
from ssl_ray.study.schema import State


def checked(draw: Callable[..., dict]) -> Callable[..., go.Figure]:
    """What `draw` makes as a figure of plotly, which raises where a value is none that it knows."""
    return lambda *arguments, **options: go.Figure(draw(*arguments, **options))


figures = SimpleNamespace(
    accuracy_over_dim=checked(drawn.accuracy_over_dim),
    best_beta_over_dim=checked(drawn.best_beta_over_dim),
    accuracy_over_training=checked(drawn.accuracy_over_training),
    alpha_over_epochs=checked(drawn.alpha_over_epochs),
    loss_terms=checked(drawn.loss_terms),
    throughput=checked(drawn.throughput),
    pareto=checked(drawn.pareto),
    fraction_map=checked(drawn.fraction_map),
    parallel_coordinates=checked(drawn.parallel_coordinates),
    importance_bars=checked(drawn.importance_bars),
)
FIGURES: dict[str, Callable[[Study], go.Figure]] = {
    "accuracy_over_dim": figures.accuracy_over_dim,
    "best_beta_over_dim": figures.best_beta_over_dim,
    "accuracy_over_minutes": figures.accuracy_over_training,
    "accuracy_over_views": lambda study: figures.accuracy_over_training(study, x="views"),
    "accuracy_over_epochs": lambda study: figures.accuracy_over_training(study, x="epochs"),
    "alpha_over_epochs": figures.alpha_over_epochs,
    "loss_terms": figures.loss_terms,
    "throughput": figures.throughput,
    "pareto": figures.pareto,
    "pareto_cost": lambda study: figures.pareto(study, cost="cost"),
    "fraction_map": figures.fraction_map,
    "fraction_map_minutes": lambda study: figures.fraction_map(study, show="minutes"),
    "parallel_coordinates": figures.parallel_coordinates,
    "importance_bars": figures.importance_bars,
}
each_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
SMALL_GRID = {"model.projector_dim": [64, 256], "loss.beta": [0.01, 0.04]}


States = Mapping[int, State | None]


def study_of(folder: Path, trials: int, *, points: int = 100, states: States = MappingProxyType({}), **changes: Any) -> Study:
    """Complete trials but for those whose state is given by their number; None: queued."""
    uri = str(folder / "study")
    made = synthetic.head(trials, **changes)
    schema.write_study(uri, made)
    for number, trial in enumerate(made.trials):
        synthetic.write_trial(uri, made, trial, points=points, state=states.get(number, complete()))
    return read_study(uri)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """5 d x 5 beta x 3 m x 3 fractions, one seed."""
    return study_of(tmp_path_factory.mktemp("whole"), 225, seeds=(0,))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 d x 2 beta x 3 seeds."""
    return study_of(tmp_path_factory.mktemp("small"), 12, grid=SMALL_GRID)


def results(figure: go.Figure) -> list[Any]:
    """The traces that have trials."""
    return [trace for trace in figure.data if trace.meta is not None]


def named(figure: go.Figure, name: str) -> Any:
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def leaves(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def texts(value: Any) -> Iterator[str]:
    """All that plotly draws as text of a figure: everything but meta and customdata."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in ("meta", "customdata"):
                yield from texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str):
        yield value


# What holds for all --------------------------------------------------------------------------------------------------


@each_figure
def test_what_follows_from_a_budget_is_no_setting(draw, small: Study):
    budgeted = [
        dataclasses.replace(trial, settings=trial.settings | {"train.steps": 100 + i, "evaluate.every_steps": 40})
        for i, trial in enumerate(small.head.trials)
    ]
    assert draw(dataclasses.replace(small, head=dataclasses.replace(small.head, trials=tuple(budgeted)))) == draw(small)


@each_figure
def test_every_point_says_whose_it_is(draw: Callable, whole: Study):
    known = {trial.name for trial in whole.trials}
    traces = results(draw(whole))
    assert traces
    for trace in traces:
        trials = trace.meta["trials"]
        assert known.issuperset(trials)
        assert len(set(trials)) == len(trials)
        if trace.customdata is None:
            assert trace.type == "bar"  # of all trials together
            continue
        assert set(leaves(list(trace.customdata))) == set(range(len(trials)))
        if trace.type != "heatmap":
            assert len(trace.customdata) == len(trace.x) == len(trace.y)
            assert trace.text is None or len(trace.text) == len(trace.x)


@each_figure
def test_every_axis_is_labelled_with_its_unit(draw: Callable, whole: Study):
    figure = draw(whole)
    layout = figure.to_plotly_json()["layout"]
    axes = {key: axis for key, axis in layout.items() if re.fullmatch(r"[xy]axis\d*", key)}
    used = {(trace.yaxis or "y").replace("y", "yaxis") for trace in figure.data if hasattr(trace, "yaxis")}
    labels = [axis["title"]["text"] for axis in axes.values()]
    assert used <= axes.keys()
    assert "xaxis" in axes
    assert all(re.search(r"\(.+\)$", label) or label == "swept key" for label in labels), labels


@each_figure
def test_a_figure_of_nothing_says_so(draw: Callable, tmp_path: Path):
    for states in {}, dict.fromkeys(range(2)):
        figure = draw(study_of(tmp_path / str(len(states)), len(states), states=states))
        assert figure.data == ()
        assert figure.layout.annotations[0].text.endswith(".")


@each_figure
def test_numbers_that_are_missing_do_no_harm(draw: Callable, tmp_path: Path):
    study = study_of(tmp_path, 6, grid=SMALL_GRID, states={4: State(status="failed", error="x"), 5: None})
    first, second, *rest = study.trials
    unread = {field.name: getattr(first.readouts, field.name) * math.nan for field in dataclasses.fields(first.readouts)}
    no_readout = dataclasses.replace(
        first, readouts=dataclasses.replace(first.readouts, **unread | {"step": first.readouts.step})
    )
    broken = second.curve.loss.copy()
    broken[5:8] = [math.nan, math.inf, -math.inf]
    no_loss = dataclasses.replace(second, curve=dataclasses.replace(second.curve, loss=broken))
    figure = draw(dataclasses.replace(study, trials=(no_readout, no_loss, *rest)))
    text = json.dumps(figure.to_plotly_json(), allow_nan=False)
    assert "NaN" not in text
    assert "nan" not in " ".join(texts(figure.to_plotly_json()))


HOSTILE = ["<script>alert(1)</script>", "<a href='http://x'>y</a>", "%{meta[0]}&amp;", "\u202eöß\x00\x1b[31m", "n" * 5000]


@each_figure
def test_texts_of_a_study_are_not_markup(draw: Callable, tmp_path: Path):
    grid = {"loss.form": [*HOSTILE, None, {"a": HOSTILE[0]}], "model.projector_dim": [64, 128], HOSTILE[0]: HOSTILE[:2]}
    study = study_of(tmp_path, 28, grid=grid, seeds=(0,), currency=HOSTILE[0], states={3: running()}, points=30)
    renamed = [dataclasses.replace(trial, name=f"{HOSTILE[i % 5]}{i}") for i, trial in enumerate(study.trials)]
    terms = {HOSTILE[0]: renamed[0].curve.loss}
    renamed[0] = dataclasses.replace(renamed[0], curve=dataclasses.replace(renamed[0].curve, terms=terms))
    figure = draw(dataclasses.replace(study, trials=tuple(renamed)))
    for text in texts(figure.to_plotly_json()):
        bare = text.replace("<br>", "").replace("%{text}", "")
        assert "<" not in bare
        assert "%{" not in bare
        assert bare.isprintable()
        assert len(text) < 600
    if "trial" in str(figure.data[0].meta):
        assert set(figure.data[0].meta["trials"]) <= {trial.name for trial in renamed}  # data, as it is


@each_figure
def test_a_figure_of_some_trials_has_theirs_only(draw: Callable, whole: Study):
    names = {trial.name for trial in whole.trials[::7]}
    shown = set().union(*(trace.meta["trials"] for trace in results(draw(select(whole, names)))))
    assert shown
    assert shown <= names


@each_figure
def test_the_same_study_gives_the_same_figure(draw: Callable, whole: Study):
    assert draw(whole).to_json() == draw(whole).to_json()


# Each ----------------------------------------------------------------------------------------------------------------


def test_accuracy_over_dim_has_a_line_for_each_beta_and_the_best(small: Study):
    figure = figures.accuracy_over_dim(small)
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == [64, 128, 256]
    means = {}
    for beta in SMALL_GRID["loss.beta"]:
        line = named(figure, f"β {beta}")
        assert list(line.x) == [64, 256]
        for d, y, who in zip(line.x, line.y, line.customdata, strict=True):
            mine = [trial for trial in small.trials if (trial.d, trial.beta) == (d, beta)]
            assert [line.meta["trials"][i] for i in who] == [trial.name for trial in mine]
            means[d, beta] = analysis.mean_interval([trial.result("linear_accuracy") for trial in mine])
            assert y == means[d, beta].mean
    best = named(figure, "best of each d")
    assert list(best.y) == [max(means[d, beta].mean for beta in SMALL_GRID["loss.beta"]) for d in (64, 256)]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(bands) == 2
    truth = [means[64, 0.01].high, means[256, 0.01].high, means[256, 0.01].low, means[64, 0.01].low]
    assert list(bands[0].y) == truth
    assert list(named(figure, "target 80 %").y) == [0.8, 0.8]
    assert "3 trials, 95 % from" in named(figure, "β 0.01").text[0]


def test_with_one_seed_there_is_no_band_and_settings_beside_beta_have_their_own_lines(whole: Study):
    figure = figures.accuracy_over_dim(whole)
    assert not [trace for trace in figure.data if trace.fill == "toself"]
    lines = [trace for trace in results(figure) if trace.name != "best of each d"]
    assert len(lines) == 5 * 3 * 3
    assert [trace.name for trace in lines if trace.showlegend] == [f"β {beta}" for beta in synthetic.GRID["loss.beta"]]
    assert len({trace.line.color for trace in lines}) == 5
    assert all(trace.x == (64, 128, 256, 512, 1024) for trace in lines)
    assert "d 64, β 0.0025, m 2, fraction 0.25: " in lines[0].text[0]


def test_best_beta_over_dim_has_the_law(whole: Study):
    figure = figures.best_beta_over_dim(select(whole, {t.name for t in whole.trials if (t.m, t.fraction) == (4, 1.0)}))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    (points,) = results(figure)
    assert dict(zip(points.x, points.y, strict=True)) == {64: 0.04, 128: 0.02, 256: 0.01, 512: 0.005, 1024: 0.0025}
    # At the end of the sweep a better one may lie beyond.
    assert points.marker.symbol == ("circle-open", "circle", "circle", "circle", "circle-open")
    guide, fit = (trace for trace in figure.data if trace.meta is None)
    assert guide.name.startswith("β = c / d, c = 2.56")
    np.testing.assert_allclose(np.multiply(guide.x, guide.y), 2.56)
    assert fit.name == "fit, slope -1.00 (-1.00 to -1.00)"


def test_a_loss_without_beta_has_no_best_beta(tmp_path: Path):
    study = study_of(tmp_path, 4, grid={"loss.name": ["vicreg"], "model.projector_dim": [64, 256]})
    assert figures.best_beta_over_dim(study).data == ()
    assert len(results(figures.accuracy_over_dim(study))) == 1


def test_accuracy_over_training_is_the_readouts_with_running_ones_dashed(tmp_path: Path):
    states = {1: running(), 2: State(status="stopped", reason="ASHA")}
    study = study_of(tmp_path, 4, grid={"views.count": [2, 8]}, seeds=(0, 1), states=states)
    for x, field in (("minutes", "minutes"), ("views", "views"), ("epochs", "epoch")):
        figure = figures.accuracy_over_training(study, x=x)
        assert {trace.name: trace.line.dash for trace in figure.data if trace.name.startswith("m =")} == {
            "m = 2": "solid", "m = 2, running": "dash", "m = 8": "solid", "m = 8, failed or stopped": "dot",
        }  # fmt: skip
        line = named(figure, "m = 2, running")
        assert line.meta["trials"] == [study.trials[1].name]
        np.testing.assert_allclose(line.x[:-1], getattr(study.trials[1].readouts, field), rtol=1e-5)
        np.testing.assert_allclose(line.y[:-1], study.trials[1].readouts.linear_accuracy, rtol=1e-5)
        assert line.x[-1] is line.y[-1] is None
        assert figure.layout.xaxis.title.text.startswith("training (")


def test_minutes_to_the_target_are_marked_where_it_was_reached(tmp_path: Path):
    study = study_of(tmp_path, 3, grid={"views.count": [2, 4, 8]}, seeds=(0,), points=40)
    times = [analysis.time_to_target(t.readouts.minutes, t.readouts.linear_accuracy, 0.8) for t in study.trials]
    assert [time.reached for time in times] == [False, True, True]
    figure = figures.accuracy_over_training(study, 0.8)
    marks = named(figure, "minutes to the target")
    assert list(marks.x) == [time.x for time in times if time.reached]
    assert set(marks.y) == {0.8}
    assert marks.meta["trials"] == [trial.name for trial in study.trials[1:]]
    assert named(figure, "target 80 %").y == (0.8, 0.8)
    assert len(figures.accuracy_over_training(study, 0.999).data) == 4  # three lines and the target


def test_a_study_without_a_target_has_no_target_line(tmp_path: Path):
    study = study_of(tmp_path, 3, target_accuracy=None)
    for draw in (figures.accuracy_over_training, figures.accuracy_over_dim, figures.pareto):
        assert not [trace for trace in draw(study).data if "target" in trace.name]
    assert figures.fraction_map(study, show="minutes").layout.annotations[0].text == "The study has no target accuracy."


def test_pareto_has_a_point_for_each_setting_the_front_and_dim_others(whole: Study):
    figure = figures.pareto(whole)
    points = [trace for trace in results(figure) if trace.mode == "markers"]
    assert len(points) == 9
    assert sum(len(trace.x) for trace in points) == 225
    assert len({trace.marker.color for trace in points}) == len({trace.marker.symbol for trace in points}) == 3
    truth = {t.name: (t.readouts.minutes[-1], 1 - t.result("linear_accuracy")) for t in whole.trials}
    names, values = list(truth), np.array(list(truth.values()))
    front = set(np.array(names)[analysis.pareto_front(values[:, 0], values[:, 1])])
    for trace in points:
        for x, y, opacity, who, text in zip(trace.x, trace.y, trace.marker.opacity, trace.customdata, trace.text, strict=True):
            (name,) = (trace.meta["trials"][i] for i in who)
            assert (x, y) == truth[name]
            assert (opacity == 1) == (name in front)
            assert text.startswith("d ")
    line = named(figure, "front")
    assert set(line.meta["trials"]) == front
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)
    assert named(figure, "target 20 %").y == pytest.approx((0.2, 0.2))


def test_pareto_means_over_seeds_and_names_the_currency(small: Study):
    figure = figures.pareto(small, cost="cost")
    assert figure.layout.xaxis.title.text == "cost (EUR, log)"
    (points,) = (trace for trace in results(figure) if trace.mode == "markers")
    assert [len(who) for who in points.customdata] == [3] * 4
    assert set(points.x) == {0.083}
    free = dataclasses.replace(small, trials=tuple(_free(trial) for trial in small.trials))
    assert figures.pareto(free, cost="cost").layout.annotations[0].text == "No complete trial has a cost."


def _free(trial: Trial) -> Trial:
    return dataclasses.replace(trial, state=dataclasses.replace(trial.state, cost=None))


def test_trials_that_are_not_complete_are_no_results(tmp_path: Path):
    study = study_of(tmp_path, 4, grid=SMALL_GRID, seeds=(0,), states={1: running(), 2: State(status="stopped")})
    for draw in (figures.accuracy_over_dim, figures.best_beta_over_dim, figures.pareto, figures.fraction_map):
        shown = set().union(*(trace.meta["trials"] for trace in results(draw(study))))
        assert shown == {study.trials[0].name, study.trials[3].name}


def test_the_map_has_means_and_frames_the_constant_product(tmp_path: Path):
    grid = {"views.count": [2, 4, 8], "data.fraction": [1.0, 0.5, 0.25]}
    pairs = [(2, 1.0), (4, 0.5), (8, 0.25), (8, 1.0)]
    study = study_of(tmp_path, 9, grid=grid, seeds=(0,))
    study = select(study, {trial.name for trial in study.trials if (trial.m, trial.fraction) in pairs})
    figure = figures.fraction_map(study)
    (heat,) = figure.data
    assert (heat.x, heat.y) == (("0.25", "0.5", "1"), ("2", "4", "8"))
    value = {(trial.m, trial.fraction): trial.result("linear_accuracy") for trial in study.trials}
    for i, m in enumerate([2, 4, 8]):
        for j, fraction in enumerate([0.25, 0.5, 1.0]):
            if (m, fraction) in pairs:
                assert heat.z[i][j] == pytest.approx(value[m, fraction], rel=1e-5)
                assert heat.text[i][j] == f"{100 * value[m, fraction]:.1f} %"
            else:
                assert heat.z[i][j] is None
                assert heat.customdata[i][j] == []
    frames = figure.layout.shapes
    assert [frame.name for frame in frames] == ["m x fraction = 2"] * 3
    centres = [((frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2) for frame in frames]
    assert centres == [(heat.x.index(x), heat.y.index(y)) for x, y in [("1", "2"), ("0.5", "4"), ("0.25", "8")]]


def test_the_map_of_minutes_says_where_the_target_was_not_reached(tmp_path: Path):
    study = study_of(tmp_path, 3, grid={"views.count": [2, 4, 8]}, seeds=(0,), points=40)
    heat = figures.fraction_map(study, 0.8, show="minutes").data[0]
    times = [analysis.time_to_target(t.readouts.minutes, t.readouts.linear_accuracy, 0.8).x for t in study.trials]
    assert [row[0] for row in heat.z] == [None, pytest.approx(times[1], rel=1e-5), pytest.approx(times[2], rel=1e-5)]
    assert heat.text[0][0] == f"> {times[0]:.3g} min"
    assert heat.colorbar.title.text == "minutes to 80 %"


def test_loss_and_its_terms_have_a_panel_each(whole: Study):
    figure = figures.loss_terms(select(whole, {whole.trials[0].name}))
    titles = {key: figure.layout[key].title.text for key in ("yaxis", "yaxis2", "yaxis3")}
    assert titles == {"yaxis": "off diagonal (no unit)", "yaxis2": "diagonal (no unit)", "yaxis3": "loss (no unit)"}
    assert figure.layout.yaxis3.type == "log"
    domains = [figure.layout[key].domain for key in titles]
    assert domains[0][0] == 0
    assert all(low[1] < high[0] for low, high in itertools.pairwise(domains))
    loss = next(trace for trace in figure.data if trace.yaxis == "y3")
    np.testing.assert_allclose(loss.y[:-1], whole.trials[0].curve.loss, rtol=1e-5)
    assert [trace.showlegend for trace in figure.data] == [True, False, False]


def test_a_loss_that_may_be_negative_is_not_on_a_logarithmic_axis(whole: Study):
    trial = whole.trials[0]
    negative = dataclasses.replace(trial, curve=dataclasses.replace(trial.curve, loss=trial.curve.loss - 50))
    assert figures.loss_terms(dataclasses.replace(whole, trials=(negative,))).layout.yaxis3.type is None


def test_throughput_has_images_and_waiting(small: Study):
    figure = figures.throughput(small)
    assert figure.layout.yaxis2.title.text == "throughput (images/s)"
    assert all(y is None or y == pytest.approx(0.1) for t in figure.data if t.yaxis == "y" for y in t.y)
    assert all(y is None or y == pytest.approx(128 / 0.3, rel=1e-5) for t in figure.data if t.yaxis == "y2" for y in t.y)


def test_alpha_has_its_ideal(small: Study):
    figure = figures.alpha_over_epochs(small)
    ideal = named(figure, "alpha = 1")
    assert (ideal.yaxis, ideal.y) == ("y2", (1.0, 1.0))
    assert {y for t in results(figure) if t.yaxis == "y2" for y in t.y} == {1.2, None}


def test_parallel_coordinates_have_the_swept_keys_first_and_the_objective_last(tmp_path: Path):
    grid = {"model.projector_dim": [64, 1024], "loss.form": ["mean", "pairs", None], "optim.lr": [0.001, 0.002]}
    study = study_of(tmp_path, 12, grid=grid, seeds=(0,))
    figure = figures.parallel_coordinates(study)
    labels = ["d<br>(log2)", "loss.form", "optim.lr", "training<br>(minutes)", "linear accuracy<br>(% of test images)"]
    assert list(figure.layout.xaxis.ticktext) == labels
    ticks = {place: [note.text for note in figure.layout.annotations if note.x == place] for place in range(5)}
    assert ticks[0] == ["64", "1024"]
    assert ticks[1] == ["mean", "pairs", "null"]
    lines = {}
    for trace in figure.data:
        for i in range(0, len(trace.x), 6):
            assert trace.x[i : i + 6] == (0, 1, 2, 3, 4, None)
            lines[trace.meta["trials"][trace.customdata[i]]] = trace.y[i : i + 5]
    assert lines.keys() == {trial.name for trial in study.trials}
    result = np.array([trial.result("linear_accuracy") for trial in study.trials])
    for trial, value in zip(study.trials, (result - result.min()) / np.ptp(result), strict=True):
        d, form, lr, _, objective = lines[trial.name]
        assert d == {64: 0, 1024: 1}[trial.settings["model.projector_dim"]]
        assert form == {"mean": 0, "pairs": 0.5, None: 1}[trial.settings["loss.form"]]
        assert lr == {0.001: 0, 0.002: 1}[trial.settings["optim.lr"]]
        assert objective == pytest.approx(value, abs=1e-4)


def test_importance_is_the_analysis(whole: Study):
    (trace,) = figures.importance_bars(whole).data
    value = [trial.result("linear_accuracy") for trial in whole.trials]
    truth = analysis.importance({key: [t.settings[key] for t in whole.trials] for key in whole.head.swept}, value)
    shown = dict(zip(trace.y, trace.x, strict=True))
    assert shown == {drawing.SHORT[key]: share for key, share in truth.share.items()} | {"seeds and combinations": truth.residual}
    assert list(trace.x[1:]) == sorted(trace.x[1:])


def test_other_objectives_are_shown_as_what_they_are(tmp_path: Path):
    study = study_of(tmp_path, 6, grid=SMALL_GRID, objective="rankme", mode="max")
    figure = figures.accuracy_over_dim(study)
    assert figure.layout.yaxis.title.text == "RankMe (dimensions)"
    assert figure.layout.yaxis.tickformat is None
    assert not [trace for trace in figure.data if "target" in trace.name]
    knn = study_of(tmp_path / "knn", 6, grid=SMALL_GRID, objective="knn_accuracy")
    assert figures.accuracy_over_training(knn).layout.yaxis.title.text == "kNN accuracy (% of test images)"


# Drawing -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=700), st.integers(4, 200))
def test_a_thinned_curve_keeps_ends_and_extremes(values: list[float], most: int):
    y = np.array(values)
    x, kept = drawing.thinned(np.arange(len(y)), y, most)
    assert len(x) <= most
    assert (x[0], x[-1]) == (0, len(y) - 1)
    np.testing.assert_array_equal(kept, y[x])
    if np.isfinite(y).any():
        assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(y), np.nanmax(y))


def test_a_panel_has_a_bounded_number_of_points(tmp_path: Path):
    study = study_of(tmp_path, 3, points=900)
    assert all(len(trace.x) <= 3 * 201 for trace in figures.loss_terms(study).data)
    many = dataclasses.replace(study, trials=study.trials * 700)
    panel = [trace for trace in figures.throughput(many).data if trace.yaxis == "y"]
    assert sum(len(trace.x) for trace in panel) <= 2100 * 21


def test_colours_can_be_told_apart_and_are_enough():
    for count in (1, 3, 8, 9, 50):
        colours = [drawing.colour(position, count) for position in range(count)]
        assert len(set(colours)) == count
        assert all(re.fullmatch("#[0-9A-F]{6}", each) for each in colours)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64, "64"),
        (0.04, "0.04"),
        (1.0, "1"),
        (2.8 / 3, "0.9333"),
        (1e6, "1e+06"),
        (0, "0"),
        (True, "true"),
        (None, "null"),
        (math.nan, "NaN"),
        ("a b", "a b"),
        ([1, 2], "[1, 2]"),
        (10**400, str(10**400)[:119] + "…"),
    ],
)
def test_values_of_settings_are_short(value: Any, text: str):
    assert drawing.shown_value(value) == text


def test_levels_are_sorted_and_different():
    assert drawing.levels([1024, 64.0, 64, "b", None, "a", True]) == [64, 1024, "a", "b", None, True]
