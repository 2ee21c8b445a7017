"""`embed` and `neighbours` on a small run."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_harness import pack, png, write_tar
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from ssl_ray import shards
from ssl_ray.each import in_threads, in_turn
from ssl_ray.train.embed import draw_neighbours, embed


@pytest.fixture
def features(cli, trained: Path, packed: Path, tmp_path: Path) -> Path:
    cli("embed", trained, packed, "-o", tmp_path / "features.parquet").ok()
    return tmp_path / "features.parquet"


def matrix(table) -> np.ndarray:
    return np.stack(table["h"].to_numpy())


def test_features_stand_beside_keys_and_labels_in_the_order_of_the_data_set(features, trained, packed):
    table, manifest = pq.read_table(features), shards.load_manifest(str(packed))
    rows = [shards.index_rows(manifest, shard) for shard in range(len(manifest.counts))]
    assert table["key"].to_pylist() == [key for part in rows for key in part["key"].to_pylist()]
    assert table["label"].to_pylist() == [label for part in rows for label in part["label"].to_pylist()]
    assert table["shard"].to_pylist() == [
        name for name, count in zip(manifest.names.to_pylist(), manifest.counts, strict=True) for _ in range(count)
    ]
    assert str(table.schema.field("h").type) == "fixed_size_list<element: float>[128]"
    about, run = json.loads(table.schema.metadata[b"ssl_ray"]), json.loads((trained / "run.json").read_text())
    assert (about["config_hash"], about["step"], about["data_digest"]) == (run["hash"], 4, manifest.digest)
    assert about["class_names"] == ["class-0", "class-1", "class-2"]


def test_their_classifier_is_the_one_of_the_knn_protocol(cli, features, evaluated, packed):
    """The features are those that protocols make: scikit-learn's neighbours of them have the same accuracy."""
    (result,) = cli("evaluate", evaluated, "knn", "--test", packed, "--data", packed, "--json").ok().json
    table = pq.read_table(features)
    h, labels = matrix(table), table["label"].to_numpy()
    near = NearestNeighbors(n_neighbors=20, metric="cosine").fit(h).kneighbors(h, return_distance=False)
    votes = np.stack([np.bincount(labels[row], minlength=3) for row in near])
    assert result["top1"]["value"] == pytest.approx(np.mean(votes.argmax(axis=1) == labels), abs=0.03)


