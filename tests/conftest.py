"""Shared by all tests: the long stage, skips that CI does not allow, a small file system to fill up, a real S3 server."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import seaweedfs

# Ray's workers give way to all else by default: beside a test that uses both CPUs they would get a thirtieth.
os.environ.setdefault("RAY_worker_niceness", "0")
# A job in the background of a shell ignores Ctrl-C, and so would what the tests start, which they stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests of the long stage too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if "long" in item.keywords])
        items[:] = [item for item in items if "long" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything must run: {report.longrepr}"
    return report


@pytest.fixture
def tmpfs() -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of its own with the options given, or changes those of the one it mounted."""
    at = Path(tempfile.mkdtemp(prefix="ssl-ray-test-"))  # not below tmp_path, which pytest could not clear if this were killed

    def mount(options: str) -> Path:
        remount = "remount," if at.is_mount() else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", at], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return at

    yield mount
    if at.is_mount():
        subprocess.run(["umount", "--lazy", at], check=True)  # lazy: the index stays open in this process
    at.rmdir()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweedfs.Server]:
    """One for all tests of a process: they use names of their own in its bucket, and leave it running."""
    with seaweedfs.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server
