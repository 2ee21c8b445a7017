"""Views as linear maps: view = clip(A (Ry X Rx') + t mean), where Ry and Rx crop, resize, flip and blur.

All sums run over taps in a fixed order, element by element, so that a view has the same bytes whatever batch, process or
thread count makes it.  Where this differs from torchvision: values are clipped and rounded once, at the end, not after each
colour step; hue turns in the YIQ plane, not in HSV; the order is always brightness, contrast, saturation, hue, grayscale,
solarisation.  Blur comes before the colours, with which it commutes but for clipping.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import correlate1d

from ssl_ray.config import Views
from ssl_ray.views.params import ViewParams, draw

LUMA = np.array([0.299, 0.587, 0.114])
"""Rec. 601, as PIL and torchvision weigh."""
# RGB -> YIQ (FCC NTSC, 1953).
_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_BLOCK_BYTES = 2**22
"""Views are made in blocks of about this size, which stay in the cache."""


def make_views(images: Sequence[np.ndarray], hashes: np.ndarray, *, spec: Views, seed: int, epoch: int) -> np.ndarray:
    """uint8 [B, m, C, size, size]: the views of B images, uint8 [C, H, W] each, with hashes uint64 [B]."""
    heights = np.array([image.shape[1] for image in images])
    widths = np.array([image.shape[2] for image in images])
    params = draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)
    size, channels = spec.size_px, spec.channels
    views = np.empty((len(images), spec.count, channels, size, size), np.uint8)
    small = max(channels * heights.max() * widths.max(), channels * size**2) <= 2**15
    for own in _groups(heights, widths) if small else np.arange(len(images))[:, None]:
        source = np.stack([images[i] for i in own])
        at = np.indices((len(own), spec.count)).reshape(2, -1)
        block = max(1, _BLOCK_BYTES // (4 * channels * size * max(size, source.shape[-1])))
        for start in range(0, at.shape[1], block if small else 1):
            which, view = at[:, start : start + (block if small else 1)]
            made = _views_of(source, which, _take(params, own[which], view), size=size)
            views[own[which], view] = made
    return views


def _groups(heights: np.ndarray, widths: np.ndarray) -> list[np.ndarray]:
    """The positions of the images of each size."""
    _, group = np.unique(np.stack([heights, widths]), axis=1, return_inverse=True)
    return [np.flatnonzero(group.reshape(-1) == i) for i in range(group.max() + 1)]


def _take(params: ViewParams, image: np.ndarray, view: np.ndarray) -> ViewParams:
    return ViewParams(**{name: values[image, view] for name, values in vars(params).items()})


def _views_of(source: np.ndarray, which: np.ndarray, params: ViewParams, *, size: int) -> np.ndarray:
    """uint8 [V, C, size, size]: views of source[which], all sources [n, C, H, W] of one size; params of [V]."""
    channels = source.shape[1]
    if len(which) == 1:  # of a large image only the crop is touched
        top, left = int(params.top[0]), int(params.left[0])
        source = source[which, :, top : top + int(params.height[0]), left : left + int(params.width[0])]
        which, top_px, left_px = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    else:
        top_px, left_px = params.top, params.left
    taps_y, weights_y = resize_taps(params.height, size)
    taps_x, weights_x = resize_taps(params.width, size)
    taps_x = np.where(params.flip[:, None, None], taps_x[:, ::-1], taps_x)
    weights_x = np.where(params.flip[:, None, None], weights_x[:, ::-1], weights_x)
    rows = np.ascontiguousarray(source.transpose(0, 2, 1, 3))  # [n, H, C, W]
    x = _gather(rows, which, taps_y + top_px[:, None, None], weights_y)  # [V, size, C, W]
    columns = np.ascontiguousarray(x.transpose(0, 3, 2, 1))  # [V, W, C, size]
    x = _gather(columns, np.arange(len(which)), taps_x + left_px[:, None, None], weights_x)  # [V, size (x), C, size (y)]
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))  # [V, C, y, x]
    matrix, grey = colour_maps(params, channels)
    luma = x[:, 0] if channels == 1 else _weighted(x, LUMA)
    mean = luma.reshape(len(x), -1).astype(np.float64).mean(axis=1)
    for i in np.flatnonzero(params.sigma > 0):
        kernel = blur_kernel(float(params.sigma[i]), size)
        x[i] = correlate1d(correlate1d(x[i], kernel, axis=1, mode="mirror"), kernel, axis=2, mode="mirror")
    shift = (grey * mean).astype(np.float32)[:, None, None]
    if channels == 1:
        x = x * matrix[:, 0, 0].astype(np.float32)[:, None, None, None] + shift[:, None]
    else:
        x = np.stack([_weighted(x, matrix[:, out]) + shift for out in range(channels)], axis=1)
    np.clip(x, 0, 255, out=x)
    views = (x + np.float32(0.5)).astype(np.uint8)
    inverted = params.solarize[:, None, None, None] & (views >= 128)
    return np.where(inverted, 255 - views, views)


def _weighted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [V, H, W]: the sum over channels of x [V, 3, H, W] times weights [3] or [V, 3]."""
    w = np.broadcast_to(weights.astype(np.float32), (len(x), 3))[..., None, None]
    return x[:, 0] * w[:, 0] + x[:, 1] * w[:, 1] + x[:, 2] * w[:, 2]


