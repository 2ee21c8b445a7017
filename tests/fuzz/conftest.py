"""Folders in memory, and an address space that a bomb cannot fill the machine through."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOM_BYTES = 4 * 2**30


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def folder() -> Iterator[Path]:
    shm = "/dev/shm"
    at = Path(tempfile.mkdtemp(prefix="ssl-ray-fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
    yield at
    shutil.rmtree(at)
