"""What somebody needs who is to find out why a run failed, in one zip without secrets.

    contents.json           all that is in it, and all that was looked for and is absent, cut or cannot be read
    run/                    run.json, latest.json, summary.json, quarantine.jsonl, failures, read-outs, newest metrics
    checkpoints.json        names and sizes of the files of the checkpoints, not the weights
    versions.json           Python, packages, system, and variables that Ray, AWS and torch read
    doctor.json             what `ssl-ray doctor` finds on this machine
    ray/SESSION/            Ray's logs on this machine of the processes of this run, and of their node
    cluster/nodes.json      with --address: the nodes that the cluster has and had, and why those that are gone went
    cluster/jobs/           the newest jobs that drove the run: what Ray says of each, and the end of what it printed
    cluster/NODE/           Ray's logs on each node that is there, as those of this machine

Nothing ends it: a run may be damaged, and a storage or a cluster away.
"""

import dataclasses
import functools
import io
import json
import os
import platform
import re
import time
import urllib.parse
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ssl_ray import __version__, storage
from ssl_ray.doctor import asked, doctor, log_of, nodes_of
from ssl_ray.errors import DataError, ResourceError, SslRayError, UsageError
from ssl_ray.masking import is_secret, secrets_here, without_any_secret, without_secrets
from ssl_ray.submit import connected, errors_of
from ssl_ray.train import cluster, logs
from ssl_ray.train.capacity import HEAD

MAX_FILE, MAX_ALL = 2**20, 2**25
"""Bytes of a file, of which the end is kept, and of all together before they are packed."""
NEWEST = {"failures": 20, "evaluations": 3, "metrics": 3}
"""So many files of each folder of a run are taken."""
MOST_LINES, MOST_PROCESSES, MOST_JOBS = 10_000, 8, 3
"""Of a cluster: the last lines of a log, the newest processes of the run on a node, and its newest jobs."""
VARIABLES = re.compile(r"RAY_|AWS_|SSL_RAY|GLOO_|NCCL_|CUDA_|OMP_|TORCH_|PYTHONPATH$|TMPDIR$|LANG$|HTTPS?_PROXY$|NO_PROXY$", re.I)
_NODE_LOGS = ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err", "monitor.log", "monitor.err", "dashboard_agent.log")
_PROCESS = re.compile(r"^(?:worker|python-core-(?:worker|driver))-.*[-_](\d+)\.(?:out|err|log)$")
"""Ray's logs of a process, whose number is in the name."""
_OURS = re.compile(r"-(\d+)\.log(?:\.1)?$")
_DRIVER = re.compile(r"^ssl-ray-.*-driver-(\d+)\.log$")


@dataclasses.dataclass
class _Bundle:
    """The zip as it grows."""

    archive: zipfile.ZipFile
    secrets: list[str]
    contents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    total: int = 0

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """The end of what `read` returns, without secrets."""
        room = min(MAX_FILE, MAX_ALL - self.total)
        if room <= 0:
            self.note(name, f"left out, after {MAX_ALL // 2**20} MiB of others")
            return
        try:
            data = read()
        except (SslRayError, OSError) as error:
            self.note(name, f"cannot be read: {storage.one_line(error)}")
            return
        if not data:
            self.note(name, "empty")
            return
        cut = len(data) > room
        text = data[-room:].decode(errors="replace")
        text = self.clean(text.partition("\n")[2] if cut else text)  # a secret that is cut would not be known
        self.total += len(text)
        self.archive.writestr(name, text)
        self.note(name, f"the end of {len(data)} bytes" if cut else "", size=len(text.encode()))

    def clean(self, text: str) -> str:
        return without_any_secret(text, self.secrets)

    def note(self, name: str, note: str, *, size: int = 0) -> None:
        self.contents.append({"file": name, "bytes": size, "note": self.clean(note)})


