import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ssl_ray.study import analysis
from ssl_ray.study.analysis import (
    Reached,
    area_over_time,
    best_beta,
    bootstrap_interval,
    fit_power_law,
    goodness,
    groups,
    importance,
    mean_interval,
    mean_time,
    pareto_front,
    time_to_target,
    views_by_fraction,
)

NAN = math.nan
# The best beta found for each d in arXiv 2312.10725.
PAPER_D = [64, 128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 8192]
PAPER_BETA = [0.04, 0.04, 0.02, 0.01, 0.002, 0.002, 0.001, 0.001, 0.0008, 0.001, 0.0004, 0.0008]


# Over seeds ----------------------------------------------------------------------------------------------------------


def test_trials_that_differ_in_the_seed_only_are_a_group():
    assert groups([{"a": 1, "b": 2}, {"a": 1}, {"b": 2, "a": 1}, {"a": 1.5}]) == [[0, 2], [1], [3]]
    assert groups([]) == []


@pytest.mark.parametrize(("mode", "best"), [("max", 3.0), ("min", 0.5), ("near", 1.25)])
def test_the_best_is_the_largest_goodness(mode, best: float):
    values = np.array([3.0, NAN, 0.5, 1.25, 0.7])
    assert values[np.nanargmax(goodness(values, mode, 1.0))] == best


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_of_a_mean_is_students(confidence: float):
    values = [0.81, 0.835, 0.82, 0.84, 0.811]
    made = mean_interval([*values, NAN], confidence=confidence)
    low, high = scipy.stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    np.testing.assert_allclose([made.mean, made.low, made.high], [np.mean(values), low, high])
    assert made.n == 5


def test_a_mean_of_one_seed_has_no_bounds_and_of_none_is_nan():
    cut = mean_interval([0.99, 0.97], within=(0, 1))  # 0.98 +- 12.7 x 0.01
    assert (cut.low, cut.mean, cut.high) == (pytest.approx(0.98 - 0.127062), pytest.approx(0.98), 1.0)
    one = mean_interval([NAN, 0.8])
    assert (one.mean, one.n) == (0.8, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval([NAN])
    assert math.isnan(none.mean)
    assert none.n == mean_interval([]).n == 0


def test_equal_seeds_have_an_interval_of_no_width():
    made = mean_interval([0.5, 0.5, 0.5])
    assert made.low == made.mean == made.high == 0.5


def test_the_bootstrap_is_as_wide_as_the_binomial_says():
    made = bootstrap_interval([0.8], [500])
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 500, 0.8) / 500
    np.testing.assert_allclose([made.mean, made.low, made.high], [0.8, low, high], atol=0.003)
    three = bootstrap_interval([0.8, 0.82, 0.78, NAN], [500, 500, 500, 500])
    assert three.n == 3
    np.testing.assert_allclose(three.high - three.low, (made.high - made.low) / math.sqrt(3), rtol=0.05)
    assert bootstrap_interval([0.8, 0.82], [500, 300]) == bootstrap_interval([0.8, 0.82], [500, 300])


def test_the_bootstrap_has_an_outcome_at_the_ends():
    sure = bootstrap_interval([1.0, 0.0], [10, 10])
    assert (sure.mean, sure.low, sure.high) == (0.5, 0.5, 0.5)
    for accuracies, counts in ([], []), ([NAN], [5]), ([0.5], [NAN]), ([0.5], [0]):
        assert bootstrap_interval(accuracies, counts).n == 0
        assert math.isnan(bootstrap_interval(accuracies, counts).mean)


# Projector and beta --------------------------------------------------------------------------------------------------


