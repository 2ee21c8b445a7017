"""Files on any fsspec storage (local paths, s3://, gs://, ...), and its failures as errors a user can act on.

Endpoint, region and credentials of S3 come from the standard AWS variables and files. What fails in a way that may pass is
tried again: a server may restart, or ask its clients to slow down.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from ssl_ray.errors import DataError, ResourceError, UsageError
from ssl_ray.masking import USER_INFO

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

CONNECT_S = 5
"""To connect to a server."""
STALL_S = 10
"""A connection on which nothing comes for so long is given up."""
ATTEMPTS = 8
"""For what fails in a way that may pass, beside the retries of the storage's own client. The pauses between them, about .5, 1, 2,
... 20 s, take 38 to 64 s: a server may start again meanwhile. Each attempt ends by the timeouts above."""
FIRST_PAUSE_S = 0.5
FEW_ATTEMPTS = 3
"""Before a storage answered this process for the first time, since a wrong endpoint is to be told soon; and for a file that is
not there, where that is no answer: network file systems may see a file late."""

BULK = 1000
"""Objects that S3 deletes in a request."""
KNOWN = (
    "a path or a URI such as s3://bucket/name; file://, s3://, http:// and https:// (to read) are there, "
    "other protocols of fsspec need their package"
)


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that it means the same in every process; ~ is the home.

    Raises UsageError if empty, or if no path can be so, or names of a URI are empty, `.` or `..`, which storages take for
    different places.
    """
    if not uri or "\0" in uri:
        given = f"the path {uri!r}" if uri else "an empty path"
        raise UsageError(f"{given} was given, expected a folder or a URI such as s3://bucket/name.")
    protocol, _, path = uri.partition("://")
    if not is_local(uri) and USER_INFO.search(uri):  # which errors of the clients would repeat in forms of their own
        raise UsageError(f"{uri}: a user or password in it. Leave it out: environment and AWS files have them.")
    if not is_local(uri) and not protocol.startswith("http") and {"", ".", ".."} & set(path.rstrip("/").split("/")):
        raise UsageError(f"{uri}: a name in it is empty, . or .., expected a URI such as s3://bucket/name.")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))) if is_local(uri) else uri.rstrip("/")


def open_storage(uri: str) -> "tuple[AbstractFileSystem, str]":
    """The fsspec filesystem of `uri` and the path in it, without a slash at its end.

    Raises UsageError for an empty URI or an unknown protocol, DataError where the filesystem connects at once and cannot.
    """
    import fsspec

    if is_local(uri):  # not by url_to_fs, to which "::" in a file's name is a chain of protocols
        return fsspec.filesystem("file"), absolute(uri)
    options: dict[str, Any] = {}
    if uri.startswith("s3"):
        options = {"config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": STALL_S}}
    place = absolute(uri)
    try:
        with storage_errors(uri, "connecting"):  # not by url_to_fs either
            kind = fsspec.get_filesystem_class(place.partition("://")[0])
            filesystem = kind(**kind._get_kwargs_from_urls(place), **options)
            path = str(kind._strip_protocol(place))
    except (ValueError, ImportError) as error:
        raise UsageError(f"{uri}: {one_line(error)}. Expected {KNOWN}.") from error
    return filesystem, path


def one_line(error: BaseException) -> str:
    """The text of an error, its line breaks taken out; its type where it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names]) or "/"


def _without_bucket(error: BaseException) -> bool:
    """Whether S3 said that the bucket itself is absent, and not only what was looked for in it."""
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket"


@contextlib.contextmanager
def storage_errors(uri: str, doing: str) -> Iterator[None]:
    """Turns failures of the storage into DataError or ResourceError that name `uri` and what was being done to it."""
    try:
        yield
    except FileNotFoundError as error:
        if _without_bucket(error):
            raise DataError(f"{uri}: no such bucket ({doing}). Make it, or check its name and AWS_ENDPOINT_URL.") from error
        raise DataError(f"{uri}: not there ({doing}). Check the path.") from error
    except PermissionError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"{uri}: no permission ({doing}: {reason}). Check owner or credentials, or the path.") from error
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"{uri}: not a place for it ({doing}: {reason}). Use another path.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{uri}: no space left ({doing}). Free some and run the same command again.") from error
        if error.errno == errno.EROFS:
            raise DataError(f"{uri}: the file system is read-only ({doing}). Use another path.") from error
        raise DataError(f"{uri}: {doing} failed: {one_line(error)}. Check the storage and the network.") from error
    except Exception as error:
        if _package(error) in ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "google", "azure"):
            message = one_line(error)
            raise DataError(f"{uri}: {doing} failed: {message}. Check credentials, endpoint and network.") from error
        raise


# Trying again --------------------------------------------------------------------------------------------------------

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_LASTING_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL)

_answered: set[str] = set()
"""Protocols of the storages that answered this process."""
_resume_at = 0.0
"""Nothing is asked of a storage before (time.monotonic): it said that this process asks too much."""


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def may_pass(error: BaseException) -> bool:
    """Whether a failure of a storage may be gone a little later."""
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING) and error.errno not in _LASTING_ERRNO
    package = _package(error)
    if package in ("aiohttp", "gcsfs", "azure"):
        found = [getattr(error, name, None) for name in ("status", "code", "status_code")]
        status = next((value for value in found if isinstance(value, int)), 500)
        return status >= 500 or status == 429
    passing = {"HTTPClientError", "ConnectionError"}  # the second where nothing listens: a server that starts again
    return package in ("botocore", "aiobotocore") and any(base.__name__ in passing for base in type(error).__mro__)


def _too_much(error: BaseException | None) -> bool:
    """Whether a storage said that it is asked too much: 503 or 429, S3's SlowDown (EBUSY from s3fs)."""
    if getattr(error, "errno", None) == errno.EBUSY or getattr(error, "status", None) in (429, 503):
        return True
    arrow = ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "THROTTLING", "HTTP status 503", "HTTP status 429")
    return isinstance(error, OSError) and any(text in str(error) for text in arrow)


