"""Checks of a place to run: this machine, a storage and a cluster.

Each finding is a row: what was looked at, whether it is well, what was found, and what to do.
"""

import contextlib
import http.client
import itertools
import os
import platform
import re
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from ssl_ray import storage
from ssl_ray.config import Config
from ssl_ray.errors import ResourceError, SslRayError
from ssl_ray.train import cluster, lease
from ssl_ray.train.capacity import GROUP, HEAD, Capacity, Node, may_come

LIBRARIES = ("ssl-ray", "torch", "torchvision", "ray", "pyarrow", "s3fs")
LEAST_SHARED, LEAST_DISK = 2**30, 10 * 2**30
"""Bytes: of /dev/shm for Ray's object store, of the disk below /tmp for its sockets, logs and what does not fit in memory."""
MOST_SKEW_S = 60.0
"""Of clocks: S3 refuses requests that are a quarter of an hour off, and what is noted here would be in the wrong order."""
SMALL, LARGE, TIMES = 2**10, 16 * 2**20, 5
"""Bytes of the objects that are written to a storage and read, and how often the small one is."""
ASK_S = 60.0
"""Seconds for an answer of a cluster."""
_RAY = ("raylet", "gcs_server")
_LOOPBACK = ("127.", "::1")
_METRICS = ("ray::DashboardAgent", "monitor.py", "dashboard.py")
"""Processes of Ray's that may give metrics over HTTP; others are not asked, since they take it for a broken client."""
_PROBE_S = 5.0
_CONFIGURED, _LOOKED_THROUGH = "Using Autoscaling Config:", 10_000
"""What stands before the configuration in an autoscaler's log, and the lines in which it is looked for: it is near the start."""

T = TypeVar("T")


def doctor(uri: str | None, *, address: str | None, config: Config | None) -> list[dict[str, Any]]:
    """All findings, in the order in which they are looked for.

    uri: a storage to write to, where runs shall be.  address: of a cluster's dashboard.  config: what shall run there, or on
    this machine where no cluster is named.
    """
    found = [_versions(), _gpu(), *_room(), *_ports()]
    if uri is not None:
        found += _guarded("storage", _storage(uri))
    if address is not None:
        found += _guarded("cluster", _cluster(address, config))
    elif config is not None:
        found.append(_workers(config, [_machine()], None, more="Or name a cluster: --address."))
    return found


