"""A run on several hosts survives what happens to hosts and their links: the same steps with the same views as alone."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SMALL, finish, newest_step, records, run, wait_until
from hosts import MISSING, Hosts, several_hosts

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"several hosts on one machine: {MISSING}"),
]
STEPS = 400
KEYS = [*SMALL, "train.batch=32", f"train.steps={STEPS}", "checkpoint.every_steps=20", "evaluate.max_images=50"]
KEYS += ["views.size_px=24", "views.count=4"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = run("pretrain", f"run={uri}", "train.workers=0", *KEYS)
    assert code == 0, err
    return uri


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with several_hosts() as made:
        made.add("head", cpus=0)
        made.add("a", cpus=2)
        made.add("b", cpus=2)
        yield made


class Run:
    def __init__(self, uri: Path, hosts: Hosts):
        self.uri, self.hosts = uri, hosts
        self.start()

    def start(self) -> None:
        self.driver = self.hosts.driver("pretrain", f"run={self.uri}", "train.workers={min: 1, max: 2}", *KEYS)

    def until(self, condition, what: str) -> None:
        assert wait_until(condition, self.driver, what), f"the driver ended early:\n{finish(self.driver)[2]}"

    def reach(self, step: int) -> None:
        self.until(lambda: newest_step(self.uri) >= step, f"step {step}")

    def goes_on_after(self, ends: int) -> str:
        """Waits for so many ends of the workers and for ten steps after; why the last was."""
        failures = lambda: sorted((self.uri / "failures").glob("*.json"))  # noqa: E731
        self.until(lambda: len(failures()) >= ends, f"end {ends} of the workers")
        found = json.loads(failures()[ends - 1].read_text())
        self.reach(found["step"] + 30)
        return str(found["reasons"])

    def finish(self, alone: Path) -> None:
        code, _, err = finish(self.driver)
        assert code == 0, err
        left, right = ([(record["step"], record["digest"]) for record in records(uri)] for uri in (alone, self.uri))
        assert left == right
        assert len(left) == STEPS


def test_a_link_that_is_cut_is_noticed_and_a_host_that_joins_takes_over(hosts, alone, tmp_path):
    watched = Run(tmp_path / "run", hosts)
    watched.reach(30)
    hosts.cut("b")
    watched.goes_on_after(1)
    hosts.add("c", cpus=2)
    assert "made way for more workers" in watched.goes_on_after(2)
    watched.finish(alone)


def test_a_host_and_then_the_driver_are_killed(hosts, alone, tmp_path):
    watched = Run(tmp_path / "run", hosts)
    watched.reach(30)
    hosts.kill("a")
    watched.goes_on_after(1)
    os.killpg(watched.driver.pid, signal.SIGKILL)
    finish(watched.driver)
    watched.start()
    watched.finish(alone)
