"""One Ray cluster for all tests of this folder, in processes of its own: a driver may die without it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_ray.train.cluster import PROMPT

FAULT = Path(__file__).parents[1] / "fault"

HEAD = """
import os, ray, sys
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=400_000_000, log_to_driver=False, logging_level="ERROR",
         _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files tell processes where to die; see fault/sitecustomize.py."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def cluster(faults: Path) -> Iterator[dict[str, str]]:
    """The environment of a driver that joins the cluster; it has more CPUs than the machine, so that four workers fit."""
    with tempfile.TemporaryDirectory(prefix="ssl-ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        path = f"{FAULT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        env = {"FAULTS": str(faults), "PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | PROMPT
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, folder],
            env=os.environ | env | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert head.stdin is not None
        assert head.stdout is not None
        try:
            yield env | {"RAY_ADDRESS": head.stdout.readline().strip()}
        finally:
            head.stdin.close()
            try:
                head.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()
            head.stdout.close()
