"""The index of shards that others wrote, against tarfile, zlib and hashlib; and what is refused, by name."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import picture, read_tar, read_webdataset, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError

SALT = b"ssl_ray sample v1\0"


def expected_hash(shard: str, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(SALT + shard.encode() + b"\0" + key.encode(), digest_size=8).digest(), "little")


def labels(manifest: shards.Manifest) -> list[int]:
    return [label for i in range(len(manifest.counts)) for label in shards.index_rows(manifest, i)["label"].to_pylist()]


def indexed(folder: Path, members: list[tuple[str, bytes]], **options) -> shards.Manifest:
    write_tar(folder / "x.tar", members, **options)
    return shards.index(str(folder))


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.gz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_column_is_what_tarfile_zlib_and_hashlib_say(tmp_path, name, form):
    long = "d" * 80 + "/" + "é" * 35
    members = [*samples(4, label=lambda i: i % 2), (f"{long}.png", picture(9)), (f"{long}.cls", b"2")]
    path = write_tar(tmp_path / name, members, format=form)
    manifest = shards.index(str(tmp_path))
    table = shards.index_rows(manifest, 0)
    assert table["label"].to_pylist() == [0, 1, 0, 1, 2]
    assert table["shard"].to_pylist() == [0] * 5
    content = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".png")]
    assert table["key"].to_pylist() == [member.name[:-4] for member in images]
    assert table["offset"].to_pylist() == [member.offset_data for member in images]
    assert table["size"].to_pylist() == [member.size for member in images]
    truth = [content[member.offset_data : member.offset_data + member.size] for member in images]
    assert truth == [data for name, data in members if name.endswith(".png")]
    assert table["crc32"].to_pylist() == [zlib.crc32(data) for data in truth]
    assert table["hash"].to_pylist() == [expected_hash(name, key) for key in table["key"].to_pylist()]
    assert manifest.sizes.tolist() == [path.stat().st_size]
    assert manifest.sha256.to_pylist() == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert not manifest.shuffled


def test_the_files_have_the_schemas_of_docs_formats(tmp_path):
    shards.index(str(write_tar(tmp_path / "x.tar", samples(2)).parent))
    manifest, index = (pq.read_schema(tmp_path / name) for name in ("manifest.parquet", "index/part-00000.parquet"))
    assert {field.name: str(field.type) for field in manifest} == {
        "name": "string",
        "size_bytes": "int64",
        "count": "int64",
        "sha256": "string",
    }
    assert {field.name: str(field.type) for field in index} == {
        "shard": "int32",
        "key": "string",
        "offset": "int64",
        "size": "int64",
        "label": "int32",
        "hash": "uint64",
        "crc32": "uint32",
    }
    documented = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for field in (*manifest, *index):
        assert f"| `{field.name}` | {field.type} |" in documented


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["cls", "txt", "json"])
def test_numbers_are_classes_as_they_are(tmp_path, extension):
    content = (lambda i: f'{{"label": {i}}}') if extension == "json" else (lambda i: f"{i}\n")
    manifest = indexed(tmp_path, samples(4, label=content, extension=extension))
    assert labels(manifest) == [0, 1, 2, 3]
    assert manifest.class_names is None
    assert manifest.class_counts == (1, 1, 1, 1)


@pytest.mark.parametrize("extension", ["cls", "txt", "json"])
def test_names_are_numbered_in_alphabetical_order_over_all_shards(tmp_path, extension):
    names = {"a.tar": ["zebra", "cat"], "b.tar": ["ant", "zebra", "1_000"]}
    for shard, own in names.items():
        content = (lambda i, own=own: f'{{"label": "{own[i]}"}}') if extension == "json" else (lambda i, own=own: own[i])
        write_tar(tmp_path / shard, samples(len(own), label=content, extension=extension))
    manifest = shards.index(str(tmp_path))
    assert manifest.class_names == ("1_000", "ant", "cat", "zebra")
    assert labels(manifest) == [3, 2, 1, 3, 0]
    assert manifest.class_counts == (1, 1, 1, 2)
    assert shards.stats(str(tmp_path))["classes"] == {"1_000": 1, "ant": 1, "cat": 1, "zebra": 2}


def test_cls_comes_before_json_and_json_before_txt(tmp_path):
    image = picture(0)
    members = [("a.txt", b"1"), ("a.json", b'{"label": 2}'), ("a.cls", b"3"), ("a.png", image)]
    members += [("b.png", image), ("b.txt", b"1"), ("b.json", b'{"label": 2}'), ("c.json", b'{"width": 3}'), ("c.png", image)]
    assert labels(indexed(tmp_path, members)) == [3, 2, -1]


@pytest.mark.parametrize(
    ("extension", "content"),
    [("txt", "two\nlines"), ("txt", "a caption " * 8), ("txt", ""), ("json", "{}"), ("json", "[1]"), ("json", '{"label": true}')],
)
def test_captions_and_other_json_are_no_labels(tmp_path, extension, content):
    manifest = indexed(tmp_path, samples(2, label=lambda i: content, extension=extension))
    assert labels(manifest) == [-1, -1]
    assert manifest.class_counts is None


@pytest.mark.parametrize(
    ("extension", "content", "message"),
    [
        ("cls", "-1", r"label out of range: got -1, expected 0 to 999999"),
        ("cls", "1000000", r"label out of range: got 1000000"),
        ("json", '{"label": 99999999999999999999999}', r"label out of range: got 9999"),
        ("cls", "9" * 5000, r"label out of range"),
        ("cls", "", r"\.cls holds '', expected a class number or name"),
        ("cls", "a\nb", r"\.cls holds 'a\\nb'"),
        ("json", "{", r"\.json is not JSON"),
        ("cls", b"\xff\xfe", r"not UTF-8"),
    ],
)
def test_a_label_that_is_none_is_an_error_that_names_shard_and_key(tmp_path, extension, content, message):
    content = content.encode() if isinstance(content, str) else content
    with pytest.raises(DataError, match=rf"x\.tar: 000001: .*{message}") as caught:
        indexed(tmp_path, [*samples(1), ("000001.png", picture(1)), (f"000001.{extension}", content)])
    assert len(str(caught.value)) < 300
    with pytest.raises(DataError, match=r"no manifest\.parquet"):
        shards.load_manifest(str(tmp_path))


@pytest.mark.parametrize("same_shard", [True, False])
def test_numbers_and_names_together_are_an_error(tmp_path, same_shard):
    if same_shard:
        write_tar(tmp_path / "x.tar", samples(2, label=lambda i: ["3", "cat"][i]))
    else:
        write_tar(tmp_path / "w.tar", samples(1, label=lambda i: "3"))
        write_tar(tmp_path / "x.tar", samples(1, label=lambda i: "cat"))
    with pytest.raises(DataError, match=r"some labels are numbers, others names \('cat', by x.tar\)"):
        shards.index(str(tmp_path))


# Keys and images -----------------------------------------------------------------------------------------------------


def test_keys_are_those_of_webdataset_sub_folders_and_dots_included(tmp_path):
    names = ["a/b.c/d.png", "./e.PNG", "f.g.png", "f.h.JPG", "v1.0/x.jpeg", "y.webp", "z.png"]
    kinds = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
    members = [(name, picture(i, kinds[name.lower().rpartition(".")[2]])) for i, name in enumerate(names)]
    manifest = indexed(tmp_path, [*members, (".hidden.png", b"x"), ("no_extension", b"x")])
    keys = shards.index_rows(manifest, 0)["key"].to_pylist()
    whole = [sample["__key__"] for sample in read_webdataset(tmp_path) if set(sample) & {"png", "jpg", "jpeg", "webp"}]
    assert keys == whole == ["a/b.c/d", "./e", "v1.0/x", "y", "z"]


def test_of_several_images_the_first_kind_counts_and_other_members_are_let_be(tmp_path):
    members = [("a.npy", b"x"), ("a.webp", b"w"), ("a.png", b"p"), ("a.seg.png", b"s"), ("a.JPG", b"j"), ("only.npy", b"n")]
    manifest = indexed(tmp_path, members)
    assert manifest.num_samples == 1
    assert bytes(shards.read_samples(manifest, np.array([0]), np.array([0])).images[0]) == b"j"


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, samples(2))
    manifest = shards.index(str(tmp_path))
    hashes = [value for i in (0, 1) for value in shards.index_rows(manifest, i)["hash"].to_pylist()]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"0")], "key a appears again after b: interleaved"),
        ([("a.png", b"1"), ("b.png", b"2"), ("a.png", b"1")], "key a appears again after b"),
        ([("a.png", b"1"), ("a.png", b"2")], r"key a has two \.png members"),
        ([("a.cls", b"1"), ("a.npy", b"2")], "no image in it"),
        ([], "no image in it"),
    ],
)
def test_a_shard_that_makes_no_sense_is_an_error_that_says_which_and_where(tmp_path, members, message):
    write_tar(tmp_path / "good.tar", samples(2))
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=rf"{tmp_path}/x\.tar: {message}") as caught:
        shards.index(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_links_and_names_that_are_no_text_are_errors(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"x\.tar: a\.png is a link"):
        shards.index(str(tmp_path))
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("é.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match=r"x\.tar: the name of .* is not UTF-8"):
        shards.index(str(tmp_path))


# Data sets -----------------------------------------------------------------------------------------------------------


def test_manifest_and_index_may_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("shards/x.tar"), samples(3, label=lambda i: i))
    (tmp_path / "elsewhere" / "index").mkdir(parents=True)
    (tmp_path / "elsewhere" / "index" / "mine.txt").write_text("mine")
    shards.index("shards", output="elsewhere")
    assert [path.name for path in Path("shards").iterdir()] == ["x.tar"]
    assert Path("elsewhere/index/mine.txt").read_text() == "mine"
    monkeypatch.chdir("/")
    manifest = shards.load_manifest(str(tmp_path / "elsewhere"))
    got = shards.read_samples(manifest, np.zeros(3, np.int64), np.arange(3))
    assert [bytes(image) for image in got.images if image is not None] == [picture(i) for i in range(3)]
    assert shards.check(str(tmp_path / "elsewhere"))["ok"]


def test_a_data_set_may_be_moved(tmp_path):
    write_tar(tmp_path / "old" / "x.tar", samples(3))
    digest = shards.index(str(tmp_path / "old")).digest
    (tmp_path / "old").rename(tmp_path / "new")
    manifest = shards.load_manifest(str(tmp_path / "new"))
    assert manifest.digest == digest
    assert not shards.read_samples(manifest, np.array([0]), np.array([1])).problems


def test_indexing_again_takes_what_is_there_now(tmp_path):
    write_tar(tmp_path / "x.tar", samples(3))
    write_tar(tmp_path / "y.tar", samples(2))
    assert shards.index(str(tmp_path)).counts.tolist() == [3, 2]
    (tmp_path / "x.tar").unlink()
    write_tar(tmp_path / "y.tar", samples(4))
    manifest = shards.index(str(tmp_path))
    assert manifest.counts.tolist() == [4]
    assert shards.index_rows(manifest, 0).num_rows == 4


def test_the_whole_index_comes_in_order_over_parts_and_row_groups(tmp_path):
    counts = [1 + i % 3 for i in range(300)]  # more shards than one part holds
    image = picture(0)
    for i, count in enumerate(counts):
        write_tar(tmp_path / f"{i:04d}.tar", [(f"{n}.png", image) for n in range(count)])
    manifest = shards.index(str(tmp_path))
    tables = list(shards.iter_index(manifest, ["shard", "key"]))
    assert [s for table in tables for s in table["shard"].to_pylist()] == np.repeat(np.arange(300), counts).tolist()
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    for shard in (0, 159, 160, 299):
        assert shards.index_rows(manifest, shard)["key"].to_pylist() == [str(n) for n in range(counts[shard])]
    for path in sorted(tmp_path.glob("*.tar"))[3:]:
        path.unlink()
    assert shards.index(str(tmp_path)).counts.tolist() == counts[:3]
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["part-00000.parquet"]


def test_a_shard_of_more_rows_than_a_row_group(tmp_path):
    image = picture(0)
    members = [part for i in range(9000) for part in ((f"{i}.png", image), (f"{i}.cls", b"cat" if i % 2 else b"ant"))]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", [("x.png", image)])
    manifest = shards.index(str(tmp_path))
    assert shards.index_rows(manifest, 0, ["label"])["label"].to_pylist() == [0, 1] * 4500
    assert shards.index_rows(manifest, 1)["key"].to_pylist() == ["x"]
    assert manifest.class_counts == (4500, 4500)
    assert list(read_tar(tmp_path / "b.tar")) == ["x.png"]


def test_a_manifest_of_a_million_shards_loads_in_seconds_and_within_700_mib(tmp_path):
    count = 10**6
    columns = {
        "name": pa.array([f"train-{i:07d}.tar" for i in range(count)]),
        "size_bytes": np.full(count, 2**30),
        "count": np.full(count, 1000),
        "sha256": pa.array([f"{i:064x}" for i in range(count)]),
    }
    about = {"format_version": 1, "class_names": None, "class_counts": None, "mean_bytes": 1e5, "data_uri": None}
    table = pa.table(columns).replace_schema_metadata({"ssl_ray": json.dumps(about)})
    pq.write_table(table, tmp_path / "manifest.parquet")
    program = r"""if True:
        import re, sys, time
        from ssl_ray import shards
        began = time.process_time()
        assert shards.load_manifest(sys.argv[1]).num_samples == 10**9
        seconds = time.process_time() - began
        print(seconds, int(re.search(r"VmHWM: *\t *(\d+) kB", open("/proc/self/status").read())[1]) / 2**10)
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, mib = map(float, done.stdout.split())
    assert seconds < 10
    assert mib < 700


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.parquet").write_bytes(b"no"), r"manifest\.parquet: not a readable Parquet file"),
        (
            lambda folder: pq.write_table(pq.read_table(folder / "index/part-00000.parquet"), folder / "manifest.parquet"),
            "format",
        ),
        (lambda folder: (folder / "index/part-00000.parquet").write_bytes(b"no"), r"part-00000\.parquet: damaged"),
        (lambda folder: (folder / "index/part-00000.parquet").unlink(), r"part-00000\.parquet: not there. Make it again"),
        (
            lambda folder: pq.write_table(
                pq.read_table(folder / "index/part-00000.parquet")[:2], folder / "index/part-00000.parquet"
            ),
            "holds 2 samples, expected 3 by the manifest",
        ),
    ],
)
def test_a_damaged_manifest_or_index_is_an_error(tmp_path, damage, message):
    write_tar(tmp_path / "x.tar", samples(3))
    shards.index(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        shards.index_rows(shards.load_manifest(str(tmp_path)), 0)


def test_an_index_that_fails_leaves_the_one_that_was_there(tmp_path):
    before = indexed(tmp_path, samples(5))
    rows = shards.index_rows(before, 0)
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"y\.tar: truncated"):
        shards.index(str(tmp_path))
    assert shards.load_manifest(str(tmp_path)).digest == before.digest
    assert shards.index_rows(shards.load_manifest(str(tmp_path)), 0).equals(rows)