def retried(uri: str, call: Callable[[], T], *, again: Callable[[BaseException], bool] = may_pass) -> T:
    """What `call` returns; where it raises an error of which `again` says so, it is called anew, ATTEMPTS times in all.

    Where a storage says that it is asked too much, all threads of this process wait. Raises the last error.
    """
    import tenacity

    protocol = uri.partition("://")[0] if not is_local(uri) else ""

    def last(state: tenacity.RetryCallState) -> bool:
        assert state.outcome is not None
        # A process of Ray comes after its driver, to which the storage has answered.
        known = not protocol or protocol in _answered or sys.modules.get("ray") is not None
        gone = isinstance(state.outcome.exception(), FileNotFoundError)
        return state.attempt_number >= (ATTEMPTS if known and not gone else FEW_ATTEMPTS)

    def slow_down(state: tenacity.RetryCallState) -> None:
        global _resume_at
        assert state.outcome is not None
        assert state.next_action is not None
        if _too_much(state.outcome.exception()):
            _resume_at = max(_resume_at, time.monotonic() + state.next_action.sleep)

    def wait(_: tenacity.RetryCallState) -> None:
        while (left := _resume_at - time.monotonic()) > 0:
            time.sleep(left * random.uniform(1, 1.5))  # not all at the same moment

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(again),
        stop=last,
        wait=lambda state: min(20, FIRST_PAUSE_S * 2 ** (state.attempt_number - 1)) * random.uniform(0.75, 1.25),
        before=wait,
        before_sleep=slow_down,
        reraise=True,
    )
    result = retrying(call)
    _answered.add(protocol)
    return result


def ask(uri: str, call: Callable[[], T]) -> T:
    """What `call` returns, tried again where it may pass; but on local disks what fails, fails for good."""
    return call() if is_local(uri) else retried(uri, call)


def read_bytes(uri: str) -> bytes:
    """The whole content. Raises DataError if it is absent or cannot be read."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "reading"):
        return ask(uri, lambda: filesystem.cat_file(path))


def write_atomic(uri: str, data: bytes) -> None:
    """Puts `data` at `uri`, whole or not at all; folders above are made. Raises DataError or ResourceError."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "writing"):
        if not is_local(uri):
            ask(uri, lambda: filesystem.pipe_file(path, data))
            return
        with _replacing(path) as file:
            file.write(data)


