"""Data in a real S3 server."""

import pytest
import seaweedfs
from command import ssl_ray


@pytest.fixture(scope="session")
def digits(server: seaweedfs.Server) -> str:
    """The digits, packed into the server."""
    uri = f"s3://{seaweedfs.BUCKET}/digits"
    ssl_ray(server.environment(), "data", "pack", "digits", uri, "--shard-mb", "0.5").ok()
    return uri
