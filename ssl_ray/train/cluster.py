"""Joining or starting a Ray cluster.

Ray blocks, for a minute where its processes are gone. What waits for it does so in threads, so that this process hears
signals whatever becomes of Ray.
"""

import dataclasses
import functools
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_ray import storage
from ssl_ray.errors import ResourceError, SslRayError, TrainingError
from ssl_ray.train.capacity import Capacity, of_cluster

SCRATCH = Path("/tmp")
"""Ray makes sockets below its folder, whose paths may have 107 characters: $TMPDIR may be too long."""
KEEP_LOGS_S = 24 * 3600.0
"""Folders of processes that are gone are removed after so long."""
PROMPT = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""What every process of a cluster needs in its environment, drivers too, for a machine that is gone, or whose link is cut, to be
noticed in ten seconds. By default it takes Ray a minute, and tasks that ran there are waited for for more than two.

All or none: processes without these take the questions of one that has them for an attack, and cut it off (Too many pings)."""
LISTEN_S = 0.1
"""Seconds between two calls of `listen` while Ray starts."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A cluster that was joined."""

    folder: Path
    """Of this process; it ends with the session."""
    capacity: Capacity
    """What was free of the cluster; of one that this process is part of, all of it."""
    address: str
    """Of Ray's head."""
    call: Callable[..., "Future[Any]"]
    """Runs a function that waits for Ray, in a thread. Where one still runs at the end of the session, Ray is left to end with
    this process: Ray's C++ would end it, with its own words, if Ray were gone first."""


@contextmanager
def ray_session(listen: Callable[[], None] = lambda: None) -> Iterator[Session]:
    """Ray for as long as the context lasts, and a folder of this process; both end with it.

    listen: called again and again while Ray starts; what it raises ends the start.
    Where the end is an error that Ray's logs may explain, the folder stays for a day. Raises as start_ray does.
    In a process that has joined Ray already, as a trial of a study, that is used, and left as it is.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"ssl-ray-{os.getpid()}-", dir=SCRATCH))
    # The kernel kills Ray's processes when the thread that started them ends, so that one has to last as long as they do.
    threads = ThreadPoolExecutor(thread_name_prefix="ray")
    called: list[Future[Any]] = []
    address, keep, joined = "", False, has_joined()
    processes = _Processes()

    def call(work: Callable[..., Any], *given: Any) -> "Future[Any]":
        called.append(threads.submit(work, *given))
        return called[-1]

    try:
        starting = call(start_ray, folder, processes)
        while not starting.done():
            listen()
            wait([starting], timeout=LISTEN_S)
        listen()
        capacity, address = starting.result()
        yield Session(folder, capacity, address, call)
    except BaseException as error:
        keep = isinstance(error, TrainingError) or not isinstance(error, SslRayError)
        raise
    finally:
        if not joined and all(future.done() for future in called) and address and answers(address):
            import ray

            ray.shutdown()
        else:
            processes.freeze()  # they end with this one, and until then could make the folder anew
        threads.shutdown(wait=False)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    """Whether a process of a cluster, at HOST:PORT, takes connections."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return False
    return True


def is_local() -> bool:
    """Whether start_ray would start a cluster of this machine alone."""
    return not has_joined() and not os.environ.get("RAY_ADDRESS")


def has_joined() -> bool:
    """Whether this process is part of a cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _sweep() -> None:
    """Removes the folders that killed processes left behind."""
    for folder in SCRATCH.glob("ssl-ray-*-*"):
        owner = re.match(r"ssl-ray-(\d+)-", folder.name)
        try:
            mine = folder.stat().st_uid == os.getuid() and folder.stat().st_mtime < time.time() - KEEP_LOGS_S
        except OSError:
            continue
        if owner and mine and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def start_ray(folder: Path, processes: "_Processes") -> tuple[Capacity, str]:
    """Joins the cluster that RAY_ADDRESS names, else starts a local one with token authentication, without dashboard.

    folder: where a local one keeps its sockets and logs.  processes: is told of its processes.
    Returns what is free and the address of the head.
    Raises ResourceError if the cluster cannot be reached or started.
    """
    if has_joined():
        import ray

        return of_cluster(free=False), ray.get_runtime_context().gcs_address
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    # Workers that were promised CPUs of a machine that has just gone would wait for them for a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    # Memory of blocks that were trained on is used again at once: fresh pages cost ten times as much as the copy into them.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "50")
    if is_local():
        for name, value in PROMPT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Nobody takes this node away, and a process to watch for that takes a second to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if not is_local():
            ray.init(**common)
        else:
            with _deaf_to_sigterm(processes):
                ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, _temp_dir=str(folder), **common)
        return of_cluster(free=True), ray.get_runtime_context().gcs_address
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        remedy = "Check free memory, or set train.workers=0 to train in this process."
        if os.environ.get("RAY_ADDRESS"):
            remedy = "Check RAY_ADDRESS and the token, or unset it to use this machine alone."
        raise ResourceError(f"Ray did not start or cannot be reached ({storage.one_line(error)}). {remedy}") from error


class _Processes:
    """Ray's that this process has started, each the leader of a group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen] = []
        self._frozen = False

    def start(self, begin: Callable[[], subprocess.Popen]) -> subprocess.Popen:
        with self._lock:
            if self._frozen:
                raise RuntimeError("Ray is not started any more")
            self._started.append(begin())
            return self._started[-1]

    def freeze(self) -> None:
        """Stops them where they are, and lets no more begin. The kernel ends them with this process all the same."""
        with self._lock:
            self._frozen = True
            for process in self._started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGSTOP)


@contextmanager
def _deaf_to_sigterm(processes: _Processes) -> Iterator[None]:
    """The processes that Ray starts meanwhile, and theirs, take no notice of SIGTERM (seen with Ray 2.60).

    `timeout`, schedulers and init systems signal whole groups and jobs. Ray would end before its workers leave a checkpoint,
    and end this process too: without them Ray's C++ exits. With SIGINT Ray itself does the same. That its processes die
    with this one is the kernel's work.
    """
    from ray._private import services

    popen: Any = services.ConsolePopen

    def start(*command: Any, **options: Any) -> subprocess.Popen:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # is inherited, by Ray's workers too
        try:
            process: Any = processes.start(lambda: popen(*command, process_group=0, **options))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        process.terminate = process.kill = functools.partial(_kill_group, process)  # this is how ray.shutdown ends them
        return process

    services.ConsolePopen = start  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def _kill_group(process: subprocess.Popen) -> None:
    """Kills a process that leads its group, and those that it started there: Ray's agents would outlive it by half a minute."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
