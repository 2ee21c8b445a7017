"""Where a run stands, for Prometheus: gauges and counters of the driver, exported by its node's Ray agent with Ray's own.

The driver hears of every step from the run's files, so that the workers spend no time on it. Prometheus sees the names below with
`ray_` before them, counters with `_total` after them, each with the label `run`, its folder or URI. They end with the driver.
"""

import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ssl_ray.masking import without_secrets
from ssl_ray.train import cluster, runs

EVERY_S = 2.0
"""Seconds between two times that numbers are passed on. Ray 2.60 forgets a gauge that is not set again for some seconds."""

COUNTERS = {
    "ssl_steps": "Steps that this driver has seen.",
    "ssl_images": "Images in these steps.",
}
GAUGES = {
    "ssl_position": "Steps that are done.",
    "ssl_steps_planned": "Steps of the whole run.",
    "ssl_images_per_s": "Images a second, of all workers.",
    "ssl_data_wait_share": "Share of the time in which the workers wait for data, 0 to 1.",
    "ssl_loss": "Loss of the newest step.",
    "ssl_loss_term": "Terms of the loss of the newest step.",
    "ssl_learning_rate": "Learning rate of the newest step.",
    "ssl_embedding_std": "Mean standard deviation of the embeddings at the newest look, every ten steps.",
    "ssl_effective_rank": "Effective rank of the embeddings at the newest look; 1: collapsed.",
    "ssl_bad_samples": "Samples of the run that could not be used.",
    "ssl_restarts": "Starts of the workers after the first, over all drivers of the run.",
}
_IN_RECORDS = {
    "loss": "ssl_loss",
    "lr": "ssl_learning_rate",
    "embedding_std": "ssl_embedding_std",
    "effective_rank": "ssl_effective_rank",
    "bad_samples": "ssl_bad_samples",
}

_ASCII = "".join(map(chr, range(128)))

Progress = Callable[[str, dict[str, Any]], None]


@contextmanager
def exported(progress: Progress, *, run: str, step: int, total_steps: int) -> Iterator[Progress]:
    """`progress`, with which Ray's metrics are told too of the run that it is called for, where this process has joined Ray.

    step: so many are done.  total_steps: of the whole run.
    """
    if not cluster.has_joined():
        yield progress
        return
    gauges = _Gauges(run, step=step, total_steps=total_steps)

    def tell(kind: str, value: dict[str, Any]) -> None:
        progress(kind, value)
        if kind == "step":
            gauges.add(value)
        elif kind == "starts":
            gauges.starts(value["number"])

    try:
        yield tell
    finally:
        gauges.close()


def label(run: str) -> str:
    """What metrics call a run: its URI, with bytes that are no ASCII, of which Ray 2.60 takes no labels, as %C3%A9."""
    return urllib.parse.quote(without_secrets(run), safe=_ASCII, errors="surrogateescape")


class _Gauges:
    """Collects the records of steps; a thread passes on what they say, in a stall too."""

    def __init__(self, run: str, *, step: int, total_steps: int):
        from ray.util.metrics import Counter, Gauge

        self._tags = {"run": label(run)}
        self._counters = {name: Counter(name, help, tag_keys=("run",)) for name, help in COUNTERS.items()}
        keys = {"ssl_loss_term": ("run", "term")}
        self._gauges = {name: Gauge(name, help, tag_keys=keys.get(name, ("run",))) for name, help in GAUGES.items()}
        self._values: dict[tuple[str, str], float] = {("ssl_position", ""): step, ("ssl_steps_planned", ""): total_steps}
        """By gauge and term."""
        self._new: list[dict[str, Any]] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._new.append(record)

    def starts(self, number: int) -> None:
        with self._lock:
            self._values["ssl_restarts", ""] = number - 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            if new:
                self._values |= _values(new)
            values = dict(self._values)
        if new:
            self._counters["ssl_steps"].inc(len(new), tags=self._tags)
            self._counters["ssl_images"].inc(sum(record["images"] for record in new), tags=self._tags)
        for (name, term), value in values.items():
            self._gauges[name].set(value, tags=self._tags | ({"term": term} if term else {}))


def _values(records: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """What gauges say after these steps, by gauge and term of the loss."""
    seconds = sum(record["seconds"] for record in records)
    newest: dict[str, Any] = {}
    for record in records:  # not every one has a look at the embeddings
        newest |= record
    return {
        ("ssl_position", ""): newest["step"] + 1,
        ("ssl_images_per_s", ""): sum(record["images"] for record in records) / seconds,
        ("ssl_data_wait_share", ""): sum(record["data_wait_s"] for record in records) / seconds,
        **{(name, ""): newest[key] for key, name in _IN_RECORDS.items() if key in newest},
        **{("ssl_loss_term", key): value for key, value in newest.items() if key not in runs.NO_TERMS},
    }
