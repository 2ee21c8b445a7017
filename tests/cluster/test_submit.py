"""Verbs as jobs of a real cluster with a token: followed, left, found again, stopped; and what is refused."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Done, ssl_ray
from harness import ROOT, finish, newest_step, records, start, wait_until
from nodes import PACED, free_port, several_nodes

KEYS = ["views.count=2", "views.size_px=8", "model.projector_dim=16", "evaluate.max_images=50", "checkpoint.every_steps=5"]
RUN = "run=s3://bucket/runs/one"
long = pytest.mark.long


@pytest.fixture(scope="module")
def client() -> Iterator[dict[str, str]]:
    """The variables of a client of a cluster whose dashboard takes jobs."""
    with several_nodes(PACED) as nodes:
        port = free_port()
        nodes.add("head", cpus=2, dashboard=port)
        yield {"RAY_AUTH_TOKEN_PATH": nodes.env["RAY_AUTH_TOKEN_PATH"], "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}


def submit(client: dict[str, str], *arguments: str) -> Done:
    return ssl_ray(client, "submit", *arguments)


def ray_job(client: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    env = os.environ | client | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run(["ray", "job", *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until_step(step: int, run: Path, client: dict[str, str], name: str) -> None:
    end = time.monotonic() + 200
    while newest_step(run) < step:
        assert time.monotonic() < end, ray_job(client, "logs", name)
        time.sleep(0.1)


def assert_stopped_with_a_checkpoint(run: Path) -> None:
    assert [record["step"] for record in records(run)] == list(range(len(records(run))))
    assert f'"step": {len(records(run))}' in (run / "latest.json").read_text()


@long
@pytest.mark.timeout(600)
def test_a_job_is_followed_to_its_end_and_the_same_line_is_another_attempt(client, tmp_path: Path):
    line = ["pretrain", f"run={tmp_path / 'run'}", "train.steps=6", "train.workers=1", *KEYS, "--json"]
    done = submit(client, *line).ok()
    assert done.json["status"] == "SUCCEEDED"
    assert done.json["submission_id"].endswith("-1")
    assert "step 6" in done.err  # what the job printed
    assert len(records(tmp_path / "run")) == 6
    again = submit(client, *line).ok()
    assert again.json["submission_id"] == done.json["submission_id"][:-1] + "2"
    assert "is complete" in again.err


@long
@pytest.mark.timeout(600)
def test_the_exit_code_is_that_of_the_job(client, tmp_path: Path):
    done = submit(client, "evaluate", str(tmp_path / "none"), "--json")
    assert (done.code, done.json["status"], done.json["exit_code"]) == (3, "FAILED", 3)
    assert "no run here" in done.err


@long
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_the_job_and_the_same_line_finds_it_again(client, tmp_path: Path):
    run = tmp_path / "run"
    line = ["submit", "pretrain", f"run={run}", "train.steps=100000", "train.workers=1", *KEYS]
    first = start(*line, env=client)
    assert wait_until(lambda: newest_step(run) >= 10, first, "step 10")
    first.send_signal(signal.SIGINT)
    code, _, err = finish(first)
    assert code == 130
    assert "goes on" in err
    name = next(word for word in err.split() if word.startswith("ssl-ray-pretrain-"))
    seen = newest_step(run)
    second = start(*line[:2], *reversed(line[2:]), env=client)
    assert wait_until(lambda: newest_step(run) > seen + 10, second, "ten more steps")
    submit(client, *line[1:], "train.workers=0").refused(
        4, f"{name} runs already", "train.workers=1", f"ray job stop --address {client['RAY_API_SERVER_ADDRESS']} {name}"
    )
    ray_job(client, "stop", name)
    code, _, err = finish(second)
    assert code == 130, err
    assert f"{name} runs already" in err
    assert_stopped_with_a_checkpoint(run)


@long
@pytest.mark.timeout(600)
def test_a_job_of_ray_job_submit_leaves_a_checkpoint_too(client, tmp_path: Path):
    documented = (ROOT / "jobs" / "pretrain.py").read_text().partition('"""')[2].partition("\n\n")[0].replace("\\\n", "")
    line = shlex.split(documented.removeprefix("ray job"))
    options = json.loads(line[line.index("--runtime-env-json") + 1])
    options["env_vars"]["PACE_S"] = "6"  # a step takes longer than Ray waits by default
    line[line.index("--runtime-env-json") + 1] = json.dumps(options)
    line = line[: line.index("jobs/pretrain.py") + 1]
    said = ray_job(
        client, line[0], "--no-wait", *line[1:], f"run={tmp_path / 'run'}", "train.steps=1000", "train.workers=1", *KEYS
    )
    (name,) = set(re.findall(r"raysubmit_\w+", said))
    until_step(1, tmp_path / "run", client, name)
    ray_job(client, "stop", name)
    assert_stopped_with_a_checkpoint(tmp_path / "run")


@long
@pytest.mark.timeout(600)
def test_files_that_were_changed_while_their_job_runs_are_refused(client, tmp_path: Path):
    folder, recipe = tmp_path / "mine", tmp_path / "mine" / "small.yaml"
    folder.mkdir()
    recipe.write_text("train: {steps: 100000, workers: 0}\n")
    line = [
        "pretrain",
        "-c",
        recipe.name,
        f"run={tmp_path / 'run'}",
        *KEYS,
        "--working-dir",
        str(folder),
        "--no-follow",
        "--json",
    ]
    first = submit(client, *line).ok()
    name = first.json["submission_id"]
    assert "uploading" in first.err
    again = submit(client, *line).ok()
    assert again.err.startswith(f"{name} runs already\n")
    recipe.write_text("train: {steps: 100001, workers: 0}\n")
    submit(client, *line).refused(4, f"{name} runs already, with other files of --working-dir\n")
    until_step(0, tmp_path / "run", client, name)
    ray_job(client, "stop", name)