def _gather(rows: np.ndarray, which: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [V, out, ...]: sums of weights [V, out, T] times rows[which, taps [V, out, T]]; rows [n, H, ...]."""
    total: np.ndarray | None = None
    extra = (1,) * (rows.ndim - 2)
    last = rows.shape[1] - 1
    for t in range(taps.shape[2]):
        part = rows[which[:, None], np.minimum(taps[:, :, t], last)] * weights[:, :, t].reshape(*weights.shape[:2], *extra)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def resize_taps(crop: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Source positions int64 and weights float32, [V, size, T] each, that resize `crop` [V] pixels to `size`.

    Antialiased bilinear: a triangle as wide as a view's pixel where it is larger than the source's, cut at the borders and
    normalised, as in PIL and torchvision's `antialias=True`. Weights past the last tap are 0.
    """
    scale = crop / size
    support = np.maximum(scale, 1.0)[:, None]
    centre = (np.arange(size) + 0.5) * scale[:, None]
    first = np.maximum(np.floor(centre - support + 0.5), 0)
    stop = np.minimum(np.floor(centre + support + 0.5), crop[:, None])
    count = int((stop - first).max())
    taps = first[..., None] + np.arange(count)
    weights = np.maximum(1 - np.abs((taps + 0.5 - centre[..., None]) / support[..., None]), 0)
    weights = np.where(taps < stop[..., None], weights, 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.minimum(taps, crop[:, None, None] - 1).astype(np.int64), weights.astype(np.float32)


def blur_kernel(sigma: float, size: int) -> np.ndarray:
    """float64 [k]: a Gaussian at whole pixels, normalised; k is a tenth of the view, odd, at least 3."""
    half = max(1, math.floor(size / 20 + 0.5))
    x = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    return kernel / kernel.sum()


def colour_maps(params: ViewParams, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A float64 [V, C, C] and t [V]: the colours of a view are A x + t mean, mean the luma of the resized crop.

    Grey vectors pass saturation, hue and grayscale unchanged, so that contrast's shift is the same for every channel.
    """
    gain, grey = params.brightness * params.contrast, params.brightness * (1 - params.contrast)
    if channels == 1:
        return gain[:, None, None], grey
    to_grey = np.ones((3, 1)) * LUMA
    saturation = params.saturation[:, None, None]
    saturate = saturation * np.eye(3) + (1 - saturation) * to_grey
    turn = 2 * np.pi * params.hue
    zero, one, cos, sin = np.zeros_like(turn), np.ones_like(turn), np.cos(turn), np.sin(turn)
    rotation = np.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]).transpose(2, 0, 1)
    matrix = _YIQ_INVERSE @ rotation @ _YIQ @ saturate
    matrix = np.where(params.gray[:, None, None], to_grey @ matrix, matrix)
    return gain[:, None, None] * matrix, grey


def plain(images: Sequence[np.ndarray], *, size_px: int) -> np.ndarray:
    """uint8 [B, C, size, size]: the plain view: the shorter side resized to `size_px`, the centre cut out."""
    views = []
    for image in images:
        side = min(image.shape[1:])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[:, top : top + side, left : left + side]
        taps, weights = resize_taps(np.array([side]), size_px)
        x = _gather(square.transpose(1, 0, 2)[None], np.zeros(1, np.int64), taps, weights)  # [1, size, C, W]
        x = _gather(np.ascontiguousarray(x.transpose(0, 3, 2, 1)), np.zeros(1, np.int64), taps, weights)
        views.append((x[0].transpose(1, 2, 0) + np.float32(0.5)).astype(np.uint8))
    return np.stack(views)
