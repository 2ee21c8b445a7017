"""The fixed protocol of an evaluation, and its numbers from features. A change of any number here is a new version."""

import math
from typing import Any

import numpy as np

from ssl_ray.evaluate.readout import L2_GRID, L2_WITHOUT_HELD_OUT, knn_accuracy, linear_readout
from ssl_ray.evaluate.spectrum import FIRST_RANK, MIN_RANKS, alpha, rankme, spectrum

KNN_K = 20

PROTOCOL: dict[str, Any] = {
    "version": 1,
    "view": "plain: resized to the views' size, no augmentation",
    "linear": {
        "model": "multinomial logistic regression on standardised features",
        "l2_grid": list(L2_GRID),
        "l2_chosen_on": "cross-entropy of a stratified fifth of the training images",
        "l2_without_held_out": L2_WITHOUT_HELD_OUT,
    },
    "knn": {"k": KNN_K, "similarity": "cosine", "weights": "equal", "ties": "smallest label"},
    "alpha": {
        "images": "held out",
        "fit": "weighted least squares on log-log, weights 1/rank",
        "first_rank": FIRST_RANK,
        "last_rank": "min(D // 2, n // 4)",
        "min_ranks": MIN_RANKS,
    },
    "rankme": {"images": "held out", "centred": False, "eps": 1e-7},
}
"""What stands beside every result, so that two of them are compared only where it is equal."""


def evaluate_features(
    train_h: np.ndarray, train_y: np.ndarray | None, test_h: np.ndarray, test_y: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """The measures of one encoder, as plain values for JSON.

    train_h: float [n, D] features of training images.  test_h: float [t, D] of held-out ones, t >= 1; alpha and RankMe
    are theirs.  train_y, test_y: integer labels, or None.  seed: 0 to 2**32 - 1, of the read-out's split.
    linear_accuracy, linear_l2 and knn_accuracy are None without labels or with one class in training (a read-out says
    nothing then); alpha and alpha_fit_range are None where there are too few eigenvalues. A test image of a class that
    training lacks is an error of both read-outs.
    Raises ValueError for shapes that do not fit, NaN or infinity.
    """
    linear_accuracy = linear_l2 = nearest = None
    if train_y is not None and test_y is not None and len(np.unique(train_y)) > 1:
        linear = linear_readout(train_h, train_y, test_h, test_y, seed=seed)
        linear_accuracy, linear_l2 = linear.accuracy, linear.l2
        nearest = knn_accuracy(train_h, train_y, test_h, test_y, k=KNN_K)
    decay = alpha(test_h)
    return {
        "linear_accuracy": linear_accuracy,
        "linear_l2": linear_l2,
        "knn_accuracy": nearest,
        "alpha": None if math.isnan(decay.alpha) else decay.alpha,
        "alpha_fit_range": None if decay.fit_range is None else list(decay.fit_range),
        "rankme": rankme(test_h),
        "spectrum": [list(each) for each in spectrum(test_h)],
        "num_train": len(train_h),
        "num_test": len(test_h),
        "protocol": PROTOCOL,
    }