def test_the_best_beta_of_a_d_is_the_best_mean_over_seeds():
    trials = [  # d, beta, value
        (64, 0.04, 0.80), (64, 0.04, 0.82), (64, 0.02, 0.90), (64, 0.02, 0.60), (64, 0.01, 0.5),
        (256, 0.01, 0.70), (256, 0.02, NAN), (256, 0.04, 0.69),
        (1024, 0.01, NAN),
        (128, NAN, 0.9),
    ]  # fmt: skip
    small, large = best_beta(*zip(*trials, strict=True))
    assert (small.d, small.beta, small.value.n, small.at_edge) == (64, 0.04, 2, True)
    assert small.value.mean == pytest.approx(0.81)
    assert (large.d, large.beta, large.at_edge) == (256, 0.01, True)
    assert math.isnan(large.value.low)


def test_the_best_beta_inside_the_sweep_is_not_at_its_edge():
    (made,) = best_beta([64] * 3, [0.01, 0.02, 0.04], [0.1, 0.3, 0.2])
    assert (made.beta, made.at_edge) == (0.02, False)


def test_of_equally_good_betas_the_smallest_is_taken():
    assert best_beta([64] * 3, [0.04, 0.01, 0.02], [0.8, 0.8, 0.7])[0].beta == 0.01


def test_best_beta_follows_the_mode():
    d, beta, value = [64] * 3, [0.01, 0.02, 0.04], [0.7, 1.1, 1.6]
    assert best_beta(d, beta, value, mode="min")[0].beta == 0.01
    assert best_beta(d, beta, value, mode="near", target=1.0)[0].beta == 0.02
    assert best_beta([], [], []) == []


def test_the_fit_is_that_of_scipy():
    law = fit_power_law(PAPER_D, PAPER_BETA)
    truth = scipy.stats.linregress(np.log(PAPER_D), np.log(PAPER_BETA))
    half = scipy.stats.t.ppf(0.975, len(PAPER_D) - 2) * truth.stderr
    np.testing.assert_allclose([law.slope.mean, law.intercept], [truth.slope, truth.intercept])
    np.testing.assert_allclose([law.slope.low, law.slope.high], [truth.slope - half, truth.slope + half])
    np.testing.assert_allclose(law(np.array([100.0])), math.exp(truth.intercept) * 100**truth.slope)
    assert law.slope.mean == pytest.approx(-1.07, abs=0.005)  # as was read off the paper's points
    assert law.c.mean == pytest.approx(scipy.stats.gmean(np.multiply(PAPER_D, PAPER_BETA)))
    assert law.c.low < 2.8 < law.c.high


def test_an_exact_law_is_found_without_doubt():
    d = np.array([64, 256, 1024, 8192])
    law = fit_power_law(d, 2.8 / d)
    np.testing.assert_allclose([law.slope.mean, law.slope.low, law.slope.high], -1, atol=1e-6)
    np.testing.assert_allclose([law.c.mean, law.c.low, law.c.high], 2.8)


def test_few_points_have_a_slope_without_bounds_or_none():
    two = fit_power_law([64, 256], [0.04, 0.01])
    assert two.slope.mean == pytest.approx(-1)
    assert math.isnan(two.slope.low)
    one = fit_power_law([64, 64], [0.04, 0.02])
    assert math.isnan(one.slope.mean)
    assert one.c.mean == pytest.approx(64 * math.sqrt(0.04 * 0.02))
    none = fit_power_law([64, NAN, -1, 5], [NAN, 0.1, 0.1, 0.0])
    assert none.c.n == fit_power_law([], []).c.n == 0
    assert math.isnan(none.c.mean)


# Time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "truth"),
    [
        ([0.1, 0.5, 0.9, 0.95], Reached(3.5, True)),  # between minutes 2 and 4
        ([0.1, 0.5, 0.8, 0.95], Reached(4.0, True)),
        ([0.8, 0.5, 0.8, 0.95], Reached(0.0, True)),
        ([0.1, 0.9, 0.2, 0.95], Reached(1.75, True)),  # it fell later
        ([0.1, NAN, 0.9, 0.95], Reached(3.5, True)),
        ([0.1, 0.5, 0.7, 0.79], Reached(6.0, False)),
        ([0.1, 0.5, 0.7, NAN], Reached(4.0, False)),
        ([0.8, 0.8, 0.8, 0.8], Reached(0.0, True)),
    ],
)
def test_minutes_to_a_target_are_read_between_readouts(accuracy: list[float], truth: Reached):
    made = time_to_target([0, 2, 4, 6], accuracy, 0.8)
    assert made.reached == truth.reached
    assert made.x == pytest.approx(truth.x)


