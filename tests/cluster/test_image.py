"""The image of cluster/Dockerfile, really built, on a Debian made here in the place of Docker's, without a daemon or a registry.

Five minutes on two idle cores, and disk for four times its 7 GB while it is made, most of both torch's: pip is given this
machine's own settings, to take packages from where it takes them.  Needs root and `apt install buildah crun mmdebstrap`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import harness
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PROGRAMS = ("buildah", "mmdebstrap")
BYTES = 30e9
MISSING = ", ".join(
    [name for name in PROGRAMS if not shutil.which(name)]
    + ["root"] * (os.geteuid() != 0)
    + [f"{BYTES / 1e9:.0f} GB of free disk"] * (shutil.disk_usage(tempfile.gettempdir()).free < BYTES and "CI" not in os.environ)
)
RUN = ["train.workers=0", "train.steps=6", "train.batch=32", *harness.SMALL]
LOADS = """
from ssl_ray.views import draws, kernel, png, stored
print([sum(room.load().stats.cache_hits.values()) for room in (draws, kernel, png, stored)])
"""
# Asks a head that starts in a network of its own, of which nothing but the loopback is there.
HEAD = """
import json, os, pathlib, subprocess, sys, time, urllib.error, urllib.request

token = pathlib.Path("/home/ray/.ray/auth_token")
token.write_text(os.urandom(32).hex())
ray = subprocess.Popen([*sys.argv[1:], "--block"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ask(port, path, **headers):
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


end = time.monotonic() + 120
while time.monotonic() < end and not (ask(52365, "/api/healthz") == 200 and ask(8265, "/api/gcs_healthz") == 200):
    assert ray.poll() is None, "Ray has ended"
    time.sleep(1)
print(json.dumps({
    "probe": ask(52365, "/api/healthz"),
    "anybody": ask(8265, "/api/jobs/"),
    "with the token": ask(8265, "/api/jobs/", Authorization=f"Bearer {token.read_text()}"),
    "metrics": ask(8080, "/metrics"),
}))
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=f"building an image: needs {MISSING}"),
]

Image = Callable[..., str]
"""Runs a command in a container of the image, as its user and in its environment; gives what it prints."""


def pip_settings(path: Path) -> list[str]:
    """Writes those of this machine's pip to a file for the image's; gives the volumes that a build needs to follow them."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = {
        name.rpartition(".")[2]: value.strip("'\"") for name, _, value in (line.partition("=") for line in listed.splitlines())
    }
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    # The files of an index in a folder lie beside it.
    words = [urlsplit(word) for value in settings.values() for word in value.split()]
    places = {
        Path(word.path).parent if word.scheme == "file" else Path(word.path) for word in words if word.scheme in ("", "file")
    }
    volumes = {path: "/etc/pip.conf"} | {place: str(place) for place in places if place.is_absolute() and place.exists()}
    return [f"--volume={there}:{here}:ro" for there, here in volumes.items()]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}
    store = [f"--root={folder / 'root'}", f"--runroot={folder / 'run'}"]

    def buildah(verb: str, *arguments: str, before: tuple[str, ...] = ()) -> str:
        command = [*before, "buildah", *store, verb, *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout.strip()

    try:
        base = folder / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", base], check=True)
        debian = buildah("from", "scratch")
        buildah("add", "--quiet", debian, str(base), "/")
        buildah("commit", "--quiet", "--rm", debian, "localhost/debian:bookworm")
        base.unlink()
        given = ["BASE=localhost/debian:bookworm", "TORCH=https://pypi.org/simple"]
        files = [
            f"--file={CLUSTER / 'Dockerfile'}",
            f"--ignorefile={CLUSTER / 'Dockerfile.dockerignore'}",
            "--tag=localhost/ssl-ray:1",
        ]
        buildah("bud", *files, *(f"--build-arg={each}" for each in given), *pip_settings(folder / "pip.conf"), ".")
        container = buildah("from", "localhost/ssl-ray:1")

        def run(*command: str, before: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> str:
            variables = (f"--env={name}={value}" for name, value in (environment or {}).items())
            return buildah("run", *variables, container, "--", *command, before=before)

        yield run
    finally:
        for verb in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run(["buildah", *store, *verb], env=environment, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_its_user_is_nobody_special_and_can_change_nothing_of_it(image):
    assert image("id", "-u", "-n") == "ray"
    assert image("sh", "-c", "find /opt /usr /etc -writable -not -type l 2>/dev/null || true") == ""


def test_the_views_are_compiled_in_it(image):
    assert image("python", "-c", LOADS) == "[1, 1, 1, 1]"


def test_it_trains_as_this_machine_does(image, tmp_path):
    """Machine code for another processor than this one, Debian's Python: the views and the losses are the same."""
    image("ssl-ray", "pretrain", *RUN, "run=/tmp/one")
    code, _, errors = harness.run("pretrain", *RUN, f"run={tmp_path / 'one'}")
    assert code == 0, errors
    (tmp_path / "theirs" / "metrics").mkdir(parents=True)
    for name in image("ls", "/tmp/one/metrics").split():
        (tmp_path / "theirs" / "metrics" / name).write_text(image("cat", f"/tmp/one/metrics/{name}"))
    ours, theirs = (
        [
            {key: value for key, value in record.items() if key not in harness.VARYING}
            for record in harness.records(tmp_path / each)
        ]
        for each in ("one", "theirs")
    )
    assert len(ours) == 6
    assert ours == theirs


def test_a_head_starts_in_it_as_the_files_have_it(image):
    """With the options of cluster/aws.yaml but for the machines to start, in a network of its own."""
    start = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["head_start_ray_commands"][-1].split()
    start = [word for word in start if not word.startswith("--autoscaling-config")]
    alone = (
        "unshare",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "alone",
    )
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/home/ray/.ray/auth_token"}
    options = ["--node-ip-address=127.0.0.1", "--num-cpus=0", "--object-store-memory=100000000"]
    answers = json.loads(image("python", "-c", HEAD, *start, *options, before=alone, environment=environment).splitlines()[-1])
    assert answers == {"probe": 200, "anybody": 401, "with the token": 200, "metrics": 200}


def test_the_launcher_and_its_head_find_in_it_what_they_need(image):
    for program in ("rsync", "ssh", "bash", "ray"):
        assert image("which", program)
    assert image("printenv", "HOME") == "/home/ray"
    assert image("stat", "--format=%U %a", "/home/ray/.ray") == "ray 700"  # else Docker would make it for the token, as root's
    image("python", "-c", "import ray.autoscaler._private.aws.node_provider, ray.autoscaler._private.gcp.node_provider")
