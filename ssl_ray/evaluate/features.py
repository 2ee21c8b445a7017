"""Features h of plain images, and batch-norm statistics for an encoder that was never trained."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ssl_ray.errors import TrainingError

# The base of BatchNorm1d, 2d, 3d and SyncBatchNorm, as torch.optim.swa_utils.update_bn uses it.
_BatchNorm = nn.modules.batchnorm._BatchNorm


def features(encode: Callable[[Tensor], Tensor], images: np.ndarray, *, batch: int = 256) -> np.ndarray:
    """float32 [n, D]: the representation h of every image, in order.

    encode: uint8 [B, C, H, W] on the CPU -> [B, D] on any device; it normalises the pixels itself. The caller puts its
    module in eval mode, so that a feature does not depend on the other images of its batch.
    images: uint8 [n, C, H, W], n >= 1; may be read-only (a memory map).  batch: images in one call of encode.
    Raises ValueError for other shapes, TrainingError if the encoder gives NaN or infinity.
    """
    _check_images(images, at_least=1)
    h: np.ndarray | None = None
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            # A copy: torch warns of arrays that are read-only.
            part = encode(torch.from_numpy(np.array(images[start : start + batch]))).float().cpu().numpy()
            if h is None:
                h = np.empty((len(images), part.shape[1]), np.float32)
            h[start : start + len(part)] = part
    assert h is not None
    bad = np.count_nonzero(~np.isfinite(h).all(axis=1))
    if bad:
        raise TrainingError(
            f"evaluate: the encoder gives NaN or infinity for {bad} of {len(h)} images, expected finite features. "
            "Its training diverged: evaluate an earlier checkpoint, or train anew with a lower optim.lr."
        )
    return h


def calibrate_batch_norm(module: nn.Module, images: np.ndarray, *, batch: int, encode: Callable[[Tensor], Tensor]) -> None:
    """Set the running statistics of all batch norms in `module` to those of `images`; nothing else changes.

    A fresh encoder normalises with mean 0 and variance 1, which fit no layer: as a reference it would be a straw man.
    Statistics are averages over near-equal batches (sizes differ by at most one, none is left out): the mean is that
    of all images to within that rounding, the variance the mean of the batches' variances. Only the batch norms are in
    train mode meanwhile, so that dropout stays off; their momentum and every module's mode are restored.
    images: uint8 [n, C, H, W], n >= 2.  batch: most images in one call, but never fewer than 2 or 3.
    encode: as for `features`, over `module`.
    Raises ValueError for other shapes, or for n < 2, which has no variance.
    """
    _check_images(images, at_least=2)
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    modes = [(m, m.training) for m in module.modules()]
    count = max(1, min(-(-len(images) // batch), len(images) // 2))
    try:
        module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's name for a cumulative average
            norm.train()
        with torch.no_grad():
            for part in np.array_split(images, count):
                encode(torch.from_numpy(np.array(part)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for each, mode in modes:
            each.training = mode


def _check_images(images: np.ndarray, *, at_least: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < at_least:
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}, expected uint8 [n, C, H, W] with n >= {at_least}.")
