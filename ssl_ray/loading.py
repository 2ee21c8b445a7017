"""A trained encoder for Python, from a run, one of its checkpoints or what `ssl-ray export` wrote. No Ray, no projector.

What comes is a plain module, whose batch norms are torch's own, and the plain view that the read-outs take of an image: so the
features are those of `ssl-ray evaluate`.
"""

import functools
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_ray import storage, views
from ssl_ray.errors import DataError
from ssl_ray.model import PIXEL_MEAN, PIXEL_STD, build_encoder, default_generator_lock, normalized
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import encoder_weights, weights_uri

FORMAT_VERSION = 1
"""Of encoder.json."""


class Encoder(nn.Module):
    """uint8 images [n, C, H, W] -> float32 features h [n, num_features], on the weights' device.

    It normalises the pixels itself: raises ValueError for floats, which would be normalised twice, and for other channels.
    """

    def __init__(self, encoder: nn.Module, *, channels: int):
        super().__init__()
        self.encoder, self.channels = encoder, channels
        self.num_features: int = encoder.num_features  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ValueError(f"images: got {got}, expected uint8 [n, {self.channels}, H, W].")
        device = next(self.parameters()).device
        return self.encoder(normalized(images.to(device).to(memory_format=torch.channels_last)))


def load(uri: str | os.PathLike) -> tuple[Encoder, Callable[[Any], Tensor]]:
    """The encoder in eval mode, and what makes its input: `encoder(preprocess(["a.jpg", "b.png"]))` is float32 [2, D].

    uri: a run (its newest committed checkpoint), a folder RUN/checkpoints/NAME, or an export with its encoder.safetensors.
    encoder: see Encoder; its parameters may be trained further, and features without that want torch.inference_mode().
    preprocess: see there; channels and size are those of the run.
    Raises DataError where there is no encoder, or a file of it is damaged.
    """
    at = storage.absolute(os.fspath(uri))
    if storage.exists(storage.join(at, "encoder.json")):
        made, weights = _described(storage.join(at, "encoder.json")), storage.join(at, "encoder.safetensors")
        if not storage.exists(weights):
            raise DataError(f"{at}: has no encoder.safetensors. Export the run again, with --format safetensors.")
    elif storage.exists(storage.join(at, "run.json")):
        made = _of_run(at)
        weights = weights_uri(storage.join(at, "checkpoints", runs.committed(at, step=None)))
    elif storage.exists(storage.join(at, "weights.safetensors")):
        made, weights = _of_run(at.rsplit("/", 2)[0]), weights_uri(at)
    else:
        raise DataError(f"{at}: no encoder here, expected a run, a checkpoint of one or an export (run.json, encoder.json).")
    encoder = build(weights=encoder_weights(weights), source=weights, **made)
    how = {"channels": made["channels"], "size_px": made["size_px"]}
    return encoder.to(memory_format=torch.channels_last), functools.partial(preprocess, **how)


def _of_run(uri: str) -> dict[str, Any]:
    config = runs.config_of(runs.load_run(uri), uri)
    return {"name": config.model.encoder, "channels": config.views.channels, "size_px": config.views.size_px}


def description(name: str, *, channels: int, size_px: int, num_features: int) -> dict[str, Any]:
    """encoder.json: all that the encoder and its input are made from, beside the weights."""
    return {
        "format_version": FORMAT_VERSION,
        "encoder": name,
        "channels": channels,
        "size_px": size_px,
        "num_features": num_features,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
    }


def _described(uri: str) -> dict[str, Any]:
    found = runs.read_json(uri)
    if found.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{uri}: format_version is {found.get('format_version')}, this ssl_ray reads {FORMAT_VERSION}.")
    name, channels, size_px = found.get("encoder"), found.get("channels"), found.get("size_px")
    sizes = isinstance(size_px, int) and 1 <= size_px <= 4096 and channels in (1, 3)
    if not isinstance(name, str) or not sizes or (found.get("pixel_mean"), found.get("pixel_std")) != (PIXEL_MEAN, PIXEL_STD):
        raise DataError(f"{uri}: damaged, it does not say what the encoder is. Export the run again.")
    return {"name": name, "channels": channels, "size_px": size_px}


def build(name: str, *, channels: int, size_px: int, weights: dict[str, Tensor], source: str) -> Encoder:
    """The encoder `name` with `weights` (names `encoder.*`) in eval mode; leaves torch's generators as they are.

    Raises DataError, naming `source`, if the weights are not those of such an encoder; UsageError as build_encoder does.
    """
    with default_generator_lock, torch.random.fork_rng(devices=[]):
        encoder = Encoder(build_encoder(name, channels=channels, size_px=size_px), channels=channels)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{source}: not the weights of {name} ({storage.one_line(error)[:300]}). Restore it.") from error
    return encoder.eval()


# From anything that is an image to what the encoder takes -----------------------------------------------------------------


def preprocess(images: Any, *, channels: int, size_px: int) -> Tensor:
    """uint8 [n, C, size, size]: the plain views of images: the shorter side resized to `size_px`, the centre cut out.

    images: a list of images, or one: encoded bytes, a path or URI, an image of Pillow, or a uint8 array or tensor [C, H, W]
    with 1 or 3 channels; or a uint8 array [n, C, H, W].  Files and channels follow the rules of docs/formats.md.
    Raises DataError for an image that cannot be read or decoded, ValueError for what is none.
    """
    several = isinstance(images, list | tuple) or getattr(images, "ndim", None) == 4
    made = [
        views.plain([_pixels(image, position, channels=channels)], size_px=size_px)
        for position, image in enumerate(images if several else [images])
    ]
    return torch.from_numpy(np.concatenate([np.empty((0, channels, size_px, size_px), np.uint8), *made]))


def _pixels(image: Any, position: int, *, channels: int) -> np.ndarray:
    what = str(image) if isinstance(image, str | PurePath) else f"image {position}"
    try:
        match image:
            case str() | os.PathLike():
                return views.decode(storage.read_bytes(os.fspath(image)), channels=channels)
            case bytes() | bytearray() | memoryview():
                return views.decode(bytes(image), channels=channels)
            case Image.Image():
                return views.from_pillow(image, channels=channels)
            case np.ndarray() | Tensor():
                return _of_array(np.asarray(image), what, channels=channels)
    except views.UndecodableImage as error:
        raise DataError(f"{what}: {error}. Leave it out, or convert it.") from error
    raise ValueError(
        f"{what}: got {type(image).__name__}, expected encoded bytes, a path, an image of Pillow or a uint8 array [C, H, W]."
    )


def _of_array(pixels: np.ndarray, what: str, *, channels: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.size:
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"{what}: got {got}, expected uint8 [C, H, W] with 1 or 3 channels.")
    if pixels.shape[0] == channels:
        return pixels
    return (
        np.repeat(pixels, 3, axis=0)
        if channels == 3
        else views.from_pillow(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), channels=1)
    )
