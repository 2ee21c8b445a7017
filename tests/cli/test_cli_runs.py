"""Runs through the command line: what ends one early loses nothing, and the same command goes on from there."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cli_harness import SMALL
from safetensors.numpy import load_file

from ssl_ray.cli import main


def marker(uri: Path) -> dict:
    return json.loads((uri / "latest.json").read_text())


def weights(uri: Path) -> dict[str, np.ndarray]:
    return load_file(uri / "checkpoints" / marker(uri)["checkpoint"] / "weights.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def steps(uri: Path) -> list[int]:
    lines = [line for path in sorted((uri / "metrics").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["step"] for line in lines]


def test_a_run_ends_in_a_summary_that_the_same_command_shows_again(pretrain, cli, packed, trained):
    summary = pretrain(f"data.uri={packed}", f"run={trained}").ok().json
    assert summary == json.loads((trained / "summary.json").read_text())
    keys = """run steps images views seconds images_per_s data_wait_share linear_accuracy linear_accuracy_untrained
    knn_accuracy alpha rankme bad_samples dropped_samples restarts"""
    assert set(summary) >= set(keys.split())
    assert (summary["run"], summary["steps"], summary["images"], summary["views"]) == (str(trained), 4, 64, 128)
    # Keys of the execution may change; the run's own configuration is a recipe.
    pretrain(f"data.uri={packed}", f"run={trained}", "checkpoint.keep=5").ok()
    assert cli("pretrain", "--json", "-c", trained).ok().json == summary
    shown = cli("config", "show", "-c", trained, "--json").ok().json
    assert (shown["run"], shown["data"]["uri"], shown["train"]["steps"]) == (str(trained), str(packed), 4)


def test_evaluate_gives_the_numbers_of_the_summary(cli, trained):
    summary = json.loads((trained / "summary.json").read_text())
    names = ("linear_accuracy", "knn_accuracy", "alpha", "rankme")
    done = cli("evaluate", trained, "--json").ok().json
    assert [done[name] for name in names] == [summary[name] for name in names]
    assert done["protocol"]["version"] >= 1
    untrained = cli("evaluate", trained, "--untrained", "--json").ok().json
    assert untrained["linear_accuracy"] == summary["linear_accuracy_untrained"]
    assert cli("evaluate", trained, "--step", 2, "--json").ok().json["step"] == 2
    cli("evaluate", trained, "--step", 3).refused(3, "no checkpoint of step 3. There are: 2, 4.")


def test_runs_are_listed(cli, trained, tmp_path):
    rows = cli("runs", "list", trained.parent, "--json").ok().json
    assert [(row["run"], row["status"], row["steps"]) for row in rows] == [(str(trained), "complete", 4)]
    assert "complete" in cli("runs", "list", trained).ok().out
    assert cli("runs", "list", tmp_path).ok().out == f"no runs below {tmp_path}\n"
    assert cli("runs", "list", tmp_path, "--json").ok().json == []


def assert_split(profile: dict, *, steps: int, workers: int) -> None:
    assert (profile["steps"], profile["workers"]) == (steps, workers)
    assert {"wait", "transfer", "forward", "loss", "backward", "optimizer", "other"} == profile["stages_s"].keys()
    assert all(value > 0 for value in (*profile["stages_s"].values(), *profile["making_s"].values()))
    assert sum(profile["stages_s"].values()) == pytest.approx(profile["step_s"])
    assert (profile["all_reduce_s"] > 0) == (workers > 1)
    assert profile["all_reduce_s"] < profile["step_s"]
    assert 2**20 < profile["peak_memory_bytes"] < 2**34


def test_a_profile_splits_a_step_into_stages_and_leaves_the_run_alone(cli, trained, tmp_path):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert_split(cli("profile", uri, "--json", "--steps", 3).ok().json, steps=3, workers=0)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert "backward" in cli("profile", uri, "--steps", 1).ok().out


@pytest.mark.long
def test_a_profile_of_two_workers_has_their_all_reduces(trained):
    command = [sys.executable, "-m", "ssl_ray", "profile", str(trained), "--json", "--steps=3", "train.workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_split(json.loads(done.stdout), steps=3, workers=2)


def test_another_configuration_under_the_same_run_is_refused_with_the_difference(pretrain, cli, packed, trained):
    before = weights(trained)
    done = pretrain(f"data.uri={packed}", f"run={trained}", "seed=1", "views.count=3")
    done.refused(2, str(trained), "seed was 0, now 1", "views.count was 2, now 3", "Use another run=URI")
    pretrain(f"data.uri={packed}", f"run={trained}", "--resume=never").refused(2, "exists already", "--resume auto")
    assert all(np.array_equal(before[name], value) for name, value in weights(trained).items())


def test_other_data_under_the_same_run_is_refused(pretrain, with_bad_image, trained):
    pretrain(f"data.uri={with_bad_image}", f"run={trained}").refused(2, "holds another run", "data.digest was")


@pytest.mark.parametrize("text", [b'{"format', b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_record_of_the_run_is_named(pretrain, cli, packed, trained, tmp_path, text):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    for name in ("latest.json", "run.json"):
        good = (uri / name).read_bytes()
        (uri / name).write_bytes(text)
        pretrain(f"data.uri={packed}", f"run={uri}").refused(3, f"{uri}/{name}")
        cli("evaluate", uri).refused(3, f"{uri}/{name}")
        (uri / name).write_bytes(good)
    (uri / "run.json").unlink()
    pretrain(f"data.uri={packed}", f"run={uri}").refused(3, "has checkpoints but no run.json")
    cli("evaluate", uri).refused(3, "no run here (no run.json)")


def test_a_damaged_marker_is_mended_as_the_message_says(pretrain, packed, trained, tmp_path):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    good = marker(uri)
    (uri / "latest.json").write_text("")
    (uri / "checkpoints" / "0000000006-half").mkdir()  # not whole
    done = pretrain(f"data.uri={packed}", f"run={uri}").refused(3, f"{uri}/latest.json: damaged", "Put this into it")
    (uri / "latest.json").write_text(done.err[done.err.index("{") :])
    assert marker(uri) == {name: good[name] for name in ("step", "checkpoint")}
    (uri / "summary.json").unlink()
    pretrain(f"data.uri={packed}", f"run={uri}").ok()
    (uri / "latest.json").write_text("")
    shutil.rmtree(uri / "checkpoints")
    pretrain(f"data.uri={packed}", f"run={uri}").refused(3, "Remove it, and the run begins again.")
    (uri / "latest.json").unlink()
    pretrain(f"data.uri={packed}", f"run={uri}").ok()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(pretrain, cli, packed, tmp_path, trained, name):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    at = uri / "checkpoints" / marker(uri)["checkpoint"] / name
    at.write_bytes(at.read_bytes()[:-20])
    (uri / "summary.json").unlink()
    (uri / "latest.json").write_text(json.dumps(marker(uri) | {"step": 4}))
    pretrain(f"data.uri={packed}", f"run={uri}").refused(3, str(at))
    if name == "weights.safetensors":
        cli("evaluate", uri).refused(3, str(at))
    at.unlink()
    pretrain(f"data.uri={packed}", f"run={uri}").refused(3, str(at), "Restore it")


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_bit_that_changed_in_a_checkpoint_is_noticed(pretrain, cli, packed, tmp_path, trained, name):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    (uri / "latest.json").write_text(json.dumps(marker(uri) | {"step": 4, "checkpoint": f"{4:010d}-{marker(uri)['attempt']}"}))
    at = uri / "checkpoints" / marker(uri)["checkpoint"] / name
    data = bytearray(at.read_bytes())
    data[-2] ^= 64  # of the last number, which stays one
    at.write_bytes(data)
    (uri / "summary.json").unlink()
    pretrain(f"data.uri={packed}", f"run={uri}").refused(3, str(at), "damaged", "Restore it")
    if name == "weights.safetensors":
        cli("evaluate", uri).refused(3, str(at), "damaged")


def test_a_marker_that_leads_out_of_the_run_is_damaged(pretrain, cli, packed, tmp_path, trained):
    uri = Path(shutil.copytree(trained, tmp_path / "run"))
    (uri / "latest.json").write_text(json.dumps(marker(uri) | {"checkpoint": "../../elsewhere"}))
    cli("evaluate", uri).refused(3, "latest.json: damaged")


def test_read_outs_of_a_run_that_cannot_be_written_to_are_refused_before_the_work(cli, tmp_path, trained, tmpfs):
    disk = tmpfs("size=20m")
    uri = Path(shutil.copytree(trained, disk / "run"))
    tmpfs("ro")
    for protocol in ((), ("knn",)):
        cli("evaluate", uri, *protocol).refused(3, "evaluations", "read-only")


def test_a_run_without_a_checkpoint_cannot_be_read_out(cli, pretrain, packed, tmp_path):
    uri = tmp_path / "run"
    pretrain(f"data.uri={packed}", f"run={uri}", "optim.lr=1e30").refused(1, "is not finite at step")
    cli("evaluate", uri).refused(3, "no checkpoint was committed yet", f"ssl-ray pretrain -c {uri}")
    cli("evaluate", uri, "--untrained").ok()


def test_a_loss_that_is_not_finite_ends_the_run_with_step_checkpoint_and_cause(pretrain, packed, tmp_path):
    uri = tmp_path / "run"
    keys = (f"data.uri={packed}", f"run={uri}", "optim.lr=1e30", "optim.warmup_epochs=0", "checkpoint.every_steps=1")
    done = pretrain(*keys).refused(1, "is not finite at step 1", "the last good checkpoint is that of step", "lower optim.lr")
    assert f"of step {marker(uri)['step']}." in done.err


# Storage ------------------------------------------------------------------------------------------------------------


def test_without_permission_to_write_the_place_is_named(pretrain, cli, images, packed, copied, tmpfs):
    file = copied / "manifest.parquet"
    read_only = tmpfs("size=1m")
    tmpfs("ro")
    for place in (file / "run", Path("/proc/run"), read_only / "run"):
        pretrain(f"data.uri={packed}", f"run={place}").refused(3, str(place))
        cli("data", "pack", images, place).refused(3, str(place))
        cli("data", "index", packed, "-o", place).refused(3, str(place))
        cli("data", "preview", packed, "-o", place / "x.png", *SMALL).refused(3, str(place))
    pretrain(f"data.uri={packed}", f"run={read_only / 'run'}").refused(3, "read-only", "Use another path")
    pretrain(f"data.uri={packed}", "run=/proc/run").refused(3, "/proc/run: this folder", "cannot be created", "Use another path")


def test_a_full_disk_ends_the_run_and_after_freeing_some_the_same_command_goes_on(pretrain, packed, trained, tmpfs):
    disk = tmpfs("size=6m")  # one checkpoint of 3.7 MB fits
    keys = (f"data.uri={packed}", f"run={disk / 'run'}", "checkpoint.every_steps=2")
    pretrain(*keys).refused(4, str(disk), "no space left", "run the same command again")
    assert marker(disk / "run")["step"] == 2
    tmpfs("size=64m")
    summary = pretrain(*keys).ok().json
    assert summary["steps"] == 4
    assert steps(disk / "run") == [0, 1, 2, 3]
    assert_same_weights(disk / "run", trained)


def test_a_full_disk_ends_a_pack_and_leaves_no_data_set(cli, images, tmpfs):
    disk = tmpfs("size=128k")
    cli("data", "pack", images, disk / "train").refused(4, "no space left")
    assert not (disk / "train" / "manifest.parquet").exists()
    tmpfs("size=8m")
    cli("data", "pack", images, disk / "train", "--overwrite").ok()
    cli("data", "check", disk / "train").ok()


# Stopping -----------------------------------------------------------------------------------------------------------

LONGER = ("train.steps=300",)


@pytest.fixture(scope="module")
def undisturbed(packed, tmp_path_factory):
    uri = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(["pretrain", "--json", *SMALL, f"data.uri={packed}", *LONGER, f"run={uri}"]) == 0
    return uri


def start(uri: Path, *arguments: str, stderr: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ssl_ray", "pretrain", *SMALL, *LONGER, f"run={uri}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)


def stop(process: subprocess.Popen[bytes], uri: Path, number: int) -> tuple[int, bytes]:
    """Sends the signal after the first checkpoint; the exit code and stdout."""
    with contextlib.ExitStack() as ending:
        ending.callback(process.kill)
        until = time.monotonic() + 60
        while not (uri / "latest.json").exists() or not marker(uri)["step"]:
            assert process.poll() is None, "it ended first"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_a_stop_whose_checkpoint_finds_no_room_says_so(packed, tmpfs):
    disk = tmpfs("size=1m")
    uri, errors = disk / "run", subprocess.PIPE
    process = start(uri, f"data.uri={packed}", "checkpoint.every_s=1000", "train.steps=100000", stderr=errors)
    until = time.monotonic() + 60
    while not list(uri.glob("metrics/*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert b"no space left" in said
    assert b"with a checkpoint" not in said


def assert_continues(pretrain, uri: Path, undisturbed: Path, *arguments: str) -> None:
    done = marker(uri)["step"]
    assert 0 < done < 300
    assert steps(uri) == list(range(done))
    assert pretrain(*LONGER, f"run={uri}", *arguments).ok().json["steps"] == 300
    assert steps(uri) == list(range(300))
    assert_same_weights(uri, undisturbed)


def test_a_terminated_run_leaves_a_checkpoint_and_the_same_command_continues_it_exactly(pretrain, packed, tmp_path, undisturbed):
    uri, keys = tmp_path / "run", (f"data.uri={packed}", "checkpoint.every_steps=20")
    with (tmp_path / "stderr").open("wb") as stderr:
        process = start(uri, *keys, stderr=stderr.fileno())
        assert stop(process, uri, signal.SIGTERM) == (130, b"")
    lines = (tmp_path / "stderr").read_text().splitlines()
    count = int(lines[0].partition("(")[2].split()[0])
    steps_said = f"300 steps, {count // 16} an epoch ({count} images, {count % 16} of them left out by turns)"
    assert lines[0] == f"{uri} begins: {steps_said}"
    assert any("] step 1/300  loss " in line for line in lines)  # a line a period, where there is no terminal
    assert lines[-1].startswith("ssl-ray: stopped after step ")
    assert lines[-1].endswith(" with a checkpoint; the same command continues.")
    assert_continues(pretrain, uri, undisturbed, *keys)


EARLY = """
import os, signal, sys, time
from ssl_ray import cli
from ssl_ray.train import runs

