"""Samples by shard and row against tarfile: any order, merged requests, and what is wrong with damaged shards."""

import dataclasses
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import read_tar, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError

COUNTS = (5, 1, 30)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[shards.Manifest, list[dict[str, bytes]]]:
    """Three shards, the second gzip'd, and what tarfile reads of each."""
    folder = tmp_path_factory.mktemp("read")
    names = ("a.tar", "b.tgz", "c.tar")
    paths = [
        write_tar(folder / name, samples(count, label=lambda i: i % 4, seed=100 * s))
        for s, (name, count) in enumerate(zip(names, COUNTS, strict=True))
    ]
    return shards.index(str(folder)), [read_tar(path) for path in paths]


def read(manifest: shards.Manifest, pairs: list[tuple[int, int]]) -> shards.Samples:
    return shards.read_samples(manifest, np.array([s for s, _ in pairs], np.int64), np.array([r for _, r in pairs], np.int64))


def one_shard(folder: Path, members: list[tuple[str, bytes]], name: str = "x.tar") -> tuple[shards.Manifest, Path]:
    path = write_tar(folder / name, members)
    return shards.index(str(folder)), path


PAIR = st.sampled_from([(s, r) for s, count in enumerate(COUNTS) for r in range(count)])


@settings(deadline=None, max_examples=100)
@given(pairs=st.lists(PAIR, max_size=60))
def test_any_samples_in_any_order_with_repeats_are_those_that_tarfile_reads(data, pairs):
    manifest, truth = data
    got = read(manifest, pairs)
    assert [bytes(image) for image in got.images] == [truth[s][f"{r:06d}.png"] for s, r in pairs]
    assert got.keys == [f"{r:06d}" for _, r in pairs]
    assert got.labels.tolist() == [int(truth[s][f"{r:06d}.cls"]) for s, r in pairs]
    assert got.hashes.tolist() == [shards.index_rows(manifest, s)["hash"][r].as_py() for s, r in pairs]
    assert got.problems == {}
    assert got.requests <= len({s for s, _ in pairs})  # small shards, without a gap of 64 KiB: one request each


def test_a_run_of_samples_is_one_request_of_its_bytes(data):
    manifest, _ = data
    rows = shards.index_rows(manifest, 2).slice(10, 20)
    got = read(manifest, [(2, r) for r in range(10, 30)])
    assert got.requests == 1
    assert got.bytes_read == rows["offset"][-1].as_py() + rows["size"][-1].as_py() - rows["offset"][0].as_py()


def test_ranges_are_merged_over_small_gaps_only_and_not_without_bound(tmp_path):
    size = 2**20
    members = [(f"{i:02d}.png", bytes([i]) * size) for i in range(20)] + [(f"{i}.jpg", b"small") for i in range(100, 200)]
    manifest, _ = one_shard(tmp_path, members)
    assert read(manifest, [(0, 0), (0, 2), (0, 4)]).requests == 3  # gaps of 1 MiB
    got = read(manifest, [(0, r) for r in range(20)])  # 20 MiB in requests of at most 8
    assert got.requests == 3
    assert [bytes(image[:1]) for image in got.images if image is not None] == [bytes([i]) for i in range(20)]
    assert read(manifest, [(0, 20), (0, 50), (0, 119)]).requests == 2  # 99 samples of 1 KiB: one gap of over 64 KiB
    assert read(manifest, [(0, 20), (0, 50), (0, 80)]).requests == 1


def test_a_gzipd_shard_is_read_whole_and_kept(tmp_path):
    manifest, path = one_shard(tmp_path, samples(5), "x.tgz")
    first, again = read(manifest, [(0, 4), (0, 0)]), read(manifest, [(0, 1)])
    assert (first.requests, first.bytes_read) == (1, path.stat().st_size)
    assert (again.requests, again.bytes_read) == (0, 0)


def test_nothing_asked_is_nothing_read(data):
    got = read(data[0], [])
    assert (got.images, got.keys, got.problems, got.requests, got.bytes_read) == ([], [], {}, 0, 0)


# Damage --------------------------------------------------------------------------------------------------------------


def test_changed_bytes_are_a_problem_of_their_sample_alone(tmp_path):
    manifest, path = one_shard(tmp_path, samples(6))
    with tarfile.open(path) as tar:
        member = tar.getmembers()[3]
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(content)
    got = read(manifest, [(0, r) for r in (5, 3, 1)])
    assert list(got.problems) == [1]
    assert "changed" in got.problems[1]
    assert "crc32" in got.problems[1]
    assert got.images[1] is None
    assert got.keys[1] == "000003"
    assert [bytes(got.images[i]) for i in (0, 2)] == [read_tar(path)[f"{r:06d}.png"] for r in (5, 1)]


