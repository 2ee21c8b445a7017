"""Ours and others' ways from images to views of one law, for bench_views.py.

The law: a random resized crop of .08 to 1 of the area, ratio 3/4 to 4/3; flip .5; with probability .8 brightness, contrast and
saturation times .6 to 1.4 and hue turned by up to .1; grey .2; with probability `blur` a Gaussian of sigma .1 to 2 pixels.

Each function takes images and gives a call that makes `views` views of each of them on `cores` cores. Encoded images (bytes) are
decoded once a call, by what the library decodes with; pixels (uint8 [H, W, 3]) are given to it as it likes them, outside the
call. FFCV reads pixels in both cases, for that is how it stores small images. Libraries that work image by image do so in this
process, or in a DataLoader of two workers; ours uses two threads.
"""

import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ssl_ray.config import Views
from ssl_ray.views import decode, least_size, load, make_views

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIGMA = (0.1, 2.0)
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask PyPI for a newer version on import

Call = Callable[[], object]
Images = list[bytes] | list[np.ndarray]


def ours(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    load()
    spec, epochs = Views(count=views, size_px=size, blur=blur), itertools.count()
    given, decoded = _given(
        images, lambda data: decode(data, channels=3, least_size=least_size(spec)), lambda pixels: pixels.transpose(2, 0, 1)
    )
    hashes = np.random.default_rng(0).integers(0, 2**64, len(given), dtype=np.uint64)
    parts = [slice(i * len(given) // cores, (i + 1) * len(given) // cores) for i in range(cores)]
    pool = ThreadPoolExecutor(cores)

    def part(which: slice, epoch: int) -> np.ndarray:
        return make_views([decoded(one) for one in given[which]], hashes[which], spec=spec, seed=0, epoch=epoch)

    def call() -> object:
        epoch = next(epochs)
        if cores == 1:
            return part(parts[0], epoch)
        return list(pool.map(part, parts, [epoch] * cores))

    return call


def _given(images: Images, decode: Callable[[bytes], Any], wrap: Callable[[np.ndarray], Any]) -> tuple[list, Callable]:
    """What a call begins with, and what it does to each first: encoded images are decoded, pixels are wrapped before it."""
    if isinstance(images[0], bytes):
        return images, decode
    return [wrap(pixels) for pixels in images], lambda wrapped: wrapped


class _Each(Dataset):
    def __init__(self, given: list, views_of: Callable[[Any], list]):
        self.given, self.views_of = given, views_of

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: int) -> list:
        return self.views_of(self.given[i])


def _one_by_one(given: list, views_of: Callable[[Any], list], cores: int) -> Call:
    """views_of each in turn: here, or by workers that stay alive between calls."""
    if cores == 1:
        return lambda: [views_of(one) for one in given]
    batch = max(1, len(given) // (4 * cores))
    loader = DataLoader(_Each(given, views_of), batch, num_workers=cores, persistent_workers=True, multiprocessing_context="fork")
    return lambda: sum(1 for _ in loader)


def lightly(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    from lightly.transforms.multi_view_transform import MultiViewTransform
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    one = SimCLRViewTransform(
        input_size=size,
        cj_prob=0.8,
        cj_strength=1.0,
        cj_bright=0.4,
        cj_contrast=0.4,
        cj_sat=0.4,
        cj_hue=0.1,
        min_scale=SCALE[0],
        random_gray_scale=0.2,
        gaussian_blur=blur,
        sigmas=SIGMA,
        hf_prob=0.5,
        normalize=None,
    )
    transform = MultiViewTransform(transforms=[one] * views)
    given, decoded = _given(images, _pillow, Image.fromarray)
    return _one_by_one(given, lambda one: transform(decoded(one)), cores)


def torchvision(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(_blur_px(size), SIGMA)], blur))
    transform = v2.Compose(steps)
    given, decoded = _given(images, _tensor, _as_tensor)

    def views_of(one: Any) -> list:
        image = decoded(one)
        return [transform(image) for _ in range(views)]

    return _one_by_one(given, views_of, cores)


def albumentations(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    steps = [
        A.RandomResizedCrop((size, size), scale=SCALE, ratio=RATIO),
        A.HorizontalFlip(p=0.5),
        A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1), p=0.8),
        A.ToGray(p=0.2),
    ]
    if blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=SIGMA, p=blur))
    transform = A.Compose(steps)

    def opencv(data: bytes) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    given, decoded = _given(images, opencv, lambda pixels: pixels)

    def views_of(one: Any) -> list:
        image = decoded(one)
        return [transform(image=image)["image"] for _ in range(views)]

    return _one_by_one(given, views_of, cores)


