"""Joining or starting a Ray cluster."""

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl_ray import storage
from ssl_ray.errors import ResourceError, SslRayError, Stopped, TrainingError

SCRATCH = Path("/tmp")
"""Ray makes sockets below its folder, whose paths may have 107 characters: $TMPDIR may be too long."""
KEEP_LOGS_S = 24 * 3600.0
"""Folders of processes that are gone are removed after so long."""


@contextmanager
def ray_session() -> Iterator[Path]:
    """Ray for as long as the context lasts, and a folder of this process; both end with it.

    Where the end is an error that Ray's logs may explain, the folder stays for a day. Raises as start_ray does.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"ssl-ray-{os.getpid()}-", dir=SCRATCH))
    keep = False
    try:
        start_ray(folder)
        import ray

        try:
            yield folder
        finally:
            ray.shutdown()
    except BaseException as error:
        keep = isinstance(error, TrainingError) or not isinstance(error, SslRayError)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


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


def start_ray(folder: Path) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts a local one with token authentication, without dashboard.

    folder: where a local one keeps its sockets and logs.
    Raises ResourceError if the cluster cannot be reached or started, Stopped if SIGTERM came meanwhile.
    """
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # Memory of blocks that were trained on is used again at once: fresh pages cost ten times as much as the copy into them.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "50")
    if not os.environ.get("RAY_ADDRESS"):  # nobody takes this node away, and a process to watch for that takes a second to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**common)
        else:
            ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, _temp_dir=str(folder), **common)
    except SystemExit as error:  # Ray's own handler of SIGTERM, which ray.init installs
        raise Stopped("stopped while Ray started; the same command continues.") from error
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise ResourceError(
            f"Ray did not start or cannot be reached ({storage.one_line(error)}). Check RAY_ADDRESS, the token and free memory, "
            "or set train.workers=0 to train in this process."
        ) from error
