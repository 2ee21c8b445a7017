"""The files of a run, damaged: read or refused by name by all that reads them, and never the wrong step believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import damages, fuzz, json_values, refused_or_done
from hypothesis import strategies as st

from ssl_ray.cli import main
from ssl_ray.config import Config, build
from ssl_ray.train import checkpoint, loop, runs
from ssl_ray.train.optim import build_optimizer

KEYS = ["views.count=2", "views.size_px=8", "views.channels=1", "model.projector_dim=8", "train.batch=16", "train.steps=4"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps in this process, with a checkpoint after two and four."""
    uri = tmp_path_factory.mktemp("runs") / "run"
    keys = ["data.uri=digits", f"run={uri}", "train.workers=0", "checkpoint.every_steps=2", "evaluate.max_images=60"]
    assert main(["pretrain", "--json", *KEYS, *keys]) == 0
    return uri


class Reader:
    """All that reads a run, with one network and optimiser for every case."""

    def __init__(self, uri: Path):
        self.uri = str(uri)
        self.config: Config = build(runs.load_run(self.uri)["config"], ["data.uri=digits"])
        self.network = loop.make_network(self.config, group=None)
        self.optimizer = build_optimizer("adam", self.network.parameters(), lr=1e-3, weight_decay=0.0)

    def read(self) -> None:
        runs.list_runs(self.uri)
        marker = runs.read_marker(self.uri)
        build(runs.load_run(self.uri)["config"], source=f"{self.uri}/run.json")
        runs.read_metrics(self.uri)
        runs.best_step(self.uri)
        runs.newest_failure(self.uri)
        if marker.checkpoint is not None:
            at = f"{self.uri}/checkpoints/{marker.checkpoint}"
            state = checkpoint.read_checkpoint(at, self.network, self.optimizer)
            loop.read_counters(state, step=marker.step, at=f"{at}/state.json")
            checkpoint.init_from(self.uri, self.network)
        runs.begin_attempt(self.uri, lease=1)


def case(reader: Reader, whole: Path, name: str, damage: Callable[[bytes], bytes] | None, value: object, key: float) -> None:
    """One file of the run is damaged; a JSON file may hold another value at one of its keys instead."""
    shutil.copytree(whole, reader.uri)
    path = Path(reader.uri) / name
    data = path.read_bytes()
    if damage is not None:
        path.write_bytes(damage(data))
    elif path.suffix == ".json":
        record = json.loads(data)
        record[list(record)[int(key * len(record))]] = value
        path.write_text(json.dumps(record))
    try:
        with refused_or_done(Path(name).name, reader.uri, "config show", ": got "):  # a key of the configuration, by its name
            reader.read()
    finally:
        shutil.rmtree(reader.uri)


@pytest.mark.parametrize("cases", [40, pytest.param(600, marks=pytest.mark.long)])
def test_damaged_files_of_a_run_are_read_or_refused(cases, trained, folder):
    names = [str(path.relative_to(trained)) for path in sorted(trained.rglob("*")) if path.is_file() and path.stat().st_size]
    own = folder / "run"
    shutil.copytree(trained, own)
    reader = Reader(own)
    reader.read()
    shutil.rmtree(own)
    small = [name for name in names if not name.endswith(".safetensors")]
    fuzz(
        lambda **drawn: case(reader, trained, **drawn),
        cases,
        name=st.sampled_from([*names, *small]),
        damage=st.none() | damages(),
        value=json_values,
        key=st.floats(0, 1, exclude_max=True),
    )