@settings(deadline=None, max_examples=60)
@given(fraction=st.floats(0, 1, exclude_max=True), pairs=st.lists(st.tuples(st.just(0), st.integers(0, 5)), max_size=12))
def test_of_a_truncated_shard_the_samples_before_the_cut_are_read(tmp_path_factory, fraction, pairs):
    manifest, path = one_shard(tmp_path_factory.mktemp("cut"), samples(6))
    rows = shards.index_rows(manifest, 0)
    ends = [offset + size for offset, size in zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)]
    truth = read_tar(path)
    cut = int(fraction * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:cut])
    got = read(manifest, pairs)
    for i, (_, r) in enumerate(pairs):
        if ends[r] <= cut:
            assert bytes(got.images[i]) == truth[f"{r:06d}.png"]
            assert i not in got.problems
        else:
            assert got.images[i] is None
            assert "shorter than its index says" in got.problems[i]


def test_a_missing_shard_is_a_problem_of_all_its_samples_and_of_no_others(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, samples(3))
    manifest = shards.index(str(tmp_path))
    (tmp_path / "a.tar").unlink()
    got = read(manifest, [(0, 0), (1, 0), (0, 2)])
    assert got.problems == {0: "the shard is missing", 2: "the shard is missing"}
    assert [image is None for image in got.images] == [True, False, True]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:50] + b"\xff\xff" + data[52:]])
def test_a_gzipd_shard_that_does_not_decompress_is_a_problem_of_all_its_samples(tmp_path, damage):
    manifest, path = one_shard(tmp_path, samples(3), "x.tgz")
    path.write_bytes(damage(path.read_bytes()))
    got = read(manifest, [(0, 0), (0, 2)])
    assert list(got.problems) == [0, 1]
    assert all("does not decompress" in reason for reason in got.problems.values())


def test_a_gzipd_shard_that_was_replaced_has_changed_bytes(tmp_path):
    manifest, path = one_shard(tmp_path, samples(3), "x.tgz")
    sizes = manifest.sizes.copy()
    write_tar(path, samples(3, seed=50))
    sizes[0] = path.stat().st_size  # as if both had the same size
    got = read(dataclasses.replace(manifest, sizes=sizes), [(0, 0), (0, 2)])
    assert all("changed" in reason or "shorter" in reason for reason in got.problems.values())
    assert list(got.problems) == [0, 1]


def test_a_folder_in_the_place_of_a_shard_ends_the_read_at_once(tmp_path):
    manifest, path = one_shard(tmp_path / "set", samples(3))
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"x\.tar: not a file"):
        read(manifest, [(0, 0)])


# A storage that fails for a while ------------------------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """Files in memory; `faults` are what the next ranged reads do instead of answering well."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[Callable[[bytes], bytes]]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start=start, end=end, **options)
        return self.faults.pop(0)(data) if self.faults and path.endswith(".tar") else data


def no_answer(data: bytes) -> bytes:
    raise TimeoutError("no answer")


@pytest.fixture
def flaky(tmp_path):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    path = write_tar(tmp_path / "x.tar", samples(4))
    uri = f"flaky://{tmp_path.name}"
    fsspec.filesystem("flaky").pipe_file(f"{uri}/x.tar", path.read_bytes())
    yield shards.index(uri), read_tar(path)
    Flaky.faults.clear()


@pytest.mark.parametrize("fault", [no_answer, lambda data: data[:10], lambda data: b"\0" * len(data)])
def test_a_failure_on_the_way_is_tried_again_and_makes_no_sample_bad(flaky, fault):
    manifest, truth = flaky
    Flaky.faults[:] = [fault]
    got = read(manifest, [(0, 0), (0, 3)])
    assert Flaky.faults == []
    assert [bytes(image) for image in got.images if image is not None] == [truth["000000.png"], truth["000003.png"]]
    assert got.problems == {}


def test_a_storage_that_keeps_failing_ends_the_read_and_makes_no_sample_bad(flaky, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    Flaky.faults[:] = [no_answer] * 8
    with pytest.raises(DataError, match=r"x\.tar: reading failed 8 times \(TimeoutError: no answer\)"):
        read(flaky[0], [(0, 0)])
