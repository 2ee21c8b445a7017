"""What somebody needs who is to find out why a run failed, in one zip without secrets.

    contents.json           all that is in it, and all that was looked for and is absent, cut or cannot be read
    run/                    run.json, latest.json, summary.json, quarantine.jsonl, failures, read-outs, newest metrics
    checkpoints.json        names and sizes of the files of the checkpoints, not the weights
    versions.json           Python, packages, system, and variables that Ray, AWS and torch read
    doctor.json             what `ssl-ray doctor` finds on this machine
    ray/SESSION/            Ray's logs on this machine of the processes of this run, and of their node

Nothing ends it: a run may be damaged, and a storage away.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import re
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ssl_ray import __version__, storage
from ssl_ray.doctor import doctor
from ssl_ray.errors import DataError, SslRayError, without_secrets
from ssl_ray.train import cluster, logs

MAX_FILE, MAX_ALL = 2**20, 2**25
"""Bytes of a file, of which the end is kept, and of all together before they are packed."""
NEWEST = {"failures": 20, "evaluations": 3, "metrics": 3}
"""So many files of each folder of a run are taken."""
VARIABLES = re.compile(r"RAY_|AWS_|SSL_RAY|GLOO_|NCCL_|CUDA_|OMP_|TORCH_|PYTHONPATH$|TMPDIR$|LANG$|HTTPS?_PROXY$|NO_PROXY$", re.I)
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|KEY|CREDENTIAL|CONNECTION_STRING", re.I)
"""In the name of a variable."""
LEAST_SECRET = 8
"""Shorter values may be part of any word."""
_NODE_LOGS = ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err", "monitor.log", "monitor.err", "dashboard_agent.log")
_PROCESS = re.compile(r"^(?:worker|python-core-(?:worker|driver))-.*[-_](\d+)\.(?:out|err|log)$")
"""Ray's logs of a process, whose number is in the name."""
_OURS = re.compile(r"-(\d+)\.log(?:\.1)?$")


@dataclasses.dataclass
class _Bundle:
    """The zip as it grows."""

    archive: zipfile.ZipFile
    secrets: list[str]
    contents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    total: int = 0

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """The end of what `read` returns, without secrets."""
        try:
            data = read()
        except (SslRayError, OSError) as error:
            self.note(name, f"cannot be read: {storage.one_line(error)}")
            return
        room = min(MAX_FILE, MAX_ALL - self.total)
        if room <= 0:
            self.note(name, f"left out, after {MAX_ALL // 2**20} MiB of others")
            return
        cut = len(data) > room
        text = data[-room:].decode(errors="replace")
        text = self.clean(text.partition("\n")[2] if cut else text)  # a secret that is cut would not be known
        self.total += len(text)
        self.archive.writestr(name, text)
        self.note(name, f"the end of {len(data)} bytes" if cut else "", size=len(text.encode()))

    def clean(self, text: str) -> str:
        text = "\n".join(map(without_secrets, text.split("\n")))
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def note(self, name: str, note: str, *, size: int = 0) -> None:
        self.contents.append({"file": name, "bytes": size, "note": self.clean(note)})


def debug(run: str, output: str) -> dict[str, Any]:
    """Writes the zip about the run at `run` to the path or URI `output`; returns where it is and what is in it.

    Raises DataError where there is nothing of a run, and if the zip cannot be written.
    """
    uri = storage.absolute(run)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        bundle = _Bundle(archive, _secrets())
        _add_run(bundle, uri)
        bundle.add("versions.json", lambda: _json(_versions()))
        bundle.add("doctor.json", lambda: _json(doctor(None, address=None, config=None)))
        _add_logs(bundle, uri)
        head = {"run": bundle.clean(uri), "made": time.time(), "files": bundle.contents}
        archive.writestr("contents.json", _json(head))
    storage.write_atomic(output, packed.getvalue())
    return {"written": output, "bytes": len(packed.getvalue()), "files": bundle.contents}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, default=str) + "\n").encode()


def _add_run(bundle: _Bundle, uri: str) -> None:
    try:
        there = storage.list_names(uri)
    except SslRayError as error:  # it is not asked for each file, for up to a minute
        bundle.note("run/", f"cannot be read: {error}")
        return
    if not there:
        raise DataError(f"{uri}: no run here. `ssl-ray runs list` shows the runs below a folder.")
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
        "environment": {name: "***" if _is_secret(name) else value for name, value in variables.items()},
    }


def _is_secret(name: str) -> bool:
    """Whether the value of a variable is one; that of one that names a file is not."""
    return SECRET.search(name) is not None and not name.endswith(("_PATH", "_FILE", "_MODE", "_URI", "_URL"))


def _secrets() -> list[str]:
    """Values of variables that are secrets, as JSON has them too, and Ray's tokens of this user."""
    found = [value for name, value in os.environ.items() if _is_secret(name)]
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), os.path.expanduser("~/.ray/auth_token")):
        with contextlib.suppress(OSError, ValueError):
            found += [Path(path).read_text().strip()] if path else []
    found += [json.dumps(value)[1:-1] for value in found]
    return sorted({value for value in found if len(value) >= LEAST_SECRET}, key=len, reverse=True)


# Ray's logs --------------------------------------------------------------------------------------------------------


def _add_logs(bundle: _Bundle, uri: str) -> None:
    logged = [(session, name) for session in _sessions() for name in _logs_of(session / "logs", uri)]
    for session, name in logged:
        bundle.add(f"ray/{session.name}/{name}", functools.partial(_end_of, session / "logs" / name))
    if not logged:
        bundle.note("ray/", "no logs of this run on this machine; they are where its driver and workers were")


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
    processes = {found[1] for found in map(_OURS.search, ours) if found}
    theirs = [name for name in names if (found := _PROCESS.match(name)) and found[1] in processes]
    train = [f"train/{name}" for name in _listed(folder / "train") if f"{start}-".encode() in _end_of(folder / "train" / name)]
    return [*ours, *theirs, *train, *(name for name in names if name in _NODE_LOGS)]


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


def default_output(run: str) -> str:
    """Where the zip goes if nothing is said."""
    return f"ssl-ray-debug-{logs.short_name(storage.absolute(run))}.zip"
