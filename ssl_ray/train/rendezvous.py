"""How workers find each other: by a store of torch's in worker 0, which asks nobody who they are.

torch has it listen on all interfaces of its machine; here it listens at the address by which other machines of the cluster reach
this one, which is 127.0.0.1 where there are none.
"""

import contextlib
import socket
import sys
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train._internal.utils import get_address_and_port
from ray.train.torch import TorchConfig, config


class OwnAddress(TorchConfig):
    """As TorchConfig, with that store."""

    @property
    def backend_cls(self):
        return _Backend


class _Backend(config._TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_at_own_address)
        config.get_address_and_port = _address_and_port
        super().on_start(worker_group, backend_config)


def _address_and_port() -> tuple[str, int]:
    """Of worker 0."""
    address, port = get_address_and_port()
    return "127.0.0.1" if sum(node["Alive"] for node in ray.nodes()) == 1 else address, port


def listen_at_own_address() -> None:
    """From now on the store of a process group of this process listens at its own address only (seen with torch 2.14)."""
    rendezvous: Any = sys.modules["torch.distributed.rendezvous"]
    rendezvous.TCPStore = _store


def _store(
    host_name: str, port: int, world_size: int | None, is_master: bool, timeout: timedelta, **options: Any
) -> dist.TCPStore:
    if is_master:
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        with contextlib.suppress(OSError):  # the address is that of a host which passes on: torch listens everywhere, as usual
            options["master_listen_fd"] = socket.create_server((host_name, port), family=family, backlog=1024).detach()
    return dist.TCPStore(host_name, port, world_size, is_master, timeout, **options)
