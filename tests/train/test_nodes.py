"""Nodes that die and come: the run goes on with as many workers as there is room for, and loses no step."""

import json
from pathlib import Path

import pytest
from harness import SMALL, digests, finish, newest_step, records, run, start, stop, wait_until
from nodes import PACED, Nodes, several_nodes

KEYS = [*SMALL, "train.batch=32", "checkpoint.every_steps=20", "evaluate.max_images=50"]


class Watched:
    """A run whose starts are seen."""

    def __init__(self, uri: Path, nodes: Nodes, *keys: str):
        self.uri = uri
        self.driver = start("pretrain", f"run={uri}", *KEYS, *keys, env=nodes.env)

    def until(self, condition, what: str) -> None:
        assert wait_until(condition, self.driver, what), f"the driver ended early:\n{finish(self.driver)[2]}"

    def reach(self, step: int) -> None:
        self.until(lambda: newest_step(self.uri) >= step, f"step {step}")

    def failures(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((self.uri / "failures").glob("*.json"))]

    def ends_of_workers(self, number: int) -> str:
        """Waits for so many ends of the workers and for twenty steps after; why the last of them was."""
        self.until(lambda: len(self.failures()) >= number, f"end {number} of the workers")
        self.reach(self.failures()[-1]["step"] + 20)
        return str(self.failures()[number - 1]["reasons"])

    def finish(self) -> str:
        """What it said."""
        code, _, err = finish(self.driver)
        assert code == 0, err
        assert "Traceback" not in err
        return err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_workers_follow_nodes_that_die_and_come(tmp_path):
    with several_nodes(PACED) as nodes:
        nodes.add("head", cpus=0)
        nodes.add("first", cpus=2)
        nodes.add("second", cpus=2)
        watched = Watched(tmp_path / "run", nodes, "train.workers={min: 1, max: 3}", "train.steps=100000")
        watched.reach(30)
        assert all(nodes.has_workers(name) for name in ("first", "second"))
        nodes.terminate_raylet("second")
        watched.ends_of_workers(1)
        nodes.add("third", cpus=2)
        assert "made way for more workers" in watched.ends_of_workers(2)
        stop(watched.driver)
    steps = len(records(watched.uri))
    code, _, err = run("pretrain", f"run={tmp_path / 'alone'}", "train.workers=0", f"train.steps={steps}", *KEYS)
    assert code == 0, err
    assert digests(watched.uri) == digests(tmp_path / "alone")
    assert [step for step, _ in digests(watched.uri)] == list(range(steps))
