"""What predictions are worth: accuracies with their intervals, per class, confusions. Numbers to plain values for JSON."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ssl_ray.philox import BOOTSTRAP, philox

DRAWS = 1000
LEVEL = 0.95
JACKKNIFE_GROUPS = 10
_BLOCK = 2**22  # test images drawn at once


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """bool [t]: whether the label is among the k largest scores; of equal ones the smallest label comes first.

    scores: float [t, K]; a class of score -inf is never among them.  labels: int [t], below K.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    return (rank < k) & (own[:, 0] > -np.inf)


def resampled(values: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The means of `values` in DRAWS bootstrap samples of the test images: float [DRAWS, M], and the first of them class by
    class, [DRAWS, K], NaN where a sample has none of a class.

    values: float [M, t].  labels: int [t], below K.  The samples are the same in every call with the same t.
    Cost: 7 s for t = 50,000 on one core.
    """
    means, per_class = [], []
    for drawn in _resamples(values.shape[1]):
        means.append(values[:, drawn].mean(axis=2).T)
        cells = (np.arange(len(drawn))[:, None] * num_classes + labels[drawn]).ravel()
        size = len(drawn) * num_classes
        count = np.bincount(cells, minlength=size).astype(np.float64)
        hits = np.bincount(cells, weights=values[0, drawn].ravel(), minlength=size)
        share = np.divide(hits, count, out=np.full(size, np.nan), where=count > 0)
        per_class.append(share.reshape(len(drawn), num_classes))
    return np.concatenate(means), np.concatenate(per_class)


def _resamples(n: int) -> Iterator[np.ndarray]:
    """int64 [b, n]: DRAWS times n images with replacement, a block of draws at a time, always the same ones."""
    rows = max(1, _BLOCK // n)
    for start in range(0, DRAWS, rows):
        draw = np.arange(start, min(DRAWS, start + rows), dtype=np.uint64)[:, None]
        words = np.stack(philox(np.arange(-(-n // 4), dtype=np.uint64), draw, BOOTSTRAP, 0, key=(0, 0)), axis=-1)
        words = words.reshape(len(draw), -1)[:, :n]
        yield (words * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def interval(draws: np.ndarray) -> list[float] | None:
    """The middle LEVEL of draws float [DRAWS], NaN left out; None without any."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return None
    return [float(value) for value in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def t_interval(values: Sequence[float]) -> list[float] | None:
    """Of the mean of two values or more, such as those of several seeds, by Student's t at LEVEL; None for a single one."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    margin = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return [mean - margin, mean + margin]


def jackknife(measure: Callable[[np.ndarray], float], h: np.ndarray) -> list[float] | None:
    """An interval of measure(h) at LEVEL, by leaving out a tenth of the images after the other (Tukey; t of 9 degrees).

    For what a bootstrap, which repeats images, would bias: a rank.  None with fewer than 20 images.
    """
    if len(h) < 2 * JACKKNIFE_GROUPS:
        return None
    group = np.arange(len(h)) % JACKKNIFE_GROUPS
    values = np.array([measure(h[group != out]) for out in range(JACKKNIFE_GROUPS)])
    error = np.sqrt((JACKKNIFE_GROUPS - 1) / JACKKNIFE_GROUPS * np.sum((values - values.mean()) ** 2))
    margin = stats.t.ppf((1 + LEVEL) / 2, JACKKNIFE_GROUPS - 1) * error
    value = measure(h)
    return [float(value - margin), float(value + margin)]


def classified(scores: Sequence[np.ndarray], labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracies of one or more repetitions (seeds), as plain values.

    scores: float [t, K] of each.  labels: int [t].
    top1 and top5 (None for 5 classes or fewer): `value`, the mean over repetitions; `interval`, of a bootstrap over the test
    images, repetitions kept; `by_seed`; `seed_interval`, of Student's t over repetitions, None for one. per_class: those of
    each class, with its number of test images n. confusion: int [K, K], rows are true classes, columns predicted ones,
    summed over repetitions; a test image for which no class has a score is in no column.
    """
    classes = len(class_names)
    hits = [np.stack([top_k(each, labels, k) for each in scores]) for k in ((1, 5) if classes > 5 else (1,))]
    draws, of_class = resampled(np.stack([hit.mean(axis=0) for hit in hits]), labels, classes)
    found: dict[str, Any] = {"top1": None, "top5": None}
    for name, hit, drawn in zip(("top1", "top5"), hits, draws.T, strict=False):
        by_seed = [float(value) for value in hit.mean(axis=1)]
        about = {"value": float(hit.mean()), "interval": interval(drawn)}
        found[name] = about | {"by_seed": by_seed, "seed_interval": t_interval(by_seed)}
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, weights=hits[0].mean(axis=0), minlength=classes)
    found["per_class"] = [
        {
            "class": name,
            "n": int(count[i]),
            "value": float(right[i] / count[i]) if count[i] else None,
            "interval": interval(of_class[:, i]),
        }
        for i, name in enumerate(class_names)
    ]
    confusion = np.zeros(classes * classes, np.int64)
    for each in scores:
        some = each.max(axis=1) > -np.inf
        confusion += np.bincount(labels[some] * classes + each.argmax(axis=1)[some], minlength=classes**2)
    return found | {"confusion": confusion.reshape(classes, classes).tolist()}
