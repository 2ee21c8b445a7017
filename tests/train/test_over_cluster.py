"""Packing, indexing and read-outs over a cluster: the same bytes and numbers as in one process, and the same errors."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command import ssl_ray
from harness import SMALL, finish, run, start, wait_until
from nodes import several_nodes
from PIL import Image

from ssl_ray import shards


def write_images(folder: Path, count: int) -> Path:
    for i in range(count):
        at = folder / f"class-{i % 3}" / f"{i}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        side = 8 + i % 40  # of many sizes, so that shards differ in their number of images
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)).save(at)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OVER = """
import json, sys
from ssl_ray import shards
from ssl_ray.each import in_turn
from ssl_ray.ray_map import over_cluster

images, out = sys.argv[1:]
with over_cluster(in_turn, label=None) as each:
    assert each is not in_turn
    for source, name in ((images, "of-images"), ("digits", "of-arrays"), (f"{out}/of-images", "of-shards")):
        shards.pack(shards.open_source(source, each=each), f"{out}/{name}", seed=3, shard_bytes=100_000, each=each)
    shards.index(f"{out}/of-arrays", output=f"{out}/index", each=each)
    print(json.dumps(shards.check(f"{out}/of-images", each=each)))
"""


def test_shards_made_indexed_and_checked_over_a_cluster_are_those_of_one_process(cluster, tmp_path):
    images, over, alone = write_images(tmp_path / "images", 300), tmp_path / "over", tmp_path / "alone"
    told = subprocess.run(
        [sys.executable, "-c", OVER, str(images), str(over)], env=os.environ | cluster, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    for source, name in ((images, "of-images"), ("digits", "of-arrays"), (over / "of-images", "of-shards")):
        manifest = shards.pack(shards.open_source(str(source)), str(alone / name), seed=3, shard_bytes=100_000)
        assert len(manifest.counts) > 2
        assert files(over / name) == files(alone / name)
    shards.index(str(over / "of-arrays"), output=str(alone / "index"))
    assert files(over / "index") == files(alone / "index")
    assert json.loads(told.stdout) == shards.check(str(alone / "of-images"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_error_of_a_task_is_told_in_a_line_and_leaves_no_shards(cluster, tmp_path):
    (tmp_path / "bad").mkdir()
    with tarfile.open(tmp_path / "bad" / "a.tar", "w") as tar:
        image = write_images(tmp_path / "images", 1) / "class-0" / "0.png"
        for name in ("x.png", "y.png", "x.png"):
            tar.add(image, name)
    ssl_ray(cluster, "data", "pack", str(tmp_path / "bad"), str(tmp_path / "out")).refused(3, "a.tar: key x appears again")
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_evaluation_over_a_cluster_has_the_numbers_of_one_in_one_process(cluster, tmp_path):
    uri = tmp_path / "run"
    keys = [*SMALL, "train.workers=0", "train.steps=5", "train.batch=64"]
    code, _, err = run("pretrain", f"run={uri}", *keys)
    assert code == 0, err
    alone = ssl_ray({}, "evaluate", str(uri), "--json").ok().json
    assert ssl_ray(cluster, "evaluate", str(uri), "--json").ok().json == alone
    assert json.loads((uri / "evaluations" / "0000000005.json").read_text()) == alone
    protocols = ("evaluate", str(uri), "knn", "spectrum", "--json")
    assert ssl_ray(cluster, *protocols).ok().json == ssl_ray({}, *protocols).ok().json
    for name, environment in (("alone", {}), ("over", cluster)):
        ssl_ray(environment, "embed", str(uri), "digits", "-o", str(tmp_path / f"{name}.parquet")).ok()
    assert (tmp_path / "over.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


PLACED = """
import ray
from ssl_ray.each import in_turn
from ssl_ray.ray_map import over_cluster

with over_cluster(in_turn, label="name=second") as each:
    used = set(each(lambda _: ray.get_runtime_context().get_node_id(), range(6)))
    print(*(node["Labels"]["name"] for node in ray.nodes() if node["NodeID"] in used))
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_pack_goes_on_where_a_machine_dies_and_keeps_to_the_label_it_is_given(tmp_path):
    images = write_images(tmp_path / "images", 6000)
    with several_nodes({}) as nodes:
        nodes.add("head", cpus=0)
        nodes.add("first", cpus=1)
        nodes.add("second", cpus=1)
        placed = subprocess.run([sys.executable, "-c", PLACED], env=os.environ | nodes.env, capture_output=True, text=True)
        assert placed.stdout == "second\n", placed.stderr
        pack = ("data", "pack", "digits", str(tmp_path / "nowhere"), "--label", "name=third")
        ssl_ray(nodes.env, *pack).refused(4, "--label name=third: the cluster has no node")
        driver = start("data", "pack", str(images), str(tmp_path / "set"), "--shard-mb", "0.0625", env=nodes.env)
        assert wait_until(lambda: len(list((tmp_path / "set").glob("*.tar"))) >= 5, driver, "five shards")
        nodes.kill("second")
        code, _, err = finish(driver)
        assert code == 0, err
    shards.pack(shards.open_source(str(images)), str(tmp_path / "alone"), shard_bytes=2**16)
    assert files(tmp_path / "set") == files(tmp_path / "alone")
