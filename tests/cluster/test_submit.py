"""Verbs as jobs of a real cluster: followed, left, found again, stopped; and what is refused."""

import json
import os
import subprocess
from collections.abc import Iterator

import pytest
from nodes import Nodes, free_port, several_nodes

KEYS = ["views.count=2", "views.size_px=8", "model.projector_dim=16", "evaluate.max_images=50", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Nodes, dict[str, str]]]:
    """A cluster whose dashboard takes jobs, and the variables of a client."""
    with several_nodes({}) as nodes:
        port = free_port()
        nodes.add("head", cpus=2, dashboard=port)
        client = {"RAY_AUTH_TOKEN_PATH": nodes.env["RAY_AUTH_TOKEN_PATH"], "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        yield nodes, client


def job(cluster, name: str) -> dict:

    done = subprocess.run(
        [
            "python",
            "-c",
            f"from ray.job_submission import *; import os; "
            f"print(JobSubmissionClient(os.environ['RAY_API_SERVER_ADDRESS']).get_job_info({name!r}).json())",
        ],
        env=os.environ | cluster[1] | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
