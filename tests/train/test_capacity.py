"""What a cluster has room for, and what it may grow to, as its autoscaler's configuration says."""

import pytest

from ssl_ray.config import Config, Workers, build
from ssl_ray.errors import ResourceError
from ssl_ray.study.run import concurrency
from ssl_ray.train.capacity import GROUP, HEAD, Capacity, Cpus, Node, Where, cpus_of, may_come, require_cpus
from ssl_ray.train.ray_train import plan_resources

CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "data": {"resources": {"CPU": 4}, "labels": {"role": "data"}, "max_workers": 3},
        "train": {"resources": {"CPU": 2, "GPU": 1}, "labels": {"role": "train"}},
        "unknown": {"resources": {}, "max_workers": 3},
    },
}


def there(*groups: str) -> list[dict]:
    """A head, and nodes of these types."""
    head = {"Resources": {HEAD: 1.0}, "Labels": {GROUP: "head"}}
    return [head, *({"Resources": {"CPU": 1.0}, "Labels": {GROUP: group}} for group in groups)]


@pytest.mark.parametrize(
    ("groups", "data", "train"),
    [((), 3, 5), (("data",), 2, 4), (("data", "data", "data"), 0, 2), (("train",) * 4, 1, 1), (("train",) * 5, 0, 0)],
)
def test_each_type_may_come_up_to_its_limit_and_that_of_the_cluster(groups: tuple[str, ...], data: int, train: int):
    coming = may_come(CONFIG, there(*groups))
    assert sum(node.has("role=data") for node in coming) == data
    assert sum(node.has("role=train") for node in coming) == train
    assert len(coming) == data + train
    assert {node.cpus for node in coming if node.has("role=train")} <= {2.0}


def test_nothing_comes_without_an_autoscaler():
    assert may_come(None, there("data")) == []


def test_workers_leave_to_streams_what_only_streams_may_use():
    nodes = [Node({"CPU": 4.0}, {"role": "data"}), Node({"CPU": 2.0}, {"role": "train"}), Node({"CPU": 1.0}, {})]
    assert cpus_of(nodes, Where()) == Cpus(0, 0, 7)
    assert cpus_of(nodes, Where(train="role=train")) == Cpus(0, 5, 2)
    cpus = cpus_of(nodes, Where(train="role=train", data="role=data"))
    assert cpus == Cpus(2, 4, 0)
    assert cpus.count(1, 1) == 2
    assert cpus.count(0.5, 2) == 2
    assert cpus.left(2) == 4
    assert Cpus(2, 0, 4).left(3) == 3


def test_the_message_says_where_which_cpus_are_missing():
    where = Where(train="role=train", data="role=data")
    require_cpus(Cpus(1, 1, 0), workers=4, threads=1, where=where)
    with pytest.raises(
        ResourceError, match="the cluster has free: 1 to train on nodes with role=train, 9 for data on nodes with role=data"
    ) as caught:
        require_cpus(Cpus(1, 9, 0), workers=5, threads=1, where=where, grown=True)
    assert "with all nodes that may be added. Set train.workers=4 or fewer" in str(caught.value)
    with pytest.raises(ResourceError, match="needs 4 free CPUs a worker"):
        require_cpus(Cpus(9, 1, 0), workers=Workers(min=1, max=2), threads=2)


def on_gpus(workers: int) -> Config:
    return build({}, [f"train.workers={workers}", "train.threads=1", "train.label=role=train", "data.label=role=data"])


@pytest.mark.parametrize(("workers", "trials"), [(0, 5), (1, 5), (2, 2), (5, 1)])
def test_trials_beside_one_another_have_a_gpu_for_each_worker(workers: int, trials: int):
    grown = Capacity([], [*may_come(CONFIG | {"max_workers": 5}, []), Node({"CPU": 64.0}, {"role": "data"})])
    config = on_gpus(workers)
    assert concurrency(grown, [config]) == trials
    if workers > 1:
        planned = plan_resources(config, grown, share=0.99 / trials)
        assert planned.per_worker["GPU"] == 1
        assert planned.worker_cpus * workers * trials <= 10


def test_more_workers_than_gpus_are_refused():
    grown = Capacity([], [*may_come(CONFIG, []), Node({"CPU": 64.0}, {"role": "data"})])
    with pytest.raises(ResourceError, match=r"6 workers \(train.workers\) need a GPU each; the cluster has 5 free."):
        plan_resources(on_gpus(6), grown)
