"""Reading while the store and the network fail: the batches are those of local files, or the error says what is wrong."""

import json
import threading
from pathlib import Path

import pytest
from command import ssl_ray
from proxy import Rule
from seaweedfs import BUCKET, Server
from stored import batches, forget_clients

from ssl_ray import shards, storage
from ssl_ray.errors import DataError
from ssl_ray.shards import fetch


@pytest.mark.parametrize("fault", ["503", "500", "reset", "truncate"])
def test_answers_that_fail_change_no_batch(store, fault, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.05)
    where = {"manifest.parquet": 1, "index/part": 1, "GET /ssl/small/shard": 12}  # twelve: more than Arrow's client tries
    store.between.rules = [Rule(fault, times=times, match=part) for part, times in where.items()]
    assert list(batches(store.uri)) == store.truth[: len(store.truth) // 2]
    met = [request.line for request in store.between.log if request.fault == fault]
    assert {part: sum(part in line for line in met) for part in where} == where


@pytest.mark.parametrize("verb", ["GET", "PUT"])
def test_what_the_tools_ask_is_asked_again(store, monkeypatch, verb):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.05)
    store.between.rules = [Rule("reset", times=6, match=verb)]  # six: one more than s3fs tries
    storage.write_atomic(f"{store.uri}-other/x", b"x" * 5000)
    assert storage.read_bytes(f"{store.uri}-other/x") == b"x" * 5000
    assert sum(request.fault == "reset" for request in store.between.log) == 6


def test_connections_that_stall_are_given_up(store, monkeypatch):
    monkeypatch.setattr(storage, "STALL_S", 1)
    forget_clients()
    store.between.rules = [Rule("stall", match=part, seconds=600) for part in ("manifest.parquet", "GET /ssl/small/shard")]
    assert list(batches(store.uri)) == store.truth[: len(store.truth) // 2]
    assert sum(request.fault == "stall" for request in store.between.log) == 2
    forget_clients()


def test_an_answer_that_trickles_is_given_up(store, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPT_S", 1)
    store.between.rules = [Rule("slow", match="GET /ssl/small/shard", bytes_per_s=10)]
    assert list(batches(store.uri)) == store.truth[: len(store.truth) // 2]
    assert sum(request.fault == "slow" for request in store.between.log) == 1


def test_the_server_is_killed_and_started_again_between_two_requests_of_the_stream(store, server: Server):
    found, restart = [], threading.Thread(target=server.start)
    for batch in batches(store.uri, epochs=2):
        found.append(batch)
        if len(found) == len(store.truth) // 2:
            server.stop()
            restart.start()
            store.between.log.clear()
    restart.join()
    assert found == store.truth
    assert store.requests(".tar")


def test_a_store_that_does_not_answer_ends_the_stream_with_what_and_where(store, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    store.between.rules = [Rule("503", times=1000, match="GET /ssl/small/shard")]
    with pytest.raises(
        DataError, match=r"s3://ssl/small/\S+: reading failed 2 times \(OSError.*Check the storage and the"
    ) as told:
        list(batches(store.uri))
    assert "\n" not in str(told.value)


def test_one_thread_that_is_told_to_slow_down_makes_the_others_wait(store, monkeypatch):
    monkeypatch.setattr(storage, "_resume_at", 0.0)
    store.between.rules = [Rule("503", times=3, match="GET /ssl/small/shard")]  # the client's own attempts, all used up
    manifest = shards.load_manifest(store.uri)
    name = manifest.names[0].as_py()
    assert fetch.fetch(f"{store.uri}/{name}", 0, 1000) == (store.local / name).read_bytes()[:1000]
    assert storage._resume_at > 0


def test_what_may_not_be_read_is_told_at_once(store, server: Server, tmp_path):
    done = ssl_ray(server.environment("reader") | {"AWS_SECRET_ACCESS_KEY": "no"}, "data", "check", store.uri)
    done.refused(3, "no permission")


# Where endpoint and credentials are found ----------------------------------------------------------------------------

CONFIGS = {
    "profile": "[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n",
    "services": "[profile lab]\nservices = near\n[services near]\ns3 =\n  endpoint_url = {endpoint}\n",
}
CREDENTIALS = "[lab]\naws_access_key_id = reader\naws_secret_access_key = reader-secret-key\n"


@pytest.mark.parametrize("place", [*CONFIGS, "AWS_ENDPOINT_URL_S3"])
def test_endpoint_and_credentials_come_from_the_standard_files(store, server: Server, tmp_path: Path, place):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIGS.get(place, "").format(endpoint=store.between.endpoint))
    environment = {"HOME": str(tmp_path), "AWS_PROFILE": "lab", "AWS_EC2_METADATA_DISABLED": "true"}
    if place not in CONFIGS:
        environment[place] = store.between.endpoint
    found = ssl_ray(environment, "data", "stats", store.uri, "--json").ok().json
    assert found == ssl_ray({}, "data", "stats", str(store.local), "--json").ok().json
    assert store.requests("GET /ssl/small/shard")


# A whole run ---------------------------------------------------------------------------------------------------------

RUN = ("views.count=2", "model.projector_dim=16", "train.batch=128", "train.steps=24", "train.digest=true")


def steps(uri: str) -> list[tuple[int, str, float]]:
    lines = [
        line for name in storage.list_names(f"{uri}/metrics") for line in storage.read_bytes(f"{uri}/metrics/{name}").splitlines()
    ]
    return [(one["step"], one["digest"], one["loss"]) for one in map(json.loads, lines)]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_has_the_same_steps_while_everything_fails_now_and_then(store, server: Server, tmp_path: Path):
    ssl_ray({}, "pretrain", f"data.uri={store.local}", f"run={tmp_path}/run", "train.workers=0", *RUN).ok()
    faults = ("503", "500", "reset", "truncate")
    store.between.rules = [Rule(fault, times=3, match=part) for fault in faults for part in (".tar", "PUT /ssl/faulty", "GET")]
    environment = server.environment(endpoint=store.between.endpoint)
    done = ssl_ray(
        environment, "pretrain", f"data.uri={store.uri}", f"run=s3://{BUCKET}/faulty", "train.workers=0", *RUN, "--json"
    )
    summary = done.ok().json
    assert (summary["bad_samples"], summary["restarts"]) == (0, 0)
    met = [request.fault for request in store.between.log if request.fault]
    assert len(met) >= 20
    assert set(met) == set(faults)
    found, expected = steps(f"s3://{BUCKET}/faulty"), steps(f"{tmp_path}/run")
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert found[0][2] == pytest.approx(expected[0][2], rel=1e-4)


def test_a_shard_that_is_lost_ends_a_run_or_its_samples_are_replaced(store, server: Server):
    uri, client = f"s3://{BUCKET}/lost", server.client()
    shards.pack(shards.open_source("digits"), uri, shard_bytes=2**18)
    manifest = shards.load_manifest(uri)
    lost = manifest.names[1].as_py()
    client.delete_object(Bucket=BUCKET, Key=f"lost/{lost}")
    keys = (f"data.uri={uri}", "train.workers=0", "train.steps=9", "model.projector_dim=16", "views.count=2")
    run, environment = f"run=s3://{BUCKET}/runs-lost/", server.environment()
    ssl_ray(environment, "pretrain", f"{run}a", *keys, "--json").refused(3, lost, "the shard is missing", "data check")
    went_on = ssl_ray(environment, "pretrain", f"{run}b", *keys, "data.max_bad_samples=2000", "--json").ok()
    assert 0 < went_on.json["bad_samples"] <= manifest.counts[1]
    assert went_on.json["steps"] == 9