def require_writable(uri: str) -> None:
    """Raises DataError where `uri` cannot be written to, before the work of hours and not after."""
    probe = join(uri, ".writing-test")
    write_atomic(probe, b"")
    remove(probe)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A file that takes the place of the local `path` when it is complete and on the disk."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileNotFoundError as error:  # of /proc and its like
        raise DataError(f"{folder}: this folder is not there and cannot be created ({error.filename}: no place for one). "
                        "Use another path.") from error  # fmt: skip
    temporary = os.path.join(folder, f".writing-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """A local folder for a while, where TMPDIR says."""
    with contextlib.ExitStack() as undo:
        with storage_errors("TMPDIR", "making a temporary folder"):
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix=f"ssl-ray-{purpose}-", ignore_cleanup_errors=True))
        yield folder


def _require_only_absent(error: OSError) -> None:
    """Raises what is wrong where a filesystem calls more than the absence of a file by that name."""
    if _without_bucket(error):
        raise error
    cause = error.__cause__  # HTTP's takes any failure for absence, such as a server that is not there
    if cause is not None and (isinstance(cause, OSError) or getattr(cause, "status", 404) != 404):
        raise cause from None


def exists(uri: str) -> bool:
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "looking"):
        filesystem.invalidate_cache(path)
        try:  # not by exists(), which takes any failure for absence in some filesystems
            ask(uri, lambda: filesystem.info(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            _require_only_absent(error)
            return False
        return True


def list_names(uri: str) -> list[str]:
    """Names directly below `uri`, sorted; none if it is absent. Files that are still being written are left out."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "listing"):
        filesystem.invalidate_cache(path)
        try:
            found = ask(uri, lambda: filesystem.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError) as error:
            _require_only_absent(error)
            return []
    names = {name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path}
    return sorted(name for name in names if not name.startswith(".writing-"))


def remove(uri: str) -> None:
    """Removes a file or everything below a folder; nothing happens if it is absent."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "removing"):
        filesystem.invalidate_cache(path)
        with contextlib.suppress(FileNotFoundError):
            ask(uri, lambda: filesystem.rm(path, recursive=True) if is_local(uri) else _remove(filesystem, path))


def _remove(filesystem: Any, path: str) -> None:
    """By the names that are there: to `rm` a name with * ? or [ is a pattern, which others may fit."""
    if not _is_s3(filesystem):
        for each in [path] if filesystem.isfile(path) else filesystem.find(path):
            filesystem.rm_file(each)
        return
    from fsspec.asyn import sync

    # The folders too, deepest first: servers that keep files keep these.
    found = sorted([path, *filesystem.find(path, withdirs=True)], reverse=True)
    for start in range(0, len(found), BULK):
        sync(filesystem.loop, filesystem._bulk_delete, found[start : start + BULK])


def upload(local: str, uri: str) -> None:
    """Copies a local file to `uri`, in parts where it is large; folders above are made."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "writing"):
        if is_local(uri):
            with open(local, "rb") as source, _replacing(path) as file:
                shutil.copyfileobj(source, file, 2**20)
        else:
            ask(uri, lambda: filesystem.put_file(local, path))


# A file that several may write ---------------------------------------------------------------------------------------


class Changed(Exception):
    """A file is no longer what was to be replaced."""


def _is_s3(filesystem: "AbstractFileSystem") -> bool:
    return "s3" in filesystem.protocol


def can_swap(uri: str) -> bool:
    """Whether `swap` is there for this kind of storage. A store's server may yet take no notice of the condition."""
    return is_local(uri) or _is_s3(open_storage(uri)[0])


def read_versioned(uri: str) -> tuple[bytes | None, str | None]:
    """A small file and its version, which another content does not have; None and None if it is absent."""
    filesystem, path = open_storage(uri)
    with storage_errors(uri, "reading"):
        try:
            if _is_s3(filesystem):
                from fsspec.asyn import sync

                return ask(uri, lambda: sync(filesystem.loop, _get_object, filesystem, path))
            filesystem.invalidate_cache(path)
            data = filesystem.cat_file(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            _require_only_absent(error)
            return None, None
    return data, hashlib.sha256(data).hexdigest()


async def _get_object(filesystem: Any, path: str) -> tuple[bytes, str]:
    bucket, key, _ = filesystem.split_path(path)
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    return await answer["Body"].read(), answer["ETag"]


def swap(uri: str, data: bytes, *, version: str | None) -> str:
    """Writes a small file if it is still of `version` (None: absent); returns its new version. Raises Changed if it is not.

    `data` must be like nothing that another would write: it tells our own write, whose answer was lost, from another's.
    """
    with storage_errors(uri, "writing"):
        if is_local(uri):
            with _locked(os.path.dirname(absolute(uri))):
                if read_versioned(uri)[1] != version:
                    raise Changed(uri)
                with _replacing(absolute(uri)) as file:
                    file.write(data)
            return hashlib.sha256(data).hexdigest()
        filesystem: Any
        filesystem, path = open_storage(uri)
        bucket, key, _ = filesystem.split_path(path)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            put = {"Bucket": bucket, "Key": key, "Body": data} | condition
            return ask(uri, lambda: filesystem.call_s3("put_object", **put)["ETag"])
        except OSError as error:
            if _without_bucket(error) or _http_status(error) not in (404, 409, 412):
                raise
    there, now = read_versioned(uri)
    if there != data or now is None:
        raise Changed(uri)
    return now


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Alone among all that swap files in a local folder, which is made."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".writing-lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _http_status(error: BaseException) -> int | None:
    """That of the answer of S3 which s3fs made an OSError of."""
    response = getattr(error.__cause__, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
