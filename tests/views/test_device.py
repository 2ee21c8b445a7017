"""Views on a device against numpy's maps, a float64 reference and torchvision; the same bytes however they are added up."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear import ALL_ON, hashes_of, noise, reference
from torchvision.transforms.v2 import functional as F

from ssl_ray.config import Views
from ssl_ray.views import ViewParams, crops_only, device, draw, make_views
from ssl_ray.views.device import device_views, photometrics
from ssl_ray.views.linear import colour_maps, numpy_views

CPU = torch.device("cpu")
STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)}


def whole_views(images, hashes, **options) -> np.ndarray:
    return device_views(images, hashes, **options, device=CPU).numpy()


def crops_finished(images, hashes, *, spec: Views, seed: int, epoch: int) -> np.ndarray:
    """What a run makes with views.photometric_on=worker."""
    crops = make_views(images, hashes, spec=crops_only(spec), seed=seed, epoch=epoch)
    return photometrics(torch.from_numpy(crops), hashes, spec=spec, seed=seed, epoch=epoch).numpy()


both = pytest.mark.parametrize("make", [whole_views, crops_finished])


def drawn(images, hashes, spec: Views, *, seed: int, epoch: int) -> ViewParams:
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    return draw(spec, seed=seed, epoch=epoch, hashes=hashes, heights=heights, widths=widths)


def gains(p: ViewParams, channels: int) -> np.ndarray:
    """[B, m]: by how much a view may change if every value of its crop changes by one."""
    flat = ViewParams(**{name: values.reshape(-1) for name, values in vars(p).items()})
    matrix, grey = colour_maps(flat, channels)
    return (np.abs(matrix).sum(axis=-1).max(axis=-1) + np.abs(grey)).reshape(p.top.shape)


def differences(made: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[B, m]: the largest difference in each view."""
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype == np.uint8
    return np.abs(made.astype(int) - expected).max(axis=(2, 3, 4), initial=0)


# --- the maps -----------------------------------------------------------------------------------------------------------

PROBABILITY = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.tuples(st.floats(0, 1), st.floats(0, 1)))
SPECS = st.builds(
    Views,
    count=st.integers(2, 9),
    channels=st.sampled_from([1, 3]),
    size_px=st.integers(4, 70),
    crop_scale=st.sampled_from([(0.08, 1.0), (0.001, 0.01), (1.0, 1.0)]),
    flip=PROBABILITY,
    jitter=PROBABILITY,
    brightness=st.sampled_from([0.0, 0.4]),
    contrast=st.sampled_from([0.0, 0.4]),
    saturation=st.sampled_from([0.0, 0.4]),
    hue=st.sampled_from([0.0, 0.1, 0.5]),
    grayscale=PROBABILITY,
    blur=PROBABILITY,
    blur_sigma=st.sampled_from([(0.1, 2.0), (0.01, 0.02), (5.0, 100.0)]),
    solarize=PROBABILITY,
)
SIZES = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(SPECS, SIZES, st.integers(0, 2**32 - 1))
def test_whole_views_are_numpys_within_a_level(spec, sizes, seed):
    images, hashes = [noise(spec.channels, *size, seed=seed) for size in sizes], hashes_of(len(sizes), seed=seed)
    options = {"spec": spec, "seed": seed, "epoch": 1}
    assert differences(whole_views(images, hashes, **options), numpy_views(images, hashes, **options)).max() <= 1


@pytest.mark.parametrize(
    ("count", "channels", "size_px", "source"), [(9, 3, 32, (32, 32)), (2, 3, 224, (375, 500)), (8, 1, 8, (8, 8))]
)
def test_ninety_nine_bytes_in_a_hundred_are_numpys(count, channels, size_px, source):
    spec = Views(count=count, channels=channels, size_px=size_px, blur=(1.0, 0.1), solarize=0.2, jitter=(0.8, 0.0))
    images, hashes = [noise(channels, *source, seed=i) for i in range(2 if size_px == 224 else 20)], hashes_of(20)
    options = {"spec": spec, "seed": 3, "epoch": 0}
    made, expected = (make(images, hashes[: len(images)], **options) for make in (whole_views, numpy_views))
    assert differences(made, expected).max() <= 1
    assert np.count_nonzero(made != expected) < made.size / 100


