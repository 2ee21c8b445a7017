"""A real S3 server for the tests of this folder, and the variables of its clients."""

from collections.abc import Iterator

import pytest
import seaweedfs


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweedfs.Server]:
    with seaweedfs.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def digits(server: seaweedfs.Server) -> str:
    """The digits, packed into the server."""
    uri = f"s3://{seaweedfs.BUCKET}/digits"
    seaweedfs.ssl_ray(server.environment(), "data", "pack", "digits", uri, "--shard-mb", "0.5").ok()
    return uri
