import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_info, threadpool_limits

from ssl_ray.evaluate.readout import L2_GRID, L2_WITHOUT_HELD_OUT, knn_accuracy, linear_readout


def blobs(n, dims, classes, seed, spread=2.0):
    """Overlapping classes with features of different scales and offsets."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(classes, dims))
    y = rng.integers(0, classes, n)
    h = (centres[y] + spread * rng.normal(size=(n, dims))) * np.logspace(-2, 2, dims) + np.linspace(-5, 5, dims)
    return h.astype(np.float32), y


def optimum_predictions(train_h, train_y, test_h, l2):
    """Minimum of mean cross-entropy + l2 / 2 |W|^2 in float64, from the formula."""
    mean, std = train_h.mean(0, dtype=np.float64), train_h.std(0, dtype=np.float64)
    x, one_hot = (train_h - mean) / std, np.eye(train_y.max() + 1)[train_y]
    shape = (x.shape[1] + 1, one_hot.shape[1])

    def loss(flat):
        w = flat.reshape(shape)
        logp = log_softmax(x @ w[:-1] + w[-1], axis=1)
        residual = (np.exp(logp) - one_hot) / len(x)
        grad = np.vstack([x.T @ residual + l2 * w[:-1], residual.sum(0)])
        return -np.sum(one_hot * logp) / len(x) + l2 / 2 * np.sum(w[:-1] ** 2), grad.ravel()

    options = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 5000}
    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    assert np.abs(found.jac).max() < 1e-6
    w = found.x.reshape(shape)
    return ((test_h - mean) / std @ w[:-1] + w[-1]).argmax(1)


@pytest.mark.parametrize(("n", "spread"), [(300, 3.0), (1500, 2.0)])
def test_accuracy_is_that_of_the_optimum_of_the_stated_loss(n, spread):
    train, test = blobs(n, 20, 5, seed=2, spread=spread), blobs(1000, 20, 5, seed=3, spread=spread)
    got = linear_readout(*train, *test)
    expected = optimum_predictions(*train, test[0], got.l2)
    assert got.l2 in L2_GRID
    assert abs(got.accuracy - np.mean(expected == test[1])) <= 0.002  # two images on a border
    assert (got.num_train, got.num_test) == (n, 1000)


def test_few_images_with_many_features_get_a_stronger_penalty_than_many_images():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(4000, 100)).astype(np.float32)
    y = (h[:, :2].sum(1) + rng.normal(size=4000) > 0).astype(int)
    few = linear_readout(h[:150], y[:150], h[3000:], y[3000:])
    many = linear_readout(h[:3000], y[:3000], h[3000:], y[3000:])
    assert few.l2 > many.l2
    assert few.accuracy < many.accuracy


def test_the_readout_repeats_itself_and_only_the_split_depends_on_the_seed():
    train, test = blobs(400, 10, 4, seed=4), blobs(300, 10, 4, seed=5)
    assert linear_readout(*train, *test, seed=7) == linear_readout(*train, *test, seed=7)
    by_l2 = {}
    for seed in range(6):
        got = linear_readout(*train, *test, seed=seed)
        assert abs(by_l2.setdefault(got.l2, got.accuracy) - got.accuracy) <= 1 / 300


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_thread_count_neither_matters_nor_is_changed(threads):
    train, test = blobs(600, 60, 5, seed=4, spread=4.0), blobs(500, 60, 5, seed=5, spread=4.0)
    with threadpool_limits(threads):
        before = threadpool_info()
        got = linear_readout(*train, *test)
        assert threadpool_info() == before
    with threadpool_limits(1):
        assert linear_readout(*train, *test) == got


def test_units_offsets_and_constant_features_do_not_matter():
    train, test = blobs(400, 10, 4, seed=4), blobs(300, 10, 4, seed=5)
    plain = linear_readout(*train, *test)

    def changed(h):
        constant = np.full((len(h), 2), 0.1, np.float32)
        constant[::2, 1] = np.nextafter(np.float32(0.1), np.float32(1))  # constant but for rounding
        return np.hstack([h * np.float32(1024), constant, np.zeros((len(h), 1), np.float32)])

    assert linear_readout(changed(train[0]), train[1], changed(test[0]), test[1]) == plain


def test_names_of_the_classes_do_not_matter():
    train, test = blobs(300, 8, 3, seed=6), blobs(200, 8, 3, seed=7)
    names = np.array([-5, 17, 10**12])
    assert linear_readout(train[0], names[train[1]], test[0], names[test[1]]) == linear_readout(*train, *test)


def test_images_of_a_class_that_training_lacks_are_errors_of_both_readouts():
    train, test = blobs(300, 8, 3, seed=6), blobs(200, 8, 3, seed=7)
    more_h, more_y = np.vstack([test[0], test[0][:50]]), np.concatenate([test[1], np.full(50, 9)])
    known, mixed = linear_readout(*train, *test), linear_readout(*train, more_h, more_y)
    assert mixed.accuracy == pytest.approx(known.accuracy * 200 / 250)
    assert knn_accuracy(*train, more_h, more_y) == pytest.approx(knn_accuracy(*train, *test) * 200 / 250)


def test_classes_with_one_image_leave_nothing_to_choose_on_and_take_the_stated_penalty():
    h = np.eye(4, dtype=np.float32)
    got = linear_readout(h, np.arange(4), h, np.arange(4))
    assert (got.l2, got.accuracy) == (L2_WITHOUT_HELD_OUT, 1.0)


def test_classes_with_one_or_two_images_beside_large_ones_are_learned():
    h, y = blobs(203, 6, 2, seed=8, spread=0.1)
    y[200:], h[200:] = [2, 3, 3], h[200:] + 1e4 * np.array([[1], [2], [2]], np.float32)
    got = linear_readout(h, y, h[200:], y[200:])
    assert got.accuracy == 1.0


def test_a_fit_that_cannot_converge_in_its_steps_gives_no_warning():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(600, 60)) @ (rng.normal(size=(60, 60)) * np.arange(1, 61)[:, None] ** -3.0)
    x = ((h - h.mean(0)) / h.std(0)).astype(np.float32)
    y = (np.linalg.qr(x)[0] @ rng.normal(size=(60, 4)) + 0.02 * rng.gumbel(size=(600, 4))).argmax(1)
    with pytest.warns(ConvergenceWarning), threadpool_limits(1):
        LogisticRegression(C=1 / (600 * L2_GRID[-1]), tol=1e-4, max_iter=500).fit(x, y)
    assert 0.3 < linear_readout(x, y, x, y).accuracy <= 1  # any warning is an error here


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_knn_agrees_with_scikit_learn(n, dims, classes, k, seed):
    rng = np.random.default_rng(seed)
    dims += 1  # in one dimension every cosine is 1 or -1, all ties
    train_h, test_h = (rng.normal(size=(size, dims)).astype(np.float32) + 0.3 for size in (n, 40))
    train_y, test_y = rng.integers(0, classes, n), rng.integers(0, classes, 40)
    peer = KNeighborsClassifier(min(k, n), metric="cosine", algorithm="brute").fit(train_h, train_y)
    assert knn_accuracy(train_h, train_y, test_h, test_y, k=k) == pytest.approx(peer.score(test_h, test_y))


def test_knn_in_several_blocks_agrees_with_scikit_learn():
    train, test = blobs(20_000, 8, 5, seed=1, spread=1.0), blobs(2_000, 8, 5, seed=2, spread=1.0)
    peer = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(*train)
    assert abs(knn_accuracy(*train, *test) - peer.score(*test)) <= 0.001


def test_a_tie_of_votes_goes_to_the_smallest_label():
    train_h = np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [-1, 0]], np.float32)
    train_y = np.array([7, 3, 3, 7, 1])
    test_h = np.array([[1, 0]], np.float32)
    assert knn_accuracy(train_h, train_y, test_h, np.array([3]), k=4) == 1.0
    assert knn_accuracy(train_h, train_y, test_h, np.array([7]), k=4) == 0.0
    assert knn_accuracy(train_h, train_y, test_h, np.array([7]), k=1) == 1.0


def test_knn_sees_directions_only_and_takes_zero_vectors():
    train, test = blobs(200, 6, 3, seed=1), blobs(100, 6, 3, seed=2)
    lengths = np.exp2(np.random.default_rng(0).integers(-8, 8, (200, 1))).astype(np.float32)
    assert knn_accuracy(train[0] * lengths, train[1], *test) == knn_accuracy(*train, *test)
    zeros = np.zeros((4, 6), np.float32)
    assert knn_accuracy(zeros, np.array([2, 2, 5, 5]), zeros, np.array([2, 2, 2, 5])) == 0.75


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter_to_knn(random):
    train, test = blobs(80, 6, 3, seed=1), blobs(50, 6, 3, seed=2)
    a, b = random.sample(range(80), 80), random.sample(range(50), 50)
    assert knn_accuracy(train[0][a], train[1][a], test[0][b], test[1][b], k=7) == knn_accuracy(*train, *test, k=7)


@pytest.mark.parametrize("measure", [linear_readout, knn_accuracy])
def test_wrong_input_is_named(measure):
    (train_h, train_y), (test_h, test_y) = blobs(40, 6, 3, seed=1), blobs(20, 6, 3, seed=2)
    with pytest.raises(ValueError, match=r"test_h, test_y: got \[20, 5\]"):
        measure(train_h, train_y, test_h[:, :5], test_y)
    with pytest.raises(ValueError, match=r"train_h, train_y: got \[40, 6\] and \[39\]"):
        measure(train_h, train_y[:39], test_h, test_y)
    with pytest.raises(ValueError, match=r"test_h, test_y: got \[0, 6\]"):
        measure(train_h, train_y, test_h[:0], test_y[:0])
    train_h[3, 2] = np.nan
    with pytest.raises(ValueError, match="train_h: got NaN or infinity"):
        measure(train_h, train_y, test_h, test_y)


def test_one_class_and_no_neighbour_are_errors():
    train, test = blobs(40, 6, 3, seed=1), blobs(20, 6, 3, seed=2)
    with pytest.raises(ValueError, match="got 1 class"):
        linear_readout(train[0], np.zeros(40, int), *test)
    with pytest.raises(ValueError, match="k: got 0"):
        knn_accuracy(*train, *test, k=0)
