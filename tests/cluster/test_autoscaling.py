"""On a cluster whose autoscaler adds and ends nodes: studies make it grow, it shrinks after, and runs wait for what they need."""

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SMALL, digests, finish, newest_step, run, start, stop, wait_until
from local_cluster import Local, local_cluster
from nodes import PACED, several_nodes

from ssl_ray.study.results import read_study

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STUDY = """
recipe: digits
keys: {train.workers: 0, train.label: ssl-ray/role=train, evaluate.max_images: 50, views.size_px: 8}
sweep:
  model.projector_dim: {grid: [16, 24, 32]}
budget: {views: 12000}
readouts: 3
"""
MARKS = """
import os, pathlib, ray

ray.init(log_to_driver=False)
mark = pathlib.Path("mark")
mark.touch()
where = {os.getcwd()}
for role in ("data", "train"):
    where.add(ray.get(ray.remote(lambda: os.getcwd()).options(label_selector={"ssl-ray/role": role}).remote()))
assert mark.exists(), "another host removed the folder of this job"
assert len(where) == 3, where
"""
KEYS = [*SMALL, "train.batch=32", "train.steps=30", "evaluate.max_images=50"]
PLACED = ["train.label=ssl-ray/role=train", "data.label=ssl-ray/role=data"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Local]:
    """Nodes of one CPU, at most two of each kind."""
    with local_cluster("--max=2", "--cpus=1", "--idle-s=10") as made:
        yield made


def alone(cluster: Local) -> bool:
    return sorted(cluster.roles().values()) == ["head"]


def test_a_study_makes_a_cluster_grow_to_its_limit_and_it_shrinks_after(cluster: Local, tmp_path: Path):
    cluster.until(lambda: alone(cluster), "one node")
    (tmp_path / "study.yaml").write_text(STUDY)
    cluster.submit("study", "-m", "ssl_ray", "study", "run", str(tmp_path / "study.yaml"), "-o", str(tmp_path / "study"))
    cluster.until(lambda: sorted(cluster.roles().values()) == ["head", "train", "train"], "three nodes", job="study")
    cluster.until(lambda: cluster.state("study") == "SUCCEEDED", "the end of the study", job="study")
    assert "3 trials to run, 2 at a time" in cluster.logs("study")
    assert [trial.state.status for trial in read_study(str(tmp_path / "study")).trials] == ["complete"] * 3
    cluster.until(lambda: alone(cluster), "the end of the nodes")


def test_workers_and_tasks_land_on_nodes_with_their_labels_which_come_for_them(cluster: Local, tmp_path: Path):
    cluster.until(lambda: alone(cluster), "the end of nodes of other tests")
    uri = tmp_path / "run"
    cluster.submit("placed", "-m", "ssl_ray", "pretrain", f"run={uri}", "train.workers=2", *KEYS, *PLACED)
    roles: dict[str, str] = {}

    def done() -> bool:
        roles.update(cluster.roles())
        return cluster.state("placed") == "SUCCEEDED"

    cluster.until(done, "the end of the run", job="placed")
    seen = Counter(roles.values())  # one that takes long to join, as on a busy machine, may be asked for twice
    assert seen["head"] == 1
    assert seen["data"] >= 2
    assert seen["train"] >= 2
    actors = cluster.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    workers = [roles[row["node_id"]] for row in actors if "RayTrainWorker" in row["class_name"]]
    tasks = cluster.get("/api/v0/tasks?detail=1&limit=1000")["data"]["result"]["result"]
    makers = {roles[row["node_id"]] for row in tasks if "_work_round" in row["name"] and row["node_id"]}
    readers = {roles[row["node_id"]] for row in tasks if "evaluate_run" in row["name"] and row["node_id"]}
    assert workers
    assert set(workers) == {"train"}
    assert makers == {"data"}
    assert readers == {"data"}
    code, _, err = run("pretrain", f"run={tmp_path / 'here'}", "train.workers=0", *KEYS)
    assert code == 0, err
    assert digests(uri) == digests(tmp_path / "here")


def test_the_files_of_a_job_stay_when_hosts_unpack_them_too(cluster: Local, tmp_path: Path):
    (tmp_path / "marks.py").write_text(MARKS)
    cluster.submit("marks", "marks.py", working_dir=tmp_path)
    cluster.until(lambda: cluster.state("marks") == "SUCCEEDED", "the end of the job", job="marks")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.workers=5", *PLACED], "train.workers=5 needs 0.4 CPUs on a node with ssl-ray/role=train"),
        (["train.workers={min: 5, max: 6}"], "needs 2 free CPUs a worker"),
        (["train.workers=1", "train.label=ssl-ray/role=gpu"], "0 to train on nodes with ssl-ray/role=gpu"),
    ],
)
def test_what_even_the_grown_cluster_cannot_hold_is_refused(cluster: Local, tmp_path: Path, keys: list[str], message: str):
    name = f"refused-{uuid.uuid4().hex}"
    cluster.submit(name, "-m", "ssl_ray", "pretrain", f"run={tmp_path / 'run'}", *KEYS, *keys)
    end = {"FAILED", "SUCCEEDED"}
    cluster.until(lambda: cluster.state(name) in end, "the end of the job")
    assert cluster.state(name) == "FAILED"
    logs = cluster.logs(name)
    assert message in logs
    assert "with all nodes that may be added" in logs
    assert "Traceback" not in logs


def test_as_many_workers_as_the_grown_cluster_has_room_for(cluster: Local, tmp_path: Path):
    elastic = "train.workers={min: 1, max: 8}"
    cluster.submit("elastic", "-m", "ssl_ray", "pretrain", f"run={tmp_path / 'run'}", elastic, *KEYS, "train.steps=100000")

    def workers() -> int:
        actors = cluster.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
        return sum("RayTrainWorker" in row["class_name"] and row["state"] == "ALIVE" for row in actors)

    cluster.until(lambda: workers() == 2, "two workers, each with a CPU and one for data", job="elastic")
    assert len(cluster.roles()) == 5
    cluster.stop("elastic")


def test_workers_are_packed_if_the_user_says_so(tmp_path: Path):
    """That they are spread otherwise is seen in cluster/test_drained.py."""
    with several_nodes(PACED) as nodes:
        nodes.add("head", cpus=0)
        nodes.add("first", cpus=2)
        nodes.add("second", cpus=2)
        uri = tmp_path / "run"
        keys = [*KEYS, "train.workers=2", "train.steps=100000", "train.pack=true"]
        driver = start("pretrain", f"run={uri}", *keys, env=nodes.env)
        assert wait_until(lambda: newest_step(uri) >= 5, driver, "steps", timeout_s=300), finish(driver)[2]
        assert sum(nodes.has_workers(name) for name in ("first", "second")) == 1
        stop(driver)
