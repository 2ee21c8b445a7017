"""Views on a torch device: the linear maps of linear.py as batched matrix products, with the same bytes on every device.

view = clip(A (Ry X Rx') + t mean): two products crop, resize and flip, two more blur those views that are blurred, then
colours are mixed pixel by pixel.  `device_views` makes whole views; `photometrics` makes blur, colours and solarisation of
crops that the compiled kernel made (`views.photometric_on=worker`).

A library adds up a product in an order that depends on sizes, threads and device, and what is rounded depends on the order.
So nothing is rounded inside a sum: weights are whole numbers that add up to 2**16, pixels whole numbers up to 255, and every
sum stays below 2**24, up to where float32 holds each whole number.  Between two products pixels are rounded to 256ths of a
grey level and go on in two parts, the level and the rest.  Colours are products and sums of single elements, each rounded as
IEEE says.  A view so depends on its image and its parameters alone: not on the batch, nor on threads and workers, nor on
whether a CPU or a GPU makes it.

Weights are off by up to 2**-16: a sum over T taps by T / 500 levels at worst, before colours are multiplied.  The matrices are
dense, which suits a GPU; on a CPU the compiled kernel (kernel.py) is several times as fast.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_ray.config import Views
from ssl_ray.views.linear import LUMA, blur_kernel, blur_radius, colour_maps, resize_taps
from ssl_ray.views.params import ViewParams, draw

_ONE = 2**16
"""The sum of a pixel's weights."""
_BLOCK = {"cpu": 2**20, "cuda": 2**25}
"""Values to work on at a time, some 20 bytes each: on a CPU about as many as stay in its cache."""


def photometrics(crops: Tensor, hashes: np.ndarray, *, spec: Views, seed: int, epoch: int) -> Tensor:
    """uint8 [B, m, C, size, size], on the device of `crops`: their blur, colours and solarisation.

    crops: of the same shape, what `make_views` makes with `crops_only(spec)`; hashes uint64 [B], of their samples.
    Crops are rounded, so that a value may differ from that of `make_views` by (|A| + |t|) / 2 levels, |A| the sum over its row
    of A, and one more for its own rounding.  At the default strengths that is four at worst; a byte in seven is seen to differ
    by one, one in ten thousand by two.  Raises RuntimeError if torch was told to make float32 products less exact.
    """
    sizes = np.full(len(hashes), spec.size_px)  # only boxes depend on them
    params = _flat(draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=sizes, widths=sizes))
    flat = crops.flatten(0, 1)
    views = torch.empty_like(flat)
    block = max(1, _block(crops.device) // (spec.channels * spec.size_px**2))
    with _exact_products(crops.device):
        for start in range(0, len(flat), block):
            now = slice(start, start + block)
            views[now] = _finished(flat[now], _part(params, now))
    return views.reshape(crops.shape)


def device_views(
    images: Sequence[np.ndarray], hashes: np.ndarray, *, spec: Views, seed: int, epoch: int, device: torch.device
) -> Tensor:
    """uint8 [B, m, C, size, size] on `device`: what `make_views` makes of B images, uint8 [C, H, W] each, within one level.

    Images of a block are padded to one size, which changes no byte: pads have no weight.  Raises RuntimeError as
    `photometrics` does.
    """
    heights, widths = (np.array([image.shape[axis] for image in images], np.int64) for axis in (1, 2))
    params = draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)
    views = torch.empty((len(images), spec.count, spec.channels, spec.size_px, spec.size_px), dtype=torch.uint8, device=device)
    with _exact_products(device):
        for own in _blocks(heights, widths, spec, limit=_block(device)):
            padded = np.zeros((len(own), spec.channels, heights[own].max(), widths[own].max()), np.uint8)
            for into, i in zip(padded, own, strict=True):
                into[:, : heights[i], : widths[i]] = images[i]
            some = _part(params, own)
            crops = _resized(torch.from_numpy(padded).to(device), some, size=spec.size_px)
            views[torch.from_numpy(own).to(device)] = _finished(crops, _flat(some)).unflatten(0, some.top.shape)
    return views


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Products in float32, whatever is around: with TF32 or bfloat16 they would be wrong by whole levels."""
    if torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError("views on a device need exact products: leave torch.set_float32_matmul_precision at 'highest'")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _block(device: torch.device) -> int:
    return _BLOCK.get(device.type, _BLOCK["cuda"])


def _blocks(heights: np.ndarray, widths: np.ndarray, spec: Views, *, limit: int) -> Iterator[np.ndarray]:
    """The positions int64 of the images, those of like size together, so many that `limit` values are worked on."""
    own: list[int] = []
    for i in np.lexsort((widths, heights)).tolist():
        more = [*own, i]
        height, width = int(heights[more].max()), int(widths[more].max())
        view = spec.size_px * (height + (spec.channels + 1) * width)
        if own and len(more) * (spec.channels * height * width + spec.count * view) > limit:
            yield np.array(own)
            more = [i]
        own = more
    if own:
        yield np.array(own)


def _part(params: ViewParams, at: np.ndarray | slice) -> ViewParams:
    return ViewParams(**{name: values[at] for name, values in vars(params).items()})


def _flat(params: ViewParams) -> ViewParams:
    """Arrays [B * m] of arrays [B, m]."""
    return ViewParams(**{name: values.reshape(-1) for name, values in vars(params).items()})


# --- products -----------------------------------------------------------------------------------------------------------


def _resized(images: Tensor, params: ViewParams, *, size: int) -> Tensor:
    """float32 [n * m, C, size, size] in 256ths of a level: the crops, flipped, of images uint8 [n, C, H, W]; params [n, m]."""
    n, _, height, width = images.shape
    one = _flat(params)
    taps, weights = resize_taps(one.height, size)
    down = _dense(taps + one.top[:, None, None], weights, height, device=images.device)  # [n * m, size, H]
    taps, weights = resize_taps(one.width, size)
    across = _dense(taps + one.left[:, None, None], weights, width, device=images.device)
    flipped = np.flatnonzero(one.flip)
    if len(flipped):
        at = torch.from_numpy(flipped).to(images.device)
        across[at] = across[at].flip(1)
    return _mapped(images, down.reshape(n, -1, height), across)


def _blurred(x: Tensor, sigma: np.ndarray) -> Tensor:
    """float32 [V, C, size, size] in 256ths of a level; x likewise or uint8; sigma float64 [V]; borders are mirrored."""
    size = x.shape[-1]
    half = blur_radius(size)
    mirrored = np.pad(np.arange(size), half, mode="reflect")
    taps = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * half + 1)[None]  # [1, size, 2 half + 1]
    weights = np.stack([blur_kernel(one, size) for one in sigma.tolist()])[:, None]  # [V, 1, 2 half + 1]
    both = _dense(taps, weights, size, device=x.device)
    return _mapped(x, both, both)


def _dense(taps: np.ndarray, weights: np.ndarray, length: int, *, device: torch.device) -> Tensor:
    """float32 [V, size, length]: whole numbers; taps and weights [V or 1, size or 1, T], of which the latter sum to 1."""
    at, whole = torch.from_numpy(np.ascontiguousarray(taps)).to(device), torch.from_numpy(_whole(weights)).to(device)
    views, size = max(len(at), len(whole)), max(at.shape[1], whole.shape[1])
    dense = torch.zeros((views, size, length), device=device)
    return dense.scatter_add_(2, at.expand(views, size, -1), whole.expand(views, size, -1))


def _whole(weights: np.ndarray) -> np.ndarray:
    """float32, whole numbers that sum to _ONE: rounded so that no run of them is off by more than one from its share."""
    upto = np.rint(np.cumsum(weights, axis=-1) * _ONE)
    return np.diff(upto, axis=-1, prepend=0).astype(np.float32)


def _mapped(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """float32 [n * m, C, size, size] = Ry X Rx', rounded to 256ths of a level.

    x uint8, or float32 in 256ths of a level, [n, C, H, W]; down [n, m * size, H], across [n * m, size, W].
    """
    n, channels, height, width = x.shape
    size = across.shape[1]
    level, rest = _parts(x.permute(0, 2, 1, 3).reshape(n, height, channels * width))
    y = _joined(torch.bmm(down, level), None if rest is None else torch.bmm(down, rest))  # [n, (m, y), (C, W)]
    level, rest = _parts(y.reshape(-1, size * channels, width))  # [n * m, (y, C), W]
    assert rest is not None
    turned = across.transpose(1, 2)
    y = _joined(torch.bmm(level, turned), torch.bmm(rest, turned))  # [n * m, (y, C), x]
    return y.reshape(-1, size, channels, size).transpose(1, 2)


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whole levels, and 256ths of a level beyond them if there can be any."""
    if x.dtype == torch.uint8:
        return x.float(), None
    level = x.floor()
    return level, (x - level).mul_(256)


