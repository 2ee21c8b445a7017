"""A Ray cluster on this machine that grows and shrinks as one in a cloud does: python cluster/local/cluster.py up|down|status

Its hosts are processes of this machine, each a node to Ray with CPUs that are only a number: a head without work, and up to --max
hosts of each kind, `ssl-ray/role: data` and `ssl-ray/role: train`. The autoscaler starts them when work waits for them, and ends
them when they were idle for a while. Every connection needs the token, but for metrics (see LISTENS).

A keeper holds them: it adopts what they start, writes down each process with the time of its start, and ends them all when it is
told to, or when the head ends. What `down` ends is in those notes, and nothing else.

Needs ray[default] (pip install 'ssl-ray[cluster]') and Linux. The autoscaler is Ray's own, version 2, as in a cloud; only what
starts and ends hosts is not (loopback_hosts.py).
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import loopback_hosts
import psutil

from ssl_ray.train.cluster import PROMPT

FOLDER = Path(f"/tmp/ssl-ray-local-{os.getuid()}")
ROLES = ("data", "train")
HEAD_ID = "f" * 51 + "00000"
"""The provider counts its nodes on from this."""
STORE_BYTES = 300_000_000
"""Of the object store of each host; all of them are in this machine's memory."""
PORTS = ("gcs", "dashboard", "agent", "agent_grpc", "runtime_env", "metrics", "client", "node_manager", "object_manager")
"""Each is a free one, so that two of these clusters can run on one machine."""
LISTENS = {
    ("gcs_server", "anywhere"): "the cluster's control, gRPC",
    ("raylet", "anywhere"): "tasks and objects of a node, gRPC",
    ("agent", "anywhere"): "of a node, gRPC; and its metrics, HTTP without a token",
    ("agent", "loopback"): "logs and profiles of a node, HTTP",
    ("runtime env", "loopback"): "environments of a node's jobs, HTTP",
    ("dashboard", "loopback"): "jobs and Ray's dashboard, HTTP",
    ("client", "loopback"): "Ray Client, gRPC",
    ("driver", "anywhere"): "of a job, gRPC",
    ("worker", "anywhere"): "tasks and actors, gRPC",
    ("worker", "loopback"): "gloo between the workers of a run, without a token",
}
"""Which processes listen, where, with what. Ray binds gRPC and metrics to all interfaces, whatever it is asked: on a machine that
others can reach, a firewall is needed."""
LISTENS_AT_TIMES = {
    ("monitor", "anywhere"): "the autoscaler's metrics, HTTP without a token, where no other has port 44217",
    ("dashboard", "anywhere"): "parts of the dashboard that ask for Ray's state, gRPC",
}
START_S = 180.0
END_S = 30.0
ASK_S = 60.0
ASK = """
import json, logging, ray
ray.init(log_to_driver=False, logging_level=logging.ERROR)
nodes = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps([[node["Labels"].get("ssl-ray/role"), node["Resources"].get("CPU", 0), node["NodeID"]] for node in nodes]))
"""
LONGEST = 36
"""Characters of the folder: the paths of Ray's sockets may have 107."""
LOOK_S = 0.5
"""Seconds between two looks at which processes there are."""
PR_SET_CHILD_SUBREAPER = 36


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def autoscaling(gcs: str, folder: Path, *, most: int, cpus: int, idle_s: float) -> dict[str, Any]:
    """What the autoscaler reads. The node types have the labels of cluster/aws.yaml; most: hosts of each role.

    folder: hosts have Ray folders of their own below it.
    """
    hosts = {
        role: {
            "resources": {"CPU": cpus, "object_store_memory": STORE_BYTES},
            "labels": {"ssl-ray/role": role},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        }
        for role in ROLES
    }
    # The name of the head's type is that which the provider gives it.
    head = {"resources": {"CPU": 0}, "labels": {"ssl-ray/role": "head"}, "node_config": {}, "max_workers": 0}
    nothing: tuple[str, ...] = (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "cluster_synced_files",
    )
    nothing += ("head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter")
    return {
        "cluster_name": "local",
        "max_workers": most * len(ROLES),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": f"{loopback_hosts.__name__}.{loopback_hosts.LoopbackHosts.__name__}",
            "gcs_address": gcs,
            "folder": str(folder),
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {"ray.head.default": head, **hosts},
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        **{name: [] for name in nothing},
        **{name: {} for name in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
    }


def environment(folder: Path) -> dict[str, str]:
    """Of the head, which all processes inherit."""
    return PROMPT | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
    }


