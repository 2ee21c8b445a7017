"""Runs that are killed and go on must equal runs that were left alone: losses, digests and weights, bit for bit."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness import SMALL, assert_same, finish, newest_step, ray_processes, records, results, run, start, wait_until

from ssl_ray.train.runs import read_marker

FAULT = Path(__file__).parents[1] / "fault"
STEPS = 57
ARGUMENTS = [
    *SMALL,
    "train.batch=64",
    f"train.steps={STEPS}",
    "evaluate.every_epochs=2",
    "evaluate.max_images=50",
    "checkpoint.every_steps=7",
]
"""19 steps an epoch, each a round; read-outs after steps 38 and 57."""


@pytest.fixture(scope="module")
def undisturbed(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run with so many workers that nothing happened to; each is made once."""
    made: dict[tuple[int, tuple[str, ...]], Path] = {}

    def run_of(workers: int, *keys: str) -> Path:
        if (workers, keys) not in made:
            uri = tmp_path_factory.mktemp("undisturbed") / str(workers)
            code, _, err = run("pretrain", f"run={uri}", f"train.workers={workers}", *ARGUMENTS, *keys, env=cluster)
            assert code == 0, err
            made[workers, keys] = uri
        return made[workers, keys]

    return run_of


Whom = Callable[[int, signal.Signals], None]
"""Sends a signal to more than the driver of this pid."""


def driver_and_group(pid: int, number: signal.Signals) -> None:
    """As `timeout` does."""
    os.kill(pid, number)
    os.killpg(pid, number)


def whole_job(pid: int, number: signal.Signals) -> None:
    """As schedulers do: all processes at the same time, Ray's too."""
    driver = psutil.Process(pid)
    for process in [*driver.children(recursive=True), driver]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class Victim:
    """A run whose processes are killed; after each end of its driver the same command continues it."""

    def __init__(self, uri: Path, workers: int, *, faults: Path, env: dict[str, str], keys: tuple[str, ...] = ()):
        self.uri, self.workers, self.faults, self.keys = uri, workers, faults, keys
        self.env = {"FAULTS": str(faults), "PYTHONPATH": str(FAULT)} | env
        self.kills = 0
        self._start()

    def _start(self) -> None:
        keys = [f"run={self.uri}", f"train.workers={self.workers}", *ARGUMENTS, *self.keys]
        self.driver = start("pretrain", *keys, env=self.env)

    def reach(self, step: int) -> None:
        assert wait_until(lambda: newest_step(self.uri) >= step, self.driver, f"step {step}"), self._ended()

    def _ended(self) -> str:
        return "the driver ended early:\n" + finish(self.driver)[2]

    def kill_worker(self, rank: int, *, at: int) -> None:
        """SIGKILL to one of the workers once step `at` is in the metrics."""
        self.reach(at)
        # After a restart the step may be there before the workers are.
        there = lambda: len(ray_processes("RayTrainWorker", self.faults)) == self.workers  # noqa: E731
        assert wait_until(there, self.driver, "the workers"), self._ended()
        start = read_marker(str(self.uri)).number
        ray_processes("RayTrainWorker", self.faults)[rank].kill()
        self.kills += 1
        # Or the next kill could hit the same start of the workers: the steps that it waits for may be there already.
        again = lambda: read_marker(str(self.uri)).number > start  # noqa: E731
        assert wait_until(again, self.driver, "the workers' next start"), self._ended()

    def kill_at_rename(self, target: str, *, nth: int = 1) -> None:
        """SIGKILL to whichever process is the `nth` from now on to rename a file to a path with all words of `target` in it."""
        order = self.faults / "order"
        order.write_text(f"{nth} {target}")
        while order.exists():
            if self.driver.poll() is not None:  # it was the driver, or the run is over
                break
            time.sleep(0.02)
        assert not order.exists(), f"nothing was renamed to {target}: {self._ended()}"
        self.kills += 1

    def kill_driver(self, *, at: int) -> None:
        self.reach(at)
        self.driver.kill()
        self.restart(-signal.SIGKILL)
        self.kills += 1

    def terminate_driver(self, *, at: int) -> None:
        """SIGTERM: it leaves a checkpoint of the step where it stopped."""
        self.reach(at)
        self.driver.terminate()
        self.restart(130)
        self.kills += 1

    def stop(self, *, at: int, whom: Whom) -> str:
        """SIGTERM to more than the driver, which has some seconds; what it said."""
        self.reach(at)
        whom(self.driver.pid, signal.SIGTERM)
        return self.restart(130, within_s=30)  # on a busy machine

    def restart(self, expected_code: int, within_s: float = 400) -> str:
        code, _, err = finish(self.driver, within_s)
        assert code == expected_code, err
        assert "Traceback" not in err
        self._start()
        return err

    def finish(self) -> dict:
        code, _, err = finish(self.driver)
        assert code == 0, err
        return json.loads((self.uri / "summary.json").read_text())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_run_in_this_process_equals_that_of_one_worker_through_ray(undisturbed):
    assert_same(undisturbed(0), undisturbed(1))


def test_two_workers_take_the_same_views_to_the_same_loss(undisturbed):
    left, right = records(undisturbed(0)), records(undisturbed(2))
    assert [record["digest"] for record in left] == [record["digest"] for record in right]
    assert right[0]["loss"] == pytest.approx(left[0]["loss"], rel=1e-6)


def test_a_run_in_this_process_survives_kills_at_every_stage_of_a_checkpoint(undisturbed, faults, tmp_path):
    victim = Victim(tmp_path / "run", 0, faults=faults, env={})
    # The marker is written at a start, then with each checkpoint.
    points = [("checkpoints weights", 1), ("checkpoints optimizer", 1), ("latest.json", 1), ("latest.json", 2)]
    for target, nth in [*points, ("metrics/", 1), ("summary.json", 1)]:
        victim.kill_at_rename(target, nth=nth)
        victim.restart(-signal.SIGKILL)
    victim.finish()
    assert_same(undisturbed(0), tmp_path / "run")


