"""`ray up` with the shipped file of AWS, turned to hosts that are there: a head and a worker come up over ssh, and run a job.

Each host has its own network, mount and process name spaces of this machine, a real sshd, a home and a /tmp/ray. What is changed
of the file: the provider, the way to ssh, and that there is no container, whose variables the commands set instead.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import SMALL, records

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MISSING = (
    "needs root"
    if os.geteuid() != 0
    else ", ".join(name for name in ("ip", "unshare", "/usr/sbin/sshd", "ssh", "rsync") if not shutil.which(name))
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"hosts with sshd on one machine: {MISSING}"),
]
HOST = """
mkdir -p "$1/up" "$1/work" "$1/ray" /tmp/ray /run/sshd
mount -t overlay overlay -o "lowerdir=$HOME,upperdir=$1/up,workdir=$1/work" "$HOME"
mount --bind "$1/ray" /tmp/ray
hostname "$2"
shift 2
exec "$@"
"""
APART = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


class Machines:
    """1 and 2 have an sshd; `run` is on 3, from where they are used."""

    def __init__(self, folder: Path):
        self.folder, self.sshds = folder, []
        self.spaces = {number: f"up{number}-{os.getpid()}" for number in (0, 1, 2, 3)}
        for name in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        bridge = self.spaces[0]
        ip("netns", "add", bridge)
        ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", bridge, "link", "set", "br0", "up")
        for number in (1, 2, 3):
            space = self.spaces[number]
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", bridge, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", bridge, "link", "set", f"p{number}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        for number in (1, 2):
            self._start_sshd(number)

    def on(self, number: int, *command: str) -> list[str]:
        own = self.folder / f"host{number}"
        own.mkdir(exist_ok=True)
        entered = ["bash", "-euc", HOST, "_", str(own), f"host{number}", *command]
        return ["ip", "netns", "exec", self.spaces[number], "unshare", *APART, *entered]

    def _start_sshd(self, number: int) -> None:
        options = [f"ListenAddress=10.78.0.{number}", f"AuthorizedKeysFile={self.folder / 'key.pub'}", "StrictModes=no"]
        options += ["UsePAM=no", "PidFile=none", "Subsystem=sftp internal-sftp", "PasswordAuthentication=no"]
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(self.folder / "hostkey")]
        command += [part for option in options for part in ("-o", option)]
        with (self.folder / f"sshd{number}.log").open("w") as log:
            self.sshds.append(subprocess.Popen(self.on(number, *command), stdout=log, stderr=log, start_new_session=True))

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """One after the other, on the third."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # With version 2 of the autoscaler the local provider starts no worker (Ray 2.60).
        env |= {"PATH": path, "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.run(
            self.on(3, *command), env=env, cwd=self.folder, capture_output=True, text=True, timeout=400, check=False
        )

    def end(self) -> None:
        for process in self.sshds:
            process.kill()  # and with it all processes of its name space
            process.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False, timeout=20, capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="ssl-ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Machines(Path(folder))
        try:
            yield made
        finally:
            made.end()


def turned(shipped: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The file for hosts 1 and 2."""
    home = str(Path.home())
    options = shipped["docker"]["run_options"]
    variables = [option.split(None, 1)[1] for option in options if option.startswith("--env ")]
    variables = [each.replace("/home/ray", home) for each in variables] + [f"PYTHONPATH={ROOT}", "RAY_USAGE_STATS_ENABLED=0"]
    ((mounted, _),) = shipped["file_mounts"].items()

    def commands(given: list[str], role: str, address: str) -> list[str]:
        kind = shipped["available_node_types"][role]
        labels = ",".join(f"{key}={value}" for key, value in kind["labels"].items())
        more = f"--num-cpus={min(2, kind['resources']['CPU'])} --labels={labels} --node-ip-address={address}"
        # `ray stop` has nothing to stop on a new host.
        starts = [command.replace("ray start", f"{BIN}/ray start") for command in given if command != "ray stop"]
        assert len(starts) == 1
        return [f"export {' '.join(variables)}; {starts[0]} {more} --object-store-memory=100000000"]

    return {
        "cluster_name": shipped["cluster_name"],
        "max_workers": 1,
        "idle_timeout_minutes": shipped["idle_timeout_minutes"],
        "upscaling_speed": shipped["upscaling_speed"],
        "provider": {"type": "local", "head_ip": "10.78.0.1", "worker_ips": ["10.78.0.2"]},
        "auth": {"ssh_user": "root", "ssh_private_key": str(folder / "key")},
        "file_mounts": {mounted.replace("/home/ray", home): str(folder / "token")},
        "setup_commands": shipped["setup_commands"],
        "head_start_ray_commands": commands(shipped["head_start_ray_commands"], "head", "10.78.0.1"),
        "worker_start_ray_commands": commands(shipped["worker_start_ray_commands"], "train", "10.78.0.2"),
    }


def test_ray_up_brings_up_head_and_worker_over_ssh_and_a_job_runs_on_them(machines: Machines, tmp_path: Path):
    token = machines.folder / "token"
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    file = machines.folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(turned(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()), machines.folder)))
    up = machines.run("ray", "up", "-y", "--no-config-cache", str(file))
    assert up.returncode == 0, up.stdout + up.stderr

    exec_ = ("ray", "exec", "--no-config-cache", str(file))
    keys = " ".join([*SMALL, "train.workers=1", "train.steps=20", "evaluate.max_images=50", "train.label=ssl-ray/role=train"])
    job = f"{BIN}/ray job submit --address http://127.0.0.1:8265 -- {sys.executable} -m ssl_ray pretrain {keys}"
    wait = f"until {BIN}/ray list nodes --address http://127.0.0.1:8265 | grep -q 10.78.0.2; do sleep 1; done"
    done = machines.run(*exec_, f"export RAY_AUTH_MODE=token; {wait}; {job} run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(20))
    # With another token than that which came with `file_mounts` nobody is let in.
    refused = machines.run(*exec_, f"RAY_AUTH_TOKEN={'0' * 64} RAY_AUTH_MODE=token {job} run={tmp_path / 'other'}")
    assert refused.returncode != 0
    assert not (tmp_path / "other").exists()
