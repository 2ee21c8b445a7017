"""`ssl-ray debug`: what tells why a run failed, in one zip, without secrets; whatever is absent, damaged or away."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import seaweedfs
from command import Done, ssl_ray
from nodes import free_port, several_nodes

from ssl_ray import shards

PASSWORD, KEY = "password-in-the-uri", 'key "in" the environment'
SMALL = ("views.count=2", "views.size_px=8", "views.channels=1", "model.projector_dim=16", "train.batch=16", "train.steps=40")


def bundle(uri: str, to: Path, environment: dict[str, str], *options: str) -> tuple[Done, dict[str, str], dict[str, dict]]:
    """What was printed, the text of each file of the zip, and what its contents say of each."""
    done = ssl_ray(environment, "debug", uri, "-o", str(to), *options).ok()
    with zipfile.ZipFile(to) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    contents = {each["file"]: each for each in json.loads(files["contents.json"])["files"]}
    assert {name for name, each in contents.items() if each["bytes"]} == files.keys() - {"contents.json"}
    assert all(name in done.out for name in contents)
    return done, files, contents


def pack_with_a_bad_image(folder: Path) -> None:
    """Shards of the digits, of which one's bytes are no image."""
    images = folder / "images"
    images.mkdir()
    for i, (_, data, _) in enumerate(shards.open_source("digits").read(np.arange(96))):
        (images / f"{i:03d}.png").write_bytes(data)
    (images / "000.png").write_bytes(b"\x89PNG no image")
    shards.pack(shards.open_source(str(images)), str(folder / "train"))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_that_failed_on_a_cluster_gives_a_bundle_with_its_logs_and_without_secrets(tmp_path, server: seaweedfs.Server):
    pack_with_a_bad_image(tmp_path)
    run = f"s3://{seaweedfs.BUCKET}/failed/run"
    mirror = f"https://reader:{PASSWORD}@127.0.0.1:1/x"
    environment = server.environment() | {"WANDB_API_KEY": KEY, "TORCH_MIRROR": mirror}
    port = free_port()
    at = ("--address", f"http://127.0.0.1:{port}")
    with several_nodes(environment) as nodes:
        nodes.add("head", cpus=1, dashboard=port)
        nodes.add("other", cpus=1)
        token = Path(nodes.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        client = server.environment() | {"RAY_AUTH_TOKEN_PATH": nodes.env["RAY_AUTH_TOKEN_PATH"]}
        keys = ("pretrain", f"data.uri={tmp_path / 'train'}", f"run={run}", "train.workers=2", "train.pack=false", *SMALL)
        failed = ssl_ray(client, "submit", *at, *keys)
        assert failed.code == 3
        assert "1 bad samples" in failed.err
        _, files, contents = bundle(run, tmp_path / "bundle.zip", nodes.env)
        _, elsewhere, _ = bundle(run, tmp_path / "elsewhere.zip", environment | {"HOME": str(tmp_path)})
        ids = nodes.alive()
        nodes.kill("other")
        _, fetched, fetched_contents = bundle(run, tmp_path / "fetched.zip", client, *at)
    secrets = (PASSWORD, seaweedfs.SECRETS["trainer"], KEY, json.dumps(KEY)[1:-1], token)
    for name, text in (files | elsewhere | fetched).items():
        assert not any(secret in text for secret in secrets), name
    assert json.loads(files["run/run.json"])["config"]["data"]["uri"] == str(tmp_path / "train")
    assert "run/failures/" not in files
    assert contents["run/summary.json"]["note"] == "absent"
    logs = {name.rpartition("/")[2]: text for name, text in files.items() if name.startswith("ray/")}
    ours = {name.split("-")[3]: text for name, text in logs.items() if name.startswith("ssl-ray-run-")}
    assert ours.keys() == {"driver", "0", "1"}
    ended = [json.loads(line) for line in ours["driver"].splitlines()][-1]
    assert (ended["level"], ended["rank"]) == ("ERROR", "driver")
    assert ended["message"].startswith("ended: DataError: 1 bad samples, data.max_bad_samples=0 allowed")
    assert any("1 bad samples" in json.loads(line)["message"] for line in ours["0"].splitlines())
    assert {"raylet.out", "gcs_server.out"} <= logs.keys()
    assert sum(name.startswith("worker-") for name in logs) >= 2
    assert elsewhere["run/run.json"] == files["run/run.json"]
    told = json.loads(files["versions.json"])["environment"]
    assert (told["AWS_SECRET_ACCESS_KEY"], told["TORCH_MIRROR"]) == ("***", "https://***@127.0.0.1:1/x")
    assert told["AWS_ENDPOINT_URL"] == server.endpoint
    assert not any(name.startswith("cluster/") for name in files)

    # Through the dashboard: of the node that is there what a bundle of its machine has, of the other that it is gone.
    of_head = {name.rpartition("/")[2]: text for name, text in fetched.items() if name.startswith(f"cluster/{ids['head']}/")}
    head_logs = {name for name in of_head if name.startswith("ssl-ray-run-")}
    assert any("-driver-" in name for name in head_logs)
    assert {name: of_head[name] for name in head_logs} == {name: logs[name] for name in head_logs}
    assert {"raylet.out", "gcs_server.out"} <= of_head.keys()
    assert any(name.startswith("ray-train-") for name in of_head)
    states = {node["node_id"]: node["state"] for node in json.loads(fetched["cluster/nodes.json"])}
    assert states == {ids["head"]: "ALIVE", ids["other"]: "DEAD"}
    (job,) = [json.loads(text) for name, text in fetched.items() if re.fullmatch(r"cluster/jobs/.*\.json", name)]
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 3)
    assert "1 bad samples" in fetched[f"cluster/jobs/{job['submission_id']}.log"]
    assert all(each["bytes"] <= 2**20 for each in fetched_contents.values())


