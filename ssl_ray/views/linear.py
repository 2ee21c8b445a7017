"""Views as linear maps: view = clip(A (Ry X Rx') + t mean), where Ry and Rx crop, resize, flip and blur.

Here they are written in numpy, to be read and to be compared with: the compiled kernel (kernel.py), which makes the views of
a run, does the same within one grey level.  All sums run over taps in a fixed order, element by element, so that a view has
the same bytes whatever batch, process or thread count makes it.  A view of 32 px in RGB costs about 28 us of one core, one
of 224 px 1 to 3 ms; the kernel's costs a tenth.

Crop, antialiased resize, flip, blur and each colour change but hue are those of torchvision to rounding.  Where views differ:
values are clipped and rounded once, at the end, not after each step; the order is always brightness, contrast, saturation,
hue, grayscale, solarisation; blur comes before the colours, with which it commutes but for clipping.  Hue turns in the YIQ
plane, which keeps luma, not in HSV, which keeps the largest and smallest channel: for colours drawn evenly and half faded, a
tenth of a turn comes out 13 levels apart on average, 71 at most, and the hue itself by .025 turns on average.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ssl_ray.config import Views
from ssl_ray.views.params import ViewParams, draw

LUMA = np.array([0.299, 0.587, 0.114])
"""Rec. 601, as PIL and torchvision weigh."""
# RGB -> YIQ (FCC NTSC, 1953).
_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_TO_GREY = np.ones((3, 1)) * LUMA
_CHROMA = _YIQ_INVERSE @ np.diag([0.0, 1.0, 1.0]) @ _YIQ
"""What a colour has beyond its grey."""
_CHROMA_TURNED = _YIQ_INVERSE @ np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]) @ _YIQ
"""The same, turned by a quarter in the plane of I and Q, from red over yellow to green as in torchvision."""
COLOUR_MAPS = np.concatenate([_TO_GREY, _CHROMA, _CHROMA_TURNED]).reshape(-1)
"""float64 [27]: the three maps of which colour_maps is made, for the kernel."""
_BLOCK_PX = 2**15
"""Views are made in blocks of about this size, which stay in the cache."""
_LARGE = 2**15
"""An image of more values than this is not made float as a whole."""


def numpy_views(images: Sequence[np.ndarray], hashes: np.ndarray, *, spec: Views, seed: int, epoch: int) -> np.ndarray:
    """uint8 [B, m, C, size, size]: what `make_views` makes, in numpy."""
    heights = np.array([image.shape[1] for image in images], np.int64)
    widths = np.array([image.shape[2] for image in images], np.int64)
    params = draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)
    size, channels = spec.size_px, spec.channels
    views = np.empty((len(images), spec.count, channels, size, size), np.uint8)
    for own in _groups(heights, widths):
        image, view = (at.reshape(-1) for at in np.meshgrid(own, np.arange(spec.count), indexing="ij"))
        if images[own[0]].size > _LARGE:  # of a large image only the crop is touched, a view at a time
            for i, v in zip(image, view, strict=True):
                one = _take(params, np.array([i]), np.array([v]))
                views[i, v] = _views_of(_rows(_crop(images[i], one)), np.array([0]), _at_origin(one), size=size)[0]
            continue
        rows = _rows(np.stack([images[i] for i in own])).astype(np.float32)
        which = np.repeat(np.arange(len(own)), spec.count)
        block = max(1, _BLOCK_PX // (size * max(size, rows.shape[-1])))
        for start in range(0, len(which), block):
            now = slice(start, start + block)
            made = _views_of(rows, which[now], _take(params, image[now], view[now]), size=size)
            views[image[now], view[now]] = made
    return views


def _groups(heights: np.ndarray, widths: np.ndarray) -> list[np.ndarray]:
    """The positions of the images of each size."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        sizes.setdefault(size, []).append(i)
    return [np.array(own) for own in sizes.values()]


def _take(params: ViewParams, image: np.ndarray, view: np.ndarray) -> ViewParams:
    return ViewParams(**{name: values[image, view] for name, values in vars(params).items()})


def _crop(image: np.ndarray, one: ViewParams) -> np.ndarray:
    """uint8 [1, C, height, width]: the crop of a single view."""
    top, left, height, width = (int(size[0]) for size in (one.top, one.left, one.height, one.width))
    return image[None, :, top : top + height, left : left + width]


def _at_origin(params: ViewParams) -> ViewParams:
    return dataclasses.replace(params, top=np.zeros_like(params.top), left=np.zeros_like(params.left))


def _rows(images: np.ndarray) -> np.ndarray:
    """[n, H, C, W] of images [n, C, H, W]: a row of all channels in one piece, to be fetched at once."""
    return np.ascontiguousarray(images.transpose(0, 2, 1, 3))


