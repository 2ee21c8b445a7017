"""Checks of a place to run: what is installed, and which ports of Ray's on this machine others may reach.

Each finding is a row: what was looked at, whether it is well, what was found, and what to do.
"""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import psutil

LIBRARIES = ("ssl-ray", "torch", "torchvision", "ray", "pyarrow", "s3fs")
_RAY = ("raylet", "gcs_server")
_LOOPBACK = ("127.", "::1")


def doctor() -> list[dict[str, Any]]:
    """All findings, in the order in which they are looked for."""
    return [_versions(), *_ports()]


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
                asks = process.environ().get("RAY_AUTH_MODE") == "token"
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
