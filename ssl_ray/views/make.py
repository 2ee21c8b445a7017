"""Views of a batch: parameters drawn, then one call of the compiled kernel, which is loaded when first used."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ssl_ray.config import Views
from ssl_ray.views.linear import COLOUR_MAPS, LUMA, blur_radius
from ssl_ray.views.params import ViewParams, draw


def make_views(
    images: Sequence[np.ndarray], hashes: np.ndarray, *, spec: Views, seed: int, epoch: int, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8 [B, m, C, size, size]: the views of B images, uint8 [C, H, W] each, with hashes uint64 [B].

    out: an array of that shape, contiguous, to write them to.
    Images may lie in memory as they like; as `decode` gives them, the colours of a pixel together, is fastest.
    """
    heights, widths = _sizes(images)
    params = draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)
    return views_of(images, params, size_px=spec.size_px, channels=spec.channels, out=out)


def crops_only(spec: Views) -> Views:
    """`spec` without blur, colours and solarisation: crops, resized and flipped, to which device.photometrics does the rest."""
    return dataclasses.replace(spec, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


def plain(images: Sequence[np.ndarray], *, size_px: int) -> np.ndarray:
    """uint8 [B, C, size, size]: the plain view: the shorter side resized to `size_px`, the centre cut out."""
    heights, widths = (size[:, None] for size in _sizes(images))
    side = np.minimum(heights, widths)
    no, one, zero = np.zeros(side.shape, bool), np.ones(side.shape), np.zeros(side.shape)
    params = ViewParams(
        top=(heights - side) // 2,
        left=(widths - side) // 2,
        height=side,
        width=side,
        flip=no,
        brightness=one,
        contrast=one,
        saturation=one,
        hue=zero,
        gray=no,
        sigma=zero,
        solarize=no,
    )
    return views_of(images, params, size_px=size_px, channels=images[0].shape[0])[:, 0]


def load() -> None:
    """Compiles the kernels, or finds them compiled: some seconds the first time on a machine, else a fraction of one."""
    from ssl_ray.views import draws, kernel, png, stored

    kernel.load()
    draws.load()
    png.load()
    stored.load()


def views_of(
    images: Sequence[np.ndarray], params: ViewParams, *, size_px: int, channels: int, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8 [B, m, C, size, size]: the views with parameters [B, m], whose crops lie inside their images; in `out` if given."""
    from ssl_ray.views import kernel  # here, since numba takes .3 s to import and most commands make no views

    for image in images:  # the kernel reads memory by its address
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != channels:
            raise ValueError(f"an image must be uint8 [{channels}, H, W], got {image.dtype} {list(image.shape)}")
    shape = (*params.top.shape, channels, size_px, size_px)
    views = np.empty(shape, np.uint8) if out is None else out
    if views.shape != shape or views.dtype != np.uint8 or not views.flags.c_contiguous:
        raise ValueError(f"out must be uint8 {list(shape)}, contiguous, got {views.dtype} {list(views.shape)}")
    kernel.load()(
        np.array([image.__array_interface__["data"][0] for image in images], np.int64),
        np.array([image.strides for image in images], np.int64).reshape(-1, 3),
        np.stack([params.top, params.left, params.height, params.width], axis=-1),
        np.stack([params.brightness, params.contrast, params.saturation, params.hue, params.sigma], axis=-1),
        np.stack([params.flip, params.gray, params.solarize], axis=-1),
        COLOUR_MAPS if channels == 3 else COLOUR_MAPS[:0],
        LUMA if channels == 3 else np.ones(1),
        size_px,
        blur_radius(size_px),
        views.reshape(-1),
    )
    return views


def _sizes(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64 [B]."""
    sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]