def kornia(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    import kornia.augmentation as K

    steps = [
        K.RandomResizedCrop((size, size), scale=SCALE, ratio=RATIO),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(K.RandomGaussianBlur((_blur_px(size), _blur_px(size)), SIGMA, p=blur))
    transform = torch.nn.Sequential(*steps)
    given, decoded = _given(images, _tensor, _as_tensor)
    batch = len(given) if size < 64 else 2  # larger batches of photographs leave the cache

    @torch.inference_mode()
    def call() -> object:
        made = []
        for i in range(0, len(given), batch):
            together = torch.stack([decoded(one) for one in given[i : i + batch]]).repeat_interleave(views, 0)
            made.append(transform(together.float() / 255))
        return made

    return call


def dali(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    from nvidia.dali import fn, pipeline_def, types

    # In step with its caller: an executor that works ahead would do so while another is measured.
    @pipeline_def(
        batch_size=len(images),
        num_threads=cores,
        device_id=None,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def pipeline():
        if isinstance(images[0], bytes):
            encoded = [np.frombuffer(data, np.uint8) for data in images]
            image = fn.decoders.image(fn.external_source(source=lambda: encoded, batch=True), device="cpu")
        else:
            image = fn.external_source(source=lambda: images, batch=True, layout="HWC")
        return tuple(view_of(image) for _ in range(views))

    def view_of(image):
        view = fn.random_resized_crop(image, size=(size, size), random_area=SCALE, random_aspect_ratio=RATIO)
        jitter, gray = fn.random.coin_flip(probability=0.8), fn.random.coin_flip(probability=0.2)
        brightness, contrast, saturation = (1 + jitter * fn.random.uniform(range=(-0.4, 0.4)) for _ in range(3))
        view = fn.color_twist(
            view,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation * (1 - gray),
            hue=jitter * fn.random.uniform(range=(-36.0, 36.0)),
        )
        if blur:  # a window of one pixel where there is no blur
            window = 1 + (_blur_px(size) - 1) * fn.random.coin_flip(probability=blur)
            view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=SIGMA), window_size=window)
        return fn.crop_mirror_normalize(view, mirror=fn.random.coin_flip(), dtype=types.UINT8, output_layout="CHW")

    built = pipeline()
    built.build()
    return built.run


def ffcv(images: Images, *, views: int, size: int, blur: float, cores: int) -> Call:
    """Without hue and grayscale, which it does not have; one sample for each view, since there is no decoding to share."""
    from ffcv import transforms
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    assert not blur
    kind = (len(images), views, size, cores)
    if kind in _ffcv_loaders:
        return _ffcv_loaders[kind]
    path = str(Path(tempfile.mkdtemp()) / "images.beton")
    given, decoded = _given(images, _pillow, Image.fromarray)
    pixels = [(np.asarray(decoded(one)),) for one in given] * views
    writer = DatasetWriter(path, {"image": RGBImageField(write_mode="raw")}, num_workers=1)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its progress
        writer.from_indexed_dataset(pixels)
    steps = [
        RandomResizedCropRGBImageDecoder((size, size), scale=SCALE, ratio=RATIO),
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomBrightness(0.4, 0.8),
        transforms.RandomContrast(0.4, 0.8),
        transforms.RandomSaturation(0.4, 0.8),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]
    loader = Loader(
        path, batch_size=256, num_workers=cores, order=OrderOption.SEQUENTIAL, pipelines={"image": steps}, drop_last=False
    )
    _ffcv_loaders[kind] = lambda: sum(1 for _ in loader)
    return _ffcv_loaders[kind]


_ffcv_loaders: dict[tuple[int, ...], Call] = {}
"""It compiles for a quarter of a minute, and numba complains when what it compiled is thrown away."""


def _blur_px(size: int) -> int:
    """A tenth of a view, odd, as SimCLR has it."""
    return 2 * round(size / 20) + 1


def _pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels).permute(2, 0, 1).contiguous()


def _tensor(data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