def _views_of(rows: np.ndarray, which: np.ndarray, params: ViewParams, *, size: int) -> np.ndarray:
    """uint8 [V, C, size, size]: views of rows[which], rows [n, H, C, W]; params of [V]."""
    from scipy.ndimage import correlate1d  # here: it takes a quarter of a second, in every process of a run

    channels = rows.shape[2]
    taps_y, weights_y = resize_taps(params.height, size)
    taps_x, weights_x = resize_taps(params.width, size)
    flip = params.flip[:, None, None]
    taps_x = np.where(flip, taps_x[:, ::-1], taps_x)
    weights_x = np.where(flip, weights_x[:, ::-1], weights_x)
    x = _gather(rows, which, taps_y + params.top[:, None, None], weights_y)  # [V, size, C, W]
    columns = np.ascontiguousarray(x.transpose(0, 3, 2, 1))  # [V, W, C, size]
    x = _gather(columns, np.arange(len(which)), taps_x + params.left[:, None, None], weights_x)  # [V, size (x), C, size (y)]
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))  # [V, C, y, x]
    # Converted first: a sum that converts as it goes cuts rows where its buffer ends, which depends on the batch.
    mean = _luma(x).reshape(len(x), -1).astype(np.float64).mean(axis=1)
    for i in np.flatnonzero(params.sigma > 0):
        kernel = blur_kernel(float(params.sigma[i]), size)
        x[i] = correlate1d(correlate1d(x[i], kernel, axis=1, mode="mirror"), kernel, axis=2, mode="mirror")
    matrix, grey = colour_maps(params, channels)
    x = _coloured(x, matrix.astype(np.float32), (grey * mean).astype(np.float32))
    np.clip(x, 0, 255, out=x)
    x += np.float32(0.5)
    views = x.astype(np.uint8)
    solarized = views[params.solarize]
    views[params.solarize] = np.where(solarized >= 128, 255 - solarized, solarized)
    return views


def _gather(rows: np.ndarray, which: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [V, out, ...]: sums, in float32, of weights [V, out, T] times rows[which, taps [V, out, T]]; rows [n, H, ...]."""
    flat = rows.reshape(rows.shape[0] * rows.shape[1], -1)
    # A padded tap has weight 0, yet must stay inside its own image.
    at = which[:, None, None] * rows.shape[1] + np.minimum(taps, rows.shape[1] - 1)
    weights = weights.astype(np.float32)
    total: np.ndarray | None = None
    for t in range(taps.shape[2]):
        part = flat.take(at[..., t].reshape(-1), axis=0).astype(np.float32, copy=False)
        part *= weights[..., t].reshape(-1, 1)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total.reshape(*taps.shape[:2], *rows.shape[2:])


def _luma(x: np.ndarray) -> np.ndarray:
    """float32 [V, H, W] of x [V, C, H, W]."""
    if x.shape[1] == 1:
        return x[:, 0]
    red, green, blue = LUMA.astype(np.float32)
    return x[:, 0] * red + x[:, 1] * green + x[:, 2] * blue


def _coloured(x: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """float32 [V, C, H, W]: matrix [V, C, C] times the colours of x [V, C, H, W], plus shift [V]."""
    weights = matrix[..., None, None]
    total = x[:, None, 0] * weights[:, :, 0]
    for c in range(1, x.shape[1]):
        total += x[:, None, c] * weights[:, :, c]
    total += shift[:, None, None, None]
    return total


def resize_taps(crop: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Source positions int64 and weights float64, [V, size, T] each, that resize `crop` [V] pixels to `size`.

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
    # One by one: a plain sum adds in an order that depends on the number of taps, which is that of the batch's largest crop.
    weights /= np.cumsum(weights, axis=-1)[..., -1:]
    return np.minimum(taps, crop[:, None, None] - 1).astype(np.int64), weights


def blur_radius(size: int) -> int:
    """So that the blur of a view reaches over a tenth of it: 2 r + 1 pixels, at least 3."""
    return max(1, math.floor(size / 20 + 0.5))


def blur_kernel(sigma: float, size: int) -> np.ndarray:
    """float64 [2 r + 1]: a Gaussian at whole pixels, normalised."""
    half = blur_radius(size)
    x = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    return kernel / kernel.sum()


def colour_maps(params: ViewParams, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A float64 [V, C, C] and t [V]: the colours of a view are A x + t mean, mean the luma of the resized crop.

    Saturation and hue leave luma as it is and act on the rest of a colour, which grayscale takes away. Grey vectors pass all
    three unchanged, so that contrast's shift is the same for every channel. Element by element, without BLAS, which rounds
    one matrix and a stack of them differently.
    """
    gain, grey = params.brightness * params.contrast, params.brightness * (1 - params.contrast)
    if channels == 1:
        return gain[:, None, None], grey
    turn = 2 * np.pi * params.hue
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    saturation = np.where(params.gray, 0.0, params.saturation)[:, None, None]
    return gain[:, None, None] * (_TO_GREY + saturation * (cos * _CHROMA + sin * _CHROMA_TURNED)), grey


def numpy_plain(images: Sequence[np.ndarray], *, size_px: int) -> np.ndarray:
    """uint8 [B, C, size, size]: what `plain` makes, in numpy."""
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
