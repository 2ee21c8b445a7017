"""A Ray cluster of several nodes on this machine, each in processes of its own, that come and go."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ssl_ray.train.cluster import PROMPT

FAULT = Path(__file__).parent / "fault"
PACED = {"PYTHONPATH": os.pathsep.join(filter(None, [str(FAULT), os.environ.get("PYTHONPATH")])), "PACE_S": "0.2"}
"""The environment of nodes whose workers rest after each step; see fault/sitecustomize.py."""
ASK = """
import json, ray, sys
ray.init(log_to_driver=False, logging_level="ERROR")
print(json.dumps({node["Labels"]["name"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}))
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Nodes:
    """Nodes by name; the first is the head, where drivers are."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        token = folder / "token"
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        self.env = env | PROMPT | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": self.address}
        self.processes: dict[str, subprocess.Popen] = {}

    def add(self, name: str, *, cpus: int, dashboard: int | None = None) -> None:
        """Starts a node and waits until it is part of the cluster. dashboard: port of the head's."""
        head = not self.processes
        port = self.address.partition(":")[2]
        where = ["--head", f"--port={port}", f"--temp-dir={self.folder}"] if head else [f"--address={self.address}"]
        options = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=200000000", "--block"]
        options += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", f"--labels=name={name}"]
        if head:
            pages = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
            pages += [f"--dashboard-agent-listen-port={free_port()}"]  # another Ray may have the usual one
            options += ["--include-dashboard=false"] if dashboard is None else pages
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *where, *options],
                env={key: value for key, value in (os.environ | self.env).items() if key != "RAY_ADDRESS"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 180
        while name not in self.alive():
            assert time.monotonic() < end, f"{name} does not join:\n{(self.folder / f'{name}.log').read_text()}"
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()

    def alive(self) -> dict[str, str]:
        """The ids of nodes that Ray says are alive, by name."""
        try:
            asked = subprocess.run(
                [sys.executable, "-c", ASK], env=os.environ | self.env, capture_output=True, text=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:  # a head with a dashboard takes a minute to start on a busy machine
            return {}
        found = [line for line in asked.stdout.splitlines() if line.startswith("{")]  # Ray may have something to say besides
        return json.loads(found[0]) if found else {}

    def family(self, name: str) -> list[psutil.Process]:
        """All processes of a node."""
        try:
            first = psutil.Process(self.processes[name].pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def has_workers(self, name: str) -> bool:
        return any("RayTrainWorker" in " ".join(process.cmdline()) for process in self.family(name))

    def kill(self, name: str) -> None:
        """SIGKILL to all processes of a node at the same time, as when its machine goes."""
        for process in self.family(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.pop(name).wait()

    def terminate_raylet(self, name: str) -> None:
        """SIGTERM to the raylet of a node."""
        (raylet,) = [process for process in self.family(name) if process.name() == "raylet"]
        raylet.terminate()
        raylet.wait(60)
        self.kill(name)

    def drain(self, name: str, *, deadline_s: int) -> None:
        """What a cloud's notice becomes: the node is to be left within so many seconds."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        command += [f"--node-id={self.alive()[name]}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command += [f"--deadline-remaining-seconds={deadline_s}"]
        subprocess.run(command, env=os.environ | self.env, check=True, timeout=60, capture_output=True)


@contextlib.contextmanager
def several_nodes(env: dict[str, str]) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ssl-ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(Path(folder), env)
        try:
            yield nodes
        finally:
            for name in reversed(list(nodes.processes)):
                nodes.kill(name)
