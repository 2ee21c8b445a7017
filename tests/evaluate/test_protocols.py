"""The named protocols, against other libraries and another optimiser."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from ssl_ray.evaluate.pictures import confusion_picture
from ssl_ray.evaluate.protocols import few_shots, spectral
from ssl_ray.evaluate.readout import adam_scores, knn_scores, linear_readout, logistic_scores
from ssl_ray.evaluate.spectrum import alpha, lidar, rankme


def a_set(n, seed, dims=16, classes=4, apart=1.5):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (rng.normal(size=(n, dims)) + np.eye(classes, dims)[y] * apart).astype(np.float32), y


def smoothed(scores, y, smoothing=0.1):
    """Label-smoothed cross-entropy by its definition, in float64."""
    logs = torch.log_softmax(torch.as_tensor(scores, dtype=torch.float64), dim=1)
    right = logs[torch.arange(len(y)), torch.as_tensor(y)]
    return -((1 - smoothing) * right + smoothing * logs.mean(dim=1)).mean()


def test_the_papers_classifier_finds_the_minimum_that_another_optimiser_finds():
    (x, y), (test_x, _) = a_set(1500, 0), a_set(300, 1)
    x, test_x = 10 * x, 10 * test_x  # so that its few hundred small steps get there
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 16), (4,)))
    lbfgs = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    features, labels = torch.from_numpy(x).double(), torch.from_numpy(y)

    def closure():
        lbfgs.zero_grad()
        loss = criterion(features @ weight.T + bias, labels) + 5e-7 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    lbfgs.step(closure)
    best = float(criterion(features @ weight.T + bias, labels).detach())
    scores = adam_scores(x, y, np.concatenate([x, test_x]), num_classes=4, seed=0)
    assert float(smoothed(scores[:1500], y)) == pytest.approx(best, rel=2e-3)
    expected = (torch.from_numpy(test_x).double() @ weight.T + bias).argmax(1).numpy()
    assert np.mean(scores[1500:].argmax(axis=1) == expected) >= 0.98


def test_the_papers_classifier_is_a_function_of_its_seed_and_gives_no_score_to_a_class_it_never_saw():
    (x, y), (test_x, _) = a_set(700, 0), a_set(50, 1)
    first = adam_scores(x, y, test_x, num_classes=6, seed=0)
    assert np.array_equal(first, adam_scores(x, y, test_x, num_classes=6, seed=0))
    assert not np.array_equal(first, adam_scores(x, y, test_x, num_classes=6, seed=1))
    assert np.isneginf(first[:, 4:]).all()
    assert np.isfinite(first[:, :4]).all()


def test_votes_of_neighbours_are_those_of_scikit_learn():
    (x, y), (test_x, _) = a_set(400, 0), a_set(150, 1)
    theirs = KNeighborsClassifier(20, algorithm="brute").fit(normalize(x), y).predict_proba(normalize(test_x)) * 20
    scores = knn_scores(x, y, test_x, num_classes=5, k=20)
    assert np.array_equal(np.where(np.isneginf(scores), 0, scores)[:, :4], theirs.round())
    assert np.isneginf(scores[:, 4]).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_the_logistic_regression_predict_what_the_linear_read_out_does(classes):
    (x, y), (test_x, test_y) = a_set(300, 0, classes=classes), a_set(200, 1, classes=classes)
    scores, l2 = logistic_scores(x, 2 * y, test_x, num_classes=9, seed=3)
    expected = linear_readout(x, 2 * y, test_x, 2 * test_y, seed=3)
    assert (np.mean(scores.argmax(axis=1) == 2 * test_y), l2) == (expected.accuracy, expected.l2)


def test_few_shots_are_nested_draws_with_students_interval():
    train, test = a_set(160, 0), a_set(200, 1)
    found = few_shots(*train, *test, draws=5)
    smallest = np.bincount(train[1]).min()
    assert [row["images_per_class"] for row in found] == [n for n in (1, 5, 10, 50) if n <= smallest]
    for row in found:
        assert row["num_train"] == row["images_per_class"] * len(np.unique(train[1]))
        assert row["value"] == pytest.approx(np.mean(row["by_draw"]))
        expected = stats.t.interval(0.95, 4, row["value"], stats.sem(row["by_draw"]))
        assert row["interval"] == pytest.approx(expected)
    assert found[0]["value"] < found[-1]["value"]
    assert few_shots(*train, *test, draws=3)[0]["by_draw"] == found[0]["by_draw"][:3]


def test_few_shots_take_as_many_images_of_each_class():
    """Of a class with one image alone that is taken each time: its feature, unlike all others, is found again."""
    x, y = a_set(60, 0, classes=2)
    x, y = np.concatenate([x, np.full((1, 16), 50, np.float32)]), np.append(y, 2)
    found = few_shots(x, y, x[-1:], y[-1:], draws=4)
    assert [(row["images_per_class"], row["by_draw"]) for row in found] == [(1, [1.0] * 4)]


def test_the_spectrum_has_the_measures_with_intervals():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(300, 64)) * np.arange(1, 65) ** -0.5
    views = [h[:100, None] + 0.1 * rng.normal(size=(100, 4, 64)) for _ in range(2)]
    found = spectral(h, views)
    assert found["alpha"]["value"] == alpha(h).alpha
    assert found["rankme"]["value"] == rankme(h)
    assert found["lidar"]["by_seed"] == [lidar(each) for each in views]
    for name in ("alpha", "rankme", "lidar"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_confusion_matrix_is_drawn_the_darker_the_larger_its_share():
    with Image.open(io.BytesIO(confusion_picture(np.array([[10, 0], [5, 5]]), ["cat", "dog"], "title"))) as image:
        colours = {colour: count for count, colour in image.getcolors(2**20)}
    darkest, half = (8, 48, 107), (132, 152, 181)
    assert 1000 < colours[darkest] < 44**2 < colours[half] < 2 * 44**2  # of one and of two cells, with numbers in them


@pytest.mark.parametrize("classes", [1, 60, 1000])
def test_a_confusion_matrix_of_any_size_is_drawn(classes):
    picture = confusion_picture(np.eye(classes, dtype=int), ["a long name of a class"] * classes, "title")
    with Image.open(io.BytesIO(picture)) as image:
        assert max(image.size) < 1400
