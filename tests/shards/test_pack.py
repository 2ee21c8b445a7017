"""Packing: what webdataset and tarfile read of it, its order, sizes and sums, and packs that fail or are refused."""

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import picture, read_tar, read_webdataset, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError, ResourceError, SslRayError, UsageError
from ssl_ray.shards import Source


def a_source(count: int, *, size_px: int = 8, labelled: bool = True, fails_at: int | None = None, error=None) -> Source:
    """Images of one file, whose label is their number modulo 3."""

    images = [picture(i, px=size_px) for i in range(count)]

    def read(numbers):
        if fails_at is not None and fails_at in list(numbers):
            raise error
        return [(f"k/{i}", images[i], "png") for i in numbers]

    return of_images(images, read, [i % 3 if labelled else -1 for i in range(count)], ["a", "b", "c"] if labelled else None)


def of_images(images: list[bytes], read, labels=None, class_names=None) -> Source:
    sizes = np.array([len(image) for image in images], np.int64)
    return Source("made", sizes, np.full(len(images), -1) if labels is None else np.array(labels, np.int64), class_names, read)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_webdataset_reads_what_was_packed_once_each_with_label_and_bytes(tmp_path):
    shards.pack(a_source(150), str(tmp_path), shard_bytes=2**16)
    read = {sample["__key__"]: (sample["png"], int(sample["cls"])) for sample in read_webdataset(tmp_path)}
    assert read == {f"k/{i}": (picture(i), i % 3) for i in range(150)}
    assert len(read_webdataset(tmp_path)) == 150


def test_the_order_is_shuffled_by_the_seed_and_the_bytes_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        shards.pack(a_source(150), str(tmp_path / name), seed=seed, shard_bytes=2**16)
    assert files(tmp_path / "one") == files(tmp_path / "same")
    keys = {name: [sample["__key__"] for sample in read_webdataset(tmp_path / name)] for name in ("one", "other")}
    assert sorted(keys["one"]) == sorted(keys["other"])
    assert keys["one"] != keys["other"]
    numbers = np.array([int(key[2:]) for key in keys["one"]])
    assert abs(np.corrcoef(numbers, np.arange(150))[0, 1]) < 0.3


