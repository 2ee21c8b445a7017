"""What a run tells others beside its own files, where that is asked for: TensorBoard, Weights & Biases, MLflow.

Each is told of the steps and read-outs that the driver sees, some at a time. One that fails is left, and the run goes on.
"""

import dataclasses
import functools
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl_ray import config, storage
from ssl_ray.deadline import within
from ssl_ray.errors import UsageError
from ssl_ray.train import runs

FIRST_EVERY_S, LATER_SHARE = 20.0, 0.01
"""Numbers are handed on after so long, later after this share of the time that the run took: a few hundred files at most."""
ANSWER_S = 60.0
"""A tracker that takes longer has failed."""

Point = tuple[int, dict[str, float]]
"""Step, and numbers by name."""
Points = list[Point]
Progress = Callable[[str, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trackers:
    tensorboard: bool = False
    """Event files in RUN/tensorboard."""
    wandb: str | None = None
    """Project."""
    mlflow: str | None = None
    """URI of a tracking server or database."""


@contextmanager
def tracked(progress: Progress, trackers: Trackers) -> Iterator[Progress]:
    """`progress`, with which the trackers are told too of the run that it is called for.

    Raises UsageError if a package is absent.
    """
    known = ((_tensorboard, trackers.tensorboard), (_wandb, trackers.wandb), (_mlflow, trackers.mlflow))
    makes = [make for make, given in known if given]
    if not makes:
        yield progress
        return
    require(trackers)
    told = _Told(progress)
    try:

        def tell(kind: str, value: dict[str, Any]) -> None:
            progress(kind, value)
            if kind == "start" and not value["complete"]:
                told.start(value["run"], value["step"], trackers, makes)
            elif kind in ("step", "evaluation"):
                told.add(kind, value)

        yield tell
    finally:
        told.close()


def require(trackers: Trackers) -> None:
    """Raises UsageError if a package is absent, or MLflow takes its URI for none."""
    try:
        if trackers.wandb:
            import wandb  # noqa: F401
        if trackers.mlflow:
            from mlflow.tracking import MlflowClient

            try:
                within(ANSWER_S, functools.partial(MlflowClient, trackers.mlflow))
            except ModuleNotFoundError:
                raise
            except Exception as error:
                raise UsageError(f"--mlflow {trackers.mlflow}: {storage.one_line(error)[:300]}") from error
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        package = {"mlflow": "mlflow-skinny"}.get(name, name)
        raise UsageError(f"--{name} needs a package that is absent.\nRun: pip install {package}") from error


class _Told:
    """Collects what trackers are to be told. A tracker is a generator that is sent lists of points; closed, it ends."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.trackers: dict[str, Generator[None, Points, None]] = {}
        self.points: Points = []
        self.began = self.last = time.monotonic()

    def start(self, run: str, step: int, trackers: Trackers, makes: list[Callable]) -> None:
        record = runs.load_run(run)
        for make in makes:
            name = make.__name__.strip("_")
            with self._left_if_it_fails(name):
                tracker = make(run, record, step, trackers)
                within(ANSWER_S, functools.partial(next, tracker))
                self.trackers[name] = tracker

    def add(self, kind: str, value: dict[str, Any]) -> None:
        prefix = "train" if kind == "step" else "evaluation"
        numbers = {
            f"{prefix}/{key}": float(each)
            for key, each in value.items()
            if isinstance(each, int | float) and not isinstance(each, bool) and key not in ("step", "digest")
        }
        self.points.append((value["step"] + 1 if kind == "step" else value["step"] or 0, numbers))
        now = time.monotonic()
        if now - self.last > max(FIRST_EVERY_S, LATER_SHARE * (now - self.began)):
            self.flush()

    def flush(self) -> None:
        points, self.points, self.last = self.points, [], time.monotonic()
        for name, tracker in list(self.trackers.items()):
            if points:
                with self._left_if_it_fails(name):
                    within(ANSWER_S, functools.partial(tracker.send, points))

    def close(self) -> None:
        self.flush()
        for name, tracker in list(self.trackers.items()):
            with self._left_if_it_fails(name):
                within(ANSWER_S, tracker.close)

    @contextmanager
    def _left_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any library, with a network behind it
            self.trackers.pop(name, None)
            self.progress("note", {"text": f"{name} is told no more of this run: {storage.one_line(error)}"})


# One generator each: takes what it needs at `next`, then lists of points, and ends what it began when it is closed


def _tensorboard(run: str, record: dict[str, Any], step: int, _: Trackers) -> Generator[None, Points, None]:
    """Event files in RUN/tensorboard, each written once: stores cannot append, and TensorBoard reads them in the order of names.

    The first says that steps from `step` on are told anew (`purge_step`).
    """
    from tensorboardX import SummaryWriter

    begun, number = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}", 0
    text = json.dumps(record["config"], indent=1)
    while True:
        points = yield
        with tempfile.TemporaryDirectory(prefix="ssl-ray-tb-") as folder:
            with SummaryWriter(folder, purge_step=None if number else step + 1, write_to_disk=True) as writer:
                if number == 0:
                    writer.add_text("config", f"```\n{text}\n```", step)
                for at, numbers in points:
                    for name, value in numbers.items():
                        writer.add_scalar(name, value, at)
            (file,) = Path(folder).iterdir()
            storage.write_atomic(storage.join(run, "tensorboard", f"events.out.tfevents.{begun}.{number:06d}"), file.read_bytes())
        number += 1


def _wandb(run: str, record: dict[str, Any], _: int, trackers: Trackers) -> Generator[None, Points, None]:
    """A run of Weights & Biases, the same one each time that this run goes on. WANDB_MODE=offline writes files only."""
    import wandb

    told = wandb.init(
        project=trackers.wandb,
        id=_id(run, record),
        name=runs.name_of(run),
        config=config.flatten(record["config"]),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    told.define_metric("*", step_metric="step")  # read-outs come later than the steps after theirs
    try:
        while True:
            for at, numbers in (yield):
                told.log(numbers | {"step": at})
    finally:
        told.finish()


def _mlflow(run: str, record: dict[str, Any], _: int, trackers: Trackers) -> Generator[None, Points, None]:
    """A run of MLflow in the experiment `ssl-ray`, the same one each time that this run goes on."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(trackers.mlflow)
    experiment = client.get_experiment_by_name("ssl-ray")
    number = client.create_experiment("ssl-ray") if experiment is None else experiment.experiment_id
    tag = {"ssl_ray_id": _id(run, record)}
    found = client.search_runs([number], filter_string=f"tags.ssl_ray_id = '{tag['ssl_ray_id']}'")
    if found:
        told = found[0].info.run_id
        client.update_run(told, status="RUNNING")
    else:
        told = client.create_run(number, run_name=runs.name_of(run), tags=tag).info.run_id
        flat = config.flatten(record["config"])
        client.log_batch(told, params=[Param(key, str(value)) for key, value in flat.items()])
    try:
        while True:
            points = yield
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, at) for at, numbers in points for name, value in numbers.items()]
            for first in range(0, len(metrics), 1000):  # no more in a request
                client.log_batch(told, metrics=metrics[first : first + 1000])
    finally:
        client.set_terminated(told)


def _id(run: str, record: dict[str, Any]) -> str:
    return hashlib.sha256(f"{run} {record['hash']}".encode()).hexdigest()[:16]
