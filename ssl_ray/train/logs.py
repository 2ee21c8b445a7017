"""What the processes of a run log, as lines of JSON: a file of each process beside Ray's own, on its machine.

    SESSION/logs/ssl-ray-NAME-RANK-PID.log   NAME: the last part of the run's URI; RANK: of the worker, or `driver`

A line has `time` (UTC), `level`, `run`, `rank`, `step` (null where it is not known), `logger` and `message`, and `exception`
where there is one. Secrets are left out.
"""

import datetime
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from typing import Any

from ssl_ray.errors import Stopped
from ssl_ray.masking import without_secrets
from ssl_ray.train import cluster, runs

MAX_BYTES = 2**24
"""Of a file; a second one has what was before."""

log = logging.getLogger(__name__)


@contextmanager
def kept(run: str, *, rank: int | str, step: Callable[[], int | None]) -> Iterator[None]:
    """Has what ssl_ray logs in this process, from INFO on, kept as long as the context lasts; where there is Ray.

    step: the one that the process is at. Not to keep a log, as on a full disk, ends no run.
    """
    handler = _handler(run, rank)
    if handler is None:
        yield
        return
    handler.setFormatter(_Lines(without_secrets(run), rank, step))
    logger = logging.getLogger("ssl_ray")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        log.log(logging.INFO if isinstance(error, Stopped) else logging.ERROR, "ended: %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def folder() -> str | None:
    """Where Ray's logs are, of the cluster that this process has joined; None without."""
    node = sys.modules["ray"]._private.worker._global_node if cluster.has_joined() else None
    return None if node is None else os.path.join(node.get_session_dir_path(), "logs")


def short_name(run: str) -> str:
    """The last part of a run's URI, as the name of a file may have it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", runs.name_of(run))[:80]


def _handler(run: str, rank: int | str) -> logging.Handler | None:
    at = folder()
    if at is None:
        return None
    try:
        path = os.path.join(at, f"ssl-ray-{short_name(run)}-{rank}-{os.getpid()}.log")
        return RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
    except OSError:  # as of a driver of another user than Ray's
        return None


class _Lines(logging.Formatter):
    def __init__(self, run: str, rank: int | str, step: Callable[[], int | None]):
        super().__init__()
        self.run, self.rank, self.step = run, rank, step

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname, "run": self.run, "rank": self.rank, "step": self.step()}
        line |= {"logger": record.name, "message": without_secrets(record.getMessage())}
        if record.exc_info:
            line["exception"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line)
