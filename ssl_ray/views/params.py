"""The parameters of the views of a whole batch, as arrays: pure functions of (seed, epoch, sample's hash, view).

The laws are those of torchvision's RandomResizedCrop, ColorJitter, RandomHorizontalFlip, RandomGrayscale, GaussianBlur and
RandomSolarize. Each draw has a word of its own, so that no option shifts the draws of another.

`draw` is compiled (draws.py); `numpy_draw` is the same in numpy, to be read and compared with.
"""

import dataclasses
import functools
import math
from decimal import Decimal

import numpy as np

from ssl_ray.config import Views
from ssl_ray.philox import VIEW, philox, uniform

TRIES = 10
"""Crops to try before the largest central one of an allowed ratio is taken."""


@dataclasses.dataclass(frozen=True)
class ViewParams:
    """Arrays [B, m]. A factor of 1 and a hue of 0 change nothing; a sigma of 0 is no blur."""

    top: np.ndarray
    """int64, like left, height and width: the crop in pixels of the source."""
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    """bool."""
    brightness: np.ndarray
    """float64, like the following."""
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    """In turns."""
    gray: np.ndarray
    """bool."""
    sigma: np.ndarray
    """In pixels of the view."""
    solarize: np.ndarray
    """bool."""


def least_size(spec: Views) -> tuple[int, int]:
    """Pixels, and the shorter side, of an image whose smallest crop has sides of `size_px` still: a larger one may be made
    smaller first. Crops of long images are as high as these."""
    low, high = spec.crop_ratio
    pixels = math.ceil(spec.size_px**2 / (spec.crop_scale[0] * min(low, 1 / high))) if spec.crop_scale[0] else 2**62
    return pixels, spec.size_px


