"""Views against torchvision's functional ops and a float64 reference made of dense matrices; the same bytes in any batch.

Both the compiled kernel and the maps in numpy with which it is compared elsewhere.
"""

import colorsys
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from ssl_ray.config import Views
from ssl_ray.views import ViewParams, draw, make_views, plain
from ssl_ray.views.linear import colour_maps, numpy_plain, numpy_views, resize_taps

both = pytest.mark.parametrize("make", [make_views, numpy_views])

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}
"""Options under which a view is the (square) image, resized."""


def noise(channels: int, height: int, width: int, *, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (channels, height, width), dtype=np.uint8)


def hashes_of(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, 77)).integers(0, 2**64, count, dtype=np.uint64)


def drawn(images, hashes, spec: Views, *, seed: int, epoch: int) -> ViewParams:
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    return draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)


# --- the naive reference -----------------------------------------------------------------------------------------------


def resize_matrix(source: int, size: int) -> np.ndarray:
    """float64 [size, source]: antialiased bilinear resize, from its definition."""
    support = max(source / size, 1.0)
    centre = (np.arange(size)[:, None] + 0.5) * source / size
    weights = np.maximum(0, 1 - abs(np.arange(source) + 0.5 - centre) / support)
    return weights / weights.sum(axis=1, keepdims=True)


def blur_matrix(size: int, sigma: float) -> np.ndarray:
    """float64 [size, size]: Gaussian over a tenth of the view, odd, at least 3 pixels, borders mirrored."""
    half = max(1, round(size / 20 + 1e-9))
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    padded = np.pad(np.eye(size), [(half, half), (0, 0)], mode="reflect")
    rows = [kernel @ padded[i : i + 2 * half + 1] for i in range(size)]
    return np.array(rows) / kernel.sum()


def rgb_to_yiq(x: np.ndarray) -> np.ndarray:
    r, g, b = x
    return np.stack([0.299 * r + 0.587 * g + 0.114 * b, 0.596 * r - 0.274 * g - 0.322 * b, 0.211 * r - 0.523 * g + 0.312 * b])


def yiq_to_rgb(x: np.ndarray) -> np.ndarray:
    forward = rgb_to_yiq(np.eye(3))
    return np.linalg.solve(forward, x.reshape(3, -1)).reshape(x.shape)


def turn_hue(x: np.ndarray, turns: float) -> np.ndarray:
    """Red over yellow to green for positive turns, in the plane of I and Q."""
    y, i, q = rgb_to_yiq(x)
    turned = (i + 1j * q) * np.exp(-2j * np.pi * turns)
    return yiq_to_rgb(np.stack([y, turned.real, turned.imag]))


def reference(image: np.ndarray, p: ViewParams, at: tuple[int, int], size: int) -> np.ndarray:
    """float64 [C, size, size] before clipping, rounding and solarisation, step by step as torchvision composes."""
    top, left, height, width = (int(x[at]) for x in (p.top, p.left, p.height, p.width))
    x = image[:, top : top + height, left : left + width].astype(np.float64)
    x = resize_matrix(height, size) @ x @ resize_matrix(width, size).T
    if p.flip[at]:
        x = x[:, :, ::-1]
    luma = (lambda x: x[0]) if len(x) == 1 else (lambda x: np.tensordot(GREY_WEIGHTS, x, 1))
    x = x * p.brightness[at]
    x = p.contrast[at] * x + (1 - p.contrast[at]) * luma(x).mean()
    if len(x) == 3:
        x = p.saturation[at] * x + (1 - p.saturation[at]) * luma(x)
        x = turn_hue(x, p.hue[at])
        if p.gray[at]:
            x = np.stack([luma(x)] * 3)
    if p.sigma[at] > 0:
        blur = blur_matrix(size, p.sigma[at])
        x = blur @ x @ blur.T
    return x


def assert_rounds_to(view: np.ndarray, exact: np.ndarray, solarized: bool) -> None:
    """view uint8 is `exact`, clipped, rounded to the nearest, but for the last bits of float32, and solarised."""
    exact = np.clip(exact, 0, 255)
    sure = np.abs(exact - 127.5) > 0.01  # else either side of solarisation's threshold is right
    expected = np.where(solarized & (exact > 127.5), 255 - exact, exact)
    assert np.abs(view - expected)[sure].max(initial=0) <= 0.51


ALL_ON = {"jitter": 0.7, "blur": 0.6, "solarize": 0.3, "grayscale": 0.3, "hue": 0.5, "brightness": 0.8, "contrast": 0.8}
SIZES = [
    (1, 1),
    (1, 17),
    (8, 8),
    (8, 40),
    (28, 28),
    (33, 57),
    (104, 105),  # on both sides of the number of values above which only crops are touched
    (181, 181),
    (182, 181),
    (480, 640),
    (4000, 30),
    (9, 4000),
]


