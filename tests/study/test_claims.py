"""The verdicts on studies whose truth is known: `synthetic.accuracy` says what each arm reaches."""

import itertools
import math

import pytest
import synthetic

from ssl_ray.study import claims, results

D = [16, 64, 256]
BETA = [2.8 / d * factor for d, factor in itertools.product(D, (0.25, 1.0))]


def study(folder, *, grid, points=200, seeds=(0, 1, 2, 3), trials=None, law=synthetic.accuracy, monkeypatch):
    monkeypatch.setattr(synthetic, "accuracy", law)
    count = math.prod(map(len, grid.values())) * len(seeds) if trials is None else trials
    synthetic.write(str(folder), count, points, grid=grid, seeds=seeds)
    return results.read_study(str(folder))


def verdicts(found, part):
    return {claim.text: claim.verdict for claim in found if claim.part == part}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    def judge(**law):
        def accuracy(minutes, *, d, beta, m, fraction, seed):
            noise = 0.001 * math.sin(97 * seed + d + 10 * m)
            best = 0.8 - law.get("beta", 0.02) * abs(math.log(beta * d / 2.8)) + noise
            best += law.get("d", 0.0) * math.log2(d / 256) - law.get("fraction", 0.0) * (1 - fraction) * 2 / m
            return best - 0.5 * 2.0 ** (-minutes / law.get("half", {2: 2.0, 4: 1.0, 8: 1.0})[m])

        how = {"monkeypatch": monkeypatch, "law": accuracy}
        projector = study(tmp_path / "projector", grid={"model.projector_dim": D, "loss.beta": BETA}, points=2000, **how)
        views = study(tmp_path / "views", grid={"views.count": [2, 4, 8]}, points=200, **how)
        fraction = study(
            tmp_path / "fraction", grid={"views.count": [2, 4, 8], "data.fraction": [1.0, 0.5, 0.25]}, points=2000, **how
        )
        recipe = study(tmp_path / "recipe", grid={"views.count": [2, 4]}, points=200, **how)
        return claims.claims(projector, views, fraction, recipe)

    return judge


def test_what_is_so_is_shown(judged):
    found = judged(fraction=0.05)
    assert set(verdicts(found, "a").values()) == {"shown"}
    assert len(verdicts(found, "a")) == 4
    assert set(verdicts(found, "b").values()) == {"shown"}
    (slope,) = [claim.effect for claim in found if claim.part == "b"]
    assert slope.mean == pytest.approx(1.0)
    fewer = [claim for claim in found if claim.part == "c" and "m = 4" in claim.text and "minutes" in claim.text]
    assert fewer[0].verdict == "shown"
    assert fewer[0].effect.mean == pytest.approx(2.0, rel=0.2)  # its error halves in half the time, but for noise
    (again,) = (claim for claim in found if claim.part == "e" and "minutes" in claim.text)
    assert (again.text, again.verdict, again.effect.n) == (fewer[0].text, "shown", 4)
    of_data = verdicts(found, "d")
    assert of_data["with 50% of the images, m = 4 is better than m = 2"] == "shown"


def test_what_is_the_other_way_round_is_opposite(judged):
    found = judged(d=0.02, fraction=0.2, half={2: 1.0, 4: 2.0, 8: 2.0})
    of_projector = verdicts(found, "a")
    assert of_projector["with the best beta of each, d = 16 is as good as d = 256"] == "opposite"
    assert of_projector["d = 16 needs a larger beta than the best one of d = 256"] == "shown"
    assert verdicts(found, "d")["m = 4 with 50% of the images is as good as m = 2 with 100%"] == "opposite"
    assert "shown" not in (verdicts(found, "c") | verdicts(found, "e")).values()


def test_recipes_are_compared_with_the_baseline_of_the_same_crops_too(tmp_path, monkeypatch):
    def accuracy(minutes, *, d, beta, m, fraction, seed):
        return 0.8 - 0.5 * 2.0 ** (-minutes / (4 / m))

    how = {"monkeypatch": monkeypatch, "law": accuracy}
    empty = study(tmp_path / "empty", grid={"views.count": [2]}, **how)
    recipe = study(tmp_path / "recipe", grid={"views.count": [2, 4], "views.brightness": [0.4, 0.6]}, points=200, **how)
    found = verdicts([claim for claim in claims.claims(empty, empty, empty, recipe) if "minutes" in claim.text], "e")
    few, more = "m = 2, colours = 0.4", "m = 2, colours = 0.6"
    assert {text.replace(" needs fewer minutes than ", " / "): verdict for text, verdict in found.items()} == {
        f"{more} / {few}": "not shown",
        f"m = 4, colours = 0.4 / {few}": "shown",
        f"m = 4, colours = 0.6 / {few}": "shown",
        f"m = 4, colours = 0.4 / {more}": "shown",
        f"m = 4, colours = 0.6 / {more}": "shown",
    }


def test_few_seeds_show_nothing(tmp_path, monkeypatch):
    how = {"monkeypatch": monkeypatch, "seeds": (0,)}
    grids = (
        {"model.projector_dim": D, "loss.beta": BETA},
        {"views.count": [2, 4]},
        {"views.count": [2, 4], "data.fraction": [1.0, 0.5]},
        {"views.count": [2, 4]},
    )
    made = [study(tmp_path / str(i), grid=grid, **how) for i, grid in enumerate(grids)]
    found = claims.claims(*made)
    assert {claim.verdict for claim in found if claim.part != "b"} == {"not shown"}
    assert all(row["low"] is None for row in claims.as_rows(found) if "(b)" not in row["claim"])
