"""The checks of a place to run, on a real Ray."""

import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import seaweedfs
from command import ssl_ray
from nodes import free_port

from ssl_ray.config import build
from ssl_ray.doctor import _workers
from ssl_ray.train.capacity import GROUP, HEAD, Node

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture
def short() -> Iterator[str]:
    """A folder whose name leaves room for those of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ssl-ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_ports_of_ray_that_ask_for_no_token_are_named(tmp_path, short: str, mode: str):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    env = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(token)}
    port, metrics = free_port(), free_port()
    head = [*RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={short}", "--num-cpus=0"]
    head += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"]
    head += [f"--metrics-export-port={metrics}"]
    process = subprocess.Popen(
        head, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "This command will now block" in line:
                break
        else:
            pytest.fail("Ray did not start")
        done = ssl_ray({}, "doctor", "--json")
        rows = [row for row in done.json if row["check"] == "ports" and f" {port}" in f" {row['found']}".replace(",", "")]
        assert len(rows) == 1, done.out
        assert rows[0]["found"].startswith("gcs_server (process ")
        assert rows[0]["ok"] == (mode == "token")
        # Metrics are told to all, whatever is said of a token.
        (agent,) = [row for row in done.json if f" {metrics}" in f" {row['found']}".replace(",", "")]
        assert (agent["check"], agent["ok"]) == (("metrics", True) if mode == "token" else ("ports", False))
        assert "who ask" in agent["found"] if mode == "token" else "nobody" in agent["found"]
        if mode == "disabled":
            assert done.code == 4
            assert "RAY_AUTH_MODE=token" in rows[0]["do"]
        assert done.json[0]["found"].startswith("Python 3.")
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


def test_a_storage_is_written_to_and_left_as_it_was(tmp_path: Path, server: seaweedfs.Server):
    for uri, env in ((str(tmp_path / "runs"), {}), (f"s3://{seaweedfs.BUCKET}/doctor", server.environment())):
        found = {row["check"]: row for row in ssl_ray(env, "doctor", uri, "--json").json}
        assert found["storage"]["ok"]
        assert "16 MiB written at" in found["storage"]["found"]
        assert found["lease"]["ok"]
        assert found[f"clock of {uri}"]["ok"]
    assert list(tmp_path.iterdir()) == []  # with the folder
    (tmp_path / "runs").mkdir()
    ssl_ray({}, "doctor", str(tmp_path / "runs"), "--json")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_storage_that_cannot_be_written_is_a_finding(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = ssl_ray({}, "doctor", str(tmp_path / "file" / "runs"), "--json")
    (row,) = [row for row in done.json if row["check"] == "storage"]
    assert not row["ok"]
    assert "writing" in row["found"]
    assert done.code == 4


def workers_on_this_machine(*words: str) -> dict:
    done = ssl_ray({}, "doctor", *words, "--json")
    (row,) = [row for row in done.json if row["check"] == "workers"]
    return row


def test_without_a_cluster_a_recipe_is_compared_with_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert workers_on_this_machine("-c", "digits", "train.workers=0")["ok"]
    many = 8 * (os.cpu_count() or 1)
    workers, lanes = f"train.workers={many}", [f"train.lanes={many}", f"train.batch={2 * many}"]
    for words in (["-c", "digits", workers], [workers, "runs"], ["runs", f"--{workers}"]):
        row = workers_on_this_machine(*words, *lanes)
        assert not row["ok"]
        assert f"train.workers={many}" in row["found"]
        assert row["do"] == "Or name a cluster: --address."
    assert list(tmp_path.iterdir()) == []
    ssl_ray({}, "doctor", "-c", "digits", "train.wrokers=2").refused(2, "train.workers")
    ssl_ray({}, "doctor", "one", "two").refused(2, "not understood: two")


NOBODY = "os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)"
"""Becomes another user, who may look at it (PR_SET_DUMPABLE)."""
LISTEN = """
import ctypes, os, socket, time
{become}
with socket.create_server(("0.0.0.0", 0)) as server:
    print(server.getsockname()[1], flush=True)
    time.sleep(120)
