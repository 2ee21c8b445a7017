"""Check names each bad shard and sample; stats counts; runs of labels are found in shards of others."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import picture, read_tar, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError
from ssl_ray.shards import Source

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
BAD = {"shard": "int32", "row": "int64", "key": "string", "reason": "string"}


@pytest.fixture
def folder(tmp_path):
    """Three good shards of 4, 5 and 6 samples, indexed."""
    for i, count in enumerate((4, 5, 6)):
        write_tar(tmp_path / f"{i}.tar", samples(count, label=lambda i: i % 2, seed=10 * i))
    shards.index(str(tmp_path))
    return tmp_path


def flip(path, sample: int) -> None:
    """Changes a byte in the middle of a sample's image, whose size stays."""
    data = path.read_bytes()
    image = list(read_tar(path).values())[2 * sample]
    at = data.index(image) + len(image) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])


def test_a_good_data_set_is_ok_and_leaves_no_list(folder):
    report = shards.check(str(folder))
    assert report == {"ok": True, "shards": 3, "samples": 15, "bad_shards": [], "bad_samples": [], "notes": []}
    assert not (folder / "bad.parquet").exists()


def test_every_bad_shard_and_sample_is_named_and_written(folder):
    flip(folder / "0.tar", 2)
    data = (folder / "1.tar").read_bytes()
    cut = data.index(list(read_tar(folder / "1.tar").values())[6]) + 3  # inside the fourth image
    (folder / "1.tar").write_bytes(data[:cut])
    (folder / "2.tar").unlink()
    seen = []
    report = shards.check(str(folder), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not report["ok"]
    reasons = {bad["shard"]: bad["reason"] for bad in report["bad_shards"]}
    assert set(reasons) == {"0.tar", "1.tar", "2.tar"}
    assert "sha256" in reasons["0.tar"]
    assert f"it has {cut} bytes, the manifest says {len(data)}" in reasons["1.tar"]
    assert "not there" in reasons["2.tar"]
    bad = [(row["shard"], row["key"]) for row in report["bad_samples"]]
    truth = [("0.tar", "000002"), ("1.tar", "000003"), ("1.tar", "000004"), *(("2.tar", f"{i:06d}") for i in range(6))]
    assert bad == truth
    table = pq.read_table(folder / "bad.parquet")
    assert {field.name: str(field.type) for field in table.schema} == BAD
    assert all(f"| `{name}` | {kind} |" in FORMATS for name, kind in BAD.items())
    assert table["shard"].to_pylist() == [int(shard[0]) for shard, _ in truth]
    assert table["row"].to_pylist() == [int(key) for _, key in truth]
    assert table["key"].to_pylist() == [key for _, key in truth]
    assert table["reason"].to_pylist() == [row["reason"] for row in report["bad_samples"]]
    manifest = shards.load_manifest(str(folder))
    assert [part.tolist() for part in shards.bad_samples(manifest)] == [table["shard"].to_pylist(), table["row"].to_pylist()]
    assert shards.stats(str(folder))["bad_samples"] == len(truth)


def test_a_data_set_that_was_mended_loses_its_list(folder):
    good = (folder / "0.tar").read_bytes()
    manifest = shards.load_manifest(str(folder))
    assert shards.bad_digest(manifest) == ""
    flip(folder / "0.tar", 1)
    shards.check(str(folder))
    one = shards.bad_digest(manifest)
    flip(folder / "0.tar", 3)
    shards.check(str(folder))
    assert len({"", one, shards.bad_digest(manifest)}) == 3
    (folder / "0.tar").write_bytes(good)
    assert shards.check(str(folder))["ok"]
    assert not (folder / "bad.parquet").exists()
    assert shards.bad_digest(manifest) == ""


def test_a_shard_that_changed_where_no_image_is_has_no_bad_sample(folder):
    with (folder / "2.tar").open("ab") as file:
        file.write(b"\0" * 512)
    report = shards.check(str(folder))
    assert not report["ok"]
    assert [bad["shard"] for bad in report["bad_shards"]] == ["2.tar"]
    assert report["bad_samples"] == []


def test_a_gzipd_shard_is_read_again_though_its_content_was_kept(tmp_path):
    path = write_tar(tmp_path / "x.tgz", samples(3))
    manifest = shards.index(str(tmp_path))
    shards.read_samples(manifest, np.zeros(3, np.int64), np.arange(3))
    path.write_bytes(path.read_bytes()[:-20])
    report = shards.check(str(tmp_path))
    assert len(report["bad_shards"]) == 1
    assert len(report["bad_samples"]) == 3


def test_images_that_cannot_be_decoded_are_named_whatever_their_sums_say(tmp_path):
    whole = picture(1, "JPEG", px=64)
    tiff = io.BytesIO()
    Image.new("F", (2, 2)).save(tiff, "TIFF")
    grey = io.BytesIO()
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(grey, "PNG")
    members = [
        ("cut.jpg", whole[: len(whole) // 2]),
        ("empty.png", b""),
        ("good.jpg", whole),
        ("named_wrong.jpg", picture(2, "PNG")),
        ("sixteen.png", grey.getvalue()),
        ("text.webp", b"no image"),
        ("tiff.png", tiff.getvalue()),
    ]
    write_tar(tmp_path / "x.tar", members)
    shards.index(str(tmp_path))
    report = shards.check(str(tmp_path))
    assert report["bad_shards"] == []
    assert [bad["key"] for bad in report["bad_samples"]] == ["cut", "empty", "text", "tiff"]
    assert all(bad["reason"].startswith("cannot be decoded: ") for bad in report["bad_samples"])
    assert all("0x" not in bad["reason"] for bad in report["bad_samples"])  # addresses would differ from run to run


def test_the_decoder_may_be_the_callers(folder):
    def decode(data):
        if bytes(data) == picture(11):
            raise ValueError("cannot be decoded: not to my taste")

    (bad,) = shards.check(str(folder), decode=decode)["bad_samples"]
    assert bad == {"shard": "1.tar", "key": "000001", "reason": "cannot be decoded: not to my taste"}


def test_what_was_found_is_reported_though_the_list_cannot_be_written(folder):
    flip(folder / "0.tar", 2)
    (folder / "bad.parquet").mkdir()
    (folder / "bad.parquet" / "mine").write_text("")
    report = shards.check(str(folder))
    assert [bad["key"] for bad in report["bad_samples"]] == ["000002"]
    assert "bad.parquet" in report["notes"][0]


def test_without_a_manifest_check_and_stats_say_how_to_make_one(tmp_path):
    for verb in (shards.check, shards.stats):
        with pytest.raises(DataError, match=r"no manifest\.parquet here\. Make one with: ssl-ray data index"):
            verb(str(tmp_path))


def test_stats_count_what_is_there(tmp_path):
    members = [
        ("0.gif", b"no image of ours"),
        ("a.png", picture(0, px=8)),
        ("a.cls", b"x"),
        ("b.jpg", picture(1, "JPEG", px=30)),
        ("b.cls", b"y"),
        ("c.png", b"?"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    shards.index(str(tmp_path))
    images = [data for name, data in members if not name.endswith(("cls", "gif"))]
    assert shards.stats(str(tmp_path)) == {
        "shards": 1,
        "samples": 3,
        "bytes": path.stat().st_size,
        "mean_image_bytes": round(sum(map(len, images)) / 3),
        "image_sizes_px": "8x8 to 30x30 (of 2 looked at)",
        "bad_samples": 0,
        "without_image": 1,
        "order": "random",
        "classes": {"x": 1, "y": 1},
    }


def test_stats_of_shards_that_are_gone_still_count(folder):
    for path in folder.glob("*.tar"):
        path.unlink()
    found = shards.stats(str(folder))
    assert found["samples"] == 15
    assert found["image_sizes_px"] == "none could be read"


# Order ---------------------------------------------------------------------------------------------------------------


def order_of(folder, labels: list[int], *, per_shard: int = 1000) -> str:
    for start in range(0, len(labels), per_shard):
        own = labels[start : start + per_shard]
        members = [
            part for i, label in enumerate(own) for part in ((f"{i}.png", b"x"), *([(f"{i}.cls", b"%d" % label)] * (label >= 0)))
        ]
        write_tar(folder / f"{start:06d}.tar", members)
    shards.index(str(folder))
    (note,) = shards.check(str(folder))["notes"] or ["random"]
    assert shards.stats(str(folder))["order"] == note
    return note


@pytest.mark.parametrize(
    ("labels", "per_shard"),
    [
        ([i // 100 for i in range(1000)], 1000),
        ([i // 100 for i in range(1000)], 100),  # each shard a class
        ([i // 2 for i in range(400)], 400),  # pairs of many classes
        ([i // 10 % 10 for i in range(400)], 400),  # short runs that come again
        ([0] * 40 + [1] * 40, 80),
        ([0] * 1900 + [1] * 100, 1000),  # nearly all of one class
        ([-1 if i % 10 == 9 else i // 100 for i in range(1000)], 1000),  # some without a label
    ],
)
def test_runs_of_labels_in_shards_of_others_are_found(tmp_path, labels, per_shard):
    assert "the order is not random" in order_of(tmp_path, labels, per_shard=per_shard)


@pytest.mark.parametrize(
    "labels",
    [
        np.random.default_rng(0).integers(0, 10, 1000).tolist(),
        np.random.default_rng(1).permutation(np.repeat([0, 1], [950, 50])).tolist(),
        np.random.default_rng(2).integers(-1, 2, 600).tolist(),
        list(range(300)),
        [0, 1] * 100,
        [0] * 50,
        [-1] * 50,
        [3],
    ],
)
def test_a_random_order_gives_no_alarm(tmp_path, labels):
    assert order_of(tmp_path, labels) == "random"


def test_a_set_that_was_packed_gives_no_alarm_even_where_the_draw_has_runs(tmp_path):
    image, labels = picture(0), np.zeros(100, np.int64)
    source = Source("made", np.full(100, len(image)), labels, None, lambda numbers: [(f"{i}", image, "png") for i in numbers])
    manifest = shards.pack(source, str(tmp_path / "one"))
    drawn = [int(key) for key in shards.index_rows(manifest, 0)["key"].to_pylist()]
    labels[drawn] = np.arange(100) // 25  # as luck might have it
    packed = str(tmp_path / "two")
    assert shards.order_note(shards.pack(source, packed)) is None
    assert shards.check(packed)["notes"] == []
    assert shards.stats(packed)["order"] == "random"
    assert shards.order_note(shards.index(packed)) is None  # the manifest of these shards is still there
    (tmp_path / "two" / "manifest.parquet").unlink()
    assert "not random" in shards.order_note(shards.index(packed))  # of shards of unknown origin it is not known
