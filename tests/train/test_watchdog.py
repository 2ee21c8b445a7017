"""A worker that hangs is named, with what it waits for, and the run goes on or ends; real process groups, real hangs."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gloo
import pytest
import torch
import torch.distributed as dist
from harness import SMALL, assert_same, finish, newest_step, ray_processes, run, start, wait_until

from ssl_ray import plan, stream
from ssl_ray.config import Config, build
from ssl_ray.train import loop, runs
from ssl_ray.train.pretrain import located, open_data
from ssl_ray.train.watchdog import Watchdog

FAULT = Path(__file__).parents[1] / "fault"
HANGS_AT = 3
KEYS = ["views.count=2", "views.size_px=8", "views.channels=1", "model.projector_dim=16", "train.batch=48", "train.steps=6"]


def what_a_worker_says(group: dist.ProcessGroup, config: Config, uri: str, slow: int) -> tuple[int, list[str]]:
    """The last step of a worker and what its watchdog said; the data of worker `slow` come once its own has barked."""
    rank, workers = dist.get_rank(group), dist.get_world_size(group)
    data, _ = open_data(config)
    said: list[str] = []
    barked = threading.Event()

    def stalled(text: str) -> None:
        said.append(text)
        barked.set()

    def batches() -> Iterator[stream.Batch]:
        lanes = plan.lanes_of(rank, workers, data.plan.lanes)
        for batch in stream.local_batches(data, lanes=lanes, first_step=0, stop_step=6):
            if rank == slow and batch.step == HANGS_AT:
                assert barked.wait(60)
            yield batch

    dog = Watchdog(10.0, step=0, group=group, stalled=stalled)
    outcome = loop.run_worker(
        config,
        loop.Schedule(6, data.plan.steps_per_epoch, None),
        batches(),
        run=uri,
        marker=runs.begin_attempt(uri, lease=1) if rank == 0 else runs.Marker(),
        group=group,
        rank=rank,
        device=torch.device("cpu"),
        watchdog=dog,
    )
    dog.close()
    return outcome.step, said


def test_the_worker_whose_data_do_not_come_is_named_by_all_that_wait_for_it(tmp_path):
    config = located(build({"data": {"uri": "digits"}}, KEYS))
    found = gloo.run(what_a_worker_says, [(config, str(tmp_path), 1)] * gloo.WORKERS)
    assert [step for step, _ in found] == [6] * gloo.WORKERS
    told = "rank 1: waiting for data of step 3; ranks 0, 2, 3: in the all-reduce that begins step 3"
    says = [text for _, texts in found for text in texts]
    assert f"no progress for 10 s (train.stall_s): {told}" in says  # the others may bark when it has gone on


HANG = """
import sys, threading
from ssl_ray import cli, stream

made = stream.local_batches

def hang(*given, **named):
    for batch in made(*given, **named):
        if batch.step == 3:
            threading.Event().wait()
        yield batch

stream.local_batches = hang
sys.argv[0] = "ssl-ray"
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_run_in_this_process_that_hangs_ends_with_what_it_waited_for(tmp_path):
    keys = [f"run={tmp_path / 'run'}", "train.workers=0", "train.stall_s=10", "checkpoint.every_steps=2", *KEYS]
    done = subprocess.run([sys.executable, "-c", HANG, "pretrain", *keys], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    said = done.stderr.splitlines()[-2:]
    assert said[0] == "ssl-ray: no progress for 10 s (train.stall_s): rank 0: waiting for data of step 3"
    assert said[1] == "The same command continues from the last checkpoint."
    assert "waiting for data of step 3" in runs.newest_failure(str(tmp_path / "run"))
    assert runs.read_marker(str(tmp_path / "run")).step == 2


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_data_task_and_a_worker_that_are_stopped_are_replaced_and_no_step_differs(cluster, faults, tmp_path):
    keys = [*SMALL, "train.batch=64", "train.steps=80", "checkpoint.every_steps=10", "evaluate.max_images=50"]
    keys += ["views.size_px=24", "views.count=4", "train.workers=2", "train.stall_s=30"]
    code, _, err = run("pretrain", f"run={tmp_path / 'alone'}", *keys, env=cluster)
    assert code == 0, err
    uri = tmp_path / "run"
    driver = start("pretrain", f"run={uri}", *keys, env=cluster)
    stopped = []
    for title, step in (("MapBatches", -1), ("RayTrainWorker", 15)):  # all data are soon made
        assert wait_until(lambda step=step: newest_step(uri) >= step, driver, f"step {step}")
        assert wait_until(lambda title=title: ray_processes(title, faults), driver, "a process to stop")
        stopped.append(ray_processes(title, faults)[-1])
        stopped[-1].suspend()
    code, _, err = finish(driver)
    assert code == 0, err
    assert not any(process.is_running() for process in stopped)
    assert len(list((uri / "failures").iterdir())) == 1  # a task is done again by Ray, beside the workers
    assert_same(tmp_path / "alone", uri)


def test_what_comes_after_the_last_step_is_not_watched(tmp_path: Path):
    arguments = [
        "pretrain",
        "--json",
        *KEYS,
        f"run={tmp_path}/run",
        "train.workers=0",
        "train.stall_s=3",
        "evaluate.max_images=50",
    ]
    code = f"from ssl_ray.cli import main; import time; assert main({arguments}) == 0; time.sleep(6)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=120).returncode == 0
