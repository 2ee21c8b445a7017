"""A run with a share of its machine trains and is read out by turns."""

import time

import pytest

from ssl_ray import config
from ssl_ray.train import readouts, runs
from ssl_ray.train.pretrain import pretrain


def test_no_step_is_taken_during_a_readout(tmp_path, monkeypatch: pytest.MonkeyPatch):
    steps_during: list[int] = []
    evaluate_run = readouts.evaluate_run

    def slow(uri: str, *, checkpoint: str | None):
        time.sleep(2)  # the step under way ends, and its record is written
        before = len(runs.read_metrics(uri))
        time.sleep(2)
        steps_during.append(len(runs.read_metrics(uri)) - before)
        return evaluate_run(uri, checkpoint=checkpoint)

    monkeypatch.setattr(readouts, "evaluate_run", slow)
    given = ["train.workers=0", "train.batch=16", "train.steps=400", "evaluate.max_images=50", "evaluate.every_steps=200"]
    made = config.build({}, [*given, f"run={tmp_path / 'run'}"])
    summary = pretrain(made, resume="auto", leased=False, progress=lambda kind, value: None, share=0.5)
    assert steps_during == [0, 0, 0]  # untrained, in the middle, at the end
    assert summary["steps"] == 400
