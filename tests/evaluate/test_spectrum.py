import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_ray.evaluate.spectrum import alpha, default_fit_range, lidar, rankme, spectrum


def with_spectrum(eigenvalues, n, seed=0):
    """float64 [n, D] whose covariance has exactly these eigenvalues, along random directions."""
    rng, dims = np.random.default_rng(seed), len(eigenvalues)
    raw = rng.normal(size=(n, dims))
    left, _ = np.linalg.qr(raw - raw.mean(0))  # orthonormal columns, each of sum 0
    right, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    return left * np.sqrt(np.asarray(eigenvalues) * n) @ right.T


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("fit_range", [None, (1, 40), (5, 20)])
def test_alpha_of_an_exact_power_law_is_its_exponent(exponent, fit_range):
    h = with_spectrum(7.0 * np.arange(1, 65.0) ** -exponent, n=300) + 3
    got = alpha(h, fit_range)
    assert got.alpha == pytest.approx(exponent, abs=1e-6)
    assert got.fit_range == (fit_range or (3, 32))
    if exponent:
        assert got.r2 == pytest.approx(1)


def test_alpha_is_the_weighted_least_squares_fit_of_the_singular_values():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(150, 60)) @ rng.normal(size=(60, 60)) * np.linspace(0.1, 2, 60)
    eigenvalues = np.linalg.svd(h - h.mean(0), compute_uv=False) ** 2
    rank = np.arange(4, 41)
    x, y = np.log(rank), np.log(eigenvalues[3:40])
    (slope, offset), covariance = np.polyfit(x, y, 1, w=rank**-0.5, cov=True)  # polyfit squares its weights
    weighted_variance = np.average((y - np.average(y, weights=1 / rank)) ** 2, weights=1 / rank)
    got = alpha(h, (4, 40))
    assert got.alpha == pytest.approx(-slope)
    assert got.std_error == pytest.approx(covariance[0, 0] ** 0.5)
    assert got.r2 == pytest.approx(1 - np.average((y - slope * x - offset) ** 2, weights=1 / rank) / weighted_variance)


@pytest.mark.parametrize(("n", "dims", "within"), [(300, 64, 0.1), (1000, 128, 0.1), (1000, 512, 0.1), (200, 512, 0.25)])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_alpha_of_a_gaussian_sample_is_near_the_true_one(n, dims, within, exponent):
    h = np.random.default_rng(1).normal(size=(n, dims)) * np.arange(1, dims + 1) ** (-exponent / 2)
    assert alpha(h).alpha == pytest.approx(exponent, abs=within)


def test_the_default_range_stays_inside_the_sample_and_the_dimensions():
    assert default_fit_range(10_000, 128) == (3, 64)
    assert default_fit_range(180, 2048) == (3, 45)


def test_too_few_eigenvalues_give_nan_and_no_range():
    rng = np.random.default_rng(0)
    for h in (rng.normal(size=(500, 10)), rng.normal(size=(20, 100)), np.ones((50, 64)), np.zeros((1, 64))):
        got = alpha(h)
        assert math.isnan(got.alpha)
        assert math.isnan(got.r2)
        assert got.fit_range is None
    assert math.isnan(alpha(with_spectrum(np.arange(1.0, 65), 200), (5, 11)).alpha)
    assert not math.isnan(alpha(with_spectrum(np.arange(1.0, 65), 200), (5, 12)).alpha)


def test_eigenvalues_that_are_only_rounding_end_the_range():
    law = np.arange(1, 21.0) ** -1
    h = np.hstack([with_spectrum(law, n=200), np.zeros((200, 30)), np.full((200, 50), 2.5)])
    mixed = h @ np.linalg.qr(np.random.default_rng(1).normal(size=(100, 100)))[0]
    for features in (h.astype(np.float32), mixed.astype(np.float32)):
        got = alpha(features)
        assert got.fit_range == (3, 20)
        assert got.alpha == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("n", "dims"), [(600, 50), (40, 300), (900, 700)])
def test_the_spectrum_is_that_of_numpys_covariance_thinned_evenly_in_log_rank(n, dims):
    h = np.random.default_rng(0).normal(size=(n, dims)) * np.arange(1, dims + 1) ** -0.4 + 0.2
    expected = np.linalg.eigvalsh(np.cov(h, rowvar=False, bias=True))[::-1]
    ranks, values = zip(*spectrum(h), strict=True)
    assert values == pytest.approx([expected[rank - 1] for rank in ranks], rel=1e-6)
    assert ranks[:10] == tuple(range(1, 11))
    assert ranks[-1] == min(n - 1, dims)
    assert len(ranks) <= 100
    assert max(np.diff(np.log(ranks[10:]))) < 0.15


