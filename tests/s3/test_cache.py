"""The shard cache: what it serves is right whatever is in its files, it stays in its bounds, and it spares the store."""

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from seaweedfs import BUCKET, Server
from stored import Store, batches

from ssl_ray import shards, storage
from ssl_ray.shards import Cache, read

TESTS = Path(__file__).parents[1]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def every_sample(manifest: shards.Manifest) -> tuple[np.ndarray, np.ndarray]:
    where = np.nonzero(np.arange(manifest.counts.max()) < manifest.counts[:, None])
    return where[0].astype(np.int64), where[1].astype(np.int64)


def used(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def assert_same_images(store: Store, found: shards.Samples, where: tuple[np.ndarray, np.ndarray]) -> None:
    truth = shards.read_samples(shards.load_manifest(str(store.local)), *where)
    assert found.problems == {}
    assert [bytes(image) for image in found.images] == [bytes(image) for image in truth.images]


def test_the_second_epoch_asks_the_store_for_nothing(store, kept):
    found = []
    for batch in batches(store.uri, f"data.cache_dir={kept}", epochs=2):
        found.append(batch)
        if len(found) == len(store.truth) // 2:
            assert store.requests(".tar")
            store.between.log.clear()
    assert found == store.truth
    assert store.requests() == []


def test_only_what_is_missing_is_read(store, kept):
    manifest, place = shards.load_manifest(store.uri), Cache(str(kept), 10**9)
    where = every_sample(manifest)
    half = where[1] % 100 < 50  # 50 of .2 kB: no gap to read over, but for the first reading
    first = shards.read_samples(manifest, where[0][half], where[1][half], cache=place)
    rest = shards.read_samples(manifest, *where, cache=place)
    assert_same_images(store, rest, where)
    again = shards.read_samples(manifest, *where, cache=place)
    assert (again.requests, again.bytes_read) == (0, 0)
    assert_same_images(store, again, where)
    whole = shards.read_samples(manifest, *where)
    assert first.bytes_read + rest.bytes_read <= 1.01 * whole.bytes_read


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:: 512 * 3] = os.urandom(len(data[:: 512 * 3]))
    path.write_bytes(data)


def clear(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def lengthen(path: Path) -> None:
    path.write_bytes(os.urandom(100) + path.read_bytes())


@pytest.mark.parametrize("harm", [cut, garble, clear, lengthen, Path.unlink])
def test_what_became_of_the_files_changes_no_batch_and_is_mended(store, kept, harm: Callable[[Path], None]):
    keys, epoch = f"data.cache_dir={kept}", store.truth[: len(store.truth) // 2]
    assert list(batches(store.uri, keys)) == epoch
    for path in kept.iterdir():
        harm(path)
    store.between.log.clear()
    assert list(batches(store.uri, keys)) == epoch
    assert store.requests("GET /ssl/small/shard")
    store.between.log.clear()
    assert list(batches(store.uri, keys)) == epoch
    assert store.requests("GET /ssl/small/shard") == []


@pytest.mark.parametrize("harm", [cut, garble, clear, Path.unlink])
def test_a_gzipd_shard_is_kept_whole_and_mended(store, server: Server, kept, tmp_path, harm):
    packed = tmp_path / "gz"
    packed.mkdir()
    names = sorted(store.local.glob("*.tar"))[:2]
    for path in names:
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    shards.index(str(packed))
    uri = f"s3://{BUCKET}/gz-{harm.__name__}"
    for path in packed.rglob("*.*"):
        storage.upload(str(path), f"{uri}/{path.relative_to(packed)}")
    manifest, place = shards.load_manifest(uri), Cache(str(kept), 10**9)
    where = every_sample(manifest)

    def fetched() -> int:
        read.forget_kept()  # those in memory
        found = shards.read_samples(manifest, *where, cache=place)
        assert_same_images(store, found, where)
        return found.requests

    assert [fetched(), fetched()] == [2, 0]
    for path in kept.iterdir():
        harm(path)
    assert [fetched(), fetched()] == [2, 0]


def test_what_was_used_longest_ago_goes_first_and_files_of_others_stay(store, kept):
    manifest = shards.load_manifest(store.uri)
    room = int(2.5 * manifest.sizes[0])
    kept.mkdir()
    (kept / "of-another.shard").write_bytes(b"x" * room)
    place = Cache(str(kept), room)

    def fetched(shard: int) -> int:
        rows = np.arange(manifest.counts[shard])
        return shards.read_samples(manifest, np.full(len(rows), shard), rows, cache=place).requests

    def age() -> None:
        for path in kept.iterdir():
            os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))

    for shard, requests in ((0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1)):
        assert (shard, fetched(shard)) == (shard, requests)
        age()
        assert used(kept) - room <= room + 8192
    assert (kept / "of-another.shard").stat().st_size == room


