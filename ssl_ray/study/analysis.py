"""What follows from the results of a study: numbers to numbers, no storage, no clock, no figure.

NaN stands for what is missing, in what is given and in what is returned: a missing value is left out, an interval of a single
seed has no bounds, and what nothing is known of is NaN. Nothing here raises for too few trials.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ssl_ray.study.schema import Mode

CONFIDENCE = 0.95
MOST_LEVELS = 8
"""A number swept over more values than these, as from a log-uniform draw, is cut into QUANTILES groups for its importance."""
QUANTILES = 4


@dataclasses.dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    n: int
    """Values that were there."""


# Over seeds ----------------------------------------------------------------------------------------------------------


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def groups(keys: Iterable[Any]) -> list[list[int]]:
    """Positions of equal `keys` (values as JSON has them), in the order of their first: trials that differ in the seed only."""
    found: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(_key(key), []).append(position)
    return list(found.values())


def goodness(values: np.ndarray | Sequence[float], mode: Mode, target: float | None = None) -> np.ndarray:
    """Numbers of which the larger is the better. mode: max, min, or near `target`."""
    values = np.asarray(values, dtype=np.float64)
    if mode == "near":
        return -np.abs(values - (math.nan if target is None else target))
    return values if mode == "max" else -values


def _t_half_width(std_error: float, freedom: int, confidence: float) -> float:
    return float(stdtrit(freedom, (1 + confidence) / 2) * std_error) if freedom >= 1 else math.nan


def possible(objective: str) -> tuple[float, float]:
    """The least and the largest that it can be."""
    return (0.0, 1.0) if objective.endswith("accuracy") else (-math.inf, math.inf)


def mean_interval(
    values: np.ndarray | Sequence[float], *, confidence: float = CONFIDENCE, within: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Mean of the values that are there with Student's t interval, as far as it is `within` what they can be.

    One value has a mean without bounds.
    """
    there = np.asarray(values, dtype=np.float64)
    there = there[np.isfinite(there)]
    if not len(there):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(there.mean())
    error = float(there.std(ddof=1)) / math.sqrt(len(there)) if len(there) > 1 else math.nan
    half = _t_half_width(error, len(there) - 1, confidence)
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]), len(there))