# What runs ------------------------------------------------------------------------------------------------------------


def _notes(folder: Path) -> dict[str, Any]:
    """Of a cluster that was started in this folder, {} if none was. Another user's would name processes of ours to be ended."""
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise SystemExit(f"{folder} belongs to another user. Choose another --folder.")
    try:
        return json.loads((folder / "started.json").read_text())
    except FileNotFoundError:
        return {}


def _note(folder: Path, notes: dict[str, Any]) -> None:
    new = folder / "started.json.new"
    new.write_text(json.dumps(notes, indent=1))
    new.rename(folder / "started.json")


def _name(process: psutil.Process) -> list[Any]:
    """What a process is known by: a number is given again, but not with the same time of the start."""
    return [process.pid, process.create_time()]


def _alive(names: list[list[Any]]) -> list[psutil.Process]:
    """Those of the processes that are still there."""
    found = []
    for pid, started in names:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares the time of the start before it signals
            process.send_signal(number)


def _with_children(found: list[psutil.Process]) -> list[psutil.Process]:
    """Those processes and all below them, stopped, so that none starts another meanwhile."""
    known: list[psutil.Process] = []
    while found:
        _signal(found, signal.SIGSTOP)
        known += found
        below = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                below += process.children()
        found = [process for process in below if process not in known]
    return known


def keep(folder: Path) -> None:
    """Runs the head and waits until it ends, or until SIGTERM; then ends all that it and its hosts have started."""
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
    me = psutil.Process()
    notes = _notes(folder) | {"keeper": [_name(me)]}
    _note(folder, notes)
    # What a user has for another cluster is not for this one.
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    with (folder / "head.log").open("a") as log:
        head = subprocess.Popen(notes["command"], env=env | environment(folder), stdout=log, stderr=log)

    def family() -> list[list[Any]]:
        found = []
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(_name(child))
        return found

    while not told and head.poll() is None:
        before, notes["processes"] = notes.get("processes"), family()
        if notes["processes"] != before:
            _note(folder, notes)
        _bury(but=head.pid)
        time.sleep(LOOK_S)
    end = time.monotonic() + END_S
    while (names := family()) and time.monotonic() < end:  # those that start meanwhile too
        _signal(_alive(names), signal.SIGKILL)
        head.poll()
        _bury(but=head.pid)
        time.sleep(0.05)


