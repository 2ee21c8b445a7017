"""Tars, manifests and indexes as nobody should write them: used, or refused by name; no file is written elsewhere."""

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damages, fuzz, json_values, numbers, refused_or_done, texts
from hypothesis import strategies as st

from ssl_ray import shards
from ssl_ray.errors import DataError
from ssl_ray.shards.sources import stored_png

IMAGE = stored_png(np.arange(64, dtype=np.uint8).reshape(8, 8))

# Tars ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Member:
    name: str
    content: bytes
    kind: bytes
    size: int | None
    pax: dict[str, str]


NAMES = st.sampled_from(
    [
        "a",
        "b",
        "000001",
        "../../etc/passwd",
        "/etc/shadow",
        "x/../y",
        "k" * 10_000,
        "é" * 200,
        "\x1b[2J",
        "a/b.c/d",
        "",
        ".",
        "/" * 900,
    ]
)
EXTENSIONS = st.sampled_from([".png", ".jpg", ".PNG", ".cls", ".json", ".txt", ".seg.png", "", ".", ".npy"])
CONTENTS = st.sampled_from(
    [IMAGE, b"", b"3", b"cat", b"-1", b"9" * 400, b"\xff\xfe", b"[" * 5000, b'{"label": "\\ud800"}', b'{"label": 7}', b"x" * 2000]
)
TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 8
    + [
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"V",
        b"Z",
    ]
)
SPARSE = [f"GNU.sparse.{name}" for name in ("major", "minor", "map", "size")]
PAX = st.dictionaries(
    st.sampled_from(["size", "path", "hdrcharset", "mtime", "comment", *SPARSE]),
    st.sampled_from(["-1", "0", "1", str(2**62), "BINARY", "1,2,3", "x", "a.png", "k" * 3000, ""]),
    max_size=2,
)
SIZES = st.sampled_from([None] * 12 + [0, 1, 2**33 - 1, 2**40, 2**60, 2**62])
MEMBERS = st.builds(Member, st.builds(lambda name, extension: name + extension, NAMES, EXTENSIONS), CONTENTS, TYPES, SIZES, PAX)


def tar_of(members: list[Member], form: int) -> bytes:
    """By tarfile's own headers, with what they say of a size replaced."""
    out = []
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.type, info.size, info.linkname = member.kind, len(member.content), "../../etc/passwd"
        info.pax_headers = dict(member.pax) if form == tarfile.PAX_FORMAT else {}
        if member.size is not None:
            info.size = member.size
        try:
            head = info.tobuf(form, "utf-8", "surrogateescape")
        except ValueError:  # ustar has no room for it
            head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        out.append(head + member.content + bytes(-len(member.content) % 512))
    return b"".join(out) + bytes(1024)


def whole_tar(count: int = 3) -> list[Member]:
    """Labelled samples."""
    parts = [(f"{i:03d}{end}", content) for i in range(count) for end, content in ((".png", IMAGE), (".cls", b"%d" % i))]
    return [Member(name, content, tarfile.REGTYPE, None, {}) for name, content in parts]


