"""Every source, packed and read back by webdataset, against what the test itself put in its files."""

import gzip
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from tars import picture, pixels, read_webdataset, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError, UsageError


def packed(source: shards.Source, folder: Path) -> tuple[shards.Manifest, dict[str, dict]]:
    """The manifest, and the samples that webdataset reads, by key."""
    manifest = shards.pack(source, str(folder))
    read = read_webdataset(folder)
    assert len(read) == manifest.num_samples == len(source.sizes)
    return manifest, {sample["__key__"]: sample for sample in read}


def labels(found: dict[str, dict]) -> dict[str, int | None]:
    return {key: int(sample["cls"]) if "cls" in sample else None for key, sample in found.items()}


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_the_public_names_are_these():
    assert set(shards.__all__) == {
        *("Cache", "cache_at", "Manifest", "Samples", "Source"),
        *("open_source", "pack", "index", "check", "stats", "order_note", "located"),
        *("load_manifest", "index_rows", "iter_index", "bad_samples", "bad_digest", "read_samples"),
        *("in_fraction", "held_out", "balanced_thresholds"),
    }


# Names ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_source_or_split_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"no-such: no such source\. Give one of digits, fashion-mnist, cifar10"):
        shards.open_source("no-such")
    with pytest.raises(UsageError, match="--split: digits has train, got test"):
        shards.open_source("digits", split="test")
    with pytest.raises(UsageError, match="--split: stl10 has train, test, unlabeled, got val"):
        shards.open_source("stl10", split="val", root=str(tmp_path))
    with pytest.raises(UsageError, match="fashion-mnist: say where its files are, with --root"):
        shards.open_source("fashion-mnist")


# Fashion-MNIST -------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


FASHION = {"train": "train", "test": "t10k"}


@pytest.fixture
def fashion(tmp_path):
    """A folder with its four files in small, and what they hold."""
    rng, truth = np.random.default_rng(0), {}
    for split, name in FASHION.items():
        truth[split] = rng.integers(0, 256, (7, 28, 28), np.uint8), np.array([0, 9, 3, 3, 1, 2, 9])
        for kind, array in zip(("images-idx3", "labels-idx1"), truth[split], strict=True):
            write_files(tmp_path / "files", {f"{name}-{kind}-ubyte.gz": gzip.compress(idx(array))})
    return tmp_path / "files", truth


@pytest.mark.parametrize("split", FASHION)
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_what_its_idx_files_hold(fashion, tmp_path, split, zipped):
    root, truth = fashion
    if not zipped:
        for path in list(root.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    manifest, found = packed(shards.open_source("fashion-mnist", split=split, root=str(root)), tmp_path / "set")
    images, numbers = truth[split]
    for i in range(7):
        sample = found[f"fashion-mnist-{split}-{i:08d}"]
        assert (pixels(sample["png"]) == images[i]).all()
        assert all(row.tobytes() in sample["png"] for row in images[i])  # stored, not compressed
        assert int(sample["cls"]) == numbers[i]
    assert manifest.class_names[9] == "Ankle boot"
    assert manifest.class_counts == (1, 1, 1, 2, 0, 0, 0, 0, 0, 2)


LABELS = "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, "no train-labels-idx1-ubyte.gz here. Debian has it"),
        (lambda data: b"not gzip", "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda data: data[:-12], "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda data: data[:10] + b"\xff" * 9 + data[19:], "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda data: gzip.compress(b"\0\0\x08"), "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda data: gzip.compress(idx(np.zeros((7, 2, 2)))), "not an IDX file of 1 dimensions"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "or truncated"),
        (lambda data: gzip.compress(idx(np.zeros(6))), "7 train images but 6 labels"),
        (lambda data: gzip.compress(idx(np.arange(7) + 4)), "label out of range: got 10, expected 0 to 9"),
    ],
)
def test_damaged_idx_files_are_errors_that_name_them(fashion, damage, message):
    root, _ = fashion
    data = damage((root / LABELS).read_bytes())
    (root / LABELS).unlink()
    if data is not None:
        (root / LABELS).write_bytes(data)
    with pytest.raises(DataError, match=f"{root}.*{message}") as caught:
        shards.open_source("fashion-mnist", root=str(root))
    assert "\n" not in str(caught.value)


