"""Google's and Azure's stores, as far as their emulators go: packed, trained from and into, continued, evaluated."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ssl_ray
from nodes import free_port

KEYS = ("views.count=2", "model.projector_dim=16", "train.workers=0", "train.digest=true", "evaluate.max_images=50")
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""That of every Azurite."""


@contextlib.contextmanager
def process(command: list[str], folder: Path) -> Iterator[None]:
    with (folder / "emulator.log").open("wb") as log:
        started = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        started.kill()
        started.wait()


def await_answer(ask) -> None:
    """Waits until the emulator does what is asked."""
    until = time.monotonic() + 60
    while True:
        try:
            return ask()
        except Exception:
            assert time.monotonic() < until
            time.sleep(0.2)


@pytest.fixture
def google(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a client of an emulator with the bucket `ssl`."""
    import requests

    at = f"http://127.0.0.1:{free_port()}"
    program = str(Path(sys.executable).parent / "gcp-storage-emulator")
    options = ["--host", "127.0.0.1", "--port", at.rpartition(":")[2], "--in-memory", "--default-bucket", "ssl"]
    with process([program, "start", *options], tmp_path):
        await_answer(lambda: requests.get(f"{at}/storage/v1/b/ssl", timeout=2).raise_for_status())
        # Zones and hierarchies are asked for by gRPC, which the emulator does not speak.
        yield {"STORAGE_EMULATOR_HOST": at, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a client of an emulator with the container `ssl`."""
    from azure.storage.blob import BlobServiceClient

    program, port = shutil.which("azurite-blob"), free_port()
    if program is None:
        pytest.skip("needs azurite-blob (npm install -g azurite)")
    account = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY}"
    to = f"DefaultEndpointsProtocol=http;{account};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    with process([program, "--blobPort", str(port), "--skipApiVersionCheck", "--silent"], tmp_path):
        await_answer(lambda: BlobServiceClient.from_connection_string(to).create_container("ssl"))
        yield {"AZURE_STORAGE_CONNECTION_STRING": to}


def use(scheme: str, variables: dict[str, str], local: Path) -> None:
    uri, run = f"{scheme}://ssl/digits", f"{scheme}://ssl/runs/a"
    ssl_ray(variables, "data", "pack", "digits", uri, "--shard-mb", "0.25").ok()
    assert ssl_ray(variables, "data", "check", uri, "--json").ok().json["bad_samples"] == []
    train = ("pretrain", f"data.uri={uri}", *KEYS)
    refused = ssl_ray(variables, *train, f"run={run}", "train.steps=6")
    assert refused.code == 4, refused.err
    assert "--no-lease" in refused.err.splitlines()[-1]
    done = ssl_ray(variables, *train, f"run={run}", "train.steps=6", "--no-lease", "--json").ok().json
    ssl_ray(os.environ | variables, "data", "pack", "digits", str(local / "digits"), "--shard-mb", "0.25").ok()
    here = ("pretrain", f"data.uri={local / 'digits'}", *KEYS, f"run={local / 'run'}", "train.steps=6", "--json")
    assert ssl_ray(variables, *here).ok().json["loss"] == done["loss"]
    assert ssl_ray(variables, *train, f"run={run}", "train.steps=6", "--no-lease", "--json").ok().json == done
    assert ssl_ray(variables, "evaluate", run, "--json").ok().json["knn_accuracy"] == done["knn_accuracy"]
    missing = ssl_ray(variables, "data", "stats", f"{scheme}://ssl/absent")
    missing.refused(3, f"{scheme}://ssl/absent")


@pytest.mark.long
def test_everything_works_in_a_google_bucket(google: dict[str, str], tmp_path: Path):
    use("gs", google, tmp_path)


@pytest.mark.long
def test_everything_works_in_an_azure_container(azure: dict[str, str], tmp_path: Path):
    use("abfs", azure, tmp_path)