@pytest.mark.parametrize("size_px", [4, 28, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_views_are_the_float64_reference_rounded(channels, size_px):
    sizes = [(1, 1), (1, 17), (8, 40), (33, 57), (181, 182), (480, 640), (4000, 30)]
    spec = Views(count=3, channels=channels, size_px=size_px, crop_scale=(0.01, 1.0), **ALL_ON)
    images, hashes = [noise(channels, *size, seed=i) for i, size in enumerate(sizes)], hashes_of(len(sizes))
    views, p = whole_views(images, hashes, spec=spec, seed=4, epoch=1), drawn(images, hashes, spec, seed=4, epoch=1)
    allowed = 0.51 + 0.02 * gains(p, channels)
    for at in np.ndindex(*p.top.shape):
        assert_rounds_to(views[at], reference(images[at[0]], p, at, size_px), p.solarize[at], allowed[at])


@pytest.mark.parametrize("size_px", [4, 28, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_finished_crops_are_the_float64_reference_of_crops(channels, size_px):
    spec = Views(count=5, channels=channels, size_px=size_px, flip=0.0, **ALL_ON)
    crops = np.stack([noise(channels, size_px, size_px, seed=i) for i in range(20)]).reshape(4, 5, channels, size_px, size_px)
    views = photometrics(torch.from_numpy(crops), hashes_of(4), spec=spec, seed=4, epoch=1).numpy()
    p = drawn(crops[:, 0], hashes_of(4), spec, seed=4, epoch=1)
    whole, none = np.full((4, 5), size_px), np.zeros((4, 5), int)
    p = dataclasses.replace(p, top=none, left=none, height=whole, width=whole)
    allowed = 0.51 + 0.02 * gains(p, channels)
    for at in np.ndindex(4, 5):
        assert_rounds_to(views[at], reference(crops[at], p, at, size_px), p.solarize[at], allowed[at])


def assert_rounds_to(view: np.ndarray, exact: np.ndarray, solarized: bool, allowed: float) -> None:
    exact = np.clip(exact, 0, 255)
    # Solarisation has no jump: 127 stays, 128 becomes 127.
    exact = np.where(solarized & (exact > 127.5), 255 - exact, exact)
    assert np.abs(view - exact).max() <= allowed


@pytest.mark.parametrize("size_px", [8, 32, 96])
def test_blur_is_torchvisions(size_px):
    spec = Views(count=3, size_px=size_px, jitter=0.0, grayscale=0.0, blur=(1.0, 0.0))
    crops = np.stack([noise(3, size_px, size_px, seed=i) for i in range(12)]).reshape(4, 3, 3, size_px, size_px)
    views = photometrics(torch.from_numpy(crops), hashes_of(4), spec=spec, seed=2, epoch=0).numpy()
    p = drawn(crops[:, 0], hashes_of(4), spec, seed=2, epoch=0)
    window = [2 * max(1, int(size_px / 20 + 0.5)) + 1] * 2
    for at in np.ndindex(4, 3):
        if p.sigma[at] == 0:
            assert np.array_equal(views[at], crops[at])
        else:
            theirs = F.gaussian_blur(torch.from_numpy(crops[at].astype(np.float32)), window, [float(p.sigma[at])] * 2)
            assert np.abs(views[at] - theirs.numpy()).max() <= 0.52


def test_solarisation_is_torchvisions():
    spec, crops = Views(blur=0.5), torch.from_numpy(np.stack([[noise(3, 32, 32, seed=i)] * 4 for i in range(5)]))
    options = {"seed": 0, "epoch": 0}
    before = photometrics(crops, hashes_of(5), spec=spec, **options)
    after = photometrics(crops, hashes_of(5), spec=dataclasses.replace(spec, solarize=(1.0, 0.0)), **options)
    assert torch.equal(after[:, 0::2], F.solarize(before[:, 0::2], 128))
    assert torch.equal(after[:, 1::2], before[:, 1::2])


def test_with_everything_off_crops_stay_as_they_are_and_a_constant_stays_constant_under_blur():
    crops = torch.from_numpy(noise(3, 320, 16).reshape(2, 10, 3, 16, 16))
    off = {"jitter": 0.0, "grayscale": 0.0, "count": 10, "size_px": 16}
    assert torch.equal(photometrics(crops, hashes_of(2), spec=Views(**off), seed=0, epoch=0), crops)
    flat = torch.arange(20, dtype=torch.uint8).mul(13).reshape(2, 10, 1, 1, 1).expand(crops.shape)
    assert torch.equal(photometrics(flat, hashes_of(2), spec=Views(**off, blur=1.0), seed=0, epoch=0), flat)


# --- the same views as those made with the data -------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [{"blur": 0.5, "solarize": 0.2}, STRONG])
@pytest.mark.parametrize(
    ("channels", "size_px", "source"), [(3, 32, (32, 32)), (3, 8, (40, 30)), (1, 28, (28, 28)), (3, 224, (300, 400))]
)
def test_finished_crops_are_the_views_but_for_the_rounding_between(channels, size_px, source, strengths):
    spec = Views(count=4, channels=channels, size_px=size_px, **strengths)
    images, options = [noise(channels, *source, seed=i) for i in range(2 if size_px == 224 else 40)], {"seed": 5, "epoch": 2}
    hashes = hashes_of(len(images))
    worst = differences(crops_finished(images, hashes, spec=spec, **options), make_views(images, hashes, spec=spec, **options))
    bound = gains(drawn(images, hashes, spec, **options), channels) / 2 + 1
    assert (worst <= bound + 0.05).all()
    if strengths != STRONG:
        assert worst.max() <= 3


def test_crops_are_those_of_the_views():
    """Same boxes and flips, nothing else: views without photometrics are finished as they are."""
    images, hashes = [noise(3, 50, 40, seed=i) for i in range(10)], hashes_of(10)
    plain = Views(jitter=0.0, grayscale=0.0)
    crops = make_views(images, hashes, spec=crops_only(Views(**STRONG)), seed=1, epoch=0)
    assert np.array_equal(crops, make_views(images, hashes, spec=plain, seed=1, epoch=0))
    assert np.array_equal(crops_finished(images, hashes, spec=plain, seed=1, epoch=0), crops)


# --- the same bytes -----------------------------------------------------------------------------------------------------

POOL_SIZES = [(28, 28), (28, 28), (32, 20), (1, 9), (104, 105), (210, 160), (300, 2)]


@pytest.fixture(scope="module", params=[(1, 28), (3, 32), (3, 45)], ids=str)
def pool(request):
    """Options, images, hashes, and by function the views of each image made in a batch of its own."""
    channels, size_px = request.param
    options = {"spec": Views(count=3, channels=channels, size_px=size_px, **STRONG), "seed": 5, "epoch": 6}
    images, hashes = [noise(channels, *size, seed=i) for i, size in enumerate(POOL_SIZES)], hashes_of(len(POOL_SIZES))
    alone = {make: np.stack([make([x], hashes[i : i + 1], **options)[0] for i, x in enumerate(images)]) for make in MAKERS}
    return options, images, hashes, alone


MAKERS = (whole_views, crops_finished)


@both
@settings(deadline=None, max_examples=8)
@given(order=st.lists(st.integers(0, len(POOL_SIZES) - 1), min_size=1, max_size=30))
def test_a_view_is_the_same_in_any_batch(pool, make, order):
    options, images, hashes, alone = pool
    assert np.array_equal(make([images[i] for i in order], hashes[order], **options), alone[make][order])


@both
@pytest.mark.parametrize("block", [1, 2**14, 2**30])
def test_a_view_is_the_same_in_blocks_of_any_size(pool, make, block, monkeypatch):
    options, images, hashes, alone = pool
    monkeypatch.setitem(device._BLOCK, "cpu", block)
    assert np.array_equal(make(images, hashes, **options), alone[make])


@both
def test_a_view_is_the_same_with_any_number_of_threads(pool, make):
    options, images, hashes, alone = pool
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert np.array_equal(make(images, hashes, **options), alone[make])
    finally:
        torch.set_num_threads(before)


@both
def test_a_view_is_the_same_in_whatever_order_products_are_added_up(pool, make, monkeypatch):
    """As on other devices: taps last to first, in two halves, or in float64."""
    options, images, hashes, alone = pool
    bmm = torch.bmm

    def halves(a, b):
        middle = a.shape[2] // 2
        return bmm(a[:, :, middle:], b[:, middle:]) + bmm(a[:, :, :middle], b[:, :middle])

    for other in (lambda a, b: bmm(a.flip(2), b.flip(1)), halves, lambda a, b: bmm(a.double(), b.double()).float()):
        monkeypatch.setattr(torch, "bmm", other)
        assert np.array_equal(make(images, hashes, **options), alone[make])


@both
def test_a_view_is_the_same_under_autocast(pool, make):
    options, images, hashes, alone = pool
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(make(images, hashes, **options), alone[make])


@both
def test_inexact_products_are_refused(pool, make):
    options, images, hashes, _ = pool
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="highest"):
            make(images, hashes, **options)
    finally:
        torch.set_float32_matmul_precision("highest")


@both
def test_another_seed_epoch_hash_or_view_is_another_view(pool, make):
    options, images, hashes, alone = pool
    image, own = images[4:5], hashes[4:5]
    others = [
        make(image, own, **(options | {"seed": 6})),
        make(image, own, **(options | {"epoch": 5})),
        make(image, own + np.uint64(1), **options),
        alone[make][4:5],
    ]
    assert len({view.tobytes() for made in others for view in made[0]}) == len(others) * 3


@both
def test_a_batch_of_no_image_has_no_views(make):
    assert make([], np.zeros(0, np.uint64), spec=Views(count=2, blur=1.0), seed=0, epoch=0).shape == (0, 2, 3, 32, 32)