def test_row_groups_and_how_parts_are_gone_through_change_no_number(features, trained, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_ray.train.embed.ROWS", 40)
    for name, each in (("a", in_turn), ("b", in_threads)):
        done = []
        at = str(tmp_path / f"{name}.parquet")
        embed(str(trained), str(packed), at, each=each, progress=lambda *counts, done=done: done.append(counts))
        assert pq.ParquetFile(at).metadata.num_row_groups == len(done) == 3
        assert done[-1] == (96, 96)
        assert pq.read_table(at).equals(pq.read_table(features), check_metadata=True)


class Killed(Exception):
    """What ends a process that makes features."""


@pytest.mark.parametrize("damage", [None, "cut", "flipped"])
def test_what_was_killed_goes_on_from_the_pieces_that_are_whole(trained, packed, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("ssl_ray.train.embed.ROWS", 10)
    monkeypatch.setattr("ssl_ray.train.embed.PIECE", 2)
    made = []

    def counting(call, items, *, die_after=10**9):
        for item in items:
            if len(made) == die_after:
                raise Killed
            made.append(item)
            yield call(item)

    def run(name, each, data=packed):
        done = []
        embed(str(trained), str(data), str(tmp_path / name), each=each, progress=lambda *counts: done.append(counts))
        return done

    run("whole.parquet", counting)
    total = len(made)
    assert total > 6
    made.clear()
    with pytest.raises(Killed):
        run("again.parquet", functools.partial(counting, die_after=5))
    assert not (tmp_path / "again.parquet").exists()
    pieces = sorted((tmp_path / "again.parquet.parts").iterdir())
    assert len(pieces) == 2
    data = pieces[0].read_bytes()
    if damage == "cut":
        pieces[0].write_bytes(data[:-100])
    if damage == "flipped":
        pieces[0].write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    (pieces[0].parent / "mine.txt").write_text("not ours")
    before = len(made)
    done = run("again.parquet", counting)
    assert len(made) - before == len(done) == total - (2 if damage else 4)
    assert done[-1] == (96, 96)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert [path.name for path in (tmp_path / "again.parquet.parts").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "whole.parquet.parts").exists()


def test_pieces_of_other_data_are_not_taken(trained, packed, with_bad_image, tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_ray.train.embed.PIECE", 1)

    def dying(call, items):
        yield call(items[0])
        raise Killed

    def to(name, data, each):
        embed(str(trained), str(data), str(tmp_path / name), each=each, progress=lambda *counts: None)

    with pytest.raises(Killed):
        to("a.parquet", packed, dying)
    assert list((tmp_path / "a.parquet.parts").iterdir())
    to("a.parquet", with_bad_image, in_turn)
    to("b.parquet", with_bad_image, in_turn)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_unreadable_images_are_left_out_and_counted(cli, trained, with_bad_image, tmp_path):
    done = cli("embed", trained, with_bad_image, "-o", tmp_path / "features.parquet", "--json").ok().json
    assert (done["images"], done["unreadable"], done["dimensions"]) == (96, 1, 128)
    assert "class-1/broken" not in pq.read_table(tmp_path / "features.parquet")["key"].to_pylist()


def test_images_without_labels_have_null(cli, trained, tmp_path):
    write_tar(tmp_path / "shards" / "a.tar", {f"{i}.png": png(i, label=0) for i in range(3)})
    cli("data", "index", tmp_path / "shards").ok()
    cli("embed", trained, tmp_path / "shards", "-o", tmp_path / "features.parquet").ok()
    assert pq.read_table(tmp_path / "features.parquet")["label"].to_pylist() == [None] * 3


def test_a_file_of_another_kind_is_refused(cli, trained, packed, tmp_path):
    cli("embed", trained, packed, "-o", tmp_path / "features.csv").refused(2, "ends in .parquet")
    cli("neighbours", trained, packed, "-o", tmp_path / "a.jpg").refused(2, "ends in .png")
    cli("embed", tmp_path, packed, "-o", tmp_path / "a.parquet").refused(3, "no run here")


def test_twins_are_each_others_neighbours_in_the_picture(cli, trained, tmp_path):
    """Each image is there twice, under two names: the first neighbour in a row is drawn as the image itself is."""
    source = tmp_path / "images"
    for i in range(12):
        for twin in ("a", "b"):
            path = source / f"class-{i % 3}" / f"{i}{twin}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i, label=i % 3))
    data = pack(source, tmp_path / "shards")
    done = cli("neighbours", trained, data, "-o", tmp_path / "near.png", "--images", "5", "-k", "3", "--json").ok().json
    assert (done["images"], done["neighbours"], done["among"]) == (5, 3, 24)
    with Image.open(tmp_path / "near.png") as image:
        sheet = np.asarray(image)
    size, gap, line = 96, 6, 16
    for row in range(5):
        top = gap + row * (size + line + gap)
        first, second = (sheet[top : top + size, left : left + size] for left in (gap, gap + size + 2 * gap))
        assert np.array_equal(first, second)
        assert first.std() > 0


def test_more_neighbours_than_images_are_all_others(cli, trained, tmp_path):
    write_tar(tmp_path / "shards" / "a.tar", {f"{i}.png": png(i, label=0) for i in range(5)})
    cli("data", "index", tmp_path / "shards").ok()
    picture, done = draw_neighbours(str(trained), str(tmp_path / "shards"), num_images=20, k=20)
    assert (done["images"], done["neighbours"]) == (5, 4)
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