def debug(run: str, output: str, *, address: str | None = None) -> dict[str, Any]:
    """Writes the zip about the run at `run` to the path or URI `output`; returns where it is and what is in it.

    address: of the dashboard of a cluster whose logs of the run are to be in it.
    Raises DataError where there is neither a run nor, on that cluster, a job of it, and if the zip cannot be written.
    """
    uri = storage.absolute(run)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        bundle = _Bundle(archive, secrets_here())
        is_there = _add_run(bundle, uri)
        if not is_there and address is None:
            raise DataError(f"{uri}: no run here. `ssl-ray runs list` shows the runs below a folder.")
        bundle.add("versions.json", lambda: _json(_versions()))
        bundle.add("doctor.json", lambda: _json(doctor(None, address=None, config=None)))
        _add_logs(bundle, uri)
        if address is not None and not _add_cluster(bundle, uri, address) and not is_there:
            raise DataError(f"{uri}: no run here, and no job or log of it is found at {address}. Check the name of the run.")
        head = {"run": bundle.clean(uri), "made": time.time(), "files": bundle.contents}
        archive.writestr("contents.json", _json(head))
    storage.write_atomic(output, packed.getvalue())
    return {"written": output, "bytes": len(packed.getvalue()), "files": bundle.contents}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, default=str) + "\n").encode()


def _add_run(bundle: _Bundle, uri: str) -> bool:
    """Whether there is a run, or may be one."""
    try:
        there = storage.list_names(uri)
    except SslRayError as error:  # it is not asked for each file, for up to a minute
        bundle.note("run/", f"cannot be read: {error}")
        return True
    if not there:
        bundle.note("run/", "no run here: it failed before it began, or has another name")
        return False
    for name in ("run.json", "latest.json", "lease", "summary.json", "quarantine.jsonl"):
        if name in there:
            bundle.add(f"run/{name}", functools.partial(storage.read_bytes, storage.join(uri, name)))
        else:
            bundle.note(f"run/{name}", "absent")
    for folder, most in NEWEST.items():
        try:
            names = storage.list_names(storage.join(uri, folder))
        except SslRayError as error:
            bundle.note(f"run/{folder}/", f"cannot be read: {error}")
            continue
        for name in [name for name in names if re.fullmatch(r"[\w-]+\.jsonl?", name)][-most:]:
            bundle.add(f"run/{folder}/{name}", functools.partial(storage.read_bytes, storage.join(uri, folder, name)))
    bundle.add("checkpoints.json", lambda: _json(_sizes(storage.join(uri, "checkpoints"))))
    return True


def _sizes(uri: str) -> dict[str, int]:
    """Bytes of the files below `uri`, by their names from there."""
    filesystem, path = storage.open_storage(uri)
    with storage.storage_errors(uri, "listing"):
        found = storage.ask(uri, lambda: filesystem.find(path, detail=True))
    return {name.removeprefix(path).lstrip("/"): each["size"] for name, each in sorted(found.items())}


def _versions() -> dict[str, Any]:
    packages = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    variables = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    return {
        "ssl_ray": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": dict(sorted(packages.items(), key=lambda each: each[0].lower())),
        "environment": {name: "***" if is_secret(name.upper()) else value for name, value in variables.items()},
    }


# Ray's logs --------------------------------------------------------------------------------------------------------


def _add_logs(bundle: _Bundle, uri: str) -> None:
    logged = [(session, name) for session in _sessions() for name in _logs_of(session / "logs", uri)]
    for session, name in logged:
        bundle.add(f"ray/{session.name}/{name}", functools.partial(_end_of, session / "logs" / name))
    if not logged:
        bundle.note("ray/", "no logs of this run on this machine; --address fetches those of a cluster")


def _sessions() -> list[Path]:
    """Folders of Ray's sessions of this user on this machine, those of its processes too, the newest last."""
    folders = {Path(os.path.realpath(path)) for pattern in ("session_*", "*/session_*") for path in cluster.SCRATCH.glob(pattern)}
    for process in psutil.process_iter(["cmdline"]):
        for part in process.info["cmdline"] or []:
            if part.startswith(("--session-dir=", "--session_dir=")):
                folders.add(Path(os.path.realpath(part.partition("=")[2])))
    return sorted((folder for folder in folders if _is_mine(folder)), key=lambda folder: folder.name)