def _joined(level: Tensor, rest: Tensor | None) -> Tensor:
    """Grey levels, rounded to 256ths, of the sums of weights times levels and rests."""
    x = level.div_(_ONE // 256)  # powers of two: exact
    x = x.add_(0.5) if rest is None else x.add_(rest.div_(_ONE).add_(0.5))
    return x.floor_().div_(256)


# --- colours ------------------------------------------------------------------------------------------------------------


def _finished(crops: Tensor, params: ViewParams) -> Tensor:
    """uint8 [V, C, size, size]: blur, colours and solarisation of crops of that shape, uint8 or float32 in 256ths; params [V]."""
    _, channels, size, _ = crops.shape
    device = crops.device
    matrix, grey = colour_maps(params, channels)
    weights = torch.from_numpy(matrix.astype(np.float32)).to(device)[..., None, None]
    sums = crops.sum(dim=(-2, -1), dtype=torch.float64)  # of multiples of 1/256, below 2**53 of them: exact in any order
    luma = (sums * torch.from_numpy(LUMA if channels == 3 else np.ones(1)).to(device)).unbind(1)
    mean = sum(luma[1:], luma[0]) / size**2
    shift = (torch.from_numpy(grey).to(device) * mean).float()

    x = crops.float()
    blurred = np.flatnonzero(params.sigma > 0)
    if len(blurred) == len(crops):
        x = _blurred(crops, params.sigma)
    elif len(blurred):
        at = torch.from_numpy(blurred).to(device)
        x[at] = _blurred(crops[at], params.sigma[blurred])

    total = x[:, None, 0] * weights[:, :, 0]
    for c in range(1, channels):
        total += x[:, None, c] * weights[:, :, c]
    total += (shift + 0.5)[:, None, None, None]
    views = total.clamp_(0, 255.5).to(torch.uint8)
    solarized = np.flatnonzero(params.solarize)
    if len(solarized):
        at = torch.from_numpy(solarized).to(device)
        views[at] = torch.where(views[at] >= 128, 255 - views[at], views[at])
    return views