# torchvision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("cifar10", "cifar-10-batches-py", "data_batch_1"),
        ("cifar100", "cifar-100-python", "train"),
        ("stl10", "stl10_binary", "train_X.bin"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_files_that_are_not_those_of_the_set_are_an_error_that_says_what_to_do(tmp_path, name, folder, file, there):
    if there:  # torchvision knows the files by their md5
        write_files(tmp_path, {f"{folder}/{file}": b"something else"})
    with pytest.raises(DataError, match=rf"{name}: {tmp_path}: .*--root.*--download") as caught:
        shards.open_source(name, root=str(tmp_path))
    assert "\n" not in str(caught.value)


# A folder of images --------------------------------------------------------------------------------------------------


def test_folders_at_the_first_level_are_classes_and_the_bytes_stay(tmp_path):
    files = {
        "dog/a.png": picture(1),
        "dog/deep/er/b.JPG": picture(2, "JPEG"),
        "Cat/c.webp": picture(3, "WEBP"),
        "ant v1.0/d.x.jpeg": picture(4, "JPEG"),
    }
    write_files(tmp_path / "images", files | {"dog/readme.txt": b"no image", "dog/.hidden.png": b"x", ".git/x.png": b"x"})
    manifest, found = packed(shards.open_source(str(tmp_path / "images")), tmp_path / "set")
    assert manifest.class_names == ("Cat", "ant v1.0", "dog")
    assert labels(found) == {"dog/a_png": 2, "dog/deep/er/b_JPG": 2, "Cat/c_webp": 0, "ant v1.0/d_x_jpeg": 1}
    assert found["dog/a_png"]["png"] == files["dog/a.png"]
    assert found["dog/deep/er/b_JPG"]["jpg"] == files["dog/deep/er/b.JPG"]
    assert found["Cat/c_webp"]["webp"] == files["Cat/c.webp"]
    assert found["ant v1.0/d_x_jpeg"]["jpeg"] == files["ant v1.0/d.x.jpeg"]


def test_a_folder_without_folders_has_no_labels(tmp_path):
    write_files(tmp_path / "images", {f"{i}.png": picture(i) for i in range(3)})
    manifest, found = packed(shards.open_source(str(tmp_path / "images")), tmp_path / "set")
    assert labels(found) == {"0_png": None, "1_png": None, "2_png": None}
    assert manifest.class_counts is None


def test_names_that_differ_in_dots_or_extension_only_are_samples_of_their_own(tmp_path):
    names = ["a.1.png", "a_1.png", "a_1_png.png", "a.1_png-2.png", "b.jpg", "b.png", "ü ::[*]?#%.png"]
    write_files(tmp_path / "images", {f"c/{name}": picture(i) for i, name in enumerate(names)})
    _, found = packed(shards.open_source(str(tmp_path / "images")), tmp_path / "set")
    assert len(found) == len(names)
    assert sorted(sample.get("png") or sample["jpg"] for sample in found.values()) == sorted(map(picture, range(len(names))))


def test_links_to_class_folders_are_followed_and_never_in_a_circle(tmp_path):
    write_files(tmp_path / "all", {"dog/a.png": picture(1), "cat/b.png": picture(2)})
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "dog").symlink_to(tmp_path / "all" / "dog")
    (tmp_path / "all" / "dog" / "round").symlink_to(tmp_path / "some")
    _, found = packed(shards.open_source(str(tmp_path / "some")), tmp_path / "set")
    assert labels(found) == {"dog/a_png": 0}


def test_a_relative_folder_is_fine(tmp_path, monkeypatch):
    write_files(tmp_path / "images", {"x/a.png": picture(1)})
    monkeypatch.chdir(tmp_path / "images")
    assert labels(packed(shards.open_source("."), tmp_path / "set")[1]) == {"x/a_png": 0}