def test_without_readouts_nothing_is_known_of_the_time():
    for x, accuracy in ([], []), ([NAN], [0.9]), ([1.0], [NAN]):
        made = time_to_target(x, accuracy, 0.8)
        assert not made.reached
        assert math.isnan(made.x)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_at_the_time_of_the_target_the_accuracy_is_the_target(accuracy: list[float], target: float):
    x = np.arange(len(accuracy)) * 1.5
    made = time_to_target(x, accuracy, target)
    assert made.reached == (max(accuracy) >= target)
    if made.reached and made.x > 0:
        assert np.interp(made.x, x, accuracy) == pytest.approx(target)


def test_a_mean_time_says_who_did_not_arrive():
    sure = mean_time([Reached(2, True), Reached(4, True)])
    assert (sure.time.mean, sure.censored) == (3, 0)
    assert sure.time.low < 3
    bound = mean_time([Reached(2, True), Reached(10, False), Reached(NAN, False)])
    assert (bound.time.mean, bound.time.n, bound.censored) == (6, 2, 1)
    assert math.isnan(bound.time.high)
    assert mean_time([]).time.n == 0


def test_the_area_is_the_trapezoids_by_their_width():
    x, accuracy = [0.0, 1.0, 3.0, 7.0], [0.2, 0.5, 0.7, 0.8]
    assert area_over_time(x, accuracy) == pytest.approx(scipy.integrate.trapezoid(accuracy, x) / 7)
    fine = np.linspace(0, 5, 100_001)
    assert area_over_time(x, accuracy, horizon=5) == pytest.approx(np.interp(fine, x, accuracy).mean(), abs=1e-5)
    held = (scipy.integrate.trapezoid(accuracy, x) + 3 * 0.8) / 10
    assert area_over_time([*x, 8.0], [*accuracy, NAN], horizon=10) == pytest.approx(held)


def test_an_area_has_an_outcome_for_few_readouts():
    assert (
        area_over_time([2.0], [0.5]) == area_over_time([2.0], [0.5], horizon=9) == area_over_time([2.0], [0.5], horizon=2) == 0.5
    )
    assert math.isnan(area_over_time([2.0], [0.5], horizon=1))
    assert math.isnan(area_over_time([], []))


# Trade-offs ----------------------------------------------------------------------------------------------------------


def test_the_front_of_a_hand_made_case():
    cost = [1, 2, 2, 3, 4, 4, 5, NAN, 0]
    error = [9, 5, 6, 5, 1, 1, 1, 0, NAN]
    assert np.flatnonzero(pareto_front(cost, error)).tolist() == [0, 1, 4, 5]
    assert pareto_front([], []).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_nothing_is_better_than_the_front(points: list[tuple[int, int]]):
    truth = [not any(a <= c and b <= e and (a, b) != (c, e) for a, b in points) for c, e in points]
    assert pareto_front([c for c, _ in points], [e for _, e in points]).tolist() == truth


def test_views_by_fraction_has_means_gaps_and_the_constant_product():
    m = [2, 2, 4, 4, 8, 8, 2]
    fraction = [1.0, 1.0, 0.5, 1.0, 0.25, 0.5, 0.5]
    value = [0.8, 0.9, 0.84, 0.9, 0.82, NAN, 0.7]
    made = views_by_fraction(m, fraction, value)
    assert made.m.tolist() == [2, 4, 8]
    assert made.fraction.tolist() == [0.25, 0.5, 1.0]
    np.testing.assert_allclose(made.mean, [[NAN, 0.7, 0.85], [NAN, 0.84, 0.9], [0.82, NAN, NAN]])
    assert made.n.tolist() == [[0, 1, 2], [0, 1, 1], [1, 0, 0]]
    assert made.product == 2
    assert np.argwhere(made.on_product).tolist() == [[0, 2], [1, 1], [2, 0]]
    assert np.isfinite(made.low).tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert np.argwhere(views_by_fraction(m, fraction, value, product=4).on_product).tolist() == [[1, 2], [2, 1]]


