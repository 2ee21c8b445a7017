"""The checks of a place to run, on a real Ray."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import seaweedfs
from command import ssl_ray
from nodes import free_port

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
    port = free_port()
    head = [*RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={short}", "--num-cpus=0"]
    head += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"]
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
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_storage_that_cannot_be_written_is_a_finding(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = ssl_ray({}, "doctor", str(tmp_path / "file" / "runs"), "--json")
    (row,) = [row for row in done.json if row["check"] == "storage"]
    assert not row["ok"]
    assert done.code == 4
