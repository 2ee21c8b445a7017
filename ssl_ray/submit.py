"""A verb of ssl-ray as a job of a cluster: packed, submitted once, followed to its end.

A job's name follows from the run, or from the command where it names none, and a number: Ray takes no name twice. So an answer
that was lost starts nothing twice, a client that was away comes back to its job, a run gets no second driver by another line,
and what is submitted after its end goes on with the run.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_ray import config, storage
from ssl_ray.errors import ResourceError, Stopped, UsageError

MOST_MIB = 100
"""Of what is uploaded, before it is compressed: Ray keeps it in the memory of its head and unpacks it on each machine."""
LARGEST = 5
"""So many are named where it is too much."""
STOP_S = 120
"""A job that is stopped has so long to leave a checkpoint; by default Ray kills it after 3 s."""
ATTEMPTS = 8
POLL_S = 1.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    command: list[str],
    *,
    run: str | None,
    address: str,
    working_dir: str | None,
    uv: bool,
    follow: bool,
    show: Callable[[str], None],
    write: Callable[[str], None],
) -> dict[str, Any]:
    """Submits `ssl-ray COMMAND` to the cluster whose dashboard is at `address`, or finds it running there; follows it.

    run: that the command trains, as the job finds it: it has one job at a time, whatever the command.
    working_dir: a folder to upload, whose files the command finds; None: the image has all it needs.
    uv: make the environment with uv from pyproject.toml and uv.lock of that folder.
    show: told what happens here.  write: given what the job prints.
    Returns submission_id, status and exit_code of the job, which are None where it is not followed.
    Raises UsageError for files that cannot be packed, ResourceError where the cluster cannot be reached or asked, or runs the
    job with another command or other files, Stopped on Ctrl-C: the job goes on.
    """
    use_token()
    files = None if working_dir is None else packed(working_dir, uv=uv)
    client = connected(address)
    entry = shlex.join([*(["uv", "run", "--frozen"] if uv else []), "python", "-m", "ssl_ray", *command])
    with errors_of(address):
        name, is_there = _name(client, command, run)
        if not is_there:
            if files is not None:
                show(f"uploading {working_dir}: {len(files)} files, {_mib(sum(files.values()))} MiB")
            is_there = not _submit_once(client, name, entry, working_dir, address)
        if is_there:
            _require_same(client.get_job_info(name), entry, working_dir, address)
        show(f"{name} runs already" if is_there else f"{name} submitted: {entry}")
        if not follow:
            show(_how_to(name, address))
            return {"submission_id": name, "status": None, "exit_code": None}
        return _followed(client, name, address, write)


def use_token() -> None:
    """Has Ray use the token where it finds one: in these places it looks, but not unless it is told so before it is imported."""
    places = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(map(os.environ.get, places)) or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def packed(folder: str, *, uv: bool) -> dict[str, int]:
    """The files that would be uploaded, and their bytes: Ray leaves out .git, environments, what .rayignore and .gitignore name.

    Raises UsageError if they are too many bytes, or uv lacks its files.
    """
    from ray._private.runtime_env import packaging  # what Ray itself counts

    at = Path(folder)
    for name in ("pyproject.toml", "uv.lock") if uv else ():
        if not (at / name).is_file():
            raise UsageError(f"--uv: {at / name} is not there.\nMake it (`uv lock`), or leave --uv out where the image has all.")
    found: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            found[os.fspath(path.relative_to(at.absolute()))] = path.stat().st_size

    names, is_gitignore_heeded = _left_out()
    packaging._dir_travel(at.absolute(), [packaging._get_excludes(at, names)], count, include_gitignore=is_gitignore_heeded)
    total = sum(found.values())
    if total > MOST_MIB * 2**20:
        largest = sorted(found, key=lambda name: -found[name])[:LARGEST]
        raise UsageError(
            f"--working-dir {folder}: {_mib(total)} MiB, expected {MOST_MIB} at most. The largest: "
            + ", ".join(f"{name} ({_mib(found[name])})" for name in largest)
            + ".\nName what the job does not need in .rayignore, as in .gitignore, and keep data in an object store."
        )
    return found


def _left_out() -> tuple[list[str], bool]:
    """What Ray leaves out of each folder by default, and whether it heeds .gitignore; variables of Ray change both."""
    from ray._private import ray_constants

    is_gitignore_heeded = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    return ray_constants.get_runtime_env_default_excludes(), is_gitignore_heeded


def _package(folder: str) -> str:
    """Where Ray keeps these files: the name is a digest of them, and stands in the runtime environment of their job."""
    from ray._private.runtime_env import packaging

    names, is_gitignore_heeded = _left_out()
    return packaging.get_uri_for_directory(folder, is_gitignore_heeded, excludes=names)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def connected(address: str) -> Any:
    """A client of Ray's jobs."""
    use_token()
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UsageError(
            f"submitting needs packages that are absent.\nRun: pip install 'ray[default]=={ray.__version__}'"
        ) from error
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--address: got {address}, expected that of the dashboard, as http://127.0.0.1:8265.")
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):  # which have their own levels
        logging.getLogger(name).setLevel(logging.ERROR)
    with errors_of(address):
        return JobSubmissionClient(address)