@long
@pytest.mark.timeout(600)
def test_a_recipe_that_is_a_file_comes_with_its_folder(client, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text("train: {steps: 3, workers: 0}\n")
    (tmp_path / "mine" / ".rayignore").write_text("big\n")
    (tmp_path / "mine" / "big").write_bytes(os.urandom(2**20))
    line = ["-c", "small.yaml", f"run={tmp_path / 'run'}", *KEYS]
    code, _, err = in_folder(tmp_path / "mine", client, "submit", "pretrain", *line)
    assert code == 2
    assert "--working-dir" in err
    code, _, err = in_folder(tmp_path / "mine", client, "submit", "pretrain", *line, "--working-dir", ".")
    assert code == 0, err
    assert "2 files, 0.0 MiB" in err
    assert len(records(tmp_path / "run")) == 3
    # From elsewhere too: the job, and so this side, reads small.yaml in its folder.
    line = ["-c", "small.yaml", *KEYS, f"run={tmp_path / 'other'}", "--working-dir", str(tmp_path / "mine")]
    assert submit(client, "pretrain", *line).ok().err.count("2 files, 0.0 MiB") == 1
    assert len(records(tmp_path / "other")) == 3


def in_folder(folder: Path, client: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        done = ssl_ray(client, *arguments)
    finally:
        os.chdir(before)
    return done.code, done.out, done.err


@long
def test_a_wrong_token_is_two_lines(client, tmp_path: Path):
    (tmp_path / "token").write_text("0" * 64)
    wrong = client | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    submit(wrong, "pretrain", "train.steps=1").refused(4, client["RAY_API_SERVER_ADDRESS"], "RAY_AUTH_TOKEN_PATH")
    for mode in ("disabled", "bogus"):
        submit(client | {"RAY_AUTH_MODE": mode}, "pretrain", "train.steps=1").refused(4, "RAY_AUTH_MODE=token", f"got {mode}")


@long
def test_what_a_cluster_knows_of_a_run_that_never_began_is_collected(client, tmp_path: Path):
    at, run = ("--address", client["RAY_API_SERVER_ADDRESS"]), tmp_path / "never" / "began"
    to = ("-o", str(tmp_path / "b.zip"))
    ssl_ray(client, "debug", str(run), *at, *to).refused(3, "no run here", "no job or log of it")
    assert submit(client, "pretrain", f"run={run}", f"data.uri={tmp_path / 'none'}").code == 3
    assert not run.exists()
    ssl_ray(client, "debug", str(run), *at, *to).ok()
    ssl_ray(client, "debug", str(run), *to[:1], str(tmp_path / "c.zip")).refused(3, "no run here", "runs list")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        notes = {each["file"]: each["note"] for each in json.loads(archive.read("contents.json"))["files"]}
    assert notes["run/"].startswith("no run here")
    assert any(re.fullmatch(r"cluster/jobs/ssl-ray-pretrain-.*-1\.log", name) for name in notes)


def test_what_cannot_be_submitted_is_refused_before_a_cluster_is_asked(tmp_path: Path):
    nowhere = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    submit(nowhere, "pretrain", "views.cuont=4").refused(2, "views.count")
    submit(nowhere, "doctor").refused(2, "does not run as a job", "study run")
    submit(nowhere).refused(2, "nothing to submit")
    for folder in (str(tmp_path / "none"), ""):
        submit(nowhere, "pretrain", "--working-dir", folder).refused(2, "--working-dir", "no folder")
    submit(nowhere, "pretrain", RUN, "--working-dir", str(tmp_path), "--uv").refused(2, "pyproject.toml")
    submit(nowhere, "pretrain", "--address", "127.0.0.1:8265").refused(2, "http://127.0.0.1:8265")
    (tmp_path / "big.bin").write_bytes(b"")
    os.truncate(tmp_path / "big.bin", 101 * 2**20)
    (tmp_path / "small").write_text("x")
    submit(nowhere, "pretrain", RUN, "--working-dir", str(tmp_path)).refused(2, "101.0 MiB", "big.bin (101.0)", ".rayignore")
    began = time.monotonic()
    submit(nowhere, "pretrain").refused(4, nowhere["RAY_API_SERVER_ADDRESS"], "cluster runs")
    assert time.monotonic() - began < 100


@long
@pytest.mark.timeout(300)
def test_doctor_looks_at_a_cluster(client, tmp_path: Path):
    done = ssl_ray(client, "doctor", "--address", client["RAY_API_SERVER_ADDRESS"], "-c", "digits", "--json")
    found = {row["check"]: row for row in done.json}
    for check in ("cluster", "token", "clock of the cluster", "nodes", "workers"):
        assert found[check]["ok"], found[check]
    assert found["nodes"]["found"].startswith("1 nodes, 2 CPUs, 0 GPUs")
    (tmp_path / "big.yaml").write_text("train: {workers: 40}\n")
    done = ssl_ray(client, "doctor", "--address", client["RAY_API_SERVER_ADDRESS"], "-c", str(tmp_path / "big.yaml"), "--json")
    assert done.code == 4
    (room,) = [row for row in done.json if row["check"] == "workers"]
    assert not room["ok"]
    assert "train.workers=40" in room["found"]