def _is_mine(path: Path) -> bool:
    """Whether this user made it, for others may leave a link to a file of this user's where logs are looked for."""
    try:
        return path.lstat().st_uid == os.getuid() and not path.is_symlink()
    except OSError:
        return False


def _logs_of(folder: Path, uri: str) -> list[str]:
    """Logs of a session that belong to the run: ours of it, Ray's of the same processes, of their node, and of Ray Train."""
    names, start = _listed(folder), logs.short_name(uri)
    ours = [name for name in names if name.startswith(f"ssl-ray-{start}-") and _is_of(folder / name, uri)]
    if not ours:
        return []
    theirs = _of_same_processes(names, ours)
    train = [f"train/{name}" for name in _listed(folder / "train") if f"{start}-".encode() in _end_of(folder / "train" / name)]
    return [*ours, *theirs, *train, *(name for name in names if name in _NODE_LOGS)]


def _of_same_processes(names: list[str], ours: list[str]) -> list[str]:
    """Ray's own logs of the processes that wrote ours."""
    processes = {found[1] for found in map(_OURS.search, ours) if found}
    return [name for name in names if (found := _PROCESS.match(name)) and found[1] in processes]


def _listed(folder: Path) -> list[str]:
    """Names of the files of this user in a folder that are not empty."""
    try:
        names = sorted(os.listdir(folder))
        return [name for name in names if _is_mine(at := folder / name) and at.is_file() and at.stat().st_size]
    except OSError:
        return []