def test_features_that_are_all_the_same_have_no_spectrum():
    assert spectrum(np.full((20, 5), 3.0)) == []


@pytest.mark.parametrize(("n", "dims"), [(200, 50), (40, 100), (64, 64), (1, 5), (5, 1)])
def test_rankme_is_the_formula_on_numpy_singular_values(n, dims):
    h = np.random.default_rng(0).normal(size=(n, dims)) * np.arange(1, dims + 1) ** -0.8 + 0.2
    singular = np.linalg.svd(h, compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rankme(h) == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_rankme_of_equal_singular_values_is_their_number(rank):
    left = np.linalg.qr(np.random.default_rng(0).normal(size=(300, rank)))[0]
    right = np.linalg.qr(np.random.default_rng(1).normal(size=(64, rank)))[0]
    assert rankme(5 * left @ right.T) == pytest.approx(rank, rel=1e-3)


def test_collapsed_features_have_rankme_1():
    for h in (np.zeros((30, 8)), np.ones((30, 8)), np.full((30, 8), 1e-30, np.float32)):
        assert rankme(h) == pytest.approx(1, abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(120, 40), (50, 70)]), st.floats(1e-3, 1e3))
def test_neither_measure_sees_order_rotation_scale_or_features_of_zero(seed, shape, scale):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.5
    turn = np.linalg.qr(rng.normal(size=(shape[1] + 5, shape[1] + 5)))[0]
    padded = np.hstack([h, np.zeros((shape[0], 5))])
    other = scale * rng.permutation(padded) @ turn
    assert rankme(other) == pytest.approx(rankme(h), rel=1e-4)
    assert alpha(other, (2, 30)).alpha == pytest.approx(alpha(h, (2, 30)).alpha, abs=1e-6)
    assert alpha(other + 10 * scale, (2, 30)).alpha == pytest.approx(alpha(h, (2, 30)).alpha, abs=1e-6)


@pytest.mark.parametrize("measure", [alpha, rankme])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_an_error(measure, bad):
    h = np.ones((20, 30), np.float32)
    h[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure(h)


@pytest.mark.parametrize("measure", [alpha, rankme])
def test_wrong_shapes_are_an_error(measure):
    for h in (np.ones(5), np.ones((0, 5)), np.ones((5, 0)), np.ones((2, 3, 4))):
        with pytest.raises(ValueError, match="expected"):
            measure(h)


def test_a_range_that_does_not_increase_is_an_error():
    for fit_range in ((0, 20), (9, 9), (20, 3)):
        with pytest.raises(ValueError, match="fit_range"):
            alpha(np.ones((90, 40)), fit_range)


def test_lidar_of_images_whose_views_agree_is_the_rank_of_their_means():
    classes, dims, views = 6, 20, 4
    h = np.eye(classes, dims).repeat(views, axis=0).reshape(classes, views, dims) * 3 + 1  # a regular simplex
    assert lidar(h) == pytest.approx(classes - 1, rel=1e-3)


def test_lidar_is_the_entropy_of_the_eigenvalues_of_fisher_discriminants():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(40, 5, 8)) * np.linspace(0.2, 1, 8) + rng.normal(size=(40, 1, 8)) * np.linspace(2, 0.1, 8)
    means = h.mean(1)
    within = np.mean([np.outer(each, each) for each in (h - means[:, None]).reshape(-1, 8)], axis=0) + 1e-4 * np.eye(8)
    share = np.linalg.eigvals(np.linalg.inv(within) @ np.cov(means.T, bias=True)).real  # those of W^-1/2 B W^-1/2
    share = share / share.sum()
    assert lidar(h) == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-5)


def test_lidar_of_one_direction_or_of_equal_means_is_one():
    assert lidar(np.arange(12.0)[:, None, None] * np.ones((12, 3, 5))) == pytest.approx(1, abs=1e-3)
    assert lidar(np.ones((4, 3, 5))) == 1


@pytest.mark.parametrize("h", [np.ones((4, 5)), np.ones((1, 3, 5)), np.ones((4, 1, 5)), np.full((4, 3, 5), np.nan)])
def test_lidar_refuses_what_has_no_views_or_is_not_finite(h):
    with pytest.raises(ValueError, match="h: got"):
        lidar(h)
