"""One driver at a time for a run.

On local storage the driver locks RUN/lease (flock), which ends with its process, however that ends. On S3 it writes
RUN/lease by conditional requests and keeps changing it; one that has not changed for STALE_S, on the clock of the driver that
watches it, is taken over. A lease has a number, larger than that of any before it, which goes into the run's marker:
what a driver without the newest lease has left running can commit nothing.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ssl_ray import storage
from ssl_ray.errors import ResourceError
from ssl_ray.train import runs

HEARTBEAT_S = 5.0
"""Seconds between two changes of a lease on S3."""
STALE_S = 20.0
"""A lease on S3 that does not change for so long is taken over."""


@dataclasses.dataclass
class Lease:
    number: int
    lost: bool = False
    """Whether another driver has taken it over, because this one could not be heard."""


class _Taken(Exception):
    pass


@contextlib.contextmanager
def held(uri: str, *, wait: Callable[[str], None]) -> Iterator[Lease]:
    """The lease of the run at `uri`, which is there, for as long as the context lasts.

    wait: called with what is being waited for, about once a second, while it is seen whether another driver lives; what it
    raises ends the wait.  Raises ResourceError, saying who has it, if another driver has the lease, or if the storage knows
    none.
    """
    at = storage.join(uri, "lease")
    hold = _locked if storage.is_local(uri) else _kept
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(hold(at, runs.read_marker(uri).lease or 0, wait))
        except _Taken as error:
            raise ResourceError(
                f"{uri} is being trained by {error}. Wait until it has ended, or stop it, and run the same command again."
            ) from None
        yield lease


def _record(number: int) -> dict[str, Any]:
    return {"number": number, "holder": f"{socket.gethostname()}, process {os.getpid()}", "id": uuid.uuid4().hex}


def _parse(data: bytes | None) -> dict[str, Any]:
    """What a lease says; nothing where its writing was cut off."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        record = json.loads(data or b"")
        return {"number": int(record["number"]), "holder": record["holder"] and str(record["holder"])}
    return {"number": 0, "holder": "an unknown process"}


@contextlib.contextmanager
def _locked(at: str, newest: int, _wait: Callable[[str], None]) -> Iterator[Lease]:
    with contextlib.ExitStack() as stack:
        with storage.storage_errors(at, "taking the lease"):  # of what is done under it the lease knows nothing
            file = stack.enter_context(open(at, "a+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _Taken(_parse(file.read())["holder"]) from None
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise _without_lease(at, "this file system has no locks") from error
                raise
            file.seek(0)
            number = max(newest, _parse(file.read())["number"]) + 1
            file.truncate(0)
            file.write(json.dumps(_record(number)).encode())
            file.flush()
        yield Lease(number)


@contextlib.contextmanager
def _kept(at: str, newest: int, wait: Callable[[str], None]) -> Iterator[Lease]:
    require_conditions(at)
    lease, record, version = _take(at, newest, wait)
    ended = threading.Event()

    def beat() -> None:
        nonlocal record, version
        while not ended.wait(HEARTBEAT_S):
            # A storage that is away: either it comes back, or the driver that takes over is heard of then.
            with contextlib.suppress(Exception):
                record = _record(lease.number)
                try:
                    version = storage.swap(at, json.dumps(record).encode(), version=version)
                except storage.Changed:
                    data, now = storage.read_versioned(at)
                    if now is None or _parse(data)["number"] != lease.number:
                        lease.lost = True
                        return
                    version = now  # by an earlier heartbeat, of which every answer was lost

    heart = threading.Thread(target=beat, name="lease", daemon=True)
    heart.start()
    try:
        yield lease
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(Exception):  # it grows stale by itself
            storage.swap(at, json.dumps(record | {"holder": None}).encode(), version=version)


def _take(at: str, newest: int, wait: Callable[[str], None]) -> tuple[Lease, dict[str, Any], str]:
    data, version = storage.read_versioned(at)
    seen, since = version, time.monotonic()
    while version is not None and _parse(data)["holder"] is not None and time.monotonic() - since < STALE_S:
        wait(f"{_parse(data)['holder']} had this run and may still be training it: watching for up to {STALE_S:g} s")
        time.sleep(1)
        data, version = storage.read_versioned(at)
        if version != seen and version is not None and _parse(data)["holder"] is not None:
            raise _Taken(_parse(data)["holder"])
    record = _record(max(newest, _parse(data)["number"]) + 1)
    try:
        version = storage.swap(at, json.dumps(record).encode(), version=version)
    except storage.Changed:
        raise _Taken(_parse(storage.read_versioned(at)[0])["holder"] or "another process") from None
    return Lease(record["number"]), record, version


def require_conditions(at: str) -> None:
    """Raises ResourceError where a storage does not heed the conditions of writes: some take them and say nothing."""
    if not storage.can_swap(at):
        raise _without_lease(at, "conditional writes are known here of S3 alone")
    probe = f"{at}-probe-{uuid.uuid4().hex}"
    try:
        first = storage.swap(probe, b"1", version=None)
        storage.swap(probe, b"2", version=first)
        for condition in (None, first):
            with contextlib.suppress(storage.Changed):
                storage.swap(probe, b"3", version=condition)
                raise _without_lease(at, "this storage takes no notice of the conditions of writes (If-None-Match, If-Match)")
    finally:
        storage.remove(probe)


def _without_lease(at: str, reason: str) -> ResourceError:
    return ResourceError(
        f"{at}: two drivers on one run could not be told apart: {reason}.\n"
        "Use another run=URI, or --no-lease if you see to it that no other driver trains this run."
    )
