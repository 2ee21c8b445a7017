"""What Optuna proposes, from trials whose results are made by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import synthetic

from ssl_ray.errors import UsageError
from ssl_ray.study.schema import Head, Planned, State
from ssl_ray.study.search import Proposals

SWEEP = {"optim.lr": {"log_uniform": [1e-5, 1.0]}, "views.count": {"choice": [2, 4, 8]}}
DONE = State(status="complete")


def head(sweep: dict, *, seeds: tuple[int, ...] = (0,)) -> Head:
    return synthetic.head(0, seeds=seeds, search={"sweep": sweep, "draws": 40, "readouts": 5})


class Imagined:
    """Trials that end at once, with the score that `score` gives to their settings and seed."""

    def __init__(self, made: Head, score: Callable[[dict, int], float]):
        self.head, self.score, self.proposals = made, score, Proposals(made)
        self.trials: tuple[Planned, ...] = ()
        self.reached: dict[str, list[tuple[float, float]]] = {}
        self.states: dict[str, State] = {}

    def next(self, state: State = DONE) -> dict | None:
        settings = self.proposals.cell(self.trials, self.states, self.reached)
        for seed in self.head.seeds if settings is not None else ():
            name = f"{len(self.trials):04d}-s{seed}"
            self.trials += (Planned(name=name, settings=settings, seed=seed, hash=name),)
            self.states[name], self.reached[name] = state, [(1000.0, self.score(settings, seed))]
        return settings


def good(settings: dict, seed: int) -> float:
    """Best at a learning rate of .003 and four views."""
    return -abs(math.log10(settings["optim.lr"] / 3e-3)) - (settings["views.count"] != 4) + 0.01 * seed


def test_later_proposals_are_better_than_random_ones():
    trials = Imagined(head(SWEEP, seeds=(0, 1)), good)
    scores = [good(trials.next(), 0) for _ in range(40)]
    assert np.mean(scores[-10:]) > np.mean(scores[:10]) + 0.5
    assert len({str(trial.settings) for trial in trials.trials}) == 40


def test_a_study_that_goes_on_knows_what_there_was():
    trials = Imagined(head(SWEEP), good)
    for _ in range(30):
        trials.next()
    trials.proposals = Proposals(trials.head)
    assert (
        np.mean([good(trials.next(), 0) for _ in range(8)])
        > np.mean([good(trial.settings, 0) for trial in trials.trials[:10]]) + 0.5
    )


def test_what_was_planned_and_has_not_ended_is_not_proposed_again():
    trials = Imagined(head({"views.count": {"choice": [2, 4, 8]}}), lambda settings, seed: 0.0)
    found = [trials.next(State(status="running")), trials.next(State(status="queued"))]
    trials.proposals = Proposals(trials.head)
    found.append(trials.next())
    assert sorted(cell["views.count"] for cell in found) == [2, 4, 8]
    assert trials.next() is None  # all was tried


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_trials_that_ended_early_or_failed_do_not_stop_it(status: str):
    trials = Imagined(head(SWEEP), lambda settings, seed: math.nan if status == "failed" else good(settings, seed))
    for _ in range(15):
        assert trials.next(State(status=status)) is not None


def test_numbers_have_four_digits_and_stay_within_their_bounds():
    trials = Imagined(
        head({"optim.lr": {"log_uniform": [1.23456e-3, 1.23457e-3]}, "train.steps": {"int": [1, 10**6]}}), lambda *_: 0
    )
    for _ in range(20):
        assert 1.23456e-3 <= trials.next()["optim.lr"] <= 1.23457e-3


def test_values_that_cannot_be_chosen_from_are_named():
    with pytest.raises(UsageError, match=r"sweep\.train\.workers"):
        Proposals(head({"train.workers": {"choice": [{"min": 1, "max": 2}]}}))
