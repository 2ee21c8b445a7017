"""A picture of what the augmentation does."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ssl_ray.views.make import plain

GAP_PX = 2


def preview(images: Sequence[np.ndarray], views: np.ndarray) -> bytes:
    """A PNG with a row an image: its plain view, then its views; images uint8 [C, H, W], views [B, m, C, size, size]."""
    size = views.shape[-1]
    zoom = max(1, 64 // size)
    rows = np.concatenate([plain(images, size_px=size)[:, None], views], axis=1)
    rows = rows.repeat(zoom, axis=3).repeat(zoom, axis=4)
    rows = np.pad(rows, [(0, 0)] * 3 + [(0, GAP_PX)] * 2, constant_values=255)
    # [B, m + 1, C, h, w] -> [B h, (m + 1) w, C]
    sheet = rows.transpose(0, 3, 1, 4, 2).reshape(rows.shape[0] * rows.shape[3], -1, rows.shape[2])
    sink = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(sink, "PNG")
    return sink.getvalue()