def _is_of(path: Path, uri: str) -> bool:
    """Whether the first line of a log of ours says that it is of this run."""
    try:
        with path.open("rb") as file:
            return json.loads(file.readline())["run"] == without_secrets(uri)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _end_of(path: Path) -> bytes:
    """As much of a file's end as a bundle takes, and a byte more; nothing of one that is gone."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_FILE - 1))
            return file.read()
    except FileNotFoundError:
        return b""


# Those of a cluster ------------------------------------------------------------------------------------------------


def _add_cluster(bundle: _Bundle, uri: str, address: str) -> bool:
    """What a cluster knows of the run; of one that does not answer, that. Nodes that are gone have taken their logs with them.

    Returns whether it knows of a job or has a log of the run.
    """
    try:
        client = connected(address)
        with errors_of(address):
            nodes = nodes_of(client)
    except UsageError:
        raise
    except SslRayError as error:
        bundle.note("cluster/", f"cannot be asked: {storage.one_line(error)}")
        return False
    fields = ("node_id", "node_ip", "state", "state_message", "labels", "resources_total", "start_time_ms", "end_time_ms")
    bundle.add("cluster/nodes.json", lambda: _json([{name: node.get(name) for name in fields} for node in nodes]))
    there = sorted((node for node in nodes if node["state"] == "ALIVE"), key=lambda node: HEAD not in node["resources_total"])
    found = {}
    for node in there:
        try:
            with errors_of(address):
                found[node["node_id"]] = _logs_of_node(client, node, uri)
        except SslRayError as error:
            bundle.note(f"cluster/{node['node_id']}/", f"cannot be read: {storage.one_line(error)}")
    drivers = {(node, match[1]) for node, names in found.items() for name in names if (match := _DRIVER.search(name))}
    has_jobs = _add_jobs(bundle, uri, client, drivers)
    for node, names in found.items():
        for name in names:
            bundle.add(f"cluster/{node}/{name}", functools.partial(_fetched, client, node, name))
    return has_jobs or any(name.startswith("ssl-ray-") for names in found.values() for name in names)


def _add_jobs(bundle: _Bundle, uri: str, client: Any, drivers: set[tuple[str, str]]) -> bool:
    """Whether there are any.

    drivers: nodes and numbers of the processes that drove the run, for a run may not be named in the job's command.
    """
    try:
        with errors_of(client._address):
            jobs = [job for job in client.list_jobs() if job.submission_id]
    except SslRayError as error:
        bundle.note("cluster/jobs/", f"cannot be read: {storage.one_line(error)}")
        return False
    named = re.compile(re.escape(uri) + r"(?![^\s'\"])")

    def is_ours(job: Any) -> bool:
        driver = job.driver_info and (job.driver_node_id, job.driver_info.pid)
        return driver in drivers or named.search(job.entrypoint) is not None

    ours = sorted(filter(is_ours, jobs), key=lambda job: job.start_time or 0)
    for job in ours[-MOST_JOBS:]:
        said = {name: getattr(job, name) for name in ("submission_id", "entrypoint", "message", "error_type", "driver_exit_code")}
        said |= {"status": job.status.value, "start_time_ms": job.start_time, "end_time_ms": job.end_time}
        bundle.add(f"cluster/jobs/{job.submission_id}.json", functools.partial(_json, said))
        log = functools.partial(_fetched, client, job.driver_node_id or "", f"job-driver-{job.submission_id}.log")
        bundle.add(f"cluster/jobs/{job.submission_id}.log", log)
    if not ours:
        bundle.note("cluster/jobs/", f"none of the cluster's {len(jobs)} jobs is of this run")
    return bool(ours)


def _logs_of_node(client: Any, node: dict[str, Any], uri: str) -> list[str]:
    """As `_logs_of`, of the newest processes. Of the head its own logs in any case: a run may have failed before it had some."""
    names, start = _names(client, node, "*"), logs.short_name(uri)
    ended = {name: _last_line(client, node, name) for name in names if name.startswith(f"ssl-ray-{start}-")}
    ours = [name for name in _newest(ended) if ended[name].get("run") == without_secrets(uri)][-MOST_PROCESSES:]
    theirs = _of_same_processes(names, ours)
    trained = {name: _last_line(client, node, name) for name in (_names(client, node, "train/*") if ours else ())}
    train = [name for name in _newest(trained) if str(trained[name].get("run_name")).startswith(f"{start}-")]
    of_node = [name for name in names if name in _NODE_LOGS] if ours or HEAD in node["resources_total"] else []
    return [*ours, *theirs, *train[-2 * MOST_PROCESSES :], *of_node]


def _names(client: Any, node: dict[str, Any], pattern: str) -> list[str]:
    """Of the logs of a node."""
    query = urllib.parse.urlencode({"node_id": node["node_id"], "glob": pattern})
    by_kind = asked(client, f"/api/v0/logs?{query}", lambda result: list(result.values()))
    return sorted(name for names in by_kind for name in names)


def _last_line(client: Any, node: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a log in lines of JSON; empty where it is not one."""
    try:
        line = json.loads(_fetched(client, node["node_id"], name, lines=1))
    except (SslRayError, ValueError):
        return {}
    return line if isinstance(line, dict) else {}


def _newest(ended: dict[str, dict[str, Any]]) -> list[str]:
    """Names of logs by the time of their last lines, the newest last."""
    return sorted(ended, key=lambda name: str(ended[name].get("time") or ended[name].get("asctime")))


def _fetched(client: Any, node: str, name: str, *, lines: int = MOST_LINES) -> bytes:
    """The last lines of a log of a node, and of those as much as a bundle takes, and a byte more."""
    with errors_of(client._address), log_of(client, node, name, lines=lines) as answer:
        if not answer.ok:
            raise ResourceError(f"status {answer.status_code}: {' '.join(answer.text.split())[:200]}")
        end = b""
        for part in answer.iter_content(2**16):
            end = (end + part)[-MAX_FILE - 1 :]
        return end


def default_output(run: str) -> str:
    """Where the zip goes if nothing is said."""
    return f"ssl-ray-debug-{logs.short_name(storage.absolute(run))}.zip"
