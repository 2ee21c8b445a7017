"""What TensorBoard, Weights & Biases and MLflow are told of a run, read by their own readers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ssl_ray
from harness import records
from nodes import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KEYS = ["train.workers=0", "evaluate.max_images=50", "views.size_px=8", "checkpoint.every_steps=4", "evaluate.every_steps=4"]
OFFLINE = {"WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_SILENT": "true"}


def test_tensorboard_and_mlflow_hold_every_step_of_a_run_that_went_on(tmp_path: Path):
    run, mlflow = tmp_path / "run", f"file:{tmp_path / 'mlflow'}"
    told = ["--tensorboard", "--mlflow", mlflow]
    ssl_ray(OFFLINE, "pretrain", f"run={run}", "train.steps=12", *KEYS, *told, "--json").ok()
    (run / "summary.json").unlink()
    for name in ("0000000012.json", "0000000008.json"):  # a driver that was killed before these read-outs were written
        (run / "evaluations" / name).unlink(missing_ok=True)
    ssl_ray(OFFLINE, "pretrain", f"run={run}", "train.steps=12", *KEYS, *told, "--json").ok()
    written = {record["step"] + 1: record for record in records(run)}

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("train/loss")}
    assert loss == pytest.approx({step: record["loss"] for step, record in written.items()})
    readouts = {path.stem: json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")}
    accuracy = {event.step: event.value for event in events.Scalars("evaluation/linear_accuracy")}
    assert accuracy == pytest.approx({value["step"] or 0: value["linear_accuracy"] for value in readouts.values()})

    (of_run,) = [path.parent for path in (tmp_path / "mlflow").glob("*/*/metrics")]
    lines = (of_run / "metrics" / "train" / "loss").read_text().split("\n")[:-1]
    assert {int(line.split()[2]) for line in lines} == set(written)
    assert (of_run / "params" / "views.count").read_text() == "4"


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a head of 7 bytes: blocks of 32 KiB, parts of (crc, length, type)."""
    at, parts = 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_weights_and_biases_is_told_offline_and_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    ssl_ray(OFFLINE, "pretrain", f"run={run}", "train.steps=4", *KEYS, "--wandb", "tests", "--json").ok()
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    told = [Record.FromString(data).history.item for data in logged(file.read_bytes())]
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in items} for items in told if items]
    loss = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert loss == pytest.approx({record["step"] + 1: record["loss"] for record in records(run)})


def test_a_tracker_that_does_not_answer_is_left_and_the_run_ends_well(tmp_path: Path):
    once = OFFLINE | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    keys = [f"run={tmp_path / 'run'}", "train.steps=2", *KEYS]
    done = ssl_ray(once, "pretrain", *keys, "--mlflow", f"http://127.0.0.1:{free_port()}").ok()
    assert "mlflow is told no more of this run" in done.err
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_mlflow_takes_for_no_server_is_refused_before_the_run(tmp_path: Path):
    ssl_ray({}, "pretrain", f"run={tmp_path / 'run'}", "--mlflow", str(tmp_path / "folder")).refused(2, "--mlflow", "folder")