@both
@pytest.mark.parametrize("size_px", [4, 28, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_the_float64_reference_rounded(channels, size_px, make):
    spec = Views(count=3, channels=channels, size_px=size_px, crop_scale=(0.01, 1.0), **ALL_ON)
    images = [noise(channels, *size, seed=i) for i, size in enumerate(SIZES)]
    hashes = hashes_of(len(images))
    views = make(images, hashes, spec=spec, seed=4, epoch=size_px)
    assert views.shape == (len(images), 3, channels, size_px, size_px)
    assert views.dtype == np.uint8
    p = drawn(images, hashes, spec, seed=4, epoch=size_px)
    for at in np.ndindex(len(images), 3):
        assert_rounds_to(views[at], reference(images[at[0]], p, at, size_px), p.solarize[at])


@both
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(4, 64), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_views_of_any_size_are_the_reference(make, height, width, size_px, channels, seed):
    spec = Views(count=2, channels=channels, size_px=size_px, crop_scale=(0.001, 1.0), **ALL_ON)
    image, hashes = noise(channels, height, width, seed=seed), hashes_of(1, seed=seed)
    views = make([image], hashes, spec=spec, seed=seed, epoch=0)
    p = drawn([image], hashes, spec, seed=seed, epoch=0)
    for view in range(2):
        assert_rounds_to(views[0, view], reference(image, p, (0, view), size_px), p.solarize[0, view])


@both
def test_large_images_work_whole_and_in_small_crops(make):
    images = [noise(1, 4000, 4000), noise(1, 3000, 4000)]
    for scale, size_px in (((1.0, 1.0), 32), ((0.00001, 0.0001), 224)):
        spec = Views(count=2, channels=1, size_px=size_px, crop_scale=scale, blur=1.0)
        views = make(images, hashes_of(2), spec=spec, seed=0, epoch=0)
        p = drawn(images, hashes_of(2), spec, seed=0, epoch=0)
        for at in np.ndindex(2, 2):
            assert_rounds_to(views[at], reference(images[at[0]], p, at, size_px), False)


# --- torchvision --------------------------------------------------------------------------------------------------------


def torchvision_geometry(image: np.ndarray, p: ViewParams, at: tuple[int, int], size: int) -> np.ndarray:
    """float32 [C, size, size]: crop, resize, flip and blur of torchvision, without roundings between."""
    box = [int(x[at]) for x in (p.top, p.left, p.height, p.width)]
    x = F.resized_crop(torch.from_numpy(image.astype(np.float32)), *box, [size, size], antialias=True)
    if p.flip[at]:
        x = F.horizontal_flip(x)
    if p.sigma[at] > 0:
        x = F.gaussian_blur(x, [2 * max(1, int(size / 20 + 0.5)) + 1] * 2, [float(p.sigma[at])] * 2)
    return x.numpy()


@both
@pytest.mark.parametrize("size_px", [8, 32, 96])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.001, 0.02)])
def test_crop_resize_flip_and_blur_are_torchvisions(scale, channels, size_px, make):
    spec = Views(count=4, channels=channels, size_px=size_px, crop_scale=scale, jitter=0, grayscale=0, blur=(1.0, 0.0))
    images = [noise(channels, *size, seed=i) for i, size in enumerate(SIZES)]
    hashes = hashes_of(len(images), seed=size_px)
    views = make(images, hashes, spec=spec, seed=2, epoch=0)
    p = drawn(images, hashes, spec, seed=2, epoch=0)
    for at in np.ndindex(len(images), 4):
        theirs = torchvision_geometry(images[at[0]], p, at, size_px)
        assert np.abs(views[at] - theirs).max() <= 0.51
        assert np.abs(views[at].astype(int) - np.rint(theirs)).max() <= 1


def one_change(image: np.ndarray, **options) -> tuple[np.ndarray, ViewParams]:
    """The views [m, C, H, W] of a square image under one colour change, and the parameters [1, m]."""
    spec = Views(count=12, channels=len(image), size_px=image.shape[1], **(WHOLE | options))
    hashes = hashes_of(1)
    return make_views([image], hashes, spec=spec, seed=6, epoch=0)[0], drawn([image], hashes, spec, seed=6, epoch=0)


def test_with_everything_off_a_view_is_the_image():
    image = noise(3, 40, 40)
    assert (one_change(image)[0] == image).all()
    assert np.array_equal(one_change(image, flip=1.0)[0][0], image[:, :, ::-1])


OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize(("low", "high", "strength"), [(60, 170, 0.4), (0, 256, 0.9)])
def test_brightness_contrast_and_saturation_are_torchvisions(name, channels, low, high, strength):
    image = noise(channels, 32, 32, low=low, high=high)
    views, p = one_change(image, jitter=1.0, **(OFF | {name: strength}))
    adjust = getattr(F, f"adjust_{name}")
    for view, factor in zip(views, getattr(p, name)[0], strict=True):
        theirs = adjust(torch.from_numpy(image / np.float32(255)), factor).numpy() * 255
        assert np.abs(view - theirs).max() <= 0.6  # torchvision weighs red .2989, not .299
        eight_bit = adjust(torch.from_numpy(image), factor).numpy()
        assert np.abs(view.astype(int) - eight_bit).max() <= 2  # it truncates


def test_grayscale_is_torchvisions():
    image = noise(3, 32, 32)
    views, _ = one_change(image, grayscale=1.0)
    assert (views == views[:, :1]).all()
    theirs = F.rgb_to_grayscale(torch.from_numpy(image.astype(np.float32)), 3).numpy()
    assert np.abs(views - theirs).max() <= 0.55


def test_solarisation_is_torchvisions():
    image = noise(3, 32, 32)
    options = {"jitter": 0.8, "blur": 0.5}
    before, after = one_change(image, **options)[0], one_change(image, solarize=1.0, **options)[0]
    assert np.array_equal(after, F.solarize(torch.from_numpy(before), 128).numpy())


def test_hue_is_a_rotation_in_the_yiq_plane():
    image = noise(3, 32, 32, low=80, high=150)
    views, p = one_change(image, jitter=1.0, **(OFF | {"hue": 0.5}))
    for view, turns in zip(views, p.hue[0], strict=True):
        exact = turn_hue(image.astype(np.float64), turns)
        assert_rounds_to(view, exact, False)
        assert np.allclose(np.tensordot(GREY_WEIGHTS, exact, 1), np.tensordot(GREY_WEIGHTS, image, 1))


def test_hue_is_near_torchvisions_as_documented():
    """HSV keeps the largest and smallest channel, YIQ keeps luma; the hue that comes out is nearly the same."""
    image = noise(3, 64, 64)
    luma = np.tensordot(GREY_WEIGHTS, image, 1)
    image = (luma + (image - luma) / 2).astype(np.uint8)  # half saturated
    views, p = one_change(image, jitter=1.0, **(OFF | {"hue": 0.1}))
    for view, turns in zip(views, p.hue[0], strict=True):
        theirs = F.adjust_hue(torch.from_numpy(image / np.float32(255)), turns).numpy() * 255
        difference = np.abs(view - theirs)
        assert difference.mean() <= 13
        assert difference.max() <= 75
    hues = [[colorsys.rgb_to_hsv(*pixel)[0] for pixel in x.reshape(3, -1).T[:500] / 255] for x in (view, theirs)]
    turned = (np.subtract(*hues) + 0.5) % 1 - 0.5
    assert np.abs(turned).mean() < 0.03  # turned the other way it would be up to .2


# --- the same bytes in any batch (C2) -----------------------------------------------------------------------------------

POOL_SIZES = [(28, 28), (28, 28), (28, 28), (32, 20), (1, 9), (104, 104), (104, 105), (210, 160), (210, 160), (300, 2)]


def pool(channels: int) -> tuple[list[np.ndarray], np.ndarray]:
    return [noise(channels, *size, seed=i) for i, size in enumerate(POOL_SIZES)], hashes_of(len(POOL_SIZES))


@pytest.fixture(
    scope="module",
    params=itertools.product([(1, 28), (3, 32), (3, 45)], [make_views, numpy_views]),
    ids=lambda given: f"{given[0][0]}-{given[0][1]}-{given[1].__name__}",
)
def alone(request):
    """What makes views, its options, images, hashes and the views of each image made in a batch of its own."""
    (channels, size_px), make = request.param
    spec = Views(count=3, channels=channels, size_px=size_px, blur=(1.0, 0.1), solarize=0.3)
    images, hashes = pool(channels)
    views = [make([images[i]], hashes[i : i + 1], spec=spec, seed=5, epoch=6)[0] for i in range(len(images))]
    return make, spec, images, hashes, np.stack(views)


@settings(deadline=None, max_examples=40)
@given(order=st.lists(st.integers(0, len(POOL_SIZES) - 1), min_size=1, max_size=30))
def test_a_view_is_the_same_in_any_batch(alone, order):
    make, spec, images, hashes, views = alone
    together = make([images[i] for i in order], hashes[order], spec=spec, seed=5, epoch=6)
    assert np.array_equal(together, views[order])