def draw(spec: Views, *, seed: int, epoch: int, hashes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    """The parameters of `spec.count` views of each of B samples: hashes uint64 [B], source sizes int [B]."""
    from ssl_ray.views import draws  # here, since numba takes .3 s to import and most commands draw nothing

    shape = (len(hashes), spec.count)
    boxes, factors, flags = np.empty((*shape, 4), np.int64), np.empty((*shape, 5)), np.empty((*shape, 3), bool)
    exponent, halvings = _reduced(*spec.crop_ratio)
    probabilities = (spec.flip, spec.jitter, spec.grayscale, spec.blur, spec.solarize)
    ranges = [_factor_range(strength) for strength in (spec.brightness, spec.contrast, spec.saturation)]
    draws.load()(
        np.array([seed, epoch], np.uint64),
        _view_words(spec.count),
        np.ascontiguousarray(hashes, np.uint64),
        np.ascontiguousarray(heights, np.int64),
        np.ascontiguousarray(widths, np.int64),
        np.array([*spec.crop_scale, *spec.crop_ratio, exponent]),
        halvings,
        np.stack([_chances(probability, spec.count) for probability in probabilities]),
        np.array([*ranges, (0.0, spec.hue), (spec.blur_sigma[0], spec.blur_sigma[1] - spec.blur_sigma[0])]),
        boxes,
        factors,
        flags,
    )
    top, left, height, width = np.moveaxis(boxes, -1, 0)
    brightness, contrast, saturation, hue, sigma = np.moveaxis(factors, -1, 0)
    flip, gray, solarize = np.moveaxis(flags, -1, 0)
    return ViewParams(top, left, height, width, flip, brightness, contrast, saturation, hue, gray, sigma, solarize)


def _chances(probability: float | tuple[float, ...], views: int) -> np.ndarray:
    """float64 [m]: the probability for each view."""
    each = probability if isinstance(probability, tuple) else (probability,)
    return np.array(each, np.float64)[np.arange(views) % len(each)]


def _factor_range(strength: float) -> tuple[float, float]:
    """The lowest factor, and how far above it the highest is."""
    low = max(0.0, 1 - strength)
    return low, 1 + strength - low


def _view_words(views: int) -> np.ndarray:
    """uint64 [m]: the third counter words."""
    return VIEW | np.arange(views, dtype=np.uint64) << np.uint64(8)


def numpy_draw(spec: Views, *, seed: int, epoch: int, hashes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    """What `draw` draws, in numpy."""
    u = _uniforms(spec.count, seed=seed, epoch=epoch, hashes=hashes, words=2 * TRIES + 12)
    top, left, height, width = _crops(spec, u[..., : 2 * TRIES + 2], heights, widths)
    flip, jitter, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = np.moveaxis(u[..., 2 * TRIES + 2 :], -1, 0)

    def chance(probability: float | tuple[float, ...], draws: np.ndarray) -> np.ndarray:
        return draws < _chances(probability, spec.count)

    jittered = chance(spec.jitter, jitter)

    def factor(strength: float, draws: np.ndarray) -> np.ndarray:
        low, more = _factor_range(strength)
        return np.where(jittered, low + more * draws, 1.0)

    low, high = spec.blur_sigma
    return ViewParams(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=chance(spec.flip, flip),
        brightness=factor(spec.brightness, brightness),
        contrast=factor(spec.contrast, contrast),
        saturation=factor(spec.saturation, saturation),
        hue=np.where(jittered, spec.hue * (2 * hue - 1), 0.0),
        gray=chance(spec.grayscale, gray),
        sigma=np.where(chance(spec.blur, blur), low + (high - low) * sigma, 0.0),
        solarize=chance(spec.solarize, solarize),
    )


def _uniforms(views: int, *, seed: int, epoch: int, hashes: np.ndarray, words: int) -> np.ndarray:
    """float64 [B, m, words] in (0, 1)."""
    low = (hashes & np.uint64(0xFFFFFFFF))[:, None, None]
    high = (hashes >> np.uint64(32))[:, None, None]
    view = _view_words(views)[None, :, None]
    blocks = -(-words // 4)
    block = np.arange(blocks, dtype=np.uint64)[None, None, :]
    drawn = np.stack(philox(low, high, view, block, key=(seed, epoch)), axis=-1)
    return uniform(drawn.reshape(len(hashes), views, 4 * blocks)[..., :words])


def _crops(spec: Views, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, ...]:
    """Top, left, height, width int64 [B, m] from u [B, m, 2 TRIES + 2]."""
    source_h, source_w = (np.asarray(size, np.int64)[:, None] for size in (heights, widths))
    area = (source_h * source_w)[..., None].astype(np.float64)
    scale_low, scale_high = spec.crop_scale
    target = area * (scale_low + (scale_high - scale_low) * u[..., :TRIES])
    ratio = _between(*spec.crop_ratio, u[..., TRIES : 2 * TRIES])
    tried_w, tried_h = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
    fits = (tried_w > 0) & (tried_w <= source_w[..., None]) & (tried_h > 0) & (tried_h <= source_h[..., None])
    fitted, first = fits.any(axis=-1), fits.argmax(axis=-1)[..., None]
    tried_w, tried_h = (np.take_along_axis(size, first, axis=-1)[..., 0] for size in (tried_w, tried_h))
    # None of the tries fitted: the central crop, as large as the ratios allow, a pixel at least.
    shape = source_w / source_h
    central_w = np.where(shape > spec.crop_ratio[1], np.maximum(1, np.rint(source_h * spec.crop_ratio[1])), source_w)
    central_h = np.where(shape < spec.crop_ratio[0], np.maximum(1, np.rint(source_w / spec.crop_ratio[0])), source_h)
    width = np.where(fitted, tried_w, central_w).astype(np.int64)
    height = np.where(fitted, tried_h, central_h).astype(np.int64)
    top = np.floor((source_h - height + 1) * u[..., 2 * TRIES]).astype(np.int64)
    left = np.floor((source_w - width + 1) * u[..., 2 * TRIES + 1]).astype(np.int64)
    return (
        np.where(fitted, top, (source_h - height) // 2),
        np.where(fitted, left, (source_w - width) // 2),
        height,
        width,
    )


def _between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    """low (high / low)**u, the law of a ratio, from sums and products alone.

    They round alike on every machine. Library exponentials differ in the last bit, and with them, once in a while, a box.
    """
    exponent, halvings = _reduced(low, high)
    x = u * exponent
    power = np.ones_like(x)
    for k in range(10, 0, -1):  # the series of exp to x**10 / 10!: x is at most 1/8
        power = 1 + power * x / k
    for _ in range(halvings):
        power = power * power
    return low * power


@functools.cache
def _reduced(low: float, high: float) -> tuple[float, int]:
    """The logarithm of high / low, halved so often that it is at most 1/8, and how often."""
    log_ratio = float((Decimal(high) / Decimal(low)).ln())
    halvings = max(0, math.frexp(log_ratio)[1] + 3)
    return log_ratio / 2**halvings, halvings