@contextlib.contextmanager
def errors_of(address: str) -> Any:
    """Ray's many ways to say that a cluster cannot be asked, as ResourceError."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (KeyboardInterrupt, UsageError, ResourceError, Stopped):
        raise
    except AuthenticationError as error:
        text = str(error).partition("\n")[0]
        mode = os.environ.get("RAY_AUTH_MODE")
        do = "Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
        if mode not in (None, "token"):
            do = f"Set RAY_AUTH_MODE=token: got {mode}, with which no token is shown."
        raise ResourceError(f"{address}: {text}\n{do}") from error
    except (RuntimeError, ValueError, OSError, requests.RequestException, aiohttp.ClientError) as error:
        text = storage.one_line(error)[:300]
        raise ResourceError(f"{address}: {text}\nCheck that the cluster runs and the tunnel to its dashboard is open.") from error


def _name(client: Any, command: list[str], run: str | None) -> tuple[str, bool]:
    """The name of the job, and whether it runs already."""
    first = f"ssl-ray-{command[0]}-{config.canonical_hash(_subject(command, run))[:10]}"
    numbers = {}
    for job in client.list_jobs():
        head, _, number = (job.submission_id or "").rpartition("-")
        if head == first and number.isdecimal():
            numbers[int(number)] = str(job.status.value)
    newest = max(numbers, default=0)
    if newest and numbers[newest] not in _ENDED:
        return f"{first}-{newest}", True
    return f"{first}-{newest + 1}", False


def _subject(command: list[str], run: str | None) -> dict[str, Any]:
    """What there is to be one job of at a time: the run, else the command."""
    if run is None:
        return {"command": _sorted(command)}
    # A relative path is one of the job's, wherever the client is.
    return {"run": os.path.normpath(run.removeprefix("file://")) if storage.is_local(run) else run.rstrip("/")}


def _sorted(command: list[str]) -> list[str]:
    """A command whose keys have an order of their own: only among values of the same key does it matter, the last one counts."""
    keys = sorted((word.removeprefix("--") for word in command if "=" in word), key=lambda word: word.partition("=")[0])
    return [word for word in command if "=" not in word] + keys


def _require_same(job: Any, entry: str, working_dir: str | None, address: str) -> None:
    """Raises ResourceError if the job that runs has another command, or other files, than would be submitted now."""
    other = []
    if (job.runtime_env or {}).get("working_dir") != (None if working_dir is None else _package(working_dir)):
        other.append("other files of --working-dir")
    if _sorted(shlex.split(job.entrypoint)) != _sorted(shlex.split(entry)):
        other.append(f"another command: {job.entrypoint}")
    if other:
        raise ResourceError(
            f"{job.submission_id} runs already, with {' and '.join(other)}\n{_with_ray(job.submission_id, address)}"
        )


def _submit_once(client: Any, name: str, entry: str, working_dir: str | None, address: str) -> bool:
    """Submits it, again where the answer is lost. False: it was there, from another client or by such an answer."""
    import tenacity

    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    if working_dir is not None:
        environment["working_dir"] = working_dir

    def submitted() -> bool:
        try:
            client.submit_job(entrypoint=entry, submission_id=name, runtime_env=environment)
        except RuntimeError as error:
            if name in str(error) and "already exists" in str(error):
                return False
            raise
        return True

    retrying = tenacity.Retrying(
        # Those of requests are OSErrors; a head that has just begun has no agent yet to run a job (status 500).
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, OSError) or "status code 5" in str(error)),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(max=10),
        reraise=True,
    )
    try:
        return retrying(submitted)
    except KeyboardInterrupt:
        raise Stopped(
            f"left while {name} was being submitted, so that it may run or not. The same command finds it, or submits it.\n"
            f"To see: {_ray_job('status', name, address)}"
        ) from None


def _followed(client: Any, name: str, address: str, write: Callable[[str], None]) -> dict[str, Any]:
    """Writes what the job prints until it ends; a connection that is lost is made anew."""
    import aiohttp

    written = lost = 0

    async def tail() -> None:
        nonlocal written, lost
        seen = 0  # the whole log comes again with each connection
        async for text in client.tail_job_logs(name):
            lost = 0
            fresh = text[max(0, written - seen) :]
            seen += len(text)
            written = max(written, seen)
            if fresh:
                write(fresh)

    try:
        while True:
            try:
                asyncio.run(tail())
                info = client.get_job_info(name)
                lost = 0
            except (aiohttp.ClientError, RuntimeError, OSError) as error:
                lost += 1
                if lost == 10 * ATTEMPTS:
                    raise ResourceError(
                        f"{address}: cannot be reached any more ({storage.one_line(error)}).\n{_how_to(name, address)}"
                    ) from error
                time.sleep(POLL_S)
                continue
            if info.status.value in _ENDED:
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise Stopped(f"left the job {name}, which goes on. {_how_to(name, address)}") from None
    status = info.status.value
    code = 0 if status == "SUCCEEDED" else Stopped.exit_code if status == "STOPPED" else info.driver_exit_code or 1
    return {"submission_id": name, "status": status, "exit_code": code}


def _how_to(name: str, address: str) -> str:
    return f"The same command follows it again.\n{_with_ray(name, address)}"


def _with_ray(name: str, address: str) -> str:
    logs, stop = _ray_job("logs --follow", name, address), _ray_job("stop", name, address)
    return f"To see what it prints: {logs}; to stop it, with a checkpoint: {stop}"


def _ray_job(verb: str, name: str, address: str) -> str:
    """A command of Ray, for whoever has the token but never told Ray to use it, too."""
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"{mode}ray job {verb} --address {address} {name}"
