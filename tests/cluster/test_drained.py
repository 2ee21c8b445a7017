"""A submitted job whose machines are taken away and die ends as one that nothing happened to."""

import json
import time
from pathlib import Path

import pytest
from harness import SMALL, assert_same, finish, newest_step, run, start, wait_until
from nodes import PACED, free_port, several_nodes

KEYS = [*SMALL, "train.batch=32", "checkpoint.every_steps=20", "evaluate.max_images=50"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_of_which_a_machine_is_taken_away_and_another_dies_ends_like_an_undisturbed_run(tmp_path: Path):
    uri, keys = tmp_path / "run", [*KEYS, "train.workers=2", "train.steps=140"]
    code, _, err = run("pretrain", f"run={tmp_path / 'alone'}", *keys)
    assert code == 0, err
    with several_nodes(PACED) as nodes:
        port = free_port()
        nodes.add("head", cpus=0, dashboard=port)
        for name in ("first", "second", "third"):
            nodes.add(name, cpus=2)
        client = {name: nodes.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        job = start(
            "submit", "pretrain", f"run={uri}", *keys, env=client | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        )

        def failures() -> list[dict]:
            return [json.loads(path.read_text()) for path in sorted((uri / "failures").glob("*.json"))]

        def until(condition, what: str) -> None:
            assert wait_until(condition, job, what), f"the job ended early:\n{finish(job)[2]}"

        def with_workers() -> str:
            return next(name for name in ("first", "second", "third") if name in nodes.processes and nodes.has_workers(name))

        until(lambda: newest_step(uri) >= 30, "step 30")
        assert sum(nodes.has_workers(name) for name in ("first", "second", "third")) == 2
        before, drained = newest_step(uri), with_workers()
        nodes.drain(drained, deadline_s=60)
        until(lambda: len(failures()) == 1 and newest_step(uri) >= failures()[0]["step"] + 20, "the end and start of the workers")
        nodes.kill(drained)  # its time is over
        nodes.kill(with_workers())
        until(lambda: len(failures()) == 2, "the second end of the workers")
        time.sleep(25)  # it says what it waits for
        nodes.add("fourth", cpus=2)
        code, _, err = finish(job)
    assert code == 0, err
    assert "waiting for machines: there is room for 1 of 2 workers" in err
    drained_at, killed_at = failures()
    assert "left its machine, which is being taken away" in str(drained_at["reasons"])
    assert killed_at["step"] > drained_at["step"] >= before  # no step that was done was lost
    assert_same(tmp_path / "alone", uri)
