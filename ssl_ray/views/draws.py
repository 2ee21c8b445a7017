"""The draws of params.py in numba, bit for bit those of numpy_draw: integers, and sums, products and roots in its order.

One view costs .2 us of one core, a quarter of numpy's time, and a small batch no more than that either.
"""

import math

import numpy as np
from numba import types

from ssl_ray.views.compiled import inner, loader

TRIES = 10
WORDS = 2 * TRIES + 12
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@inner
def _uniforms(u, sample, view, key):
    """u float64 [WORDS]: philox.uniform of philox.philox with the counters (sample's halves, view, 0, 1, ...)."""
    for block in range(WORDS // 4):
        x0, x1, x2, x3 = sample & _LOW, sample >> _32, view, np.uint64(block)
        k0, k1 = key[0], key[1]
        for _ in range(10):
            p0, p1 = x0 * _M0, x2 * _M1
            x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ k0, p1 & _LOW, (p0 >> _32) ^ x3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        u[4 * block] = (np.float64(x0) + 0.5) * 2.0**-32
        u[4 * block + 1] = (np.float64(x1) + 0.5) * 2.0**-32
        u[4 * block + 2] = (np.float64(x2) + 0.5) * 2.0**-32
        u[4 * block + 3] = (np.float64(x3) + 0.5) * 2.0**-32


@inner
def _crop(box, u, height, width, scale_low, scale_high, ratio_low, ratio_high, exponent, halvings):
    """box int64 [4]: top, left, height, width."""
    area = np.float64(height * width)
    for i in range(TRIES):
        target = area * (scale_low + (scale_high - scale_low) * u[i])
        x = u[TRIES + i] * exponent
        power = 1.0
        for k in range(10, 0, -1):
            power = 1 + power * x / k
        for _ in range(halvings):
            power = power * power
        ratio = ratio_low * power
        w, h = np.rint(math.sqrt(target * ratio)), np.rint(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            box[2], box[3] = int(h), int(w)
            box[0] = math.floor((height - box[2] + 1) * u[2 * TRIES])
            box[1] = math.floor((width - box[3] + 1) * u[2 * TRIES + 1])
            return
    # None of the tries fitted: the central crop, as large as the ratios allow, a pixel at least.
    box[2], box[3] = height, width
    shape = width / height
    if shape > ratio_high:
        box[3] = int(max(1.0, np.rint(height * ratio_high)))
    if shape < ratio_low:
        box[2] = int(max(1.0, np.rint(width / ratio_low)))
    box[0], box[1] = (height - box[2]) // 2, (width - box[3]) // 2


def _draw(key, views, hashes, heights, widths, crop, halvings, chances, ranges, boxes, factors, flags):
    """Fills boxes int64 [B, m, 4], factors float64 [B, m, 5], flags bool [B, m, 3].

    key uint64 [2]; views uint64 [m], their counter words; hashes uint64 [B]; heights, widths int64 [B]; crop float64 [5]: scale,
    ratio, exponent; chances float64 [5, m] of flip, jitter, gray, blur, solarisation; ranges float64 [5, 2]: lowest and width of
    brightness, contrast, saturation, (2 hue - 1), sigma.
    """
    u = np.empty(WORDS, np.float64)
    at = 2 * TRIES + 2
    for b in range(len(hashes)):
        for v in range(len(views)):
            _uniforms(u, hashes[b], views[v], key)
            _crop(boxes[b, v], u, heights[b], widths[b], crop[0], crop[1], crop[2], crop[3], crop[4], halvings)
            flags[b, v, 0] = u[at] < chances[0, v]
            flags[b, v, 1] = u[at + 6] < chances[2, v]
            flags[b, v, 2] = u[at + 9] < chances[4, v]
            factors[b, v, :3], factors[b, v, 3:] = 1.0, 0.0
            if u[at + 1] < chances[1, v]:
                for i in range(3):
                    factors[b, v, i] = ranges[i, 0] + ranges[i, 1] * u[at + 2 + i]
                factors[b, v, 3] = ranges[3, 1] * (2 * u[at + 5] - 1)
            if u[at + 7] < chances[3, v]:
                factors[b, v, 4] = ranges[4, 0] + ranges[4, 1] * u[at + 8]


_SIGNATURE = types.void(
    types.uint64[::1],
    types.uint64[::1],
    types.Array(types.uint64, 1, "C", readonly=True),
    types.Array(types.int64, 1, "C", readonly=True),
    types.Array(types.int64, 1, "C", readonly=True),
    types.float64[::1],
    types.int64,
    types.float64[:, ::1],
    types.float64[:, ::1],
    types.int64[:, :, ::1],
    types.float64[:, :, ::1],
    types.boolean[:, :, ::1],
)
load = loader(_draw, _SIGNATURE)
"""_draw as machine code."""