def test_a_damaged_run_gives_what_is_left_of_it(tmp_path):
    run = tmp_path / "run"
    (run / "metrics").mkdir(parents=True)
    (run / "failures").mkdir()
    (run / "run.json").write_bytes(b"\xff\xfe no json")
    (run / "latest.json").mkdir()
    for i in range(5):
        (run / "metrics" / f"{i:010d}-000001.jsonl").write_text(f'{{"step": {i}}}\n')
    (run / "metrics" / "0000000009-000001.jsonl").write_bytes(b"\0" * 100)
    (run / "failures" / "000001.json").write_text('{"reasons": {"0": "s3://id:sec/ret@bucket/x is away"}}')
    of_a_worker = "HF_TOKEN=not-known-here 'AWS_SECRET_ACCESS_KEY': 'nor-is-this' RAY_AUTH_TOKEN_PATH=/home/ray/token"
    (run / "failures" / "000002.json").write_text(of_a_worker)
    lines = [json.dumps({"shard": "a.tar", "key": f"{i:07d}", "reason": "x" * 80}) for i in range(20000)]
    (run / "quarantine.jsonl").write_text("\n".join(lines))
    (run / "checkpoints" / "0000000004-abc").mkdir(parents=True)
    (run / "checkpoints" / "0000000004-abc" / "weights.safetensors").write_bytes(b"1" * 1234)
    _, files, contents = bundle(str(run), tmp_path / "b.zip", {})
    assert "no json" in files["run/run.json"]
    assert contents["run/latest.json"]["note"].startswith("cannot be read: ")
    assert contents["run/summary.json"]["note"] == "absent"
    metrics = sorted(name for name in files if name.startswith("run/metrics/"))
    assert [int(name.split("/")[2][:10]) for name in metrics] == [3, 4, 9]
    assert files["run/failures/000001.json"] == '{"reasons": {"0": "s3://***@bucket/x is away"}}'
    assert files["run/failures/000002.json"] == "HF_TOKEN=*** 'AWS_SECRET_ACCESS_KEY': '***' RAY_AUTH_TOKEN_PATH=/home/ray/token"
    kept = files["run/quarantine.jsonl"].splitlines()
    assert kept == lines[-len(kept) :]
    assert 2**20 - 200 < contents["run/quarantine.jsonl"]["bytes"] <= 2**20
    assert contents["run/quarantine.jsonl"]["note"].startswith("the end of ")
    assert json.loads(files["checkpoints.json"]) == {"0000000004-abc/weights.safetensors": 1234}
    assert "no logs of this run on this machine" in contents["ray/"]["note"]
    assert json.loads(files["doctor.json"])[0]["check"] == "versions"
    assert re.match(r"2\.\d+\.", json.loads(files["versions.json"])["packages"]["ray"])


def test_a_header_in_the_environment_is_secret_and_its_token_alone_too(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(f"opaque-token-1 {tmp_path}")
    environment = {"SSL_RAY_AUTH": "Bearer opaque-token-1", "PWD": str(tmp_path)}
    _, files, _ = bundle(str(tmp_path / "run"), tmp_path / "b.zip", environment)
    assert files["run/run.json"] == f"*** {tmp_path}"
    assert json.loads(files["versions.json"])["environment"]["SSL_RAY_AUTH"] == "***"


def test_logs_of_others_and_links_are_left_alone(tmp_path):
    name = f"run-{os.getpid()}"
    run = tmp_path / name
    run.mkdir()
    (run / "run.json").write_text("{}")
    logs = Path(f"/tmp/ssl-ray-test-{os.getpid()}/session_x/logs")
    logs.mkdir(parents=True)
    try:
        (tmp_path / "private").write_text(json.dumps({"run": str(run), "message": "private"}) + "\n")
        (logs / f"ssl-ray-{name}-0-12.log").symlink_to(tmp_path / "private")
        (logs / f"ssl-ray-{name}-1-13.log").write_text(json.dumps({"run": "another"}) + "\n")
        (logs / f"ssl-ray-{name}-2-14.log").write_text(json.dumps({"run": str(run), "message": "mine"}) + "\n")
        (logs / "worker-ab-01000000-14.err").write_text("of the same process")
        (logs / "worker-ab-01000000-15.err").write_text("of another")
        _, files, _ = bundle(str(run), tmp_path / "b.zip", {})
        logged = {each.rpartition("/")[2] for each in files if each.startswith("ray/")}
        assert logged == {f"ssl-ray-{name}-2-14.log", "worker-ab-01000000-14.err"}
    finally:
        shutil.rmtree(logs.parents[1])


def test_without_a_run_there_is_no_bundle(tmp_path):
    ssl_ray({}, "debug", str(tmp_path / "none"), "-o", str(tmp_path / "b.zip")).refused(3, "no run here", "runs list")
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.long
def test_of_a_run_whose_storage_and_cluster_are_away_the_bundle_has_the_rest(tmp_path):
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y" * 10}
    at = ("--address", f"http://127.0.0.1:{free_port()}")
    done, files, contents = bundle("s3://bucket/run", tmp_path / "b.zip", away, *at)
    assert contents["run/"]["note"].startswith("cannot be read: ")
    assert contents["cluster/"]["note"].startswith(f"cannot be asked: {at[1]}: ")
    assert "Traceback" not in done.err
    assert files.keys() == {"versions.json", "doctor.json", "contents.json"}
