"""The named protocols of `ssl-ray evaluate`: their settings, and their numbers from features. See docs/evaluation.md.

A change of any number that a protocol gives is a new version of it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_ray.evaluate import protocol, readout, scores
from ssl_ray.evaluate.finetune import EPOCHS, FINETUNE
from ssl_ray.evaluate.readout import linear_readout, shuffled_by_class
from ssl_ray.evaluate.spectrum import LIDAR_DELTA, alpha, lidar, rankme, spectrum
from ssl_ray.philox import FEW_SHOT

VIEWS = 16
"""Views of an image whose mean feature `linear` takes, as in the paper: one plain, the others augmented."""
SHOTS, DRAWS = (1, 5, 10, 50), 5
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 16

_PLAIN = "one: plain, resized to the views' size, no augmentation"
_BOOTSTRAP = {"draws": scores.DRAWS, "level": scores.LEVEL, "over": "test images"}
_LOGISTIC = protocol.PROTOCOL["linear"]
_ADAM = readout.ADAM | {
    "model": "linear, from zero, on features as they are",
    "optimizer": "adam, constant learning rate",
    "random": "order of images",
}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "linear": {
        "version": 1,
        "views": f"{VIEWS}: one plain, {VIEWS - 1} augmented as in the run; features averaged, of test images too",
        "classifier": _ADAM | {"random": "views, order of images"},
        "bootstrap": _BOOTSTRAP,
    },
    "linear-plain": {"version": 1, "views": _PLAIN, "classifier": _ADAM, "bootstrap": _BOOTSTRAP},
    "knn": {"version": 1, "views": _PLAIN, "classifier": protocol.PROTOCOL["knn"], "bootstrap": _BOOTSTRAP},
    "logreg": {
        "version": 1,
        "views": _PLAIN,
        "classifier": _LOGISTIC | {"random": "the held-out fifth"},
        "bootstrap": _BOOTSTRAP,
    },
    "fewshot": {
        "version": 1,
        "views": _PLAIN,
        "classifier": _LOGISTIC | {"random": "the training images"},
        "images_per_class": list(SHOTS),
        "draws": DRAWS,
        "interval": "Student's t over draws",
    },
    "finetune": {
        "version": 1,
        "views": "training: one an epoch, crop and flip as in the run; test: plain",
        "labels": "fractions of each class, one image at least, nested",
        "epochs": {str(fraction): epochs for fraction, epochs in EPOCHS.items()},
        "classifier": FINETUNE
        | {
            "model": "encoder and a linear layer, from zero, trained together",
            "optimizer": "adamw, the learning rate along a cosine to 0",
            "random": "the labels, order of images, crops",
        },
        "bootstrap": _BOOTSTRAP,
    },
    "spectrum": {
        "version": 1,
        "images": "test",
        "views": _PLAIN,
        "alpha": {key: value for key, value in protocol.PROTOCOL["alpha"].items() if key != "images"}
        | {"std_error": "of the slope, by the residuals of the line"},
        "rankme": {"centred": False, "eps": 1e-7},
        "lidar": {
            "images": LIDAR_IMAGES,
            "views": f"{LIDAR_VIEWS} augmented as in the run",
            "delta": LIDAR_DELTA,
            "eps": 1e-7,
            "random": "views",
        },
        "interval": f"jackknife, a {scores.JACKKNIFE_GROUPS}th of the images left out at a time",
    },
}
"""What stands in every result, beside the protocol's name, so that two of them are compared only where it is equal."""

WITHOUT_LABELS = ("spectrum",)


def few_shots(
    train_h: np.ndarray, train_y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray, *, draws: int
) -> list[dict[str, Any]]:
    """Accuracy of `linear_readout` from n images of each class, for every n of SHOTS that each class has.

    The images of a draw are a pure function of its number (0 to draws - 1) and the labels; those of fewer are among those of
    more.  `value` is the mean over draws, `interval` that of Student's t; `by_draw` has them all.
    """
    found = []
    for shots in SHOTS:
        if shots > np.bincount(train_y)[np.unique(train_y)].min():
            break
        accuracies = []
        for draw in range(draws):
            order = shuffled_by_class(train_y, seed=draw, purpose=FEW_SHOT)
            _, first = np.unique(train_y[order], return_index=True)
            some = order[(first[:, None] + np.arange(shots)).ravel()]
            accuracies.append(linear_readout(train_h[some], train_y[some], test_h, test_y, seed=draw).accuracy)
        found.append(
            {
                "images_per_class": shots,
                "num_train": len(some),
                "value": float(np.mean(accuracies)),
                "interval": scores.t_interval(accuracies),
                "by_draw": accuracies,
            }
        )
    return found


def spectral(h: np.ndarray, of_views: Sequence[np.ndarray]) -> dict[str, Any]:
    """Alpha, RankMe and LiDAR with their intervals, as plain values; what cannot be had is None.

    h: float [t, D], plain features of test images.  of_views: float [n, q, D] features of several views of some of them, for
    each seed.
    """
    decay = alpha(h)
    none = math.isnan(decay.alpha)
    margin = 1.96 * decay.std_error
    views = np.stack(of_views, axis=1)  # [n, seeds, q, D]
    ranks = [lidar(views[:, seed]) for seed in range(len(of_views))] if len(views) > 1 else []
    return {
        "alpha": {
            "value": None if none else decay.alpha,
            "std_error": None if none else decay.std_error,
            "interval": None if none else [decay.alpha - margin, decay.alpha + margin],
            "fit_range": None if none else list(decay.fit_range or ()),
            "r2": None if none else decay.r2,
        },
        "rankme": {"value": rankme(h), "interval": scores.jackknife(rankme, h)},
        "lidar": {
            "value": float(np.mean(ranks)) if ranks else None,
            "interval": scores.jackknife(_mean_lidar, views) if ranks else None,
            "by_seed": ranks,
            "seed_interval": scores.t_interval(ranks),
            "images": len(views),
        },
        "spectrum": [list(each) for each in spectrum(h)],
    }


def _mean_lidar(h: np.ndarray) -> float:
    """Over the seeds; h float [n, seeds, q, D]."""
    return float(np.mean([lidar(h[:, seed]) for seed in range(h.shape[1])]))


knn_scores = functools.partial(readout.knn_scores, k=protocol.KNN_K)
