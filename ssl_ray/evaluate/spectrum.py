"""The spectrum of features: alpha (how fast it decays) and RankMe (how many dimensions it fills). Numbers to numbers.

Both take the eigenvalues of the smaller of the D x D and n x n Gram matrices, in float64: much less work than a
singular value decomposition, at the price of singular values below about 1e-8 of the largest, which neither needs.
"""

import dataclasses
import math

import numpy as np

FIRST_RANK = 3
"""First rank of the default fit: one or two leading directions often stand apart from the power law."""
MIN_RANKS = 8
"""Fewer eigenvalues than this give no exponent."""
MAX_RANKS = 100
"""Eigenvalues that a read-out keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alpha:
    alpha: float
    """Exponent of the decay, eigenvalue ~ rank^-alpha; NaN with fewer than MIN_RANKS eigenvalues to fit."""
    fit_range: tuple[int, int] | None
    """First and last rank that were fitted, from 1, both included; None where alpha is NaN."""
    r2: float
    """Weighted share of the variance of log eigenvalues that the line explains, at most 1; NaN where alpha is."""
    std_error: float
    """Of the slope, by the residuals of the line alone: how straight the spectrum is, not what other images would give."""


def default_fit_range(n: int, dims: int) -> tuple[int, int]:
    """Ranks 3 to min(D / 2, n / 4), which a sample of n images shows faithfully.

    Trained encoders leave the power law in the last dimensions, and a sample's eigenvalues near rank n are too small.
    On Gaussian features with a true power law (alpha .5 to 1.5, D 64 to 2048) the fit is within .1 for n >= 2 D and
    within .25 for n = D / 5, where it is too low: compare alpha only at the same n.
    """
    return FIRST_RANK, min(dims // 2, n // 4)


def alpha(h: np.ndarray, fit_range: tuple[int, int] | None = None) -> Alpha:
    """Power-law exponent of the covariance spectrum of h, as in alpha-ReQ (Agrawal et al., NeurIPS 2022).

    Least squares of log eigenvalue on log rank with weights 1 / rank, so that every octave of ranks weighs the same
    (Stringer et al., Nature 2019).
    h: float [n, D] features of held-out images, n >= 1.  fit_range: first and last rank, from 1, both included; None:
    `default_fit_range`. Eigenvalues that are only rounding (below 1e-13 of the mean |h|^2) end the range early.
    Raises ValueError for NaN or infinity, another shape, or a range that is not increasing from 1.
    """
    values = _checked(h)
    first, last = fit_range or default_fit_range(*values.shape)
    if fit_range and not 1 <= first < last:
        raise ValueError(f"fit_range: got {fit_range}, expected two increasing ranks from 1.")
    spectrum = _covariance_eigenvalues(values)
    last = min(last, len(spectrum))
    if last - first + 1 < MIN_RANKS:
        return Alpha(alpha=math.nan, fit_range=None, r2=math.nan, std_error=math.nan)
    rank = np.arange(first, last + 1)
    weight = (1 / rank) / np.sum(1 / rank)
    x, y = np.log(rank), np.log(spectrum[first - 1 : last])
    x, y = x - weight @ x, y - weight @ y
    slope = (weight * x) @ y / ((weight * x) @ x)
    total = (weight * y) @ y
    rest = weight @ (y - slope * x) ** 2
    r2 = 1 - rest / total if total > 0 else 1.0
    error = math.sqrt(rest / (len(rank) - 2) / ((weight * x) @ x))
    return Alpha(alpha=float(-slope), fit_range=(first, last), r2=float(r2), std_error=error)


def spectrum(h: np.ndarray) -> list[tuple[int, float]]:
    """(rank, eigenvalue) of the covariance of h, largest first, ranks from 1; of more than MAX_RANKS as many, evenly in log rank.

    h: float [n, D], n >= 1. Those that are only rounding are left out.  Raises ValueError for NaN or infinity, or another shape.
    """
    values = _covariance_eigenvalues(_checked(h))
    ranks = np.unique(np.geomspace(1, max(1, len(values)), MAX_RANKS).round().astype(int))
    return [(int(rank), float(values[rank - 1])) for rank in ranks if rank <= len(values)]


def _covariance_eigenvalues(values: np.ndarray) -> np.ndarray:
    """Largest first, as far as they are more than rounding: above 1e-13 of the mean |h|^2."""
    found = _gram_eigenvalues(values - values.mean(axis=0)) / len(values)
    return found[found > 1e-13 * np.mean(np.sum(values**2, axis=1))]


def rankme(h: np.ndarray) -> float:
    """RankMe (Garrido et al., ICML 2023): exp of the entropy of the singular values of h, normalised to sum 1.

    From 1 (collapsed) to min(n, D). As in the paper h is not centred and eps = 1e-7 is added to each share (for
    D = 2048 it lifts the result by .2 %); features that are all zero count as collapsed.
    h: float [n, D], n >= 1.  Raises ValueError for NaN or infinity, or another shape.
    """
    singular = np.sqrt(np.maximum(_gram_eigenvalues(_checked(h)), 0))
    share = singular / max(singular.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-np.sum(share * np.log(share))))


LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-7


def lidar(h: np.ndarray) -> float:
    """LiDAR (Thilak et al., ICLR 2024): how many dimensions tell images apart beyond what their views differ in.

    exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2, normalised to sum 1, with B the covariance of the means of the
    images' views, W that of views around the mean of their image, plus 1e-4 on its diagonal; as in the paper 1e-7 is added
    to each share. From 1 to min(n - 1, D); means that are all equal count as 1.
    h: float [n, q, D], q views of n images, n and q >= 2.  Raises ValueError for NaN or infinity, or another shape.
    """
    if h.ndim != 3 or min(h.shape) < 1 or min(h.shape[:2]) < 2:
        raise ValueError(f"h: got shape {list(h.shape)}, expected [n, q, D] with n, q >= 2.")
    if not np.isfinite(h).all():
        raise ValueError("h: got NaN or infinity, expected finite features.")
    values = h.astype(np.float64)
    means = values.mean(axis=1)
    within = (values - means[:, None]).reshape(-1, h.shape[2])
    between = means - means.mean(axis=0)
    spread, axes = np.linalg.eigh(within.T @ within / len(within) + LIDAR_DELTA * np.eye(h.shape[2]))
    # B = C' C / n: the eigenvalues are those of the Gram matrix of C W^-1/2
    found = np.maximum(_gram_eigenvalues(between @ axes / np.sqrt(spread)), 0)
    if found.sum() <= np.finfo(np.float64).tiny:
        return 1.0
    share = found / found.sum() + LIDAR_EPS
    return float(np.exp(-np.sum(share * np.log(share))))


def _checked(h: np.ndarray) -> np.ndarray:
    """float64 [n, D]."""
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(f"h: got shape {list(h.shape)}, expected [n, D] with n, D >= 1.")
    if not np.isfinite(h).all():
        raise ValueError("h: got NaN or infinity, expected finite features.")
    return h.astype(np.float64)


def _gram_eigenvalues(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of values' values, largest first: min(n, D) of them, the others are 0."""
    n, dims = values.shape
    return np.linalg.eigvalsh(values.T @ values if dims <= n else values @ values.T)[::-1]