"""
LOOK = f"import ctypes, json, os; from ssl_ray.doctor import _ports; {NOBODY}; print(json.dumps(list(_ports())))"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user below processes of root's")
def test_a_ray_without_a_mode_asks_nobody_though_parents_of_root_may_not_be_looked_at(short: str):
    raylet = Path(short) / "raylet"
    raylet.symlink_to(os.path.realpath(sys.executable))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    codes = [LISTEN.format(become=become) for become in (NOBODY, "")]
    listening = [subprocess.Popen([str(raylet), "-c", code], env=bare, stdout=subprocess.PIPE, text=True) for code in codes]
    try:
        ports = [process.stdout.readline().strip() for process in listening if process.stdout]
        done = subprocess.run([sys.executable, "-c", LOOK], env=bare, capture_output=True, text=True, timeout=120, check=True)
        rows = json.loads(done.stdout)
        (mine,) = [row for row in rows if f" {ports[0]}, " in row["found"]]
        assert not mine["ok"]
        assert mine["found"].endswith("asks nobody who they are")
        assert "RAY_AUTH_MODE=token" in mine["do"]
        (theirs,) = [row for row in rows if f"process {listening[1].pid} " in row["found"]]
        assert theirs["found"].endswith("may not be looked at")
    finally:
        for process in listening:
            process.kill()
            process.communicate()


# A cluster -----------------------------------------------------------------------------------------------------------


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Of a cluster whose state cannot be asked."""

    state: tuple[int, bytes]

    def do_GET(self) -> None:
        version = json.dumps({"version": "4", "ray_version": metadata.version("ray"), "ray_commit": "", "session_name": "s"})
        code, body = (200, version.encode()) if self.path == "/api/version" else self.state
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


FAILED = b'{"result": false, "msg": "Failed to query data from GCS.", "data": {"result": null}}'


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ((500, FAILED), "(status 500): Failed to query data from GCS."),
        ((200, FAILED), '(status 200): {"result": false'),
        ((200, b'{"data": {"result": {"result": [{"labels": {}}]}}}'), "(status 200): "),
        ((502, b"<html>Bad\nGateway</html>"), "(status 502): <html>Bad Gateway</html>"),
    ],
)
def test_a_state_that_cannot_be_asked_is_a_finding_beside_the_others(state: tuple[int, bytes], said: str):
    handler = type("Handler", (Dashboard,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = ssl_ray({}, "doctor", "--address", f"http://127.0.0.1:{server.server_port}", "-c", "digits", "--json")
        server.shutdown()
    assert done.code == 4
    found = [row for row in done.json if row["check"] == "cluster"]
    assert [row["ok"] for row in found] == [True, False]
    assert said in found[1]["found"]
    assert "dashboard.log" in found[1]["do"]
    assert any(row["check"] == "token" for row in done.json)


FRESH = [Node({"CPU": 0.0, HEAD: 1.0}, {GROUP: "head"})]
DATA, TRAIN = ({"resources": {"CPU": 16, "GPU": gpus}, "max_workers": most} for gpus, most in ((0, 8), (1, 4)))
AUTOSCALER = {"max_workers": 12, "head_node_type": "head", "available_node_types": {"head": {}, "data": DATA, "train": TRAIN}}


def of_workers(nodes: list[Node], autoscaler: dict | None, workers: int) -> tuple[bool, str]:
    row = _workers(build({"train": {"workers": workers, "threads": 4}}), nodes, autoscaler)
    return row["ok"], f"{row['found']} {row['do']}"


def test_room_for_workers_is_that_of_the_nodes_that_may_come_too():
    ok, said = of_workers(FRESH, AUTOSCALER, 4)
    assert ok, said
    assert said.startswith("room for 0 of train.workers=4 now, and for all of them, with a GPU each, with nodes that")
    ok, said = of_workers(FRESH, AUTOSCALER, 5)
    assert not ok
    assert "5 workers (train.workers) need a GPU each; the cluster has 4" in said
    assert "max_workers (maxReplicas)" in said
    ok, said = of_workers([*FRESH, *[Node({"CPU": 16.0, "GPU": 1.0}, {GROUP: "train"})] * 2], AUTOSCALER, 2)
    assert (ok, said) == (True, "room for train.workers=2, with a GPU each ")


def test_an_autoscaler_that_did_not_tell_its_limits_is_a_note():
    ok, said = of_workers(FRESH, None, 2)
    assert ok
    assert said.startswith("not yet: train.workers=2 needs")
    assert "An autoscaler may add nodes" in said
    ok, said = of_workers([Node({"CPU": 0.0, HEAD: 1.0}, {})], None, 2)
    assert not ok
