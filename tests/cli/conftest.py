"""The command line in this process, and small data to run it on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_harness import SMALL, pack, write_images
from command import Done

from ssl_ray.cli import main


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def pretrain(cli: Callable[..., Done]) -> Callable[..., Done]:
    """`ssl-ray pretrain --json` of a small run: nothing but an error goes to stderr."""
    return lambda *arguments: cli("pretrain", "--json", *SMALL, *arguments)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of them that no test changes."""
    return pack(images, tmp_path_factory.mktemp("packed") / "train")


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may harm."""
    return Path(shutil.copytree(packed, tmp_path / "train"))


@pytest.fixture(scope="session")
def with_bad_image(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the images and one of class-1 that is no image."""
    source = Path(shutil.copytree(images, tmp_path_factory.mktemp("bad") / "images"))
    (source / "class-1" / "broken.png").write_bytes(b"\x89PNG no image")
    return pack(source, source.with_name("train"))


@pytest.fixture(scope="session")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run on `packed` that no test changes, with a checkpoint at every second step."""
    uri = tmp_path_factory.mktemp("runs") / "trained"
    keys = (f"data.uri={packed}", f"run={uri}", "checkpoint.every_steps=2")
    assert main(["pretrain", "--json", *SMALL, *keys]) == 0
    return uri


@pytest.fixture
def evaluated(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write results into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