def test_folders_that_make_no_sense_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no image below it"):
        shards.open_source(str(tmp_path / "empty"))
    write_files(tmp_path / "mixed", {"dog/a.png": b"1", "loose.png": b"2"})
    with pytest.raises(DataError, match=r"mixed: loose\.png lies beside class folders"):
        shards.open_source(str(tmp_path / "mixed"))
    (tmp_path / "odd").mkdir()
    with open(os.fsencode(tmp_path / "odd") + b"/\xff.png", "wb"):
        pass
    with pytest.raises(DataError, match=r"odd.* is not UTF-8\. Rename it"):
        shards.open_source(str(tmp_path / "odd"))


def test_an_image_that_goes_away_ends_the_pack_and_is_named(tmp_path):
    write_files(tmp_path / "images", {"a.png": b"1", "b.png": b"2"})
    source = shards.open_source(str(tmp_path / "images"))
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png: cannot be read \(No such file"):
        shards.pack(source, str(tmp_path / "set"))


# Shards of others ----------------------------------------------------------------------------------------------------


def test_shards_of_all_kinds_are_packed_with_names_of_classes_and_their_shards_in_the_keys(tmp_path):
    names = ["cat", "ant"]
    for i, name in enumerate(["a.tar", "a.b.tar", "a.tgz", "c.tar.gz"]):
        write_tar(tmp_path / "theirs" / name, samples(3, label=lambda n, i=i: names[(n + i) % 2], seed=10 * i))
    manifest, found = packed(shards.open_source(str(tmp_path / "theirs")), tmp_path / "set")
    assert manifest.class_names == ("ant", "cat")
    stems = ["a_tar", "a_b_tar", "a_tgz", "c_tar_gz"]
    assert labels(found) == {f"{stem}/{n:06d}": 1 - (n + i) % 2 for i, stem in enumerate(stems) for n in range(3)}
    assert {key: sample["png"] for key, sample in found.items()} == {
        f"{stem}/{n:06d}": picture(10 * i + n) for i, stem in enumerate(stems) for n in range(3)
    }


def test_packing_shards_of_others_leaves_them_and_the_scratch_space_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    path = write_tar(tmp_path / "theirs" / "x.tgz", samples(3))
    before = path.read_bytes()
    source = shards.open_source(str(tmp_path / "theirs"))
    shards.pack(source, str(tmp_path / "set"))
    del source
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["x.tgz"]
    assert path.read_bytes() == before
    assert list((tmp_path / "scratch").iterdir()) == []
    write_tar(tmp_path / "theirs" / "y.tar", [])
    with pytest.raises(DataError, match=r"y\.tar: no image"):
        shards.open_source(str(tmp_path / "theirs"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_shard_that_changes_while_it_is_packed_ends_the_pack(tmp_path):
    path = write_tar(tmp_path / "theirs" / "x.tar", samples(3))
    source = shards.open_source(str(tmp_path / "theirs"))
    write_tar(path, samples(3, seed=50))
    with pytest.raises(DataError, match=r"theirs: 00000\d: .*Copy the shard again"):
        shards.pack(source, str(tmp_path / "set"))
    assert not list((tmp_path / "set").glob("*.tar"))


def test_numbers_of_classes_stay_numbers_and_a_repack_shuffles(tmp_path):
    write_tar(tmp_path / "theirs" / "x.tar", samples(200, label=lambda i: 2 * (i // 100)))
    shards.index(str(tmp_path / "theirs"))
    assert shards.stats(str(tmp_path / "theirs"))["order"] != "random"
    manifest, found = packed(shards.open_source(str(tmp_path / "theirs")), tmp_path / "set")
    assert manifest.class_counts == (100, 0, 100)
    assert labels(found) == {f"x_tar/{i:06d}": 2 * (i // 100) for i in range(200)}
    own = [int(sample["cls"]) for sample in read_webdataset(tmp_path / "set")]
    assert 60 < sum(a != b for a, b in itertools.pairwise(own)) < 140
    assert shards.stats(str(tmp_path / "set"))["order"] == "random"
