"""The compiled kernel against the same maps in numpy; the same bytes however and wherever it runs; its cache and the GIL."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssl_ray
from ssl_ray.config import Views
from ssl_ray.views import draw, make_views, plain
from ssl_ray.views.linear import numpy_plain, numpy_views
from ssl_ray.views.make import views_of


def noise(channels: int, height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)


def hashes_of(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, 77)).integers(0, 2**64, count, dtype=np.uint64)


def differing(made: np.ndarray, expected: np.ndarray) -> int:
    """How many bytes differ, none by more than one level."""
    difference = np.abs(made.astype(int) - expected)
    assert difference.max(initial=0) <= 1
    return int(np.count_nonzero(difference))


# --- numpy's maps -------------------------------------------------------------------------------------------------------

PROBABILITY = st.sampled_from([0.0, 0.5, 1.0])
SPECS = st.builds(
    Views,
    count=st.integers(2, 5),
    channels=st.sampled_from([1, 3]),
    size_px=st.one_of(st.integers(4, 80), st.sampled_from([96, 127, 224])),
    crop_scale=st.sampled_from([(0.08, 1.0), (0.001, 0.01), (1.0, 1.0)]),
    crop_ratio=st.sampled_from([(3 / 4, 4 / 3), (0.1, 10.0)]),
    flip=PROBABILITY,
    jitter=PROBABILITY,
    brightness=st.sampled_from([0.0, 0.4, 3.0]),
    contrast=st.sampled_from([0.0, 0.4, 1.0]),
    saturation=st.sampled_from([0.0, 0.4, 2.0]),
    hue=st.sampled_from([0.0, 0.1, 0.5]),
    grayscale=PROBABILITY,
    blur=PROBABILITY,
    blur_sigma=st.sampled_from([(0.1, 2.0), (0.01, 0.02), (5.0, 100.0)]),
    solarize=PROBABILITY,
)
SIZES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(SPECS, SIZES, st.integers(0, 2**32 - 1))
def test_views_are_numpys_within_a_level(spec, sizes, seed):
    """Where weights are small fractions, as from 10 to 5 pixels, many a value is a half exactly and may go either way."""
    images = [noise(spec.channels, *size, seed=seed + i) for i, size in enumerate(sizes)]
    options = {"spec": spec, "seed": seed, "epoch": 1}
    made = make_views(images, hashes_of(len(images), seed=seed), **options)
    differing(made, numpy_views(images, hashes_of(len(images), seed=seed), **options))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("source", "size_px"), [((32, 32), 32), ((96, 96), 64), ((375, 500), 32), ((375, 500), 224)])
def test_all_but_one_byte_in_a_thousand_are_numpys(source, size_px, channels):
    spec = Views(count=4, channels=channels, size_px=size_px, blur=0.5, solarize=0.2)
    options = {"spec": spec, "seed": 3, "epoch": 0}
    images = [noise(channels, *source, seed=i) for i in range(20 if size_px < 224 else 2)]
    made = make_views(images, hashes_of(len(images)), **options)
    assert differing(made, numpy_views(images, hashes_of(len(images)), **options)) < made.size / 1000


@settings(deadline=None, max_examples=60)
@given(SIZES, st.sampled_from([1, 3]), st.integers(4, 100))
def test_plain_views_are_numpys_within_a_level(sizes, channels, size_px):
    images = [noise(channels, *size, seed=i) for i, size in enumerate(sizes)]
    differing(plain(images, size_px=size_px), numpy_plain(images, size_px=size_px))


def test_huge_images_are_numpys_within_a_level():
    images = [noise(3, 4000, 3000), noise(3, 9, 5000), noise(3, 5000, 1)]
    options = {"spec": Views(count=2, size_px=40, blur=0.5), "seed": 0, "epoch": 0}
    differing(make_views(images, hashes_of(3), **options), numpy_views(images, hashes_of(3), **options))
    differing(plain(images, size_px=7), numpy_plain(images, size_px=7))


def test_a_blur_of_the_whole_view_is_numpys():
    """Sigmas so large that no end of the Gaussian may be left out, and views with more pixels than a vector beside them."""
    spec = Views(count=2, size_px=131, blur=1.0, blur_sigma=(6.0, 1e6))
    images, options = [noise(3, 200, 200)], {"spec": spec, "seed": 0, "epoch": 0}
    differing(make_views(images, hashes_of(1), **options), numpy_views(images, hashes_of(1), **options))


def test_an_image_of_another_kind_is_refused():
    spec = Views(count=2)
    for image in (noise(1, 9, 9), noise(3, 9, 9).astype(np.int16), noise(3, 9, 9)[0]):
        with pytest.raises(ValueError, match=r"an image must be uint8 \[3, H, W\], got "):
            views_of([image], draw_of(spec, 1), size_px=32, channels=3)


def draw_of(spec: Views, count: int):
    return draw(spec, seed=0, epoch=0, hashes=hashes_of(count), heights=np.full(count, 9), widths=np.full(count, 9))


# --- the same bytes -----------------------------------------------------------------------------------------------------


def some_views() -> np.ndarray:
    """Of images of many sizes, with everything on, as one array of bytes."""
    made = []
    for channels, size_px in ((1, 28), (3, 32), (3, 9), (3, 101)):
        spec = Views(count=3, channels=channels, size_px=size_px, hue=0.5, blur=0.5, solarize=0.3)
        images = [noise(channels, *size, seed=i) for i, size in enumerate([(28, 28), (33, 57), (1, 9), (300, 400), (40, 30)])]
        made.append(make_views(images, hashes_of(5), spec=spec, seed=1, epoch=2).reshape(-1))
        made.append(plain(images, size_px=size_px).reshape(-1))
    return np.concatenate(made)


def test_bytes_are_the_same_however_an_image_lies_in_memory():
    spec = Views(count=3, blur=0.5)
    image = noise(3, 50, 41)
    laid = [
        image,
        np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1),  # colours of a pixel together
        np.ascontiguousarray(image.transpose(2, 1, 0)).transpose(2, 1, 0),
        np.ascontiguousarray(image.transpose(1, 2, 0)[::-1]).transpose(2, 0, 1)[:, ::-1],  # rows from the last to the first
        np.ascontiguousarray(image.transpose(1, 2, 0)[:, ::-1]).transpose(2, 0, 1)[:, :, ::-1],
        np.ascontiguousarray(image[::-1].transpose(1, 2, 0)).transpose(2, 0, 1)[::-1],  # blue first
        np.dstack([image.transpose(1, 2, 0), image[0]])[:, :, :3].transpose(2, 0, 1),  # a fourth channel left out
    ]
    views = [make_views([each], hashes_of(1), spec=spec, seed=0, epoch=0) for each in laid]
    assert all(np.array_equal(each, views[0]) for each in views)


def test_bytes_are_the_same_in_many_threads_at_once():
    expected = some_views()
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(made, expected) for made in threads.map(lambda _: some_views(), range(12)))


def test_other_threads_run_while_views_are_made():
    images = [noise(3, 2000, 2000)] * 4
    spec = Views(count=150, size_px=224, blur=1.0)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.002):
            ticks.append(time.perf_counter())

    make_views(images[:1], hashes_of(1), spec=spec, seed=0, epoch=0)
    params = draw(spec, seed=0, epoch=0, hashes=hashes_of(4), heights=np.full(4, 2000), widths=np.full(4, 2000))
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    views_of(images, params, size_px=224, channels=3)
    stop = time.perf_counter()
    done.set()
    thread.join()
    inside = [t for t in ticks if start + 0.25 * (stop - start) < t < start + 0.75 * (stop - start)]
    assert len(inside) >= 3, f"{len(inside)} ticks in {stop - start:.3f} s"


# --- compiling ----------------------------------------------------------------------------------------------------------

_CHILD = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from test_kernel import some_views
import ssl_ray.views
assert ssl_ray.__file__.startswith({package!r}), ssl_ray.__file__
assert "numba" not in sys.modules
digest = hashlib.sha256(some_views()).hexdigest()
from ssl_ray.views import kernel
compiled = kernel.load()
assembly = "".join(compiled.inspect_asm().values())
print(digest, sum(compiled.stats.cache_hits.values()), any(name in assembly for name in ("fmadd", "ymm", "zmm")))
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package whose folder of the views cannot be written, even by root: a file lies where the cache goes."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(ssl_ray.__file__).parent, copy / "ssl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "ssl_ray" / "views" / "__pycache__").write_bytes(b"")
    return copy


def told(package: Path, cache: Path, *options: dict[str, str]) -> list[list[str]]:
    """What children say that start at once, one for each environment of `options`."""
    child = _CHILD.format(tests=str(Path(__file__).parent), package=str(package))
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    env |= {"PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(more: dict[str, str]) -> list[str]:
        command = [sys.executable, "-P", "-c", child]  # -P: the working folder may hold the package too
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    with ThreadPoolExecutor(len(options)) as threads:
        return list(threads.map(run, options))


@pytest.fixture(scope="module")
def digest() -> str:
    return hashlib.sha256(some_views()).hexdigest()


def test_a_read_only_package_is_compiled_once_into_the_users_cache_by_processes_that_start_at_once(package, tmp_path, digest):
    cache = tmp_path / "cache"
    assert [answer[0] for answer in told(package, cache, {}, {})] == [digest] * 2
    assert list(cache.rglob("*.nbc"))
    assert told(package, cache, {})[0][:2] == [digest, "1"]


def test_compiled_for_the_simplest_cpu_the_bytes_are_the_same(package, tmp_path, digest):
    """Without wide vectors and fused operations, which this machine probably has."""
    assert told(package, tmp_path, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}) == [[digest, "0", "False"]]
