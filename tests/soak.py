"""A soak: trains on a cluster of several nodes from and into a real S3 server, while stores, networks and processes fail at
random, and proves in the end that nothing was lost:

    python tests/soak.py --minutes 20 [--seed 0]

One JSON line for each fault, with how long the run took to make a new step; a summary; exit code 0 if the samples and the
losses of all steps are those of an undisturbed run, bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import proxy
import psutil
import seaweedfs
from command import ssl_ray
from nodes import Nodes, several_nodes

RUN, DATA = "runs/soak", "digits"
KEYS = [
    "views.count=4",
    "views.channels=1",
    "model.projector_dim=64",
    "train.batch=64",
    "train.epochs=100000",
    "train.workers=2",
    "train.digest=true",
    "checkpoint.every_s=10",
    "evaluate.max_images=50",
]
STORE = {
    "503": [proxy.Rule("503", times=12)],
    "500": [proxy.Rule("500", times=6)],
    "reset": [proxy.Rule("reset", times=8, after_bytes=500)],
    "truncate": [proxy.Rule("truncate", times=8, after_bytes=500)],
    "stall": [proxy.Rule("stall", times=3, seconds=25)],
    "slow": [proxy.Rule("slow", times=6, bytes_per_s=20_000)],
    "503, then resets": [proxy.Rule("503", times=5), proxy.Rule("reset", times=5)],
}
"""What befalls the next answers of the store."""
QUIET_S = 7.0
"""Metrics reach the store every five seconds; a longer time without a new step is lost."""
HANG_S = 400.0
"""So long without a new step, and the soak has failed."""


class Soak:
    """The disturbed run and what disturbs it."""

    def __init__(self, server: seaweedfs.Server, between: proxy.Proxy, nodes: Nodes, log: Path, drawn: random.Random):
        self.server, self.between, self.nodes, self.log, self.drawn = server, between, nodes, log, drawn
        self.client = server.client()
        self.added, self.faults, self.kills, self.lost_s, self.surprises = 0, 0, 0, 0.0, []  # type: int, int, int, float, list
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "ssl_ray", "pretrain", f"data.uri=s3://ssl/{DATA}", f"run=s3://ssl/{RUN}", *KEYS]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(command, env=os.environ | self.nodes.env, stdout=log, stderr=log)

    def objects(self, prefix: str) -> dict[str, bytes]:
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket="ssl", Prefix=prefix):
            for entry in page.get("Contents", []):
                found[entry["Key"]] = self.client.get_object(Bucket="ssl", Key=entry["Key"])["Body"].read()
        return found

    def newest(self) -> int:
        """The newest step in the store; -1 where it does not say."""
        with contextlib.suppress(Exception):
            entries = self.client.list_objects_v2(Bucket="ssl", Prefix=f"{RUN}/metrics/").get("Contents", [])
            started = max((entry["Key"].rpartition("-")[2] for entry in entries), default="")
            for key in sorted((entry["Key"] for entry in entries if entry["Key"].endswith(started)), reverse=True)[:1]:
                return json.loads(self.client.get_object(Bucket="ssl", Key=key)["Body"].read().splitlines()[-1])["step"]
        return -1

    def look_after(self) -> None:
        """Starts the driver again; that it ended by itself is no fault of ours."""
        if self.driver.poll() is not None:
            if self.driver.returncode != -signal.SIGKILL:
                self.surprises.append({"driver": self.driver.returncode, "said": self.log.read_text()[-300:]})
            self._start()

    def await_step(self, beyond: int) -> float:
        """Seconds until there is a newer step than `beyond`."""
        begun = time.monotonic()
        while self.newest() <= beyond:
            self.look_after()
            if time.monotonic() - begun > HANG_S:
                raise AssertionError(f"no step after {beyond} in {HANG_S:g} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return time.monotonic() - begun

    # What can happen

    def break_store(self, name: str) -> None:
        self.between.rules = [proxy.Rule(**vars(rule)) for rule in STORE[name]]

    def restart_server(self) -> None:
        self.server.stop()
        time.sleep(3)
        self.server.start()

    def kill_worker(self) -> None:
        workers = [p for p in self._family() if "RayTrainWorker" in " ".join(p.cmdline())]
        self.drawn.choice(workers).kill() if workers else None

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()

    def kill_node(self) -> None:
        name = next(name for name in self.nodes.processes if name != "head")
        self.nodes.kill(name)
        self._add_node()

    def terminate_raylet(self) -> None:
        name = next(name for name in self.nodes.processes if name != "head")
        self.nodes.terminate_raylet(name)
        self._add_node()

    def _add_node(self) -> None:
        self.added += 1
        self.nodes.add(f"more-{self.added}", cpus=2)

    def _family(self) -> Iterator[psutil.Process]:
        for name in list(self.nodes.processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in self.nodes.family(name):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.cmdline()
                        yield process

    def disturb(self, until: float) -> None:
        """Whole rounds, of four faults of the store and the network and a kill, until then."""
        kills = [self.kill_worker, self.kill_driver, self.kill_node, self.kill_worker, self.terminate_raylet]
        while time.monotonic() < until:
            for fault in [*_some(self), kills[self.kills % len(kills)]]:
                before = self.newest()
                self.kills += fault in kills
                fault()
                self.faults += 1
                after_s = self.await_step(before)
                self.lost_s += max(0.0, after_s - QUIET_S)
                about = {"fault": self.faults, "kind": fault.__name__, "step": before, "new_step_after_s": round(after_s, 1)}
                print(json.dumps(about), flush=True)
                time.sleep(self.drawn.uniform(0.5, 3))


def _some(soak: Soak) -> list[Callable[[], None]]:
    """Four faults of the store, a restart of it now and then."""
    faults: list[Callable[[], None]] = []
    for name in soak.drawn.sample(sorted(STORE), 4):

        def fault(name: str = name) -> None:
            soak.break_store(name)

        fault.__name__ = name
        faults.append(fault)
    if soak.drawn.random() < 0.5:
        faults[0] = soak.restart_server
    return faults


def records(segments: dict[str, bytes]) -> list[dict]:
    """The steps, each as the newest start of the workers that made it wrote it."""
    from ssl_ray.train import runs

    with tempfile.TemporaryDirectory() as folder:
        for key, data in segments.items():
            path = Path(folder) / "metrics" / key.rpartition("/")[2]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return runs.read_metrics(folder)


def undisturbed(folder: Path, steps: int, env: dict[str, str]) -> list[dict]:
    """The same run from local files, until it has as many steps."""
    ssl_ray({}, "data", "pack", "digits", str(folder / DATA), "--shard-mb", "0.25").ok()
    run = folder / "undisturbed"
    command = [sys.executable, "-m", "ssl_ray", "pretrain", f"data.uri={folder / DATA}", f"run={run}", *KEYS]
    with (folder / "undisturbed.log").open("wb") as log:
        driver = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
    from ssl_ray.train import runs

    while runs.read_marker(str(run)).step < steps:
        assert driver.poll() is None, (folder / "undisturbed.log").read_text()[-3000:]
        time.sleep(0.5)
    driver.terminate()
    driver.wait(120)
    return runs.read_metrics(str(run))[:steps]


def soak(folder: Path, *, minutes: float, seed: int) -> dict:
    """Runs it; returns the summary."""
    (folder / "s3").mkdir()
    with seaweedfs.serve(folder / "s3") as server, proxy.serve("127.0.0.1", server.port) as between:
        ssl_ray(server.environment(), "data", "pack", "digits", f"s3://ssl/{DATA}", "--shard-mb", "0.25").ok()
        with several_nodes(server.environment() | {"AWS_ENDPOINT_URL": between.endpoint}) as nodes:
            nodes.add("head", cpus=0)
            nodes.add("one", cpus=2)
            nodes.add("two", cpus=2)
            disturbed = Soak(server, between, nodes, folder / "driver.log", random.Random(seed))
            begun = time.monotonic()
            disturbed.await_step(5)
            disturbed.disturb(time.monotonic() + 60 * minutes)
            between.rules = []
            disturbed.driver.terminate()
            disturbed.driver.wait(120)
            seconds = time.monotonic() - begun
            found = disturbed.objects(f"{RUN}/")
            steps = json.loads(found[f"{RUN}/latest.json"])["step"]
            made = records({key: data for key, data in found.items() if "/metrics/" in key})[:steps]
            expected = undisturbed(folder, steps, nodes.env)
    wrong_samples = sum(a.get("digest") != b["digest"] for a, b in zip(made, expected, strict=False))
    wrong_losses = sum(a.get("loss") != b["loss"] for a, b in zip(made, expected, strict=False))
    return {
        "minutes": round(seconds / 60, 1),
        "steps": steps,
        "faults": disturbed.faults,
        "kills": disturbed.kills,
        "recoveries": disturbed.faults,
        "seconds_lost": round(disturbed.lost_s),
        "unexpected_ends": disturbed.surprises,
        "samples_lost": 64 * (wrong_samples + abs(len(made) - steps)),
        "steps_each_once": [record["step"] for record in made] == list(range(steps)),
        "losses_that_differ": wrong_losses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssl-ray-soak-") as folder:
        summary = soak(Path(folder), minutes=options.minutes, seed=options.seed)
    print(json.dumps(summary, indent=1))
    good = summary["steps_each_once"] and not summary["samples_lost"] and not summary["losses_that_differ"]
    return 0 if good and not summary["unexpected_ends"] else 1


if __name__ == "__main__":
    sys.exit(main())
