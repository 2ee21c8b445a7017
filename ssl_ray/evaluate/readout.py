"""Read-outs of frozen features: linear classifiers and k nearest neighbours. Numbers in, accuracies or scores out.

Scores are float32 [t, K], the larger the likelier; -inf for a class that cannot be meant: training lacks it, or it has no vote.
"""

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional

from ssl_ray.philox import CLASSIFIER_ORDER, READOUT_SPLIT, permutation

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of the L2 penalty to choose from, strongest first."""
L2_WITHOUT_HELD_OUT = 1e-2
"""The penalty where every class has one image, so that there is nothing to choose it on."""
ADAM: dict[str, Any] = {"epochs": 200, "lr": 1e-3, "weight_decay": 1e-6, "batch": 512, "label_smoothing": 0.1}
"""How the paper's linear classifier is trained: Adam, weight decay as part of the gradient, a constant learning rate."""

_BLOCK = 2**24  # similarities held at once, 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    accuracy: float
    """Share of the test images classified correctly, 0 to 1."""
    l2: float
    """The penalty chosen, one of L2_GRID."""
    num_train: int
    num_test: int


def linear_readout(train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray, *, seed: int = 0) -> Readout:
    """Accuracy of multinomial logistic regression on h.

    It minimises mean cross-entropy + l2 / 2 * |W|^2 (the bias is free; with two classes there is one weight vector),
    on features standardised with the mean and standard deviation of all training images; a feature that is constant
    there becomes 0. l2 is the entry of L2_GRID with the least cross-entropy on a held-out fifth of the training images
    (steadier than their accuracy: up to .7 % better on test images with 100 to 1,000 for training), then the fit is
    repeated on all of them. The held-out images are drawn from every class alike by `seed`: a fifth rounded down, at
    least one, but none of a class with a single image. If that leaves no held-out image at all, l2 is
    L2_WITHOUT_HELD_OUT.
    train_h: float [n, D].  test_h: float [t, D].  train_y, test_y: integer labels [n], [t]; a test image whose class
    has no training image counts as an error.  seed: 0 to 2**32 - 1.
    Cost: about 3 s for n = 20,000, D = 128, 10 classes on one core; 11 s for D = 512; 20 s for 100 classes.
    Raises ValueError for shapes that do not fit, NaN or infinity, no test image, or fewer than two training classes.
    """
    _check_sets(train_h, train_y, test_h, test_y)
    with threadpool_limits(1):
        fitted = _fitted(train_h, train_y, seed)
        accuracy = float(np.mean(fitted.classes[fitted.model.predict(fitted.standardised(test_h))] == test_y))
    return Readout(accuracy=accuracy, l2=fitted.l2, num_train=len(train_y), num_test=len(test_y))


def logistic_scores(
    train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, *, num_classes: int, seed: int
) -> tuple[np.ndarray, float]:
    """Scores of the test images by the classifier of `linear_readout`, whose predictions they give, and its l2.

    train_y: labels below K = num_classes; the other arguments, cost and errors are those of linear_readout.
    """
    _check_sets(train_h, train_y, test_h, np.zeros(len(test_h), np.int64))
    with threadpool_limits(1):
        fitted = _fitted(train_h, train_y, seed)
        found = fitted.model.decision_function(fitted.standardised(test_h))
    scores = np.full((len(test_h), num_classes), -np.inf, np.float32)
    # [t] of two classes: of the second against the first
    scores[:, fitted.classes] = np.stack([np.zeros_like(found), found], axis=1) if found.ndim == 1 else found
    return scores, fitted.l2


