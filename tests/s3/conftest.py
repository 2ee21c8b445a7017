"""Data in a real S3 server, read by this process through a proxy."""

from collections.abc import Iterator

import proxy
import pytest
import seaweedfs
from command import ssl_ray
from stored import Store, batches, forget_clients

from ssl_ray import shards, storage


@pytest.fixture(scope="session")
def digits(server: seaweedfs.Server) -> str:
    """The digits, packed into the server."""
    uri = f"s3://{seaweedfs.BUCKET}/digits"
    ssl_ray(server.environment(), "data", "pack", "digits", uri, "--shard-mb", "0.5").ok()
    return uri


@pytest.fixture(scope="session")
def stored(server: seaweedfs.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    local, uri = tmp_path_factory.mktemp("stored") / "digits", f"s3://{seaweedfs.BUCKET}/small"
    with proxy.serve("127.0.0.1", server.port) as between, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(endpoint=between.endpoint).items():
            patch.setenv(name, value)
        forget_clients()
        for place in (str(local), uri):
            shards.pack(shards.open_source("digits"), place, shard_bytes=2**18)
        yield Store(uri, local, between, list(batches(str(local), epochs=2)))
        forget_clients()


@pytest.fixture
def store(stored: Store) -> Store:
    """Without faults, its log empty."""
    stored.between.rules, stored.between.log = [], []
    storage._resume_at = 0.0
    return stored