def bootstrap_interval(
    accuracies: np.ndarray | Sequence[float],
    counts: np.ndarray | Sequence[float],
    *,
    seed: int = 0,
    draws: int = 4000,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean of the accuracies, with the percentiles of what other test images of the same kind would have given.

    accuracies, counts: [seeds], each the share of so many test images that was right. Of every seed the images are drawn anew
    by themselves: a resample of n images of which p n are right has Binomial(n, p) right ones. It says nothing about other
    seeds, so it is there for a single one too, and is too narrow where seeds share their test images.
    """
    share, images = np.asarray(accuracies, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    there = np.isfinite(share) & (images >= 1)
    share, count = share[there], images[there].astype(np.int64)
    if not len(share):
        return Interval(math.nan, math.nan, math.nan, 0)
    drawn = np.random.default_rng(seed).binomial(count, np.clip(share, 0, 1), size=(draws, len(share)))
    means = np.mean(drawn / count, axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(share.mean()), float(low), float(high), len(share))


# Projector and beta --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BestBeta:
    d: int
    beta: float
    value: Interval
    """Over the seeds of this beta."""
    at_edge: bool
    """No beta beyond it was tried with this d, so a better one may lie there."""


def best_beta(
    d: np.ndarray | Sequence[int],
    beta: np.ndarray | Sequence[float],
    value: np.ndarray | Sequence[float],
    *,
    mode: Mode = "max",
    target: float | None = None,
) -> list[BestBeta]:
    """For each d, in order, the beta whose mean over the trials is best; of equally good ones the smallest.

    d, beta, value: [n], of a trial each. A d without any value is left out.
    """
    d, beta, value = (np.asarray(each, dtype=np.float64) for each in (d, beta, value))
    there = np.isfinite(value) & np.isfinite(beta)
    d, beta, value = d[there], beta[there], value[there]
    found = []
    for width in np.unique(d):
        tried = np.unique(beta[d == width])
        cells = [mean_interval(value[(d == width) & (beta == each)]) for each in tried]
        best = int(np.argmax(goodness([cell.mean for cell in cells], mode, target)))
        found.append(BestBeta(int(width), float(tried[best]), cells[best], best in (0, len(tried) - 1)))
    return found


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """log beta = intercept + slope log d, and beta = c / d, which is the same with a slope of -1."""

    slope: Interval
    intercept: float
    c: Interval
    """Geometric mean of beta d; its interval is that of the mean of log(beta d)."""

    def __call__(self, d: np.ndarray | float) -> np.ndarray:
        return np.exp(self.intercept + self.slope.mean * np.log(d))


def fit_power_law(d: np.ndarray | Sequence[float], beta: np.ndarray | Sequence[float]) -> PowerLaw:
    """Least squares through the logarithms of d and beta [n]; the slope's interval is Student's with n - 2 degrees of freedom.

    Two points give a slope without bounds, a single d none; what is not above 0 is left out.
    """
    d, beta = np.asarray(d, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    there = np.isfinite(d) & np.isfinite(beta) & (d > 0) & (beta > 0)
    x, y = np.log(d[there]), np.log(beta[there])
    level = mean_interval(x + y)
    c = Interval(math.exp(level.mean), math.exp(level.low), math.exp(level.high), level.n)
    if len(np.unique(x)) < 2:
        return PowerLaw(Interval(math.nan, math.nan, math.nan, len(x)), math.nan, c)
    spread = float(np.sum((x - x.mean()) ** 2))
    slope = float((x - x.mean()) @ (y - y.mean())) / spread
    intercept = float(y.mean() - slope * x.mean())
    rest = float(np.sum((y - intercept - slope * x) ** 2))
    half = math.nan if len(x) < 3 else _t_half_width(math.sqrt(rest / (len(x) - 2) / spread), len(x) - 2, CONFIDENCE)
    return PowerLaw(Interval(slope, slope - half, slope + half, len(x)), intercept, c)


# Time ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reached:
    x: float
    """Minutes, views or epochs at which the target was reached; if it was not, those that were not enough. NaN: no read-out."""
    reached: bool


def _points(x: np.ndarray | Sequence[float], y: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def time_to_target(x: np.ndarray | Sequence[float], accuracy: np.ndarray | Sequence[float], target: float) -> Reached:
    """When the accuracy first was `target`, linear between the read-outs; it may have fallen below afterwards.

    x: [e], not decreasing.  accuracy: [e].  The first read-out counts as the moment if it is there already.
    """
    x, accuracy = _points(x, accuracy)
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return Reached(float(x[-1]) if len(x) else math.nan, False)
    after = int(above[0])
    if after == 0:
        return Reached(float(x[0]), True)
    before = after - 1
    share = (target - accuracy[before]) / (accuracy[after] - accuracy[before])
    return Reached(float(x[before] + share * (x[after] - x[before])), True)


@dataclasses.dataclass(frozen=True)
class MeanTime:
    time: Interval
    """Where seeds are censored, the mean is a lower bound: they count with what was not enough. It has no bounds then."""
    censored: int
    """Seeds that did not reach the target."""


def mean_time(times: Iterable[Reached]) -> MeanTime:
    """Over the seeds of a setting; those without a read-out are left out."""
    known = [each for each in times if math.isfinite(each.x)]
    interval = mean_interval([each.x for each in known])
    censored = sum(not each.reached for each in known)
    return MeanTime(dataclasses.replace(interval, low=math.nan, high=math.nan) if censored else interval, censored)


def area_over_time(
    x: np.ndarray | Sequence[float], accuracy: np.ndarray | Sequence[float], *, horizon: float | None = None
) -> float:
    """Mean accuracy from the first read-out to `horizon` (None: the last one), linear between read-outs: the area by its width.

    x: [e] minutes, views or epochs, not decreasing.  accuracy: [e].  Behind the last read-out its accuracy stays. NaN without
    read-outs, or if the horizon is before the first of them.
    """
    x, accuracy = _points(x, accuracy)
    if not len(x):
        return math.nan
    end = float(x[-1]) if horizon is None else horizon
    if end <= x[0]:
        return float(accuracy[0]) if end == x[0] else math.nan
    inside = x < end
    at = np.append(x[inside], end)
    height = np.append(accuracy[inside], np.interp(end, x, accuracy))
    return float(np.sum(np.diff(at) * (height[1:] + height[:-1]) / 2) / (end - x[0]))


# Trade-offs ----------------------------------------------------------------------------------------------------------


def pareto_front(cost: np.ndarray | Sequence[float], error: np.ndarray | Sequence[float]) -> np.ndarray:
    """bool [n]: those than which no other is as cheap and as good, and better in one of them. Equal ones are on it together.

    cost, error: [n], less is better; where one is NaN it is not on the front.
    """
    cost, error = np.asarray(cost, dtype=np.float64), np.asarray(error, dtype=np.float64)
    front = np.zeros(len(cost), bool)
    there = np.flatnonzero(~np.isnan(cost) & ~np.isnan(error))
    order = there[np.lexsort((error[there], cost[there]))]
    least, at = math.inf, math.nan  # the least error so far, and the cost at which it is
    for i in order.tolist():
        if error[i] < least:
            least, at = float(error[i]), float(cost[i])
            front[i] = True
        elif error[i] == least and cost[i] == at:
            front[i] = True
    return front


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Views over fractions: arrays [a, b]."""

    m: np.ndarray
    """[a], increasing."""
    fraction: np.ndarray
    """[b], increasing."""
    mean: np.ndarray
    """Over the trials of a cell; NaN where there are none."""
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    on_product: np.ndarray
    """bool: m times fraction is `product`, so that these cells see equally many views an epoch."""
    product: float
    """NaN without cells."""


def views_by_fraction(
    m: np.ndarray | Sequence[int],
    fraction: np.ndarray | Sequence[float],
    value: np.ndarray | Sequence[float],
    *,
    product: float | None = None,
) -> Table:
    """The mean value of each cell of m and fraction.

    m, fraction, value: [n], of a trial each.  product: None: the m times fraction that most cells with a value have, of equally
    frequent ones the largest.
    """
    m, fraction, value = np.asarray(m), np.asarray(fraction, dtype=np.float64), np.asarray(value, dtype=np.float64)
    rows, columns = np.unique(m), np.unique(fraction)
    cells = [[mean_interval(value[(m == row) & (fraction == column)]) for column in columns] for row in rows]
    shape = (len(rows), len(columns))
    mean, low, high, n = (
        np.array([[getattr(cell, name) for cell in row] for row in cells]).reshape(shape) for name in ("mean", "low", "high", "n")
    )
    products = np.outer(rows, columns).reshape(shape)
    if product is None:
        there, often = np.unique(np.round(products[n > 0], 9), return_counts=True)
        product = float(there[len(often) - 1 - np.argmax(often[::-1])]) if len(there) else math.nan
    on_product = np.isclose(products, product, rtol=1e-6, atol=0)
    return Table(rows, columns, mean, low, high, n.astype(np.int64), on_product, product)


# Importance ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Importance:
    share: dict[str, float]
    """Of the variance of the values, what the key alone explains, 0 to 1."""
    residual: float
    """What all keys together leave: seeds and what only combinations of keys explain."""
    n: int
    """Trials with a value."""


def _levels(values: Sequence[Any]) -> np.ndarray:
    """int [n]: the number of each value's level."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > MOST_LEVELS:
        cuts = np.quantile(numbers, np.arange(1, QUANTILES) / QUANTILES)
        return np.searchsorted(cuts, numbers, side="left")
    return np.unique([_key(value) for value in values], return_inverse=True)[1]


def importance(settings: Mapping[str, Sequence[Any]], value: np.ndarray | Sequence[float]) -> Importance:
    """How much of the values' variance each key explains: an analysis of variance with main effects only.

    settings: for each swept key its values [n].  value: [n].
    Each value of a key has an effect of its own, and the effects add up (least squares). A key's share is what the sum of
    squares that is left grows by when the key is taken out (type II), by the total: in a full grid the classic share of the key;
    of two keys that always change together neither explains anything alone. Key by key combinations are not modelled: they are
    part of the residual. All is NaN if there are fewer than two values or they are all equal.
    """
    value = np.asarray(value, dtype=np.float64)
    there = np.flatnonzero(np.isfinite(value))
    y = value[there] - (value[there].mean() if len(there) else 0)
    total = float(y @ y)
    if len(there) < 2 or total <= 1e-24 * len(there) * max(1.0, float(np.max(value[there] ** 2))):
        return Importance(dict.fromkeys(settings, math.nan), math.nan, len(there))
    effects = {}
    for key, values in settings.items():
        levels = _levels([values[i] for i in there.tolist()])
        effects[key] = (levels[:, None] == np.arange(levels.max() + 1)).astype(np.float64)

    def left(keys: list[str]) -> float:
        """Sum of squares that effects of these keys do not explain."""
        design = np.concatenate([np.ones((len(y), 1)), *(effects[key] for key in keys)], axis=1)
        rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return float(rest @ rest)

    whole = left(list(effects))
    share = {key: max(0.0, left([other for other in effects if other != key]) - whole) / total for key in effects}
    return Importance(share, whole / total, len(there))