begin_attempt = runs.begin_attempt

def late(*given, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)  # the driver looks twice a second
    return begin_attempt(*given, **named)

runs.begin_attempt = late
sys.argv[0] = "ssl-ray"
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_signal_that_comes_before_the_workers_begin_stops_them_too(packed, tmp_path):
    keys = [*SMALL, f"run={tmp_path / 'run'}", f"data.uri={packed}", "train.workers=0", "train.batch=16", "train.steps=100000"]
    done = subprocess.run([sys.executable, "-c", EARLY, "pretrain", *keys], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert re.search(r"stopped (before the first step|after step \d+ with a checkpoint); the same command cont", done.stderr)
    assert "Traceback" not in done.stderr


def test_signals_that_come_together_are_one_request_and_a_later_one_ends_the_process_at_once():
    code = "import time; from ssl_ray.train.pretrain import signals\nwith signals(): print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "\n"
        for pause_s in (0.1, 1.2):  # `timeout` signals the process and its group
            process.terminate()
            time.sleep(pause_s)
            assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 130
        said = "ssl-ray: stopped at once; the same command continues from the last checkpoint."
        assert process.stderr.read().split("\n") == ["", said, ""]


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM] * 2, [signal.SIGINT], [signal.SIGINT] * 2])
def test_any_verb_ends_with_130_when_it_is_terminated(tmp_path, signals):
    os.mkfifo(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "ssl_ray", "config", "show", "-c", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with (tmp_path / "recipe.yaml").open("w"):  # it reads now
            for number in signals:
                process.send_signal(number)
            assert process.wait(30) == 130
        out, said = process.stdout.read(), process.stderr.read()
        assert (out, said) == ("", "ssl-ray: stopped.\n") or (len(signals) == 2 and (out, said.strip()) == ("", ""))


def test_control_c_on_a_terminal_leaves_a_checkpoint_and_the_same_command_continues_it_exactly(
    pretrain, packed, tmp_path, undisturbed
):
    uri, keys = tmp_path / "run", (f"data.uri={packed}", "checkpoint.every_steps=20")
    terminal, theirs = os.openpty()
    process = start(uri, *keys, stderr=theirs)
    os.close(theirs)
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(terminal, 65536):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    assert stop(process, uri, signal.SIGINT) == (130, b"")
    reader.join(timeout=60)
    os.close(terminal)
    text = b"".join(shown).decode()
    assert "training" in text  # the live bar
    assert "images/s" in text
    assert "Traceback" not in text
    assert "with a checkpoint; the same command continues." in text.splitlines()[-1]
    assert_continues(pretrain, uri, undisturbed, *keys)


IMPORT = """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    raise ImportError("torch._C could not be loaded")
"""


def test_an_interrupted_import_that_fails_in_words_of_its_own_is_a_stop(trained, tmp_path):
    (tmp_path / "torch.py").write_text(IMPORT)
    command = [sys.executable, "-m", "ssl_ray", "export", str(trained), "-o", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "ssl-ray: stopped, which ended in ImportError: torch._C could not be loaded\n"