def test_weights_are_bit_for_bit_the_same_in_any_batch():
    """Bytes seldom show a last bit that differs: here it is seen."""
    crops = np.concatenate([np.arange(1, 300), [1000, 4000, 5, 2]])
    for size in (4, 32, 45):
        taps, weights = resize_taps(crops, size)
        for i, crop in enumerate(crops):
            own_taps, own_weights = resize_taps(np.array([crop]), size)
            own = own_taps.shape[2]
            assert np.array_equal(taps[i, :, :own], own_taps[0])
            assert np.array_equal(weights[i, :, :own], own_weights[0])
            assert not weights[i, :, own:].any()


def test_colour_maps_are_bit_for_bit_the_same_in_any_batch():
    p = draw(Views(hue=0.5), seed=0, epoch=0, hashes=hashes_of(200), heights=np.full(200, 9), widths=np.full(200, 9))
    for channels in (1, 3):
        for view in range(4):
            matrix, grey = colour_maps(ViewParams(**{name: x[:, view] for name, x in vars(p).items()}), channels)
            for i in range(200):
                own = ViewParams(**{name: x[i : i + 1, view] for name, x in vars(p).items()})
                own_matrix, own_grey = colour_maps(own, channels)
                assert np.array_equal(matrix[i], own_matrix[0])
                assert grey[i] == own_grey[0]


def test_a_view_is_the_same_in_a_batch_of_many_blocks(alone):
    make, spec, images, hashes, views = alone
    order = np.random.default_rng(0).integers(0, len(images), 200)
    order[50:] = order[50:] % 3  # many of one size
    together = make([images[i] for i in order], hashes[order], spec=spec, seed=5, epoch=6)
    assert np.array_equal(together, views[order])


def test_a_view_is_the_same_in_any_thread_and_with_any_number_of_them(alone):
    make, spec, images, hashes, views = alone
    with ThreadPoolExecutor(4) as threads:
        made = threads.map(lambda _: make(images, hashes, spec=spec, seed=5, epoch=6), range(8))
        assert all(np.array_equal(each, views) for each in made)
    with threadpoolctl.threadpool_limits(1):
        assert np.array_equal(make(images, hashes, spec=spec, seed=5, epoch=6), views)


def test_the_first_views_are_the_same_whatever_their_count(alone):
    make, spec, images, hashes, views = alone
    more = Views(**(vars(spec) | {"count": 8}))
    assert np.array_equal(make(images, hashes, spec=more, seed=5, epoch=6)[:, :3], views)


def test_another_seed_epoch_hash_or_view_is_another_view(alone):
    make, spec, images, hashes, views = alone
    image, own = images[3:4], hashes[3:4]
    others = [
        make(image, own, spec=spec, seed=6, epoch=6),
        make(image, own, spec=spec, seed=5, epoch=5),
        make(image, own, spec=spec, seed=6, epoch=5),
        make(image, own + np.uint64(1), spec=spec, seed=5, epoch=6),
        make(image, own ^ np.uint64(1 << 63), spec=spec, seed=5, epoch=6),
        views[3:4],
    ]
    assert len({view.tobytes() for made in others for view in made[0]}) == len(others) * spec.count


def test_images_are_read_only_and_may_lie_in_memory_as_they_like(alone):
    make, spec, images, hashes, views = alone
    strided = [np.repeat(np.asfortranarray(image), 2, axis=2)[:, :, ::2] for image in images]
    for image in strided:
        image.flags.writeable = False
    assert np.array_equal(make(strided, hashes, spec=spec, seed=5, epoch=6), views)


def test_a_batch_of_no_image_has_no_views():
    assert make_views([], np.zeros(0, np.uint64), spec=Views(count=2), seed=0, epoch=0).shape == (0, 2, 3, 32, 32)


# --- the plain view -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_px", [4, 32, 65])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [plain, numpy_plain])
def test_the_plain_view_is_the_central_square_resized(channels, size_px, make):
    images = [noise(channels, *size, seed=i) for i, size in enumerate(SIZES)]
    views = make(images, size_px=size_px)
    assert views.shape == (len(images), channels, size_px, size_px)
    assert views.dtype == np.uint8
    for view, image in zip(views, images, strict=True):
        side = min(image.shape[1:])
        off = [(n - side) // 2 for n in image.shape[1:]]  # torchvision rounds an odd rest to even, we down
        square = image[:, off[0] : off[0] + side, off[1] : off[1] + side]
        theirs = F.resize(torch.from_numpy(square.astype(np.float32)), [size_px, size_px], antialias=True)
        assert np.abs(view - theirs.numpy()).max() <= 0.51


def test_the_plain_view_of_an_image_of_its_size_is_the_image():
    image = noise(3, 32, 32)
    assert np.array_equal(plain([image], size_px=32)[0], image)