def test_fractions_that_are_not_exact_meet_the_product():
    made = views_by_fraction([2, 6], [0.3, 0.1], [0.5, 0.6])
    assert made.on_product.tolist() == [[False, True], [True, False]]


def test_no_trials_make_an_empty_table():
    made = views_by_fraction([], [], [])
    assert made.mean.shape == made.on_product.shape == (0, 0)
    assert math.isnan(made.product)


# Importance ----------------------------------------------------------------------------------------------------------


def test_of_one_key_it_is_the_share_between_groups_as_scipy_has_it():
    rng = np.random.default_rng(0)
    levels = np.repeat([0, 1, 2], [5, 3, 7])
    value = levels * 0.3 + rng.normal(size=15)
    made = importance({"a": levels.tolist()}, value)
    f = scipy.stats.f_oneway(*(value[levels == level] for level in range(3))).statistic * 2 / 12
    assert made.share["a"] == pytest.approx(f / (1 + f))
    assert made.residual == pytest.approx(1 - made.share["a"])


def test_in_a_full_grid_of_effects_that_add_up_it_is_their_variances():
    a, b, c = {64: 0.0, 256: 1.0, 1024: 5.0}, {"x": 0.0, "y": 2.0}, {None: 0.0, True: 0.0}
    cells = list(itertools.product(a, b, c, range(3)))
    value = np.array([a[i] + b[j] + c[k] for i, j, k, _ in cells])
    made = importance(
        {"a": [cell[0] for cell in cells], "b": [cell[1] for cell in cells], "c": [cell[2] for cell in cells]}, value
    )
    total = np.var(list(a.values())) + np.var(list(b.values()))
    truth = {"a": np.var(list(a.values())) / total, "b": np.var(list(b.values())) / total, "c": 0.0}
    assert made.share == pytest.approx(truth, abs=1e-12)
    assert made.residual == pytest.approx(0, abs=1e-12)


def test_what_only_combinations_explain_is_left():
    cells = list(itertools.product([0, 1], [0, 1]))
    made = importance({"a": [a for a, _ in cells], "b": [b for _, b in cells]}, [float(a ^ b) for a, b in cells])
    assert made.share == pytest.approx({"a": 0, "b": 0}, abs=1e-12)
    assert made.residual == pytest.approx(1)


def test_keys_that_change_together_explain_nothing_alone():
    made = importance({"a": [0, 1, 0, 1], "b": ["u", "v", "u", "v"]}, [0.0, 1.0, 0.1, 1.1])
    assert made.share == pytest.approx({"a": 0, "b": 0}, abs=1e-12)
    assert made.residual < 0.02


def test_a_key_of_many_numbers_does_not_explain_everything():
    rng = np.random.default_rng(1)
    lr, other = rng.random(200).tolist(), rng.integers(0, 2, 200)
    made = importance({"lr": lr, "other": other.tolist()}, other + 0.1 * rng.normal(size=200))
    assert made.share["lr"] < 0.02
    assert made.share["other"] > 0.9
    assert importance({"lr": lr}, np.array(lr)).share["lr"] > 0.9


@pytest.mark.parametrize("value", [[], [0.5], [NAN, NAN, 0.5], [0.5, 0.5, 0.5]])
def test_where_nothing_varies_no_key_is_important(value: list[float]):
    made = importance({"a": list(range(len(value)))}, value)
    assert math.isnan(made.share["a"])
    assert math.isnan(made.residual)


def test_missing_values_are_left_out():
    assert importance({"a": [0, 1, 0, 1, 1]}, [0, 1, 0.1, 1.1, NAN]) == importance({"a": [0, 1, 0, 1]}, [0, 1, 0.1, 1.1])
    assert analysis.importance({}, [0.0, 1.0]).residual == 1
