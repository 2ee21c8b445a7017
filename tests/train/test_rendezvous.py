"""Where the store listens by which workers find each other."""

import json
import subprocess
import sys

import pytest

GROUP = """
import json, sys
import psutil
import torch.distributed as dist
from nodes import free_port
from ssl_ray.train.rendezvous import listen_at_own_address

listen_at_own_address()
dist.init_process_group("gloo", init_method=f"tcp://{sys.argv[1]}:{free_port()}", rank=0, world_size=1)
print(json.dumps([c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]))
"""


def listening(address: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", GROUP, address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3"])
def test_it_is_the_address_of_its_worker_alone(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = listening(address)
    assert found
    assert set(found) <= {address, "127.0.0.1"}