def _guarded(check: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, and the error that they end with as another."""
    try:
        yield from rows
    except SslRayError as error:
        text, _, do = str(error).partition("\n")
        yield _finding(check, False, text, do)


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
    """Rows for each process of Ray's on this machine that listens to more than the machine itself."""
    seen = False
    for process in psutil.process_iter():
        try:
            name = _name(process)
            if name is None:
                continue
            seen = True
            places = [each.laddr for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
            at = {place.port: place.ip for place in places if not place.ip.removeprefix("::ffff:").startswith(_LOOPBACK)}
            asks = _auth_mode(process) == "token"
            yield from _of_ports(f"{name} (process {process.pid})", at, asks=asks, metrics=name in _METRICS)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            yield _finding("ports", False, f"process {process.pid} may not be looked at", "Run it as the user that started Ray.")
    if not seen:
        yield _finding("ports", True, "no Ray runs on this machine; ssl-ray starts its own with a token and without a dashboard")


def _of_ports(process: str, at: dict[int, str], *, asks: bool, metrics: bool) -> Iterator[dict[str, Any]]:
    """Rows for the ports of a process and their addresses.  asks: for the token.  metrics: at some of them it may give metrics,
    which Ray does to all, whatever its processes are told of a token."""
    told = sorted(port for port in at if asks and metrics and _gives_metrics(at[port], port))
    if others := ", ".join(str(port) for port in sorted(at.keys() - told)):
        found = f"{process} listens on all interfaces at {others}, and asks {'for the token' if asks else 'nobody who they are'}"
        do = "" if asks else "Start Ray with RAY_AUTH_MODE=token, or let nobody else reach these ports."
        yield _finding("ports", asks, found, do)
    if told:
        found = f"{process} gives metrics to all who ask, at {', '.join(map(str, told))}"
        yield _finding("metrics", True, found, "Keep it within the cluster's private network: Ray has no token for metrics.")


def _gives_metrics(ip: str, port: int) -> bool:
    """Whether metrics are there for one who shows no token."""
    connection = http.client.HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip), port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _auth_mode(process: psutil.Process) -> str | None:
    """Of a process of Ray's, or of the first of its parents that shows one: some write their name over their variables.

    The search ends at a parent of another user, as root's init, which is no part of this Ray.
    """
    mode = process.environ().get("RAY_AUTH_MODE")
    for parent in process.parents() if mode is None else ():
        try:
            mode = parent.environ().get("RAY_AUTH_MODE")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            break
        if mode is not None:
            break
    return mode


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
    made = [folder for folder in Path(at).parents if not os.path.exists(folder)] if storage.is_local(at) else []
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
    except BaseException:
        with contextlib.suppress(SslRayError):  # where nothing can be written, removing fails too, and would be what is told
            storage.remove(at)
        raise
    else:
        storage.remove(at)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not made after all, or another's by now
                folder.rmdir()


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
        nodes = [node for node in nodes_of(client) if node["state"] == "ALIVE"]
        autoscaler = _autoscaler(client, nodes) if config is not None else None
    total = {name: sum(node["resources_total"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    roles = sorted({node["labels"].get("ssl-ray/role", "none") for node in nodes})
    found = f"{len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs, roles: {', '.join(roles)}"
    yield _finding("nodes", bool(nodes), found, "" if nodes else "Wait until a node has joined.")
    if config is not None:
        yield _workers(config, [Node(node["resources_total"], node["labels"]) for node in nodes], autoscaler)


def _machine() -> Node:
    """This machine as a Ray that a run starts has it."""
    import torch

    return Node({"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}, {})


def _workers(
    config: Config, here: list[Node], autoscaler: dict[str, Any] | None, *, more: str = "Or let the cluster grow."
) -> dict[str, Any]:
    """Whether the workers find a place as a run finds it, on the nodes that are there and those that the autoscaler may add.

    autoscaler: its configuration; None: there is none, or it is not known.
    more: what to do where they find none, besides what is to be set.
    """
    from ssl_ray.train.ray_train import plan_resources, room

    workers, fewest = config.train.workers, config.train.fewest_workers()
    if not fewest:
        return _finding("workers", True, "train.workers=0: the driver trains, and takes nothing of the cluster")
    coming = may_come(autoscaler, [{"Resources": node.resources, "Labels": node.labels} for node in here])
    try:
        planned = plan_resources(config, Capacity(here, coming))
    except ResourceError as error:
        if autoscaler is None and any(GROUP in node.labels for node in here):
            note = "An autoscaler may add nodes; which, it did not tell: see max_workers (maxReplicas) of the cluster's file."
            return _finding("workers", True, f"not yet: {error}", note)
        do = "Or let the autoscaler add more: max_workers (maxReplicas)." if coming else more
        return _finding("workers", False, f"{error}", do)
    each = "with a GPU each" if planned.gpus else "without GPUs"
    if (now := room(here, planned)) >= fewest:
        return _finding("workers", True, f"room for train.workers={workers}, {each}")
    found = f"room for {now} of train.workers={workers} now, and for all of them, {each}, with nodes that the autoscaler may add"
    return _finding("workers", True, found)


def nodes_of(client: Any) -> list[dict[str, Any]]:
    """The nodes that a cluster knows of, those that are gone too, as Ray's state API describes them.

    client: of its jobs.  Raises ResourceError where Ray does not say.
    """

    def read(result: Any) -> list[dict[str, Any]]:
        rows = [row | {name: row.get(name) or {} for name in ("labels", "resources_total")} for row in result["result"]]
        return [row for row in rows if row["node_id"] and row["state"]]

    return asked(client, "/api/v0/nodes?detail=1&limit=10000", read)


def asked(client: Any, path: str, read: Callable[[Any], T]) -> T:
    """What `read` makes of an answer of Ray's state API. Raises ResourceError for one of a failure, or that makes no sense."""
    answer = client._do_request("GET", path, timeout=ASK_S)
    try:
        if answer.ok:
            return read(answer.json()["data"]["result"])
        said = answer.json()["msg"]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = answer.text
    what = f"Ray's dashboard does not tell {path.partition('?')[0]} (status {answer.status_code})"
    text = " ".join(str(said).split())[:200]
    raise ResourceError(f"{what}: {text}\nTry again; if it stays, dashboard.log and gcs_server.out on the head say why.")


def log_of(client: Any, node: str, name: str, *, lines: int) -> Any:
    """The end of a log of a node, as an open answer of `requests`, whose status may be that of an error.

    lines: so many; -1: all.
    """
    import requests

    query = {"node_id": node, "filename": name, "lines": str(lines), "timeout": f"{ASK_S:.0f}"}
    # Not by the client's own way to ask, which reads the answer whole to look for what it says of the token.
    how = {"headers": client._headers, "cookies": client._cookies, "verify": client._verify}
    return requests.get(f"{client._address}/api/v0/logs/file", params=query, stream=True, timeout=ASK_S, **how)


def _autoscaler(client: Any, nodes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The configuration of a cluster's autoscaler; None where it has not told it.

    Of what the dashboard offers (Ray 2.60), only the log that version 2 begins on the head has it. /api/cluster_status is empty
    with version 2; with version 1 it is the same where there is no autoscaler.
    """
    head = next((node["node_id"] for node in nodes if HEAD in node["resources_total"]), None)
    if head is None:
        return None
    try:
        with log_of(client, head, "monitor.log", lines=-1) as answer:
            answer.encoding = "utf-8"
            lines = itertools.islice(answer.iter_lines(decode_unicode=True) if answer.ok else (), _LOOKED_THROUGH)
            if not any(_CONFIGURED in line for line in lines):
                return None
            text = "\n".join(itertools.takewhile(lambda line: not re.match(r"\d{4}-\d\d-\d\d ", line), lines))
        made = yaml.safe_load(text)
    except (OSError, yaml.YAMLError):  # OSError: those of requests
        return None
    return made if isinstance(made, dict) and "available_node_types" in made else None
