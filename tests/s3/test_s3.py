"""Everything of a run in a bucket, on a real S3 server."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import ssl_ray
from nodes import PACED
from PIL import Image
from seaweedfs import BUCKET, SECRETS, Server

KEYS = ("views.count=2", "model.projector_dim=16", "train.batch=128", "train.steps=12", "train.digest=true")


def objects(server: Server, prefix: str) -> dict[str, bytes]:
    """What lies below a prefix, as another client sees it."""
    client, found = server.client(), {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for entry in page.get("Contents", []):
            found[entry["Key"]] = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
    return found


def steps(found: dict[str, bytes]) -> list[dict]:
    return [json.loads(line) for name in sorted(found) if "/metrics/" in name for line in found[name].splitlines()]


def test_another_client_sees_the_shards_that_the_manifest_names(server: Server, digits: str, tmp_path: Path):
    found = objects(server, "digits/")
    (tmp_path / "manifest.parquet").write_bytes(found["digits/manifest.parquet"])
    rows = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert len(rows) > 1
    for row in rows:
        data = found[f"digits/{row['name']}"]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["size_bytes"], row["sha256"])
    assert ssl_ray(server.environment(), "data", "check", digits).ok()
    stats = json.loads(ssl_ray(server.environment(), "data", "stats", digits, "--json").ok().out)
    assert stats["samples"] == 1797


@pytest.mark.timeout(600)
def test_a_run_of_two_workers_in_a_bucket_has_the_samples_of_a_local_one(server: Server, digits: str, tmp_path: Path):
    run, environment = f"s3://{BUCKET}/runs/two", server.environment()
    summary = json.loads(
        ssl_ray(environment, "pretrain", f"data.uri={digits}", f"run={run}", "train.workers=2", *KEYS, "--json").ok().out
    )
    assert (summary["steps"], summary["bad_samples"], summary["restarts"]) == (12, 0, 0)
    local = tmp_path / "digits"
    ssl_ray({}, "data", "pack", "digits", str(local), "--shard-mb", "0.5").ok()
    ssl_ray({}, "pretrain", f"data.uri={local}", f"run={tmp_path}/run", "train.workers=0", *KEYS, "--json").ok()
    found = objects(server, "runs/two/")
    expected = [json.loads(line) for line in next((tmp_path / "run" / "metrics").glob("*.jsonl")).read_text().splitlines()]
    assert [(one["step"], one["digest"]) for one in steps(found)] == [(one["step"], one["digest"]) for one in expected]
    assert steps(found)[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
    assert json.loads(found["runs/two/run.json"])["hash"] == json.loads((tmp_path / "run" / "run.json").read_text())["hash"]
    assert not any(secret.encode() in data for secret in SECRETS.values() for data in found.values())

    read_out = json.loads(ssl_ray(environment, "evaluate", run, "--json").ok().out)
    assert read_out["linear_accuracy"] == summary["linear_accuracy"]
    assert run in ssl_ray(environment, "runs", "list", f"s3://{BUCKET}/runs").ok().out
    again = ssl_ray(environment, "pretrain", f"data.uri={digits}", f"run={run}", "train.workers=2", *KEYS).ok()
    assert "is complete" in again.err + again.out


@pytest.mark.parametrize(
    ("identity", "arguments", "part"),
    [
        ("nobody", ("data", "stats", f"s3://{BUCKET}/digits"), "no permission"),
        ("trainer", ("data", "stats", "s3://no-such-bucket/digits"), "no such bucket"),
        ("trainer", ("data", "pack", "digits", "s3://no-such-bucket/digits"), "no such bucket"),
        ("trainer", ("data", "stats", f"s3://{BUCKET}/nothing"), "no manifest.parquet here"),
        ("reader", ("data", "pack", "digits", f"s3://{BUCKET}/other"), "no permission"),
        (
            "reader",
            ("pretrain", f"data.uri=s3://{BUCKET}/digits", f"run=s3://{BUCKET}/x", "train.workers=0"),
            "no permission",
        ),
    ],
)
def test_what_the_store_refuses_is_said_in_two_lines(server: Server, digits: str, identity, arguments, part):
    done = ssl_ray(server.environment(identity), *arguments)
    assert done.code == 3, done.err
    assert part in done.err
    assert len(done.err.strip().splitlines()) <= 2, done.err
    assert "Traceback" not in done.err
    assert not any(secret in done.err + done.out for secret in [*SECRETS.values(), "wrong-secret-key"])


def committed_step(server: Server, run: str) -> int:
    """0 until there is a checkpoint."""
    found = objects(server, f"{run}/latest.json")
    return json.loads(next(iter(found.values())))["step"] if found else 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_bad_sample_in_a_bucket_has_the_same_stand_in_after_a_stop_as_in_one_local_run(server: Server, tmp_path: Path):
    images, environment = tmp_path / "images", server.environment()
    random = np.random.default_rng(0)
    for i in range(99):
        path = images / f"class-{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 33 == 5:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
    uri, run = f"s3://{BUCKET}/with-bad", f"s3://{BUCKET}/runs/with-bad"
    ssl_ray(environment, "data", "pack", str(images), uri, "--shard-mb", "0.0625").ok()
    ssl_ray({}, "data", "pack", str(images), str(tmp_path / "local"), "--shard-mb", "0.0625").ok()
    keys = [
        "views.count=2",
        "views.size_px=8",
        "views.channels=1",
        "model.projector_dim=8",
        "train.batch=16",
        "train.digest=true",
    ]
    keys += ["train.steps=60", "checkpoint.every_steps=12", "data.max_bad_samples=3", "data.eval_fraction=0.05"]
    two = ["pretrain", "--json", f"data.uri={uri}", f"run={run}", "train.workers=2", *keys]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | environment | PACED
    with subprocess.Popen(
        [sys.executable, "-m", "ssl_ray", *two], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        while first.poll() is None and committed_step(server, "runs/with-bad") == 0:
            time.sleep(0.2)
        first.terminate()
        assert first.wait(120) == 130, first.communicate()
    assert 0 < committed_step(server, "runs/with-bad") < 60
    summary = json.loads(ssl_ray(environment, *two).ok().out)
    here = ["pretrain", "--json", f"data.uri={tmp_path}/local", f"run={tmp_path}/run", "train.workers=0", *keys]
    expected = json.loads(ssl_ray({}, *here).ok().out)
    assert summary["bad_samples"] == expected["bad_samples"] > 0
    found = objects(server, "runs/with-bad/metrics")
    records = [
        json.loads(line) for path in sorted((tmp_path / "run/metrics").iterdir()) for line in path.read_text().splitlines()
    ]
    assert [(one["step"], one["digest"]) for one in steps(found)] == [(one["step"], one["digest"]) for one in records]