def test_a_shard_ends_with_the_sample_that_fills_it(tmp_path):
    manifest = shards.pack(a_source(90, size_px=40), str(tmp_path), shard_bytes=2**16)
    assert len(manifest.counts) > 4
    for path in sorted(tmp_path.glob("*.tar"))[:-1]:
        content = read_tar(path)
        used = sum(512 + -(-len(data) // 512) * 512 for data in content.values())
        last = list(content.values())[-2:]  # label and image of the last sample
        assert used >= 2**16 > used - sum(512 + -(-len(data) // 512) * 512 for data in last)
        assert path.stat().st_size - used <= 10240 + 1024


def test_the_manifest_says_what_hashlib_and_the_file_system_say(tmp_path):
    manifest = shards.pack(a_source(150), str(tmp_path), shard_bytes=2**16)
    paths = sorted(tmp_path.glob("*.tar"))
    assert manifest.names.to_pylist() == [path.name for path in paths]
    assert manifest.sizes.tolist() == [path.stat().st_size for path in paths]
    assert manifest.sha256.to_pylist() == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert manifest.counts.tolist() == [len(read_tar(path)) // 2 for path in paths]
    assert manifest.num_samples == 150
    assert manifest.class_names == ("a", "b", "c")
    assert manifest.class_counts == (50, 50, 50)
    assert manifest.mean_bytes == pytest.approx(np.mean([len(picture(i)) for i in range(150)]))
    assert manifest.shuffled


def test_the_digest_tells_content_not_place_and_is_read_back(tmp_path):
    one = shards.pack(a_source(20), str(tmp_path / "one"))
    two = shards.pack(a_source(20), str(tmp_path / "two"))
    other = shards.pack(a_source(21), str(tmp_path / "other"))
    assert one.digest == two.digest == shards.load_manifest(str(tmp_path / "one")).digest != other.digest


def test_images_without_labels_have_no_classes(tmp_path):
    manifest = shards.pack(a_source(5, labelled=False), str(tmp_path))
    assert manifest.class_names is None
    assert manifest.class_counts is None
    assert all("cls" not in sample for sample in read_webdataset(tmp_path))
    assert shards.stats(str(tmp_path))["classes"] is None


def test_class_names_without_any_label_are_no_classes(tmp_path):
    images = [picture(i) for i in range(3)]
    unlabelled = of_images(images, lambda numbers: [(f"{i}", images[i], "png") for i in numbers], class_names=["a", "b"])
    assert shards.pack(unlabelled, str(tmp_path)).class_names is None
    assert shards.stats(str(tmp_path))["classes"] is None


def test_long_and_foreign_keys_survive(tmp_path):
    keys = ["a" * 120 + "/" + "b" * 150, "grün/日本", "with space/[x]*?#%41"]
    images = [picture(i) for i in range(3)]
    source = of_images(images, lambda numbers: [(keys[i], images[i], "png") for i in numbers])
    manifest = shards.pack(source, str(tmp_path / "a::b [x]*?#%41 ü"))
    assert sorted(shards.index_rows(manifest, 0)["key"].to_pylist()) == sorted(keys)
    got = shards.read_samples(manifest, np.zeros(3, np.int64), np.arange(3))
    assert {key: bytes(image) for key, image in zip(got.keys, got.images, strict=True)} == {
        key: picture(i) for i, key in enumerate(keys)
    }


def test_a_memory_file_system_is_as_good_as_a_local_one(tmp_path):
    uri = f"memory://{tmp_path.name}/set"
    shards.pack(a_source(60), uri, shard_bytes=2**16)
    local = shards.pack(a_source(60), str(tmp_path / "local"), shard_bytes=2**16)
    remote = shards.load_manifest(uri)
    assert remote.digest == local.digest
    got = shards.read_samples(remote, np.array([1, 0]), np.array([2, 3]))
    same = shards.read_samples(local, np.array([1, 0]), np.array([2, 3]))
    assert got.images == same.images
    assert shards.check(uri)["ok"]
    with pytest.raises(UsageError, match="there are shards already"):
        shards.pack(a_source(5), uri)
    assert shards.pack(a_source(5), uri, overwrite=True).num_samples == 5


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_rerun_is_refused_and_changes_nothing(tmp_path):
    shards.pack(a_source(10), str(tmp_path))
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"there are shards already .*--overwrite"):
        shards.pack(a_source(10), str(tmp_path))
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.gz"])
def test_shards_of_others_are_not_packed_over(tmp_path, name):
    write_tar(tmp_path / name, samples(1))
    with pytest.raises(UsageError, match=f"there are shards already .{name}"):
        shards.pack(a_source(10), str(tmp_path))


def test_overwrite_leaves_nothing_of_the_old_shards_and_everything_else(tmp_path):
    shards.pack(a_source(150), str(tmp_path), shard_bytes=2**16)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "index" / "mine.txt").write_text("mine")
    shards.pack(a_source(10), str(tmp_path), overwrite=True)
    shards.pack(a_source(10), str(tmp_path / "fresh"))
    fresh = files(tmp_path / "fresh")
    now = {name: data for name, data in files(tmp_path).items() if not name.startswith("fresh/")}
    assert now == fresh | {"notes.txt": b"mine", "index/mine.txt": b"mine"}


@pytest.mark.parametrize("tail", ["", "/", "/../set"])
def test_a_source_is_never_packed_over_itself(tmp_path, tail):
    folder = tmp_path / "set"
    write_tar(folder / "x.tar", samples(3))
    before = files(folder)
    with pytest.raises(UsageError, match="the source itself"):
        shards.pack(shards.open_source(str(folder)), str(folder) + tail, overwrite=True)
    assert files(folder) == before


def test_nothing_to_pack_and_tiny_shards_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no images"):
        shards.pack(a_source(0), str(tmp_path))
    with pytest.raises(UsageError, match=r"--shard-mb: got 0\.03"):
        shards.pack(a_source(3), str(tmp_path), shard_bytes=2**15)
    with pytest.raises(UsageError, match="empty path"):
        shards.pack(a_source(3), "")


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DataError("img.png: cannot be read"), KeyboardInterrupt()])
def test_a_pack_that_fails_leaves_no_shard_and_is_begun_again_without_a_switch(tmp_path, error):
    with pytest.raises(type(error)):
        shards.pack(a_source(400, fails_at=7, error=error), str(tmp_path), shard_bytes=2**16, seed=3)
    assert files(tmp_path) == {}
    assert shards.pack(a_source(10), str(tmp_path)).num_samples == 10


def test_a_killed_pack_leaves_no_manifest_and_is_begun_again_with_overwrite(tmp_path):
    write_tar(tmp_path / "shard-000000.tar", samples(3))  # what a SIGKILL after the first shard leaves
    with pytest.raises(DataError, match=r"no manifest.parquet"):
        shards.load_manifest(str(tmp_path))
    assert shards.pack(a_source(10), str(tmp_path), overwrite=True).num_samples == 10


def test_an_undecodable_or_wrong_image_is_packed_and_left_to_check(tmp_path):
    source = of_images([b"no image"], lambda numbers: [("k", b"no image", "jpg")])
    shards.pack(source, str(tmp_path))
    assert [bad["key"] for bad in shards.check(str(tmp_path))["bad_samples"]] == ["k"]


def test_below_a_regular_file_nothing_can_be_written_and_it_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "set")
    with pytest.raises(DataError, match=r"file/set.*not a place") as caught:
        shards.pack(a_source(3), place)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own at tmp_path/mounted."""
    place = tmp_path / "mounted"
    place.mkdir()
    done: list[Path] = []

    def mount(*options: str) -> Path:
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", place], capture_output=True)
        if result.returncode:
            pytest.skip("needs the right to mount")
        done.append(place)
        return place

    yield mount
    for at in done:
        subprocess.run(["umount", at], check=True)


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path, mounted):
    full = mounted("size=256k")
    with pytest.raises(ResourceError, match=r"mounted/set/.*: no space left .*Free some") as caught:
        shards.pack(a_source(400, size_px=32), str(full / "set"), shard_bytes=2**17)
    assert caught.value.exit_code == 4
    assert files(full) == {}
    assert shards.pack(a_source(20), str(full / "set")).num_samples == 20


def test_full_scratch_space_is_a_resource_error_that_names_it(tmp_path, mounted, monkeypatch):
    full = mounted("size=256k")
    monkeypatch.setattr("tempfile.tempdir", str(full))
    with pytest.raises(ResourceError, match=r"mounted/ssl-ray-.*no space left .*TMPDIR"):
        shards.pack(a_source(400, size_px=32), str(tmp_path / "set"), shard_bytes=2**20)
    assert files(full) == {}
    assert files(tmp_path / "set") == {}


@pytest.mark.parametrize("scratch", [True, False])
def test_an_index_for_which_there_is_no_space_is_a_resource_error(tmp_path, mounted, monkeypatch, scratch):
    full = mounted("size=64k")
    write_tar(tmp_path / "x.tar", [(f"{i}.png", b"%d" % i) for i in range(9000)])
    if scratch:
        monkeypatch.setattr("tempfile.tempdir", str(full))
    with pytest.raises(ResourceError, match=r"mounted/.*part.*\.parquet: no space left"):
        shards.index(str(tmp_path), output=str((tmp_path if scratch else full) / "out"))
    assert files(full) == {}
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_scratch_space_that_is_not_there_is_an_error_that_names_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="TMPDIR"):
        shards.pack(a_source(3), str(tmp_path / "set"))


def test_a_read_only_file_system_is_an_error_before_any_work(tmp_path, mounted):
    place = mounted("size=1m")
    write_tar(place / "x.tar", samples(3))
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with pytest.raises(DataError, match="read-only"):
        shards.pack(a_source(3, fails_at=0, error=AssertionError("read")), str(place / "set"))
    with pytest.raises(DataError, match=r"read-only .*-o OTHER_URI"):
        shards.index(str(place))
    manifest = shards.index(str(place), output=str(tmp_path / "elsewhere"))
    assert manifest.num_samples == 3
    assert shards.check(str(tmp_path / "elsewhere"))["ok"]


# The built-in data set -----------------------------------------------------------------------------------------------


def test_digits_are_packed_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = shards.located("digits")
    assert Path(place).is_relative_to(tmp_path)
    before = {name: os.stat(Path(place) / name).st_mtime_ns for name in files(Path(place))}
    assert shards.located("digits") == place
    assert {name: os.stat(Path(place) / name).st_mtime_ns for name in files(Path(place))} == before
    manifest = shards.load_manifest(place)
    assert manifest.num_samples == 1797
    assert [path.name for path in Path(place).parent.iterdir()] == [Path(place).name]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SslRayError, match=r"file/ssl_ray"):
        shards.located("digits")


def test_located_leaves_other_uris_and_makes_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shards.located("some/set") == str(tmp_path / "some/set")
    assert shards.located("s3://bucket/set/") == "s3://bucket/set"


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    shards.pack(shards.open_source("digits"), str(tmp_path))
    data = load_digits()
    for sample in read_webdataset(tmp_path)[:200]:
        number = int(sample["__key__"].rpartition("-")[2])
        (tmp_path / "x.png").write_bytes(sample["png"])
        with Image.open(tmp_path / "x.png") as image:
            assert np.abs(np.asarray(image) / 255 * 16 - data.images[number]).max() < 1 / 30
        assert int(sample["cls"]) == data.target[number]