@threadpool_limits.wrap(limits=1)  # as for the logistic regression, see _fitted
def adam_scores(train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, *, num_classes: int, seed: int) -> np.ndarray:
    """Scores of the test images by a linear classifier trained as the paper's (arXiv 2312.10725, settings in ADAM).

    Cross-entropy with label smoothing on h as it is; weights and bias begin at 0, so that only the order of the images is
    random, by `seed`; the last batch of an epoch may be smaller. Smoothing gives each of the K = num_classes its share.
    train_h: float [n, D].  train_y: int [n], below K.  test_h: float [t, D].
    Cost: about 10 ms for a thousand images and an epoch, for D = 512 and 10 classes on one core.
    Raises ValueError as linear_readout does.
    """
    _check_sets(train_h, train_y, test_h, np.zeros(len(test_h), np.int64))
    _require_classes(train_y)
    x, y = torch.from_numpy(train_h.astype(np.float32)), torch.from_numpy(train_y.astype(np.int64))
    weight = torch.zeros(num_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=ADAM["lr"], weight_decay=ADAM["weight_decay"])
    for epoch in range(ADAM["epochs"]):
        order = torch.from_numpy(permutation(len(x), key=(seed, 0), purpose=CLASSIFIER_ORDER, stream=epoch))
        for part in order.split(ADAM["batch"]):
            scores = functional.linear(x[part], weight, bias)
            loss = functional.cross_entropy(scores, y[part], label_smoothing=ADAM["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = functional.linear(torch.from_numpy(test_h.astype(np.float32)), weight, bias).numpy()
    found[:, np.setdiff1d(np.arange(num_classes), train_y)] = -np.inf
    return found


def knn_accuracy(train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray, *, k: int = 20) -> float:
    """Share of test images whose label has most of the votes of the k training images of largest cosine similarity.

    Every neighbour has one vote (no weight by similarity, so no temperature to tune); a tie of votes goes to the
    smallest label. h is not centred; a zero vector has similarity 0 to all. k above n means n.
    train_h: float [n, D], n >= 1.  test_h: float [t, D], t >= 1.  train_y, test_y: integer labels [n], [t].
    Memory: blocks of 64 MiB of similarities.  Cost: about 1 s for n = 20,000, t = 10,000, D = 128 on one core.
    Raises ValueError for shapes that do not fit, NaN or infinity, or k < 1.
    """
    _check_sets(train_h, train_y, test_h, test_y)
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more.")
    classes, labels = np.unique(train_y, return_inverse=True)
    correct = 0
    for start, votes in _votes(train_h, labels, test_h, k=k, num_classes=len(classes)):
        correct += int(np.count_nonzero(classes[votes.argmax(axis=1)] == test_y[start : start + len(votes)]))
    return correct / len(test_h)


def knn_scores(train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, *, num_classes: int, k: int) -> np.ndarray:
    """Votes for each class, by the rule of `knn_accuracy`; a class without a vote has -inf.  train_y: labels below K."""
    _check_sets(train_h, train_y, test_h, np.zeros(len(test_h), np.int64))
    found = [votes for _, votes in _votes(train_h, train_y, test_h, k=k, num_classes=num_classes)]
    votes = np.concatenate(found).astype(np.float32)
    return np.where(votes > 0, votes, np.float32(-np.inf))


def _votes(
    train_h: np.ndarray, labels: np.ndarray, test_h: np.ndarray, *, k: int, num_classes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """First test image and votes int [b, K] of one block after the other."""
    train, test = (functional.normalize(torch.from_numpy(h.astype(np.float32))) for h in (train_h, test_h))
    rows = max(1, _BLOCK // len(train))
    for start in range(0, len(test), rows):
        # [b, n] similarities -> [b, k] indices -> [b, classes] votes
        near = torch.topk(test[start : start + rows] @ train.T, min(k, len(train)), sorted=False).indices.numpy()
        cells = np.arange(len(near))[:, None] * num_classes + labels[near]
        yield start, np.bincount(cells.ravel(), minlength=len(near) * num_classes).reshape(len(near), num_classes)


def _check_sets(train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray) -> None:
    for name, h, y in (("train", train_h, train_y), ("test", test_h, test_y)):
        if h.ndim != 2 or y.shape != (len(h),) or len(h) == 0 or h.shape[1] != train_h.shape[1]:
            raise ValueError(
                f"{name}_h, {name}_y: got {list(h.shape)} and {list(y.shape)}, expected [n, {train_h.shape[-1]}] and [n], n >= 1."
            )
        if not np.isfinite(h).all():
            raise ValueError(f"{name}_h: got NaN or infinity, expected finite features.")


def _require_classes(train_y: np.ndarray) -> None:
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"train_y: got {len(np.unique(train_y))} class, expected 2 or more.")


@dataclasses.dataclass(frozen=True)
class _Logistic:
    classes: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    l2: float
    model: LogisticRegression

    def standardised(self, h: np.ndarray) -> np.ndarray:
        return ((h - self.mean) * self.scale).astype(np.float32)


def _fitted(train_h: np.ndarray, train_y: np.ndarray, seed: int) -> _Logistic:
    """The classifier of linear_readout. To be called with one thread: the thread count changes the order of sums, and on
    cores shared with training the threads of these many small products wait for each other (seen: 100 times slower)."""
    _require_classes(train_y)
    classes, labels = np.unique(train_y, return_inverse=True)
    mean, std = train_h.mean(axis=0, dtype=np.float64), train_h.std(axis=0, dtype=np.float64)
    # Below 1e-6 of the mean a float32 feature is constant but for its rounding, which must not be blown up to 1.
    varies = std > 1e-6 * np.abs(mean)
    scale = np.where(varies, 1 / np.where(varies, std, 1), 0)
    x = ((train_h - mean) * scale).astype(np.float32)
    l2, model = _choose_l2(x, labels, seed)
    _fit(model, x, labels, l2)
    return _Logistic(classes, mean, scale, l2, model)


def shuffled_by_class(labels: np.ndarray, *, seed: int, purpose: int) -> np.ndarray:
    """int64 [n]: positions of the labels, class by class, shuffled within each."""
    order = permutation(len(labels), key=(seed, 0), purpose=purpose)
    return order[np.argsort(labels[order], kind="stable")]


def _held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: the held-out fifth; labels: int [n], all of 0..K-1."""
    order = shuffled_by_class(labels, seed=seed, purpose=READOUT_SPLIT)
    count = np.bincount(labels)
    held = np.where(count >= 2, np.maximum(1, count // 5), 0)
    position = np.arange(len(labels)) - (np.cumsum(count) - count)[labels[order]]
    mask = np.zeros(len(labels), bool)
    mask[order] = position < held[labels[order]]
    return mask


def _choose_l2(x: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, LogisticRegression]:
    """The penalty, and the model fitted with it to start the last fit from."""
    # warm_start: each fit begins at the optimum of the next stronger penalty, which is near and well conditioned.
    model = LogisticRegression(tol=1e-4, max_iter=500, warm_start=True)
    held = _held_out(labels, seed)
    if not held.any():
        return L2_WITHOUT_HELD_OUT, model
    best = (math.inf, L2_WITHOUT_HELD_OUT, model)
    rows = np.arange(np.count_nonzero(held))
    for l2 in L2_GRID:
        _fit(model, x[~held], labels[~held], l2)
        # Clipped, so that one image at probability 0 does not decide alone.
        right = np.maximum(model.predict_proba(x[held])[rows, labels[held]], 1e-12)
        loss = -float(np.mean(np.log(right)))
        if loss < best[0]:
            best = (loss, l2, copy.deepcopy(model))
    return best[1:]


def _fit(model: LogisticRegression, x: np.ndarray, labels: np.ndarray, l2: float) -> None:
    model.set_params(C=1 / (l2 * len(x)))  # scikit-learn sums the cross-entropy over images
    with warnings.catch_warnings():
        # Features of very different strength may need more than the 500 steps; what is reached by then is the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels)
