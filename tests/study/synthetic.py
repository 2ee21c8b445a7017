"""A study that nobody trained: `trials` trials of `points` steps with plausible numbers, written to a folder.

Run as a program, it writes one and says how long reading it takes: python tests/study/synthetic.py FOLDER 2000 200
"""

import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ray.config import Config, canonical_hash, to_dict
from ssl_ray.study import results, schema
from ssl_ray.study.schema import Head, Planned, State

GRID = {
    "model.projector_dim": [64, 128, 256, 512, 1024],
    "loss.beta": [0.0025, 0.005, 0.01, 0.02, 0.04],
    "views.count": [2, 4, 8],
    "data.fraction": [1.0, 0.5, 0.25],
}
STEPS_PER_EPOCH = 20
BATCH = 128
NOW = 1_800_000_000.0


def planned(trials: int, *, grid: dict[str, list], seeds: tuple[int, ...]) -> tuple[Planned, ...]:
    """The first `trials` of the grid times the seeds, which is gone through again where it is smaller."""
    made: list[Planned] = []
    cells = itertools.product(*grid.values(), seeds)
    for number, (*values, seed) in enumerate(itertools.islice(itertools.cycle(cells), trials)):
        settings = dict(zip(grid, values, strict=True))
        name = "-".join([f"{number:04d}", *(re.sub(r"[^\w.]", "", str(value))[:12] for value in values), f"s{seed}"])
        made.append(Planned(name=name, settings=settings, seed=seed, hash=canonical_hash(settings | {"seed": seed})))
    return tuple(made)


def head(trials: int, *, grid: dict[str, list] | None = None, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Head:
    grid = GRID if grid is None else grid
    made: dict[str, Any] = {
        "name": "synthetic",
        "hash": canonical_hash({"trials": trials}),
        "created": NOW - 7200,
        "objective": "linear_accuracy",
        "mode": "max",
        "base": to_dict(Config()),
        "swept": tuple(grid),
        "seeds": seeds,
        "trials": planned(trials, grid=grid, seeds=seeds),
        "target_accuracy": 0.8,
        "prices": {"on-demand": 0.5},
        "currency": "EUR",
        "machine": {"cpu": "none"},
    }
    return Head(**made | changes)


def accuracy(minutes: np.ndarray, *, d: float, beta: float, m: int, fraction: float, seed: int) -> np.ndarray:
    """Best at beta = 2.8 / d; more views learn faster; less data ends lower; [n] as `minutes`."""
    best = 0.88 - 0.01 * abs(np.log2(beta * d / 2.8)) - 0.02 * (1 - fraction) + 0.002 * np.sin(97 * seed + d)
    return best - (best - 0.3) * np.exp(-minutes * m / 4)


def write_trial(uri: str, head: Head, trial: Planned, *, points: int, state: State | None, every: int = 40) -> None:
    """One that has made `points` steps, with a read-out every `every` of them and at the end; state None: queued."""
    if state is None:
        return
    at = Path(schema.trial_uri(uri, trial.name))
    (at / "metrics").mkdir(parents=True)
    (at / "evaluations").mkdir()
    m = trial.settings.get("views.count", 4)
    seconds = 0.1 + 0.05 * m
    (at / "metrics" / "0000000000-000001.jsonl").write_text(
        "".join(json.dumps(record(step, m=m, seconds=seconds)) + "\n" for step in range(points))
    )
    steps = sorted({*range(every, points, every), points} - {0})
    shape = {
        "d": trial.settings.get("model.projector_dim", 256),
        "beta": trial.settings.get("loss.beta", 0.01),
        "m": m,
        "fraction": trial.settings.get("data.fraction", 1.0),
        "seed": trial.seed,
    }
    reached = accuracy(np.array([0, *steps]) * seconds / 60 * 20, **shape)
    for step, linear in zip([None, *steps], reached.tolist(), strict=True):
        (at / "evaluations" / ("untrained.json" if step is None else f"{step:010d}.json")).write_text(
            json.dumps(readout(step, linear=linear))
        )
    schema.write_state(uri, trial.name, state)


def record(step: int, *, m: int = 4, seconds: float = 0.3, loss: float | None = None) -> dict[str, Any]:
    """A step's, as the loop writes it."""
    value = 100 / (1 + step / 10) if loss is None else loss
    terms = {"diagonal": value / 2, "off_diagonal": value * 10}
    made = {"step": step, "epoch": step // STEPS_PER_EPOCH, "loss": value} | terms
    made |= {"lr": 1e-3, "images": BATCH, "views": BATCH * m}
    if step % 10 == 0:
        made |= {"embedding_std": 1.0, "effective_rank": 30.0}
    return made | {"bad_samples": step // 100, "seconds": seconds, "data_wait_s": seconds / 10}


def readout(step: int | None, *, linear: float | None) -> dict[str, Any]:
    knn = None if linear is None else linear - 0.05
    accuracies = {"linear_accuracy": linear, "linear_l2": 1e-3, "knn_accuracy": knn}
    spectrum = {"alpha": 1.2 if step else None, "alpha_fit_range": [3, 64] if step else None, "rankme": 40.0 + (step or 0) / 10}
    return {"step": step} | accuracies | spectrum | {"num_train": 1000, "num_test": 500, "protocol": {"version": 1}}


def complete(**changes: Any) -> State:
    made = {"status": "complete", "started": NOW - 3600, "ended": NOW - 3000, "heartbeat": NOW - 3000}
    return State(**made | {"seconds": 600.0, "cost": 0.083, "attempts": 1} | changes)


def running(**changes: Any) -> State:
    return State(**{"status": "running", "started": NOW - 300, "heartbeat": NOW - 2, "attempts": 1, "seconds": 298.0} | changes)


def write(uri: str, trials: int, points: int, **changes: Any) -> Head:
    """A study of complete trials; `changes` are those of `head`."""
    made = head(trials, **changes)
    schema.write_study(uri, made)
    for trial in made.trials:
        write_trial(uri, made, trial, points=points, state=complete())
    return made


def main(folder: str, trials: int, points: int) -> None:
    began = time.perf_counter()
    made = write(folder, trials, points)
    print(f"written in {time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    study = results.read_study(folder)
    print(f"read cold in {time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    study = results.read_study(folder, study)
    print(f"read again in {time.perf_counter() - began:.3f} s")
    last = made.trials[-1]
    schema.write_state(folder, last.name, running())
    study = results.read_study(folder)
    at = Path(schema.trial_uri(folder, last.name))
    (at / "metrics" / f"{points:010d}-000002.jsonl").write_text(json.dumps(record(points)) + "\n")
    began = time.perf_counter()
    study = results.read_study(folder, study)
    print(f"read again, one trial with a new segment, in {time.perf_counter() - began:.3f} s")
    assert study.trials[-1].curve.step[-1] == points + 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
