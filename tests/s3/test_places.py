"""Places in a bucket: names that are patterns elsewhere or mean no one place; a store that is not there for a while."""

import contextlib
import threading
import time

import pytest
import seaweedfs
from command import ssl_ray
from PIL import Image
from stored import forget_clients

from ssl_ray import load, storage
from ssl_ray.cli import main
from ssl_ray.errors import UsageError

BUCKET = seaweedfs.BUCKET


@pytest.fixture
def variables(server: seaweedfs.Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield
    forget_clients()


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("name", ["[ab]", "*", "?", "a[1]", "{a,b}", "a::b", "a b", "%25", "#", "ü"])
def test_what_is_removed_is_that_name_and_no_other(name: str):
    others = ["a", "b", "a1", "[ab]x", "x"]
    for each in [*others, name]:
        storage.write_atomic(f"s3://{BUCKET}/places/{each}/file", b"1")
        storage.write_atomic(f"s3://{BUCKET}/places/{each}/folder/file", b"2")
    storage.remove(f"s3://{BUCKET}/places/{name}/file")
    assert storage.list_names(f"s3://{BUCKET}/places/{name}") == ["folder"]
    storage.remove(f"s3://{BUCKET}/places/{name}")
    assert not storage.exists(f"s3://{BUCKET}/places/{name}")
    storage.remove(f"s3://{BUCKET}/places/{name}")  # which is absent
    for each in others:
        assert storage.list_names(f"s3://{BUCKET}/places/{each}") == ["file", "folder"]


@pytest.mark.usefixtures("variables")
def test_a_data_set_whose_name_is_a_pattern_leaves_those_that_fit_it_alone(server: seaweedfs.Server):
    for name in ("fits", "fit[st]", "fit[st]"):
        ssl_ray(server.environment(), "data", "pack", "digits", f"s3://{BUCKET}/{name}", "--overwrite").ok()
    assert ssl_ray(server.environment(), "data", "stats", f"s3://{BUCKET}/fits", "--json").ok().json["samples"] == 1797


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://b//x", "s3://b/../x", "s3://b/./x", "s3://b/x/.."])
def test_a_place_of_no_one_meaning_is_refused(uri: str):
    with pytest.raises(UsageError, match=r"a name in it is empty, \. or \.\."):
        storage.absolute(uri)
    ssl_ray({}, "pretrain", f"run={uri}").refused(2, "expected a URI such as s3://bucket/name")


def test_a_store_that_refuses_connections_for_a_while_is_waited_for(tmp_path, monkeypatch: pytest.MonkeyPatch):
    with seaweedfs.serve(tmp_path) as server, contextlib.ExitStack() as undo:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        forget_clients()
        undo.callback(forget_clients)
        at = f"s3://{BUCKET}/waits"
        storage.write_atomic(at, b"before")
        server.stop()
        again = threading.Timer(12, server.start)
        again.start()
        begun = time.monotonic()
        storage.write_atomic(at, b"after")
        assert time.monotonic() - begun > 10
        again.join()
        assert storage.read_bytes(at) == b"after"
        assert storage.list_names(f"s3://{BUCKET}") == [".probe", "waits"]  # the first of the server's start


@pytest.mark.usefixtures("variables")
def test_an_encoder_is_exported_to_a_bucket_replaced_and_loaded_from_it(tmp_path):
    run, to = f"s3://{BUCKET}/encoders/run", f"s3://{BUCKET}/encoders/export"
    keys = ["train.workers=0", "train.batch=8", "train.steps=1", "views.size_px=8", "views.count=2", "model.projector_dim=8"]
    assert main(["pretrain", "--json", "data.uri=digits", f"run={run}", "evaluate.max_images=50", *keys]) == 0
    assert main(["export", run, "-o", to, "--json"]) == 0
    assert main(["export", run, "-o", to, "--json"]) == 2
    assert main(["export", run, "-o", to, "--json", "--overwrite", "--format", "safetensors", "torch"]) == 0
    assert storage.list_names(to) == ["README.md", "encoder.json", "encoder.pt2", "encoder.safetensors"]
    image = tmp_path / "image.png"
    Image.new("L", (9, 9), 200).save(image)
    (encoder, preprocess), (again, _) = load(run), load(to)
    assert again(preprocess(image)).tolist() == encoder(preprocess(image)).tolist()
