"""The cluster of cluster/local/cluster.py for tests: what it says of itself, over HTTP, and jobs on it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nodes import PACED

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "local" / "cluster.py"


def typed(folder: Path, verb: str, *options: str) -> subprocess.CompletedProcess:
    """`python cluster/local/cluster.py VERB`, of a cluster whose jobs import ssl_ray from here."""
    path = os.pathsep.join([str(ROOT), PACED["PYTHONPATH"]])
    command = [sys.executable, str(SCRIPT), verb, "--folder", str(folder), *options]
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = mine | PACED | {"PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


class Local:
    def __init__(self, folder: Path):
        self.folder = folder
        notes = json.loads((folder / "started.json").read_text())
        self.url, self.ports = notes["address"], notes["ports"]
        self.token = (folder / "token").read_text()
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def roles(self) -> dict[str, str]:
        """The label `ssl-ray/role` of each node that is alive, by its id."""
        rows = self.get("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return {row["node_id"]: row["labels"]["ssl-ray/role"] for row in rows if row["state"] == "ALIVE"}

    def submit(self, name: str, *command: str, working_dir: Path | None = None) -> None:
        """`ray job submit`, which returns at once."""
        asked = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={self.url}"]
        asked += [f"--submission-id={name}", "--no-wait", *([f"--working-dir={working_dir}"] if working_dir else [])]
        asked += ["--", sys.executable, *command]
        subprocess.run(asked, env=os.environ | self.env, check=True, capture_output=True, timeout=120)

    def state(self, name: str) -> str:
        return self.get(f"/api/jobs/{name}")["status"]

    def logs(self, name: str) -> str:
        return self.get(f"/api/jobs/{name}/logs")["logs"]

    def stop(self, name: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/api/jobs/{name}/stop", headers={"Authorization": f"Bearer {self.token}"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=30).close()
        self.until(lambda: self.state(name) in ("STOPPED", "FAILED", "SUCCEEDED"), f"the end of {name}")

    def until(self, condition: Callable[[], bool], what: str, *, job: str = "", timeout_s: float = 300) -> None:
        """Waits for `condition`, which must come before the job fails."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert not job or self.state(job) not in ("FAILED", "STOPPED"), self.logs(job)
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}: {self.roles()}\n{self.logs(job) if job else ''}"
            time.sleep(0.5)


@contextlib.contextmanager
def local_cluster(*options: str) -> Iterator[Local]:
    with tempfile.TemporaryDirectory(prefix="ssl-ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        at = Path(folder) / "c"
        started = typed(at, "up", *options)
        assert started.returncode == 0, started.stderr
        try:
            yield Local(at)
        finally:
            ended = typed(at, "down")
        assert ended.returncode == 0, ended.stderr