def test_a_bound_below_one_shard_is_kept_and_costs_no_batch(store, kept):
    found = list(batches(store.uri, f"data.cache_dir={kept}", "data.cache_bytes=100000"))
    assert found == store.truth[: len(store.truth) // 2]
    assert used(kept) <= 100000


def test_on_a_disk_that_is_full_of_shards_the_oldest_make_room(store, tmpfs, caplog):
    disk = tmpfs("size=3m")
    keys = f"data.cache_dir={disk}"
    assert list(batches(store.uri, keys, epochs=2)) == store.truth
    assert caplog.messages == []
    assert used(disk) > 0


def test_on_a_disk_that_others_filled_it_is_said_once_and_the_work_goes_on(store, tmpfs, caplog):
    disk = tmpfs("size=200k")
    (disk / "of-another").write_bytes(b"x" * 200 * 1024)
    with caplog.at_level(logging.WARNING):
        assert list(batches(store.uri, f"data.cache_dir={disk}", epochs=2)) == store.truth
    assert len(caplog.messages) == 1
    assert f"data.cache_dir: {disk}" in caplog.messages[0]
    assert "No space left" in caplog.messages[0]
    assert (disk / "of-another").stat().st_size == 200 * 1024


def test_a_folder_that_cannot_be_made_is_said_once_and_the_work_goes_on(store, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert list(batches(store.uri, f"data.cache_dir={tmp_path}/file/below", epochs=2)) == store.truth
    assert len(caplog.messages) == 1


_FILL = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from stored import batches
print(json.dumps([(step, views) for step, views, _ in batches(*sys.argv[2:])]))
"""


def test_processes_that_fill_one_cache_at_the_same_time_get_right_batches(store, kept):
    path = [str(TESTS / "s3"), str(TESTS)]
    # A bound that makes each remove what the other writes.
    given = [json.dumps(path), store.uri, f"data.cache_dir={kept}", f"data.cache_bytes={1_500_000}"]
    running = [subprocess.Popen([sys.executable, "-c", _FILL, *given], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = [[step, views] for step, views, _ in store.truth[: len(store.truth) // 2]]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert json.loads(out) == expected
    assert list(batches(store.uri, f"data.cache_dir={kept}")) == store.truth[: len(store.truth) // 2]


def test_shards_that_were_made_anew_are_others(store, kept):
    manifest, place = shards.load_manifest(store.uri), Cache(str(kept), 10**9)
    where = every_sample(manifest)
    shards.read_samples(manifest, *where, cache=place)
    before = set(os.listdir(kept))
    uri = f"s3://{BUCKET}/anew"
    shards.pack(shards.open_source("digits"), uri, shard_bytes=2**18, seed=1)
    anew = shards.load_manifest(uri)
    found = shards.read_samples(anew, *every_sample(anew), cache=place)
    assert found.problems == {}
    assert found.requests == len(anew.counts)
    assert len(set(os.listdir(kept)) - before) == len(anew.counts)
