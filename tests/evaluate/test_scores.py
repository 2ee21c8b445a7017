"""Accuracies and their intervals, against closed forms and other libraries."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from ssl_ray.evaluate.scores import DRAWS, classified, interval, jackknife, resampled, t_interval, top_k


def random_scores(n=300, classes=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels], labels


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_that_of_scikit_learn(k):
    scores, labels = random_scores()
    assert top_k(scores, labels, k).mean() == pytest.approx(top_k_accuracy_score(labels, scores, k=k))


def test_of_equal_scores_the_smallest_label_comes_first_and_no_score_is_never_right():
    scores = np.array([[1.0, 1.0, -np.inf]] * 3)
    assert top_k(scores, np.array([0, 1, 2]), 1).tolist() == [True, False, False]
    assert top_k(scores, np.array([0, 1, 2]), 3).tolist() == [True, True, False]


@pytest.mark.parametrize(("n", "share"), [(400, 0.9), (1001, 0.5)])
def test_the_bootstrap_of_an_accuracy_has_the_standard_error_and_quantiles_of_a_binomial(n, share):
    values = (np.arange(n) < share * n).astype(float)
    draws, of_class = resampled(values[None], np.zeros(n, int), 1)
    p = values.mean()
    assert draws.shape == (DRAWS, 1)
    assert draws.mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n / DRAWS))
    assert draws.std() == pytest.approx(np.sqrt(p * (1 - p) / n), rel=4 / np.sqrt(2 * DRAWS))
    low, high = interval(draws[:, 0])
    assert [low * n, high * n] == pytest.approx(stats.binom.ppf([0.025, 0.975], n, p), abs=0.3 * np.sqrt(n * p * (1 - p)))
    assert np.array_equal(of_class, draws)
    assert np.array_equal(resampled(values[None], np.zeros(n, int), 1)[0], draws)  # the same ones each time


def test_a_mean_over_classes_and_values_is_resampled_together():
    scores, labels = random_scores(n=90, classes=3)
    hits = np.stack([top_k(scores, labels, k) for k in (1, 2)]).astype(float)
    draws, of_class = resampled(hits, labels, 3)
    assert (draws[:, 0] <= draws[:, 1]).all()  # in the same samples
    assert of_class.mean(axis=0) == pytest.approx([hits[0, labels == i].mean() for i in range(3)], abs=0.03)


def test_a_record_has_what_scikit_learn_finds():
    scores, labels = random_scores()
    names = [f"class {i}" for i in range(8)]
    found = classified([scores, scores[:, ::-1]], labels, names)
    first, second = scores.argmax(axis=1), scores[:, ::-1].argmax(axis=1)
    assert found["top1"]["by_seed"] == [np.mean(first == labels), np.mean(second == labels)]
    assert found["top1"]["value"] == pytest.approx(np.mean(found["top1"]["by_seed"]))
    assert found["top5"]["by_seed"][0] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert found["confusion"] == (confusion_matrix(labels, first) + confusion_matrix(labels, second)).tolist()
    low, high = found["top1"]["interval"]
    assert low < found["top1"]["value"] < high
    for i, row in enumerate(found["per_class"]):
        right = [np.mean(each[labels == i] == i) for each in (first, second)]
        assert (row["class"], row["n"], row["value"]) == (names[i], np.sum(labels == i), pytest.approx(np.mean(right)))
        assert row["interval"][0] <= row["value"] <= row["interval"][1]


def test_few_classes_have_no_top_5_and_a_class_without_images_no_accuracy():
    found = classified([np.eye(3)[[0, 1, 0]]], np.array([0, 1, 1]), ["a", "b", "c"])
    assert found["top5"] is None
    assert found["top1"]["seed_interval"] is None
    assert found["per_class"][2] == {"class": "c", "n": 0, "value": None, "interval": None}
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_an_interval_over_seeds_is_students():
    values = [0.8, 0.83, 0.79, 0.85]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval([0.5]) is None


def test_the_jackknife_of_a_mean_has_the_standard_error_of_the_means_of_its_groups():
    h = np.random.default_rng(0).normal(size=(200, 1))
    low, high = jackknife(lambda some: float(some.mean()), h)
    groups = [h[np.arange(200) % 10 == i].mean() for i in range(10)]
    assert [low, high] == pytest.approx(stats.t.interval(0.95, 9, h.mean(), stats.sem(groups)))
    assert jackknife(np.mean, h[:19]) is None
