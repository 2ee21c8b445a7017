"""Runs of the command line for tests: start, watch, kill, and compare what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
VARYING = ("seconds", "data_wait_s")
"""The fields of a step's record that time decides."""

SMALL = ["views.count=2", "views.size_px=8", "views.channels=1", "model.projector_dim=16", "train.digest=true"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ssl_ray", *arguments]


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """The command line in a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 400) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; the whole group is killed if it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    return process.returncode, out, err


def run(*arguments: str, env: dict[str, str] | None = None, timeout_s: float = 400) -> tuple[int, str, str]:
    return finish(start(*arguments, env=env), timeout_s)


def records(uri: Path) -> list[dict]:
    """As docs/formats.md has it: where a start of the workers began, what earlier ones wrote ends."""
    segments = sorted((*map(int, path.stem.split("-")), path) for path in (uri / "metrics").glob("*.jsonl"))
    found = []
    for _, number, path in segments:
        stop = min((first for first, other, _ in segments if other > number), default=float("inf"))
        found += [record for record in map(json.loads, path.read_text().splitlines()) if record["step"] < stop]
    return found


def newest_step(uri: Path) -> int:
    """The newest step in the run's files, -1 without any."""
    while True:
        try:
            newest = sorted((uri / "metrics").glob("*.jsonl"))[-1:]
            lines = [line for path in newest for line in path.read_text().splitlines()]
            return json.loads(lines[-1])["step"] if lines else -1
        except FileNotFoundError:  # replaced or undone meanwhile
            continue


def results(uri: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What must not differ between runs: the records without their times, and the final weights."""
    marker = json.loads((uri / "latest.json").read_text())
    weights = load_file(uri / "checkpoints" / marker["checkpoint"] / "weights.safetensors")
    return [{key: value for key, value in record.items() if key not in VARYING} for record in records(uri)], weights


def assert_same(a: Path, b: Path) -> None:
    """The same steps, each once, with equal losses and digests, and equal final weights, bit for bit."""
    (steps_a, weights_a), (steps_b, weights_b) = results(a), results(b)
    assert [record["step"] for record in steps_b] == list(range(len(steps_a)))
    for left, right in zip(steps_a, steps_b, strict=True):
        assert left == right
    assert weights_a.keys() == weights_b.keys()
    assert all(np.array_equal(weights_a[name], weights_b[name]) for name in weights_a)


def wait_until(condition, process: subprocess.Popen, what: str, timeout_s: float = 200) -> bool:
    """Waits for `condition`; False if the process ended first."""
    end = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
    return True


def ray_processes(title: str, faults: Path) -> list[psutil.Process]:
    """Ray's workers whose title holds `title`, of the Ray that was started with this folder of faults; oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or [])
        try:
            if line.startswith("ray::") and title in line and process.environ().get("FAULTS") == os.fspath(faults):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return sorted(found, key=lambda process: process.info["create_time"])


def digests(uri: Path) -> list[tuple[int, int]]:
    """Each step of a run, as its records tell them, with the digest of its views."""
    return [(record["step"], record["digest"]) for record in records(uri)]


def stop(process: subprocess.Popen) -> None:
    """SIGTERM, after which a checkpoint is left."""
    process.terminate()
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
