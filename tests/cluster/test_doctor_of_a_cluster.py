"""`ssl-ray doctor` of a cluster that begins as a head without work, whose autoscaler may add hosts."""

import pytest
from command import ssl_ray
from local_cluster import local_cluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


def test_a_fresh_cluster_is_well_where_its_autoscaler_may_add_what_the_recipe_needs(tmp_path):
    (tmp_path / "big.yaml").write_text("train: {workers: 40}\n")
    with local_cluster("--max=1") as cluster:
        looked = [
            ssl_ray(cluster.env, "doctor", "--address", cluster.url, "-c", recipe, "--json")
            for recipe in ("digits", str(tmp_path / "big.yaml"))
        ]
    fits, big = ({row["check"]: row for row in done.json} for done in looked)
    assert fits["nodes"]["found"].startswith("1 nodes, 0 CPUs")
    assert fits["workers"]["ok"], fits["workers"]
    assert fits["workers"]["found"].startswith("room for 0 of train.workers=2 now, and for all of them, without GPUs")
    assert not big["workers"]["ok"]
    assert "train.workers=40" in big["workers"]["found"]
    assert "with all nodes that may be added" in big["workers"]["found"]
    assert looked[1].code == 4
