"""One driver a run: who may train it, and that no other can commit."""

import json
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from harness import SMALL, finish, newest_step, run, start, wait_until

from ssl_ray import storage
from ssl_ray.errors import SslRayError
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import Snapshot
from ssl_ray.train.writer import Writer

KEYS = ("train.workers=0", "evaluate.max_images=50", *SMALL)


def test_swaps_of_many_writers_are_one_after_the_other(tmp_path: Path):
    at = str(tmp_path / "counter")

    def count(writer: int) -> None:
        done = 0
        while done < 20:
            data, version = storage.read_versioned(at)
            number = json.loads(data)["number"] if data else 0
            try:
                storage.swap(at, json.dumps({"number": number + 1, "by": (writer, done)}).encode(), version=version)
                done += 1
            except storage.Changed:
                continue

    threads = [threading.Thread(target=count, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(Path(at).read_text())["number"] == 80
    assert storage.list_names(str(tmp_path)) == ["counter"]


def _shot(step: int) -> Snapshot:
    return Snapshot(step, {"encoder.w": torch.full((2,), float(step))}, {}, {"bad_samples": []})


def test_workers_of_an_earlier_start_commit_nothing_and_their_late_metrics_do_not_count(tmp_path: Path):
    run = str(tmp_path / "run")
    early = Writer(run, marker=runs.begin_attempt(run, lease=1), keep=2, flush_s=0.01)
    for step in range(4):
        early.record({"step": step, "by": "early"})
    early.checkpoint(_shot(2), evaluate=False)
    early.checkpoint(_shot(2), evaluate=False)  # waits for the first
    late = runs.begin_attempt(run, lease=2)
    assert (late.step, late.number, late.idle) == (2, 2, 1)
    writer = Writer(run, marker=late, keep=2, flush_s=0.01)
    for step in range(2, 5):
        writer.record({"step": step, "by": "late"})
    writer.close()
    for step in range(4, 8):
        early.record({"step": step, "by": "early"})
    early.checkpoint(_shot(8), evaluate=False)
    early.close()
    assert "taken over" in str(early.error)
    assert writer.error is None
    marker = runs.read_marker(run)
    assert (marker.step, marker.attempt, marker.lease) == (2, late.attempt, 2)
    by = {record["step"]: record["by"] for record in runs.read_metrics(run)}
    assert by == {0: "early", 1: "early"} | dict.fromkeys(range(2, 5), "late")
    assert len(runs.read_metrics(run)) == 5
    with pytest.raises(SslRayError, match="another driver has taken over"):
        runs.begin_attempt(run, lease=1)


def test_a_driver_that_slept_while_it_undid_removes_nothing_of_the_one_that_took_over(tmp_path: Path, monkeypatch):
    run = str(tmp_path / "run")
    first = Writer(run, marker=runs.begin_attempt(run, lease=1), keep=2, flush_s=0.01)
    for step in range(4):
        first.record({"step": step})
    first.checkpoint(_shot(2), evaluate=False)
    first.close()
    left = f"{run}/checkpoints/0000000003-left"  # what workers that died had begun
    storage.write_atomic(f"{left}/weights.safetensors", b"")
    heirs = []

    def sleep(uri: str, remove=storage.remove) -> None:
        """Before the first removal another driver takes over, and commits."""
        if not heirs:
            heirs.append(None)
            heir = Writer(run, marker=runs.begin_attempt(run, lease=3), keep=2, flush_s=0.01)
            for step in range(2, 9):
                heir.record({"step": step})
            heir.checkpoint(_shot(6), evaluate=False)
            heir.close()
            heirs[0] = heir
        remove(uri)

    monkeypatch.setattr(storage, "remove", sleep)
    slept = runs.begin_attempt(run, lease=2)
    marker = runs.read_marker(run)
    assert (marker.step, marker.lease) == (6, 3)
    assert storage.exists(f"{run}/checkpoints/{marker.checkpoint}/state.json")
    assert [record["step"] for record in runs.read_metrics(run)] == list(range(9))
    assert not storage.exists(left)
    with pytest.raises(storage.Changed):
        runs.commit(run, slept, step=3, checkpoint="0000000003-slept")


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_that_are_newer_than_ones_own_are_left_alone(tmp_path: Path, keep: int):
    run = str(tmp_path / "run")
    for name in ("0000000080-a", "0000000100-a", "0000000120-a", "0000000140-b", "0000000160-b"):
        storage.write_atomic(f"{run}/checkpoints/{name}/state.json", b"{}")
    gone = runs.superseded(run, newest="0000000120-a", keep=keep, pending=3)
    assert gone == ["0000000080-a", "0000000100-a"][: 3 - keep]


def test_only_the_workers_that_were_asked_stop(tmp_path: Path):
    run = str(tmp_path / "run")
    first = runs.begin_attempt(run, lease=1)
    runs.ask_to_stop(run, first)
    second = runs.begin_attempt(run, lease=2)
    assert [runs.stop_asked(run, marker) for marker in (first, second)] == [True, False]
    runs.ask_to_stop(run)
    assert [runs.stop_asked(run, marker) for marker in (first, second)] == [True, True]


def test_a_second_driver_is_refused_as_long_as_the_first_lives(tmp_path: Path):
    keys = (*KEYS, f"run={tmp_path}/run", "train.steps=100000", "checkpoint.every_steps=50")
    first = start("pretrain", *keys)
    assert wait_until(lambda: newest_step(tmp_path / "run") >= 60, first, "steps")
    code, _, err = run("pretrain", *keys)
    assert code == 4
    (line,) = [line for line in err.splitlines() if line.startswith("ssl-ray: ")]
    assert f"is being trained by {subprocess.getoutput('hostname')}, process {first.pid}." in line
    first.kill()
    finish(first)
    done = json.loads((tmp_path / "run" / "latest.json").read_text())["step"]
    again = start("pretrain", *keys)  # at once: the lock has gone with its process
    assert wait_until(lambda: newest_step(tmp_path / "run") > done + 50, again, "more steps")
    again.send_signal(signal.SIGTERM)
    assert finish(again)[0] == 130
    assert json.loads((tmp_path / "run" / "lease").read_text())["number"] == 2
