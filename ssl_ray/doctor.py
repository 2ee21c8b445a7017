"""Checks of a place to run: this machine, a storage and a cluster.

Each finding is a row: what was looked at, whether it is well, what was found, and what to do.
"""

import os
import platform
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ssl_ray import storage
from ssl_ray.config import Config
from ssl_ray.errors import ResourceError, SslRayError
from ssl_ray.train import cluster, lease
from ssl_ray.train.capacity import Node, Where, cpus_of, require_cpus

LIBRARIES = ("ssl-ray", "torch", "torchvision", "ray", "pyarrow", "s3fs")
LEAST_SHARED, LEAST_DISK = 2**30, 10 * 2**30
"""Bytes: of /dev/shm for Ray's object store, of the disk below /tmp for its sockets, logs and what does not fit in memory."""
MOST_SKEW_S = 60.0
"""Of clocks: S3 refuses requests that are a quarter of an hour off, and what is noted here would be in the wrong order."""
SMALL, LARGE, TIMES = 2**10, 16 * 2**20, 5
"""Bytes of the objects that are written to a storage and read, and how often the small one is."""
_RAY = ("raylet", "gcs_server")
_LOOPBACK = ("127.", "::1")


def doctor(uri: str | None, *, address: str | None, config: Config | None) -> list[dict[str, Any]]:
    """All findings, in the order in which they are looked for.

    uri: a storage to write to, where runs shall be.  address: of a cluster's dashboard.  config: what shall run there.
    """
    found = [_versions(), _gpu(), *_room(), *_ports()]
    if uri is not None:
        found += _guarded("storage", lambda: list(_storage(uri)))
    if address is not None:
        found += _guarded("cluster", lambda: list(_cluster(address, config)))
    return found


