"""One driver a run in a bucket: conditional writes, a heartbeat, and a driver that was only asleep."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import proxy
import pytest
from command import ssl_ray
from seaweedfs import BUCKET, Server
from stored import Store
from test_s3 import objects, steps

from ssl_ray import storage
from ssl_ray.train import lease

KEYS = ("views.count=2", "model.projector_dim=16", "train.workers=0", "train.digest=true", "checkpoint.every_steps=20")


@pytest.fixture
def variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("variables")
def test_of_many_who_write_at_a_time_one_wins(server: Server):
    at, versions = f"s3://{BUCKET}/swap/one", [None]
    for _ in range(3):
        start = threading.Barrier(6)
        won: list[tuple[bytes, str]] = []

        def write(writer: int, version=versions[-1], start=start, won=won) -> None:
            data = f"{writer} after {version}".encode()
            start.wait()
            try:
                won.append((data, storage.swap(at, data, version=version)))
            except storage.Changed:
                pass

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_versioned(at) == won[0]
        assert server.client().get_object(Bucket=BUCKET, Key="swap/one")["Body"].read() == won[0][0]
        versions.append(won[0][1])
    for stale in versions[:-1]:
        with pytest.raises(storage.Changed):
            storage.swap(at, b"late", version=stale)


def start(server: Server, digits: str, run: str, *keys: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ssl_ray", "pretrain", f"data.uri={digits}", f"run={run}", *KEYS, *keys]
    return subprocess.Popen(command, env=os.environ | server.environment(), stderr=subprocess.PIPE, text=True)


def await_step(server: Server, run: str, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not any(record["step"] >= step for record in steps(objects(server, run))):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_driver_that_slept_while_another_took_over_its_run_commits_nothing(server: Server, digits: str):
    run, keys = f"s3://{BUCKET}/runs/asleep", ("train.steps=4000",)
    sleeper = start(server, digits, run, *keys)
    await_step(server, "runs/asleep/metrics", 40, sleeper)
    refused = ssl_ray(server.environment(), "pretrain", f"data.uri={digits}", f"run={run}", *KEYS, *keys)
    assert refused.code == 4, refused.err
    assert f"process {sleeper.pid}" in refused.err
    sleeper.send_signal(signal.SIGSTOP)
    heir = start(server, digits, run, *keys)
    number = 1
    until = time.monotonic() + 100
    while number == 1:  # it watches, takes over, begins
        assert heir.poll() is None, heir.stderr.read()
        assert time.monotonic() < until
        number = json.loads(objects(server, "runs/asleep/latest.json")["runs/asleep/latest.json"])["lease"]
    assert number == 2
    sleeper.send_signal(signal.SIGCONT)
    _, said = sleeper.communicate(timeout=100)
    assert sleeper.returncode in (1, 4), said
    assert "taken over this run" in said
    heir.send_signal(signal.SIGTERM)
    _, said = heir.communicate(timeout=100)
    assert heir.returncode == 130, said
    found = objects(server, "runs/asleep/")
    marker = json.loads(found["runs/asleep/latest.json"])
    assert marker["lease"] == 2
    assert json.loads(found["runs/asleep/lease"])["holder"] is None
    assert ssl_ray(server.environment(), "evaluate", run, "--json").ok()


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_heartbeat_that_arrived_but_whose_answers_were_all_lost_is_ones_own(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.5)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)  # beside those of the client
    run = f"s3://{BUCKET}/runs/unheard"
    storage.write_atomic(f"{run}/run.json", b"{}")

    def beats() -> int:
        return sum(request.line.startswith("PUT") and "unheard/lease " in request.line for request in store.between.log)

    def await_beats(more: int) -> None:
        before, until = beats(), time.monotonic() + 60
        while beats() < before + more:
            assert time.monotonic() < until
            time.sleep(0.1)

    with lease.held(run, wait=pytest.fail) as held:
        store.between.rules = [proxy.Rule("reset", times=1000, match="unheard/lease ")]
        await_beats(12)  # at most five of these are one heartbeat's
        store.between.rules = []
        await_beats(3)
        assert not held.lost
    assert json.loads(storage.read_bytes(f"{run}/lease"))["holder"] is None
