"""Runs whose workers make colours, blur and solarisation themselves: views.photometric_on=worker."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import SMALL
from safetensors.numpy import load_file

from ssl_ray import plan, stream
from ssl_ray.config import build
from ssl_ray.errors import TrainingError
from ssl_ray.train import loop
from ssl_ray.train.pretrain import open_data

KEYS = ("train.steps=12", "checkpoint.every_steps=4", "train.digest=true", "views.blur=0.5", "views.solarize=0.2")
"""Of two epochs and more: 96 images less a tenth, 16 in a batch."""


def results(uri: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The records without their times, and the final weights."""
    lines = [line for path in sorted((uri / "metrics").glob("*.jsonl")) for line in path.read_text().splitlines()]
    records = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "data_wait_s")} for line in lines]
    name = json.loads((uri / "latest.json").read_text())["checkpoint"]
    return records, load_file(uri / "checkpoints" / name / "weights.safetensors")


@pytest.fixture
def train(pretrain, packed, tmp_path):
    """A run of that name with further keys: its end and folder."""
    return lambda name, *keys: (pretrain(*KEYS, f"data.uri={packed}", f"run={tmp_path / name}", *keys), tmp_path / name)


def test_a_run_that_ends_midway_goes_on_exactly(train, monkeypatch):
    done, undisturbed = train("undisturbed", "views.photometric_on=worker")
    assert done.ok().json["steps"] == 12
    steps = iter(range(12))

    def fails_once(*args, **kwargs):
        if next(steps, None) == 6:
            raise TrainingError("no more")
        return compute_loss(*args, **kwargs)

    compute_loss = loop.compute_loss
    monkeypatch.setattr(loop, "compute_loss", fails_once)
    train("resumed", "views.photometric_on=worker")[0].refused(1, "no more")
    monkeypatch.undo()
    done, resumed = train("resumed", "views.photometric_on=worker")
    assert done.ok().json["restarts"] == 1
    (records, weights), (records_resumed, weights_resumed) = results(undisturbed), results(resumed)
    assert records_resumed == records
    assert [record["step"] for record in records] == list(range(12))
    assert all(np.array_equal(weights[name], weights_resumed[name]) for name in weights | weights_resumed)


def test_views_are_those_made_with_the_data_to_rounding_and_the_run_is_another(train, monkeypatch):
    seen: list[np.ndarray] = []
    views_on = loop.views_on

    def seen_views(*args, **kwargs):
        views = views_on(*args, **kwargs)
        seen.append(views.numpy().copy())
        return views

    monkeypatch.setattr(loop, "views_on", seen_views)
    done, _ = train("run", "views.photometric_on=data")
    done.ok()
    train("run", "views.photometric_on=worker")[0].refused(2, "views.photometric_on")
    train("other", "views.photometric_on=worker")[0].ok()
    assert len(seen) == 24
    for data, worker in zip(seen[:12], seen[12:], strict=True):
        difference = np.abs(data.astype(int) - worker)
        assert 0 < difference.max() <= 3
        assert difference.mean() < 0.3


def test_workers_make_the_views_of_one_worker(packed):
    config = build({}, [*SMALL, *KEYS, f"data.uri={packed}", "views.photometric_on=worker"])
    data, _ = open_data(config)

    def views_of(rank: int, workers: int) -> list[np.ndarray]:
        lanes = plan.lanes_of(rank, workers, data.plan.lanes)
        batches = stream.local_batches(data, lanes=lanes, first_step=0, stop_step=12)
        epochs = [step // data.plan.steps_per_epoch for step in range(12)]
        on = {"spec": config.views, "seed": config.seed}
        made = zip(batches, epochs, strict=True)
        return [loop.views_on(torch.device("cpu"), batch, epoch=epoch, **on).numpy() for batch, epoch in made]

    alone = views_of(0, 1)
    for workers in (2, 3):
        shares = [views_of(rank, workers) for rank in range(workers)]
        assert all(np.array_equal(np.concatenate(parts), whole) for *parts, whole in zip(*shares, alone, strict=True))


def test_a_plan_takes_its_steps(cli, packed):
    keys = ("views.photometric_on=worker", "views.size_px=8", "train.batch=16", "train.workers=0", f"data.uri={packed}")
    assert cli("plan", "--json", *keys).ok().json["probed_training_per_step_s"] > 0