def _guarded(check: str, look: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `look` finds, or the error that it ends with as a finding."""
    try:
        return look()
    except SslRayError as error:
        text, _, do = str(error).partition("\n")
        return [_finding(check, False, text, do)]


def _finding(check: str, ok: bool, found: str, do: str = "") -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "do": do}


def _versions() -> dict[str, Any]:
    installed, missing = [], []
    for name in LIBRARIES:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join([f"Python {platform.python_version()}", *installed])
    return _finding("versions", not missing, found, f"pip install {' '.join(missing)}" if missing else "")


def _gpu() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count()
    if count:
        return _finding("GPU", True, ", ".join(torch.cuda.get_device_name(i) for i in range(count)))
    there = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    do = f"Install a driver for CUDA {torch.version.cuda}, or the torch that goes with the driver." if there else ""
    return _finding("GPU", not there, "one that torch cannot use" if there else "none, training is on the CPU", do)


def _room() -> Iterator[dict[str, Any]]:
    memory = psutil.virtual_memory().total
    for check, at, least, do in (
        ("shared memory", "/dev/shm", LEAST_SHARED, "Give the container more: --shm-size, or an emptyDir of medium Memory."),
        ("disk", str(cluster.SCRATCH), LEAST_DISK, "Make room: Ray stops tasks on a full disk."),
    ):
        free = shutil.disk_usage(at).free if Path(at).is_dir() else 0
        found = f"{free / 2**30:.1f} GiB free at {at}, {memory / 2**30:.1f} GiB of memory"
        yield _finding(check, free >= least, found, "" if free >= least else do)


def _ports() -> Iterator[dict[str, Any]]:
    """A row for each process of Ray's on this machine that listens to more than the machine itself."""
    seen = False
    for process in psutil.process_iter():
        try:
            name = _name(process)
            if name is None:
                continue
            seen = True
            places = [each.laddr for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
            open_ports = sorted({place.port for place in places if not place.ip.startswith(_LOOPBACK)})
            if open_ports:
                asks = _auth_mode(process) == "token"
                ports = ", ".join(map(str, open_ports))
                found = f"{name} (process {process.pid}) listens on all interfaces at {ports}, and asks " + (
                    "for the token" if asks else "nobody who they are"
                )
                do = "" if asks else "Start Ray with RAY_AUTH_MODE=token, or let nobody else reach these ports."
                yield _finding("ports", asks, found, do)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            yield _finding("ports", False, f"process {process.pid} may not be looked at", "Run it as the user that started Ray.")
    if not seen:
        yield _finding("ports", True, "no Ray runs on this machine; ssl-ray starts its own with a token and without a dashboard")


def _auth_mode(process: psutil.Process) -> str | None:
    """Of a process of Ray's, or of the first of its parents that shows one: some write their name over their variables."""
    for each in (process, *process.parents()):
        if (mode := each.environ().get("RAY_AUTH_MODE")) is not None:
            return mode
    return None


def _name(process: psutil.Process) -> str | None:
    """What a process of Ray's is called; None of another."""
    line = process.cmdline()
    if not line:
        return None
    if line[0].startswith("ray::"):
        return line[0].split()[0]
    base = os.path.basename(line[0])
    if base in _RAY:
        return base
    return next((os.path.basename(part) for part in line[1:4] if "/ray/" in part and part.endswith(".py")), None)


# A storage ------------------------------------------------------------------------------------------------------------


def _storage(uri: str) -> Iterator[dict[str, Any]]:
    """Writes, reads and removes objects below `uri`."""
    at = storage.join(storage.absolute(uri), f"doctor-{uuid.uuid4().hex}")
    try:
        storage.write_atomic(at, bytes(SMALL))
        writes = [_seconds(lambda: storage.write_atomic(at, bytes(SMALL))) for _ in range(TIMES)]
        reads = [_seconds(lambda: storage.read_bytes(at)) for _ in range(TIMES)]
        latency = f"{SMALL // 2**10} KiB written in {_ms(writes)}, read in {_ms(reads)} (median of {TIMES})"
        large = os.urandom(LARGE)
        write = _seconds(lambda: storage.write_atomic(at, large))
        read = _seconds(lambda: storage.read_bytes(at))
        rate = f"{LARGE // 2**20} MiB written at {LARGE / 2**20 / write:.0f} MiB/s, read at {LARGE / 2**20 / read:.0f} MiB/s"
        yield _finding("storage", True, f"{uri}: {latency}; {rate}, one request at a time")
        when = _written_at(at)
        if when is not None:
            yield _skew(f"clock of {uri}", when)
        try:
            if not storage.is_local(at):
                lease.require_conditions(at)
            yield _finding("lease", True, f"{uri}: a second driver on a run is refused")
        except ResourceError as error:
            text, _, do = str(error).partition("\n")
            yield _finding("lease", False, text, do)
    finally:
        storage.remove(at)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"


def _written_at(uri: str) -> datetime | None:
    """When the storage says that an object was written, just now; None of one that does not say."""
    filesystem, path = storage.open_storage(uri)
    filesystem.invalidate_cache()
    info = storage.ask(uri, lambda: filesystem.info(path))
    when = info.get("LastModified") or info.get("mtime")
    return datetime.fromtimestamp(when, UTC) if isinstance(when, int | float) else when if isinstance(when, datetime) else None


def _skew(check: str, there: datetime) -> dict[str, Any]:
    """there: what a clock shows now, or showed a second ago."""
    seconds = (there - datetime.now(UTC)).total_seconds()
    ok = abs(seconds) <= MOST_SKEW_S
    return _finding(check, ok, f"{seconds:+.0f} s from this machine's", "" if ok else "Set the clocks by NTP.")


# A cluster ------------------------------------------------------------------------------------------------------------


def _cluster(address: str, config: Config | None) -> Iterator[dict[str, Any]]:
    import requests

    from ssl_ray.submit import connected, errors_of

    client = connected(address)  # before Ray is imported, which is told to use the token
    import ray

    with errors_of(address):
        version = client._do_request("GET", "/api/version")
        said = version.json().get("ray_version")
        ok = said == ray.__version__
        do = "" if ok else f"pip install ray=={said} here, or make the cluster anew: Ray wants the same on both sides."
        yield _finding("cluster", ok, f"{address}: Ray {said}, here {ray.__version__}", do)
        without = requests.get(f"{address}/api/version", timeout=30).status_code
        do = "" if without == 401 else "Start every node with RAY_AUTH_MODE=token: whoever reaches this address can run anything."
        yield _finding("token", without == 401, "asked for" if without == 401 else "not asked for", do)
        if "Date" in version.headers:
            yield _skew("clock of the cluster", parsedate_to_datetime(version.headers["Date"]))
        nodes = client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000").json()["data"]["result"]["result"]
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    total = {name: sum(node["resources_total"].get(name, 0.0) for node in alive) for name in ("CPU", "GPU")}
    roles = sorted({node.get("labels", {}).get("ssl-ray/role", "none") for node in alive})
    found = f"{len(alive)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs, roles: {', '.join(roles)}"
    yield _finding("nodes", bool(alive), found, "" if alive else "Wait until a node has joined.")
    if config is not None:
        try:
            where = Where(train=config.train.label, data=config.data.label)
            cpus = cpus_of([Node(node["resources_total"], node.get("labels", {})) for node in alive], where)
            require_cpus(cpus, workers=config.train.workers, threads=config.train.threads, where=where)
            yield _finding("workers", True, f"room for train.workers={config.train.workers}")
        except ResourceError as error:
            yield _finding("workers", False, f"{error}", "Or let the cluster grow: nodes that are not there yet are not counted.")