def index_case(
    folder: Path, members: list[Member], among: bool, form: int, damage: Callable[[bytes], bytes] | None, packed: bool
) -> None:
    """An index of it names only images that can be read again."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    members = whole_tar()[:4] + members + whole_tar()[4:] if among else members
    data = tar_of(members, form)
    data = gzip.compress(data, 1) if packed else data
    data = damage(data) if damage is not None else data
    name = "x.tgz" if packed else "x.tar"
    (folder / name).write_bytes(data)
    outside = sorted(folder.parent.iterdir())
    with refused_or_done(name):
        manifest = shards.index(str(folder))
        rows = shards.index_rows(manifest, 0)
        assert rows.num_rows == manifest.num_samples > 0
        samples = shards.read_samples(manifest, np.zeros(rows.num_rows, np.int64), np.arange(rows.num_rows))
        assert samples.problems == {}
        plain = gzip.decompress(data) if packed else data
        for image, offset, size in zip(samples.images, *(rows[key].to_pylist() for key in ("offset", "size")), strict=True):
            assert image == plain[offset : offset + size]
    assert sorted(path.name for path in folder.iterdir()) in ([name], ["index", "manifest.parquet", name])
    assert sorted(folder.parent.iterdir()) == outside


@pytest.mark.parametrize("cases", [60, pytest.param(2300, marks=pytest.mark.long)])
def test_tars_of_any_members_and_damage_are_indexed_or_refused(cases, folder):
    own = folder / "own"
    own.mkdir()
    fuzz(
        lambda **drawn: index_case(own, **drawn),
        cases,
        members=st.lists(MEMBERS, max_size=4),
        among=st.booleans(),
        form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
        damage=st.none() | damages(),
        packed=st.booleans(),
    )


def test_the_members_of_the_fuzz_are_what_tarfile_reads():
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(fileobj=io.BytesIO(tar_of(whole_tar(), form))) as tar:
            assert [(member.name, member.size) for member in tar] == [(one.name, len(one.content)) for one in whole_tar()]


class Bomb:
    """A gzip'd tar of a few kB: a member's head and then zeros, so many, without the memory that they would take."""

    def __init__(self, head: bytes, zeros: int):
        sink = io.BytesIO()
        with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=9) as file:
            file.write(head)
            for _ in range(zeros // 2**24):
                file.write(bytes(2**24))
        self.data = sink.getvalue()


def head_of(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    return tar_of([Member(name, b"", kind, size, {})], tarfile.GNU_FORMAT)[:-1024]


@pytest.mark.long
@pytest.mark.parametrize(
    ("head", "zeros", "part"),
    [
        (head_of("a.npy", 2**33 - 512), 2**31 + 2**26, "more than 2147483648 bytes when decompressed"),
        (head_of("a.png", 2**31), 2**31 + 2**26, "has 2147483648 bytes, expected at most 268435456"),
        (head_of("././@LongLink", 2**31, tarfile.GNUTYPE_LONGNAME), 2**28, "headers of more than 1048576 bytes"),
        (head_of("pax", 2**31, tarfile.XHDTYPE), 2**28, "headers of more than 1048576 bytes"),
    ],
    ids=["of a member that is not read", "of an image", "of a name", "of a pax header"],
)
def test_a_small_gzip_that_would_fill_the_memory_is_refused_by_a_stated_limit(folder, head, zeros, part):
    (folder / "x.tgz").write_bytes(Bomb(head, zeros).data)
    assert (folder / "x.tgz").stat().st_size < 3 * 2**20
    with pytest.raises(DataError, match=re.escape(part)):
        shards.index(str(folder))


def test_a_member_that_claims_a_size_beyond_any_disk_ends_at_once(folder):
    (folder / "x.tar").write_bytes(head_of("a.npy", 2**60) + bytes(10240))
    with refused_or_done("x.tar"), pytest.raises(DataError, match="it ends within a member"):
        shards.index(str(folder))


# Manifest and index -------------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(folder: Path) -> Path:
    """Two shards, one gzip'd, and a list of bad samples."""
    own = folder / "own"
    own.mkdir()
    (own / "a.tar").write_bytes(tar_of(whole_tar(5), tarfile.PAX_FORMAT))
    (own / "b.tgz").write_bytes(gzip.compress(tar_of(whole_tar(4), tarfile.PAX_FORMAT)))
    broken = [Member("z.png", b"no image", tarfile.REGTYPE, None, {})]
    (own / "c.tar").write_bytes(tar_of([*whole_tar(2), *broken], tarfile.PAX_FORMAT))
    shards.index(str(own))
    assert len(shards.check(str(own))["bad_samples"]) == 1
    return own


FILES = ("manifest.parquet", "index/part-00000.parquet", "bad.parquet")


def use(folder: Path, *, read: bool = True) -> None:
    """All that reads these files."""
    manifest = shards.load_manifest(str(folder))
    shards.bad_digest(manifest)
    assert sum(table.num_rows for table in shards.iter_index(manifest, ["shard", "hash", "label"])) == manifest.num_samples
    for shard in range(len(manifest.counts)):
        rows = shards.index_rows(manifest, shard)
        assert rows.num_rows == manifest.counts[shard]
        there = manifest.names[shard].as_py() in os.listdir(folder)  # else the reader waits for it
        if read and there and manifest.data_uri == str(folder):
            shards.read_samples(manifest, np.full(rows.num_rows, shard), np.arange(rows.num_rows))