def _bury(*, but: int) -> None:
    """Takes notice of the ends of adopted processes."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid != but and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


# What is typed --------------------------------------------------------------------------------------------------------


def up(folder: Path, *, most: int, cpus: int, idle_s: float) -> None:
    if _alive(_notes(folder).get("keeper", [])):
        raise SystemExit(f"A cluster runs in {folder} already. End it first: {_typed('down', folder)}")
    down(folder, quiet=True)  # what a keeper left that was killed, whose only note goes with the folder
    if importlib.util.find_spec("aiohttp_cors") is None:
        raise SystemExit("Ray's dashboard, which takes jobs, is missing. Install it: pip install 'ssl-ray[cluster]'")
    if len(str(folder)) > LONGEST:
        raise SystemExit(
            f"{folder}: Ray makes sockets below it, whose paths may not be long. Choose one of {LONGEST} characters."
        )
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "autoscaling.json").exists():
            raise SystemExit(f"{folder} holds something else than a cluster that was. Choose another --folder.")
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700, parents=True)
    token = folder / "token"
    with open(token, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    gcs, url = f"{loopback_hosts.address(0)}:{ports['gcs']}", f"http://127.0.0.1:{ports['dashboard']}"
    (folder / "autoscaling.json").write_text(json.dumps(autoscaling(gcs, folder, most=most, cpus=cpus, idle_s=idle_s), indent=1))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [
        f"--node-ip-address={loopback_hosts.address(0)}",
        f"--port={ports['gcs']}",
        f"--temp-dir={folder / 'ray'}",
        "--num-cpus=0",
    ]
    command += [f"--autoscaling-config={folder / 'autoscaling.json'}", "--labels=ssl-ray/role=head"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"]
    command += [f"--dashboard-agent-listen-port={ports['agent']}", f"--dashboard-agent-grpc-port={ports['agent_grpc']}"]
    command += [f"--runtime-env-agent-port={ports['runtime_env']}", f"--metrics-export-port={ports['metrics']}"]
    command += [f"--ray-client-server-port={ports['client']}", f"--node-manager-port={ports['node_manager']}"]
    command += [f"--object-manager-port={ports['object_manager']}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--object-store-memory={STORE_BYTES}"]
    notes = {"command": command, "address": url, "gcs": gcs, "ports": ports}
    _note(folder, notes)
    with (folder / "keeper.log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, "keep", "--folder", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + START_S
    while not _answers(url, token.read_text()):
        if keeper.poll() is not None or time.monotonic() > end:
            down(folder, quiet=True)
            raise SystemExit(f"The head did not start, see {folder}/head.log and {folder}/ray/session_latest/logs.")
        time.sleep(0.2)
    print(
        f"A head is up, and up to {most} hosts of each kind ({', '.join(ROLES)}) with {cpus} CPUs come when there is work.\n"
        f"  address     {url}\n"
        f"  token file  {token}\n"
        "Next:\n"
        f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(token))}\n"
        f"  ssl-ray submit pretrain train.label=ssl-ray/role=train data.label=ssl-ray/role=data --address {url}\n"
        f"  {_typed('status', folder)}\n"
        f"  {_typed('down', folder)}"
    )


def _typed(verb: str, folder: Path) -> str:
    where = "" if folder == FOLDER else f" --folder {shlex.quote(str(folder))}"
    return f"python {shlex.quote(os.path.relpath(__file__))} {verb}{where}"


def _answers(url: str, token: str) -> bool:
    """Whether jobs can be submitted, which is the last that comes up."""
    import urllib.request

    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def down(folder: Path, *, quiet: bool = False) -> None:
    notes = _notes(folder)
    if not notes and not quiet:
        raise SystemExit(f"No cluster was started in {folder}.")
    for keeper in _alive(notes.get("keeper", [])):
        with contextlib.suppress(psutil.NoSuchProcess):
            keeper.terminate()
        psutil.wait_procs([keeper], timeout=END_S + 5)
    notes = _notes(folder)
    left = _with_children(_alive([*notes.get("keeper", []), *notes.get("processes", [])]))  # where the keeper was killed
    _signal(left, signal.SIGKILL)
    _, left = psutil.wait_procs(left, timeout=5)
    if left:
        raise SystemExit(f"These do not end: {', '.join(str(process.pid) for process in left)}.")
    if not quiet:
        (folder / "started.json").unlink(missing_ok=True)
        print(f"Ended. Logs are in {folder}/*/session_latest/logs until the next start.")


def status(folder: Path) -> None:
    notes = _notes(folder)
    if not _alive(notes.get("keeper", [])):
        raise SystemExit(f"No cluster runs in {folder}.")
    # Ray connects without end to a head that goes away meanwhile, so that a process of its own asks.
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    env |= environment(folder) | {"RAY_ADDRESS": notes["gcs"]}
    try:
        asked = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"The head does not answer for {ASK_S:g} s, see {folder}/head.log.") from None
    found = [line for line in asked.stdout.splitlines() if line.startswith("[")]  # Ray may have something to say besides
    if not found:
        said = (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SystemExit(f"The head cannot be asked ({said}), see {folder}/head.log.")
    nodes = json.loads(found[-1])
    running = len(_alive(notes.get("processes", [])))
    print(f"{notes['address']}: {len(nodes)} nodes, {running} processes, token in {folder}/token")
    for role, cpus, node in nodes:
        print(f"  {role}: {cpus:g} CPUs, {node[-8:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", metavar="up|down|status")  # and keep, which `up` starts
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the cluster; default {FOLDER}")
    parser.add_argument("--max", type=int, default=2, help="hosts of each kind; default 2")
    parser.add_argument("--cpus", type=int, default=2, help="of each host, in Ray's books; default 2")
    parser.add_argument("--idle-s", type=float, default=30.0, help="seconds after which an idle host ends; default 30")
    given = parser.parse_args()
    folder = given.folder.absolute()
    if min(given.max, given.cpus) < 1:
        parser.error("--max and --cpus: expected 1 or more")
    if not 0 < given.idle_s < float("inf"):
        parser.error(f"--idle-s: got {given.idle_s:g}, expected a number of seconds above 0")
    match given.verb:
        case "up":
            up(folder, most=given.max, cpus=given.cpus, idle_s=given.idle_s)
        case "down":
            down(folder)
        case "status":
            status(folder)
        case "keep":
            keep(folder)
        case other:
            parser.error(f"got {other}, expected up, down or status")


if __name__ == "__main__":
    main()
