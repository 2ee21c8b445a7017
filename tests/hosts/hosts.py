"""Several hosts on this machine: each has its own network, process and host name space and its own folder of Ray's.

Their links meet in a bridge, in a name space of its own, so that the machine's network is not touched. Needs root, iproute2 and
util-linux. What runs on a host ends when the process that holds its name spaces is killed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nodes import PACED

from ssl_ray.train.cluster import PROMPT

ENTER = 'hostname "$1"; mount --bind "$2" "$3"; shift 3; exec "$@"'
ASK = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
print([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]])
"""
PORT = 6380
MISSING = (
    "needs root"
    if os.geteuid() != 0
    else "needs ip (iproute2) and unshare (util-linux)"
    if not (shutil.which("ip") and shutil.which("unshare"))
    else ""
)
ROOT = Path(__file__).parents[2]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


class Hosts:
    """Hosts by name; the first is the head's, where drivers are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ray = folder / "ray"
        self.ray.mkdir()
        token = folder / "token"
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        # Names of hosts mean nothing here, by which gloo finds the network that it is to use.
        self.env = PROMPT | PACED | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "GLOO_SOCKET_IFNAME": "eth0"}
        self.switch = f"sw{os.getpid()}"
        self.numbers: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")

    def _space(self, name: str) -> str:
        return f"h{self.numbers[name]}-{os.getpid()}"

    def _on(self, name: str, *command: str, apart: bool) -> list[str]:
        """The command on a host; apart: in name spaces of its own, which are the host's processes."""
        spaces = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"] if apart else ["--mount", "--uts"]
        own = self.folder / name
        own.mkdir(exist_ok=True)
        entered = ["bash", "-c", ENTER, "_", name, str(own), str(self.ray), *command]
        return ["ip", "netns", "exec", self._space(name), "unshare", *spaces, *entered]

    def add(self, name: str, *, cpus: int) -> None:
        """Starts a host with a node of Ray's and waits until it is part of the cluster."""
        number = self.numbers[name] = len(self.numbers) + 1
        space, link = self._space(name), f"p{number}"
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", self.switch, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self.switch, "link", "set", link, "master", "br0", "up")
        _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        where = [f"--address=10.77.0.1:{PORT}"]
        if number == 1:
            where = ["--head", f"--port={PORT}", f"--temp-dir={self.ray}", "--include-dashboard=false"]
        options = [f"--node-ip-address=10.77.0.{number}", f"--num-cpus={cpus}", "--object-store-memory=200000000"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, *options, "--disable-usage-stats", "--block"]
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                self._on(name, *command, apart=True), env=os.environ | self.env, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 180
        while f"10.77.0.{number}" not in self.alive():
            assert time.monotonic() < end, (self.folder / f"{name}.log").read_text()

    def alive(self) -> str:
        """Addresses of the hosts that Ray says are alive."""
        with self._start(sys.executable, "-c", ASK) as asked:
            try:
                return asked.communicate(timeout=60)[0]
            except subprocess.TimeoutExpired:  # on a busy machine
                asked.kill()
                return ""

    def cut(self, name: str) -> None:
        """Nothing goes to or from the host any more; nobody is told."""
        _ip("-n", self.switch, "link", "set", f"p{self.numbers[name]}", "down")

    def kill(self, name: str) -> None:
        """The host and all its processes are gone at once."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        _ip("netns", "del", self._space(name))

    def driver(self, *arguments: str) -> subprocess.Popen:
        """`ssl-ray ...` on the host of the head."""
        return self._start(sys.executable, "-m", "ssl_ray", *arguments)

    def _start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            self._on(next(iter(self.numbers)), *command, apart=False),
            cwd=ROOT,
            env=os.environ | self.env | {"RAY_ADDRESS": f"10.77.0.1:{PORT}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def several_hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        hosts = Hosts(Path(folder))
        try:
            yield hosts
        finally:
            for name in reversed(list(hosts.processes)):
                hosts.kill(name)
            subprocess.run(["ip", "netns", "del", hosts.switch], check=False, timeout=20)
