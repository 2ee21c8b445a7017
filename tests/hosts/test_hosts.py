"""A run on several hosts survives what happens to hosts and their links: the same steps with the same views as alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SMALL, digests, finish, newest_step, records, run, stop, wait_until
from hosts import MISSING, Hosts, several_hosts

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"several hosts on one machine: {MISSING}"),
]
KEYS = [*SMALL, "train.batch=32", "checkpoint.every_steps=20", "evaluate.max_images=50"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with several_hosts() as made:
        made.add("head", cpus=0)
        made.add("a", cpus=2)
        made.add("b", cpus=2)
        yield made


class Run:
    def __init__(self, uri: Path, hosts: Hosts):
        self.uri = uri
        self.driver = hosts.driver("pretrain", f"run={uri}", "train.workers={min: 1, max: 2}", "train.steps=100000", *KEYS)

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

    def equals_the_undisturbed_one(self) -> None:
        stop(self.driver)
        steps, alone = len(records(self.uri)), self.uri.with_name("alone")
        code, _, err = run("pretrain", f"run={alone}", "train.workers=0", f"train.steps={steps}", *KEYS)
        assert code == 0, err
        assert digests(self.uri) == digests(alone)
        assert [step for step, _ in digests(self.uri)] == list(range(steps))


def test_a_link_that_is_cut_is_noticed_and_a_host_that_joins_takes_over(hosts, tmp_path):
    watched = Run(tmp_path / "run", hosts)
    watched.reach(30)
    hosts.cut("b")
    watched.goes_on_after(1)
    hosts.add("c", cpus=2)
    assert "made way for more workers" in watched.goes_on_after(2)
    watched.equals_the_undisturbed_one()