def test_two_workers_survive_the_death_of_a_worker_and_of_the_driver(undisturbed, cluster, faults, tmp_path):
    victim = Victim(tmp_path / "run", 2, faults=faults, env=cluster)
    victim.kill_at_rename("latest.json", nth=2)
    victim.kill_driver(at=30)
    summary = victim.finish()
    assert summary["restarts"] == victim.kills == 2
    assert_same(undisturbed(2), tmp_path / "run")


SLOW = ("views.size_px=24", "views.count=4")
"""Steps long enough to be hit."""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_workers_survive_the_death_of_a_worker_and_of_a_read_out(undisturbed, cluster, faults, tmp_path):
    victim = Victim(tmp_path / "run", 2, faults=faults, env=cluster, keys=SLOW)
    victim.kill_worker(1, at=9)
    victim.kill_at_rename("evaluations/00")
    victim.finish()
    assert_same(undisturbed(2, *SLOW), tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_number_of_workers_may_change_at_a_restart(cluster, faults, tmp_path):
    # A ReLU that flips on a rounding changes the gradient by a thousandth: a small learning rate keeps that small.
    slow = ("optim.lr=2e-6", *SLOW)
    alone = tmp_path / "alone"
    assert run("pretrain", f"run={alone}", "train.workers=0", *ARGUMENTS, *slow)[0] == 0
    victim = Victim(tmp_path / "run", 2, faults=faults, env=cluster, keys=slow)
    victim.workers = 1
    victim.terminate_driver(at=10)
    victim.workers = 4
    victim.kill_driver(at=30)
    victim.finish()
    left, right = records(alone), records(tmp_path / "run")
    assert [record["step"] for record in right] == list(range(STEPS))
    assert [record["digest"] for record in left] == [record["digest"] for record in right]
    for one, other in zip(left[:50], right[:50], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_driver_takes_the_ray_that_it_started_with_it(faults, tmp_path):
    shared = set(ray_processes("", faults))  # the cluster of other tests
    victim = Victim(tmp_path / "run", 1, faults=faults, env={})
    victim.reach(3)
    mine = lambda: set(ray_processes("", faults)) - shared  # noqa: E731
    assert mine()
    victim.driver.kill()
    finish(victim.driver)
    deadline = time.monotonic() + 90  # Ray's own agents look for the raylet once in a while
    while mine() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not mine()


def rays(driver: int) -> list[psutil.Process]:
    """Ray's own processes below a driver; Python's imports have children of their own, which come and go."""
    found = []
    for child in psutil.Process(driver).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if any("/ray/" in part for part in child.cmdline()) else []
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "whom", "processes"),
    [
        (signal.SIGTERM, os.kill, 3),
        (signal.SIGTERM, driver_and_group, 1),
        (signal.SIGTERM, whole_job, 1),
        (signal.SIGTERM, whole_job, 5),
        (signal.SIGINT, driver_and_group, 2),
    ],
)
def test_a_stop_while_ray_starts_ends_with_130_and_leaves_nothing_behind(number, whom, processes, faults, tmp_path):
    victim = Victim(tmp_path / "run", 2, faults=faults, env={})
    assert wait_until(lambda: len(rays(victim.driver.pid)) >= processes, victim.driver, "Ray's processes")
    whom(victim.driver.pid, number)
    code, _, err = finish(victim.driver, 30)
    assert (code, err.splitlines()[-1].endswith("; the same command continues.")) == (130, True), err
    assert "Traceback" not in err
    name = f"ssl-ray-{victim.driver.pid}-"
    assert not list(Path("/tmp").glob(f"{name}*"))
    deadline = time.monotonic() + 20
    while left := [process for process in psutil.process_iter(["cmdline"]) if name in " ".join(process.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_stop_while_the_workers_start_does_not_wait_for_them(cluster, faults, tmp_path):
    victim = Victim(tmp_path / "run", 2, faults=faults, env=cluster)
    assert wait_until((tmp_path / "run" / "latest.json").exists, victim.driver, "the workers' start")
    victim.driver.terminate()
    code, _, err = finish(victim.driver, 30)
    assert (code, err.splitlines()[-1]) == (130, "ssl-ray: stopped before the first step; the same command continues."), err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_whose_whole_job_is_stopped_goes_on_exactly(undisturbed, faults, tmp_path):
    victim = Victim(tmp_path / "run", 2, faults=faults, env={}, keys=SLOW)
    said = victim.stop(at=9, whom=whole_job).splitlines()[-1]
    assert said.endswith(" with a checkpoint; the same command continues.")  # Ray did not hear of it
    victim.finish()
    assert_same(undisturbed(2, *SLOW), tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_first_steps_of_a_run_of_a_hundred_thousand_rounds_come_at_once(cluster, faults, tmp_path):
    # With a round an epoch. Rounds are counted far ahead of training, which must not keep them from being made.
    victim = Victim(tmp_path / "run", 2, faults=faults, env=cluster, keys=("train.steps=null", "train.epochs=100000"))
    victim.reach(60)
    victim.driver.terminate()
    assert finish(victim.driver)[0] == 130


def test_a_step_is_in_the_metrics_once_with_what_scripts_rely_on(undisturbed):
    seen = records(undisturbed(2))
    assert [record["step"] for record in seen] == list(range(STEPS))
    for record in seen:
        assert {"step", "epoch", "loss", "lr", "images", "seconds", "data_wait_s", "digest"} <= record.keys()
        assert record["images"] == 64
    assert results(undisturbed(2))[1].keys()
