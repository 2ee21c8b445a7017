"""What a study is to do: cells, draws and configurations from its text."""

import math
from pathlib import Path

import pytest

from ssl_ray import config
from ssl_ray.cli import STUDIES, read_config, read_recipe
from ssl_ray.errors import UsageError
from ssl_ray.study import spec
from ssl_ray.study.schema import trial_config

SWEEP = {"model.projector_dim": {"grid": [16, 64]}}


def parsed(**values) -> spec.Spec:
    return spec.parse({"sweep": SWEEP} | values, source="mine.yaml")


def test_each_combination_is_a_cell_in_the_order_of_the_text():
    made = parsed(
        sweep=SWEEP | {"loss.beta": {"grid": [0.1, 0.2, 0.4]}},
        cells=[{"views.count": 2, "data.fraction": 1.0}, {"views.count": 4, "data.fraction": 0.5}],
    )
    assert spec.cells(made) == [
        {"views.count": m, "data.fraction": fraction, "model.projector_dim": d, "loss.beta": beta}
        for m, fraction in [(2, 1.0), (4, 0.5)]
        for d in (16, 64)
        for beta in (0.1, 0.2, 0.4)
    ]


def test_a_combination_that_comes_twice_is_run_once():
    assert spec.cells(parsed(sweep={"optim.lr": {"grid": [0.1, 0.1]}})) == [{"optim.lr": 0.1}]


def test_what_is_drawn_stays_the_same_and_within_its_bounds():
    sweep = {
        "optim.lr": {"log_uniform": [1e-4, 1e-1]},
        "views.count": {"choice": [2, 4, 8]},
        "optim.warmup_epochs": {"uniform": [0, 2]},
        "train.epochs": {"int": [1, 3]},
    }
    made = parsed(sweep=sweep, draws=400)
    found = spec.cells(made)
    assert found == spec.cells(made)
    assert len(found) == 400
    lrs = [cell["optim.lr"] for cell in found]
    assert all(1e-4 <= lr <= 1e-1 for lr in lrs)
    # Uniform in the logarithm: a third in each decade, of which the deviation is 9.4.
    for decade in (-4, -3, -2):
        assert abs(sum(decade <= math.log10(lr) < decade + 1 for lr in lrs) - 400 / 3) < 5 * 9.4
    assert {cell["views.count"] for cell in found} == {2, 4, 8}
    assert {cell["train.epochs"] for cell in found} == {1, 2, 3}
    assert all(0 <= cell["optim.warmup_epochs"] <= 2 for cell in found)


def test_more_draws_keep_those_that_were_there():
    sweep = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}
    assert spec.cells(parsed(sweep=sweep, draws=9))[:4] == spec.cells(parsed(sweep=sweep, draws=4))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"sweeps": {}}, "sweeps: no such key of a study (mine.yaml)"),
        ({"sweep": {}}, "sweep: got nothing"),
        ({"sweep": {"optim.lr": {"grid": []}}}, "sweep.optim.lr"),
        ({"sweep": {"optim.lr": {"logarithmic": [1, 2]}}}, "one of grid, choice, uniform, log_uniform, int"),
        ({"sweep": {"optim.lr": {"log_uniform": [0, 1]}}}, "sweep.optim.lr.log_uniform: got [0, 1]"),
        ({"sweep": {"optim.lr": {"uniform": [2, 1]}}}, "two increasing numbers"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], expected different numbers"),
        ({"budget": {"views": -1}}, "budget"),
        ({"budget": {"views": 1, "minutes": 1}}, "budget"),
        ({"draws": 0}, "draws"),
        ({"readouts": 0}, "readouts"),
        ({"objective": "f1"}, "mine.yaml"),
        ({"asha": {"grace": 2}}, "asha.grace"),
        ({"cells": [{"model.projector_dim": 4}]}, "other keys than those of sweep"),
        ({"search": "tpe"}, "mine.yaml"),
        ({"search": "optuna", "budget": {"views": 1e5}}, "keys that are drawn"),
        ({"search": "optuna", "sweep": {"optim.lr": {"uniform": [0, 1]}}, "budget": {"minutes": 5}}, "a budget in views"),
        ({"search": "optuna", "sweep": {"train.threads": {"int": [1, 2]}}, "budget": {"views": 1e5}}, "train.threads"),
        ({"prices": {"spot": -1}}, "prices"),
        ({"sweep": {"seed": {"grid": [1, 2]}}}, "seed follows from the study's `seeds`"),
        ({"keys": {"run": "here"}}, "run follows from"),
        ({"cells": [{"evaluate.every_steps": 5}]}, "evaluate.every_steps follows from the study's `readouts`"),
        (
            {"sweep": {"train.steps": {"grid": [10, 20]}}, "budget": {"views": 1e6}},
            "train.steps follows from the study's `budget`",
        ),
        ({"budget": {"hours": 1}}, "budget"),
        ({"budget": {}}, "budget"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"target_accuracy": 90}, "target_accuracy"),
        ({"target_accuracy": math.nan}, "target_accuracy"),
        ({"sweep": {"optim.lr": {"uniform": [0, math.inf]}}}, "two increasing numbers"),
        ({"sweep": {"train.epochs": {"int": [1, 10**30]}}}, "two increasing numbers"),
    ],
)
def test_what_makes_no_study_is_refused_by_name(values, part):
    with pytest.raises(UsageError) as refused:
        parsed(**values)
    assert part in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def test_too_many_trials_are_refused():
    sweep = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}
    with pytest.raises(UsageError, match=r"200,000 trials, expected 100,000 at most"):
        spec.cells(parsed(sweep=sweep, draws=200_000))


def test_a_setting_that_is_no_key_is_refused_with_what_was_meant():
    with pytest.raises(UsageError, match=r"views\.cuont: no such key .* Did you mean views\.count"):
        spec.configured(config.to_dict(config.Config()), {"views.cuont": 2}, seed=0, source="mine.yaml")


def test_settings_of_a_budget_say_how_many_steps_and_when_they_are_read_out():
    own = spec.budgeted({"views.count": 4}, steps=95, readouts=10)
    made = spec.configured(config.to_dict(config.Config()), own, seed=3, source="mine.yaml")
    assert (made.seed, made.views.count, made.train.steps, made.evaluate.every_steps) == (3, 4, 95, 10)
    assert trial_config(config.to_dict(config.Config()), own, seed=3)["train.steps"] == 95


def test_names_tell_the_setting_and_are_safe():
    assert spec.trial_name(3, {"model.projector_dim": 64, "loss.beta": 0.04}, 1) == "0003-d64-beta0.04-s1"
    assert spec.trial_name(0, {"views.count": 2, "data.fraction": 0.5}, 0) == "0000-m2-f0.5-s0"
    assert spec.trial_name(7, {"model.encoder": "../../etc"}, 0) == "0007-s0"
    assert spec.trial_name(7, {"optim.lr": 1e-05}, 0) == "0007-lr1e-05-s0"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("small", [False, True])
def test_the_studies_that_come_along_are_studies(path: Path, small: bool):
    values = read_recipe(path.stem, folder=STUDIES)
    part = values.pop("small")
    values |= part if small else {}
    for study in values.get("parts", {"": values}).values():
        made = spec.parse(study, source=path.stem)
        base = config.to_dict(read_config(made.recipe, spec.overrides(made)))
        for settings in spec.cells(made):
            for seed in made.seeds:
                spec.configured(base, settings, seed=seed, source=path.stem)
        assert len(spec.cells(made)) * len(made.seeds) >= (12 if small else 9)
