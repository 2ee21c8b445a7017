"""Ranges of bytes of shards: of local files by pread, of S3 through Arrow's client, of others through fsspec.

Arrow's client works outside of Python's lock, so that threads read beside one another and beside the making of views. A shard
costs them one request for its size in each process, then one for each range. Endpoint, region and credentials of S3 are those
that botocore finds, as for s3fs: Arrow's own search knows fewer of the standard places.
"""

import functools
import os
import re
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ssl_ray import storage
from ssl_ray.deadline import within
from ssl_ray.errors import DataError, SslRayError, UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

ATTEMPT_S = 120
"""An answer that is not complete by then is given up, however it trickles: 70 kB/s for the longest request. With the attempts
and pauses of `storage`, a range that cannot be had ends in an error after half a minute where the storage does not answer
at all, and after 17 minutes at the very most."""
OPEN_SHARDS = 4096
"""Of so many shards the sizes are remembered, 1 kB each."""

MISSING = "the shard is missing"


class Gone(Exception):
    """There is no such file, and that is the storage's answer."""


def fetch(uri: str, start: int, stop: int) -> bytes:
    """Bytes start to stop, fewer only where the file ends before.

    Raises Gone if there is no such file, DataError if it may not be read or keeps failing.
    """
    read = _pread if storage.is_local(uri) else _through_arrow if uri.startswith("s3://") else _through_fsspec
    attempts = 0

    def attempt() -> bytes:
        nonlocal attempts
        attempts += 1
        return read(uri, start, stop)

    try:
        return storage.retried(uri, attempt, again=_may_pass)
    except SslRayError:
        raise
    except FileNotFoundError as error:
        raise Gone(MISSING) from error
    except PermissionError as error:
        raise DataError(f"{uri}: no permission to read it. Check owner or credentials.") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{uri}: not a file ({error.strerror}). Put the shard back, or index again.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {storage.one_line(error)}"
        raise DataError(f"{uri}: reading failed {attempts} times ({reason}). Check the storage and the network.") from error


def _may_pass(error: BaseException) -> bool:
    lasting = (PermissionError, IsADirectoryError, NotADirectoryError, SslRayError)
    return isinstance(error, Exception) and not isinstance(error, lasting)


def forget_sizes() -> None:
    """Makes the next reads ask how large their shards are: they may have been replaced."""
    _open.cache_clear()


def _pread(uri: str, start: int, stop: int) -> bytes:
    with open(storage.absolute(uri), "rb", buffering=0) as file:
        data = os.pread(file.fileno(), stop - start, start)
        while len(data) < stop - start and (more := os.pread(file.fileno(), stop - start - len(data), start + len(data))):
            data += more
        return data


# Arrow ---------------------------------------------------------------------------------------------------------------

_making = threading.Lock()
"""botocore makes clients in one thread at a time."""


def _through_arrow(uri: str, start: int, stop: int) -> bytes:
    try:
        # nothing can end a request of Arrow's
        return within(ATTEMPT_S, functools.partial(_arrow_range, uri, start, stop))
    except Exception as error:
        forget_sizes()
        told = _told(error)
        if told is error:
            raise
        raise told from error


def _arrow_range(uri: str, start: int, stop: int) -> bytes:
    file = _open(uri, _credentials())
    expected = max(0, min(stop, file.size()) - start)
    data = file.read_at(expected, start) if expected else b""
    if len(data) < expected:
        raise EOFError(f"{len(data)} bytes came, {expected} were asked for")
    return data


def _told(error: Exception) -> Exception:
    """The error that Arrow means by its text; a key may hold any words, but comes before these."""
    codes = re.findall(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during", str(error))
    code, status = codes[-1] if codes else ("", "")
    if (
        code in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID")
        or status == "403"
    ):
        return PermissionError(storage.one_line(error))
    return FileNotFoundError(storage.one_line(error)) if code in ("NO_SUCH_KEY", "NO_SUCH_BUCKET") else error


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open(uri: str, credentials: Any) -> Any:
    """An open pyarrow file, which any number of threads may read ranges of."""
    path = uri.removeprefix("s3://")
    try:
        with _making:
            filesystem = _s3(path.partition("/")[0], credentials)
    except (ValueError, NotImplementedError) as error:  # Arrow's ArrowInvalid is a ValueError
        raise UsageError(f"{uri}: {storage.one_line(error)}. Check the URI.") from error
    return filesystem.open_input_file(path)


@functools.cache
def _session() -> tuple[Any, Any]:
    """botocore's session and its credentials, which renew themselves; None without any."""
    import botocore.session

    session = botocore.session.get_session()
    return session, session.get_credentials()


def _credentials() -> Any:
    with _making:
        found = _session()[1]
        return None if found is None else found.get_frozen_credentials()


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, credentials: Any) -> "FileSystem":
    from botocore.config import Config
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    session, _ = _session()
    client = session.create_client("s3")
    usual = session.create_client("s3", config=Config(ignore_configured_endpoint_urls=True))
    endpoint = client.meta.endpoint_url if client.meta.endpoint_url != usual.meta.endpoint_url else None
    scheme, host = urlsplit(endpoint)[:2] if endpoint else ("https", None)
    return S3FileSystem(
        access_key=credentials and credentials.access_key,
        secret_key=credentials and credentials.secret_key,
        session_token=credentials and credentials.token,
        anonymous=credentials is None,
        region=(session.get_config_variable("region") or "us-east-1") if endpoint else resolve_s3_region(bucket),
        scheme=scheme,
        endpoint_override=host,
        force_virtual_addressing=((client.meta.config.s3 or {}).get("addressing_style") == "virtual"),
        connect_timeout=storage.CONNECT_S,
        request_timeout=storage.STALL_S,
        tls_ca_file_path=session.get_config_variable("ca_bundle"),
    )


# fsspec --------------------------------------------------------------------------------------------------------------


def _through_fsspec(uri: str, start: int, stop: int) -> bytes:
    filesystem, path = storage.open_storage(uri)
    data = b""
    try:
        data = filesystem.cat_file(path, start=start, end=stop)
    except Exception as error:
        if not _past_end(error):
            raise
    if len(data) < stop - start:
        # Cut off on the way, or by the end of the file? Only the second makes a sample bad.
        filesystem.invalidate_cache(path)
        end = filesystem.info(path)["size"]
        if end != start + len(data) and (data or end > start):
            raise EOFError(f"{len(data)} bytes came, {stop - start} were asked for")
    return data


def _past_end(error: BaseException | None) -> bool:
    """Whether the storage said that the range begins after the end: HTTP 416, S3 InvalidRange. Never told by a text,
    which may hold any number (shard-000416.tar)."""
    while error is not None:
        if 416 in (getattr(error, name, None) for name in ("status", "code", "status_code")):
            return True
        response = getattr(error, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return True
        error = error.__cause__
    return False