def damaged_case(folder: Path, whole: dict[str, bytes], name: str, damage: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(damage(whole[name]))
    try:
        with refused_or_done(name, "ssl-ray data", ".t"):
            use(folder)
    finally:
        (folder / name).write_bytes(whole[name])


@pytest.mark.parametrize("cases", [50, pytest.param(900, marks=pytest.mark.long)])
def test_damaged_manifests_and_indexes_are_used_or_refused(cases, data_set):
    whole = {name: (data_set / name).read_bytes() for name in FILES}
    use(data_set)
    fuzz(lambda **drawn: damaged_case(data_set, whole, **drawn), cases, name=st.sampled_from(FILES), damage=damages())


def table_case(folder: Path, whole: dict[str, bytes], name: str, column: float, row: float, change: str, value) -> None:
    table = pq.read_table(io.BytesIO(whole[name]))
    number = int(column * table.num_columns)
    field, values = table.schema.field(number), table.column(number).to_pylist()
    match change:
        case "value":
            values[int(row * len(values))] = value
        case "all":
            values = [value] * len(values)
        case "shift":
            values = values[1:] + values[:1]
        case "fewer":
            table, values = table.slice(1), values[1:]
        case "more":
            table, values = pa.concat_tables([table, table]), values * 2
    if change == "drop":
        table = table.remove_column(number)
    else:
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            try:  # of another type then
                array = pa.array([value] * len(values))
            except (pa.ArrowException, OverflowError, TypeError, ValueError):
                return
        table = table.set_column(number, pa.field(field.name, array.type), array)
    pq.write_table(table, folder / name, row_group_size=5 if name.startswith("index") else 1000)
    try:
        with refused_or_done(name, "ssl-ray data", ".t"):
            use(folder)
    finally:
        (folder / name).write_bytes(whole[name])


@pytest.mark.parametrize("cases", [50, pytest.param(700, marks=pytest.mark.long)])
def test_manifests_and_indexes_with_other_columns_and_values_are_used_or_refused(cases, data_set):
    whole = {name: (data_set / name).read_bytes() for name in FILES}
    share = st.floats(0, 1, exclude_max=True)
    fuzz(
        lambda **drawn: table_case(data_set, whole, **drawn),
        cases,
        name=st.sampled_from(FILES),
        column=share,
        row=share,
        change=st.sampled_from(["value", "value", "value", "all", "shift", "fewer", "more", "drop"]),
        value=st.none() | numbers | texts | st.floats(),
    )


def about_case(folder: Path, whole: bytes, key: str, value: object, whole_value: bool) -> None:
    table = pq.read_table(io.BytesIO(whole))
    about = json.loads(table.schema.metadata[b"ssl_ray"])
    about = value if whole_value else about | {key: value}
    pq.write_table(table.replace_schema_metadata({"ssl_ray": json.dumps(about)}), folder / "manifest.parquet")
    with refused_or_done(
        "manifest.parquet", "ssl-ray data", "path", str((about or {}).get("data_uri")) if isinstance(about, dict) else "-"
    ):
        use(folder, read=False)
        shards.stats(str(folder)) if key != "data_uri" else None


COUNTS = ["format_version", "num_samples", "without_image", "shards_per_part", "class_counts", "mean_bytes"]
KEYS = [*COUNTS, "shuffled", "class_names", "data_uri"]


@pytest.mark.parametrize("cases", [40, pytest.param(600, marks=pytest.mark.long)])
def test_manifests_that_say_anything_of_themselves_are_used_or_refused(cases, data_set):
    whole = (data_set / "manifest.parquet").read_bytes()
    fuzz(
        lambda **drawn: about_case(data_set, whole, **drawn),
        cases,
        key=st.sampled_from(KEYS),
        value=json_values,
        whole_value=st.sampled_from([False] * 9 + [True]),
    )


@pytest.mark.parametrize("name", ["../own/a.tar", "/etc/x.tar", "sub/a.tar"])
def test_a_manifest_cannot_name_a_shard_in_another_folder(data_set, name):
    table = pq.read_table(data_set / "manifest.parquet")
    names = pa.array([name, *table["name"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, "name", names), data_set / "manifest.parquet")
    with pytest.raises(DataError, match="a shard's name is no file name"):
        shards.load_manifest(str(data_set))


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", -1), ("offset", 10**6), ("size", -1), ("size", 2**40), ("label", 99), ("label", -2), ("shard", 1)],
)
def test_an_index_cannot_point_beyond_its_shard_or_classes(data_set, column, value):
    path = data_set / "index/part-00000.parquet"
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    number = groups[0].schema.get_field_index(column)
    values = pa.array([value, *groups[0][column].to_pylist()[1:]], groups[0].schema.field(number).type)
    groups[0] = groups[0].set_column(number, column, values)
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group)
    with pytest.raises(DataError, match=r"part-00000\.parquet: damaged: .*ssl-ray data index"):
        shards.index_rows(shards.load_manifest(str(data_set)), 0)
