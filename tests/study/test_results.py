import dataclasses
import json
import math
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import seaweedfs
import synthetic
from synthetic import NOW, complete, record, running

from ssl_ray import losses, storage
from ssl_ray.errors import DataError
from ssl_ray.study import results, schema
from ssl_ray.study.results import read_study
from ssl_ray.study.schema import State
from ssl_ray.train import runs


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read, below the study."""
    names: list[str] = []

    def watched(call):
        def watch(uri: str):
            names.append(uri.partition("/trials/")[2] or uri.rpartition("/")[2])
            return call(uri)

        return watch

    for name in ("read_bytes", "read_versioned"):
        monkeypatch.setattr(storage, name, watched(getattr(storage, name)))
    return names


def trial_path(uri: str, number: int = 0) -> Path:
    return Path(schema.trial_uri(uri, schema.read_head(uri).trials[number].name))


def put_segment(at: Path, first: int, number: int, records: list[dict]) -> None:
    (at / "metrics").mkdir(parents=True, exist_ok=True)
    runs_name = runs.segment_name(first, number)
    (at / "metrics" / runs_name).write_text("".join(json.dumps(each) + "\n" for each in records))


def one_trial(folder: Path, state: State | None, *, points: int = 50, **changes) -> str:
    uri = str(folder / "study")
    made = synthetic.head(1, **changes)
    schema.write_study(uri, made)
    synthetic.write_trial(uri, made, made.trials[0], points=points, state=state)
    return uri


def test_what_is_written_is_read_back(tmp_path: Path):
    uri = str(tmp_path / "study")
    made = synthetic.head(
        3, budget={"views": 1e6}, predicted={"trials": 3, "minutes": 4.5}, objective="alpha", mode="near", target=1.0
    )
    schema.write_study(uri, made)
    assert schema.read_head(uri) == made
    state = State(
        status="failed", heartbeat=NOW, started=NOW - 9, ended=NOW, seconds=9.5, attempts=3, error="Zeile 1\n<b>ü\u202e"
    )
    schema.write_state(uri, made.trials[1].name, state)
    study = read_study(uri)
    assert [trial.state for trial in study.trials] == [State(), state, State()]
    assert [trial.name for trial in study.trials] == [trial.name for trial in made.trials]
    assert study.summary is None
    assert study.trials[0].curve.step.shape == study.trials[0].readouts.step.shape == (0,)
    assert math.isnan(study.trials[0].result("linear_accuracy"))


def test_a_curve_holds_sums_and_rates_of_its_steps(tmp_path: Path):
    uri = one_trial(tmp_path, complete(), points=50, grid={"views.count": [4]})
    (trial,) = read_study(uri).trials
    truth = runs.read_metrics(str(trial_path(uri)))
    np.testing.assert_array_equal(trial.curve.step, np.arange(1, 51))
    np.testing.assert_allclose(trial.curve.minutes, np.cumsum([each["seconds"] for each in truth]) / 60)
    np.testing.assert_allclose(trial.curve.views, np.cumsum([each["views"] for each in truth]))
    np.testing.assert_allclose(trial.curve.epoch, np.arange(1, 51) / synthetic.STEPS_PER_EPOCH)
    np.testing.assert_allclose(trial.curve.loss, [each["loss"] for each in truth])
    assert list(trial.curve.terms) == ["diagonal", "off_diagonal"]
    np.testing.assert_allclose(trial.curve.terms["diagonal"], [each["diagonal"] for each in truth])
    np.testing.assert_allclose(trial.curve.images_per_s, synthetic.BATCH / 0.3)
    np.testing.assert_allclose(trial.curve.data_wait_share, 0.1)
    assert trial.bad_samples == truth[-1]["bad_samples"]


def test_readouts_stand_where_their_steps_were_done(tmp_path: Path):
    uri = one_trial(tmp_path, complete(), points=100, grid={"views.count": [4]})
    (trial,) = read_study(uri).trials
    read = trial.readouts
    assert read.step.tolist() == [0, 40, 80, 100]
    np.testing.assert_allclose(read.epoch, [0, 2, 4, 5])
    np.testing.assert_allclose(read.minutes, np.array([0, 40, 80, 100]) * 0.3 / 60)
    np.testing.assert_allclose(read.views, np.array([0, 40, 80, 100]) * synthetic.BATCH * 4)
    assert math.isnan(read.alpha[0])  # null in the file
    assert (
        trial.result("linear_accuracy")
        == read.linear_accuracy[-1]
        == runs.evaluations(str(trial_path(uri)))[-1]["linear_accuracy"]
    )


def test_an_untrained_network_is_no_result(tmp_path: Path):
    uri = one_trial(tmp_path, running(), points=0)
    for path in (trial_path(uri) / "evaluations").glob("0*"):
        path.unlink()
    (trial,) = read_study(uri).trials
    assert trial.readouts.step.tolist() == [0]
    assert math.isnan(trial.result("linear_accuracy"))


def test_a_readout_whose_steps_are_not_in_the_metrics_has_no_minutes(tmp_path: Path):
    uri = one_trial(tmp_path, complete(), points=10)
    (trial_path(uri) / "evaluations" / "0000000099.json").write_text(json.dumps(synthetic.readout(99, linear=0.5)))
    read = read_study(uri).trials[0].readouts
    assert read.step.tolist() == [0, 10, 99]
    assert np.isnan(read.minutes).tolist() == [False, False, True]
    assert read.linear_accuracy[-1] == 0.5


@pytest.mark.parametrize("steps", [999, 1000, 1001, 2500, 12_345])
def test_a_long_curve_becomes_means_that_lose_no_time_and_no_view(tmp_path: Path, steps: int):
    uri = one_trial(tmp_path, complete(), points=0)
    made = [record(step, seconds=0.1 + step % 7, loss=float(step)) for step in range(steps)]
    put_segment(trial_path(uri), 0, 1, made)
    curve = read_study(uri).trials[0].curve
    every = -(-steps // results.CURVE_POINTS)
    parts = [made[at : at + every] for at in range(0, steps, every)]
    assert len(curve.step) == len(parts) <= results.CURVE_POINTS
    assert curve.step[-1] == steps
    np.testing.assert_allclose(curve.loss, [np.mean([each["loss"] for each in part]) for part in parts])
    np.testing.assert_allclose(curve.minutes[-1], sum(each["seconds"] for each in made) / 60)
    rates = [sum(each["images"] for each in part) / sum(each["seconds"] for each in part) for part in parts]
    np.testing.assert_allclose(curve.images_per_s, rates)


def test_what_earlier_starts_wrote_ends_where_later_ones_began(tmp_path: Path):
    uri = one_trial(tmp_path, running(), points=0)
    at = trial_path(uri)
    put_segment(at, 0, 1, [record(step, loss=1.0) for step in range(10)])
    put_segment(at, 10, 1, [record(step, loss=1.0) for step in range(10, 14)])
    put_segment(at, 6, 2, [record(step, loss=2.0) for step in range(6, 12)])
    put_segment(at, 12, 3, [record(step, loss=3.0) | {"new_term": 1.0} for step in range(12, 15)])
    curve = read_study(uri).trials[0].curve
    truth = runs.read_metrics(str(at))
    assert curve.loss.tolist() == [each["loss"] for each in truth] == [1.0] * 6 + [2.0] * 6 + [3.0] * 3
    assert np.isnan(curve.terms["new_term"]).tolist() == [True] * 12 + [False] * 3


def test_the_length_of_an_epoch_is_not_guessed(tmp_path: Path):
    uri = one_trial(tmp_path, running(), points=5)  # within its first epoch
    study = read_study(uri)
    assert np.isnan(study.trials[0].curve.epoch).all()
    schema.write_state(uri, study.trials[0].name, complete())  # of 10 epochs, as its configuration says
    np.testing.assert_allclose(read_study(uri, study).trials[0].curve.epoch, np.arange(1, 6) / 5 * 10)


def test_beta_is_the_one_that_counted(tmp_path: Path):
    def beta(**settings) -> float:
        grid = {key.replace("__", "."): [value] for key, value in settings.items()}
        return read_study(one_trial(tmp_path, None, grid=grid)).trials[0].beta

    assert beta(model__projector_dim=64, loss__beta=0.5) == 0.5
    assert beta(model__projector_dim=64) == losses.beta_auto(64)
    assert beta(loss__beta="auto") == losses.beta_auto(256)
    assert math.isnan(beta(loss__name="vicreg"))


def test_a_running_trial_is_stale_when_its_heart_has_stopped():
    def shown(**changes) -> str:
        return results.shown_status(running(**changes), now=NOW)

    assert shown(heartbeat=NOW - 59) == "running"
    assert shown(heartbeat=NOW - 61) == shown(heartbeat=None) == shown(heartbeat=math.nan) == "stale"
    assert results.shown_status(complete(heartbeat=0.0), now=NOW) == "complete"


def test_counts_know_every_trial(tmp_path: Path):
    uri = str(tmp_path / "study")
    made = synthetic.head(5)
    schema.write_study(uri, made)
    for planned, state in zip(
        made.trials, [complete(), running(), running(heartbeat=0.0), State(status="failed"), None], strict=True
    ):
        synthetic.write_trial(uri, made, planned, points=3, state=state)
    study = read_study(uri)
    assert results.counts(study, now=NOW) == {"queued": 1, "running": 1, "complete": 1, "failed": 1, "stale": 1}
    with pytest.raises(ValueError, match="3 trials have not ended"):
        results.summarise(study)


def test_a_summary_has_predicted_and_real(tmp_path: Path):
    uri = str(tmp_path / "study")
    made = synthetic.head(2, predicted={"trials": 2, "steps": 40, "minutes": 1.0, "cost": {"on-demand": 0.1}})
    schema.write_study(uri, made)
    synthetic.write_trial(uri, made, made.trials[0], points=20, state=complete(seconds=90.0, cost=0.25))
    synthetic.write_trial(uri, made, made.trials[1], points=5, state=State(status="stopped", seconds=30.0, reason="ASHA"))
    results.write_summary(uri, read_study(uri))
    summary = read_study(uri).summary
    assert summary is not None
    assert summary["real"] == {"trials": 2, "steps": 25, "minutes": 2.0, "cost": {"on-demand": pytest.approx(1 / 60)}}
    assert summary["predicted"] == made.predicted
    assert summary["counts"] == {"complete": 1, "stopped": 1}


# Reading again -------------------------------------------------------------------------------------------------------


def test_complete_trials_are_not_read_again(tmp_path: Path, opened: list[str]):
    uri = str(tmp_path / "study")
    synthetic.write(uri, 3, 10)
    study = read_study(uri)
    opened.clear()
    again = read_study(uri, study)
    assert opened == ["study.json", "summary.json"]
    assert all(new is old for new, old in zip(again.trials, study.trials, strict=True))


def test_of_a_running_trial_only_what_is_new_is_read(tmp_path: Path, opened: list[str]):
    uri = one_trial(tmp_path, running(), points=40)
    name = schema.read_head(uri).trials[0].name
    study = read_study(uri)
    opened.clear()
    study = read_study(uri, study)
    assert opened == ["study.json", f"{name}/trial.json", "summary.json"]
    put_segment(trial_path(uri), 40, 1, [record(40)])
    opened.clear()
    study = read_study(uri, study)
    assert f"{name}/metrics/0000000040-000001.jsonl" in opened
    assert len(opened) == 4
    assert study.trials[0].curve.step[-1] == 41
    # The segment that is not finished is replaced by a longer one, of the same name; a read-out comes.
    put_segment(trial_path(uri), 40, 1, [record(40), record(41)])
    (trial_path(uri) / "evaluations" / "0000000042.json").write_text(json.dumps(synthetic.readout(42, linear=0.7)))
    opened.clear()
    study = read_study(uri, study)
    assert len(opened) == 5
    assert study.trials[0].curve.step[-1] == study.trials[0].readouts.step[-1] == 42


def test_reading_again_gives_what_reading_anew_gives(tmp_path: Path):
    uri = str(tmp_path / "study")
    made = synthetic.head(4)
    schema.write_study(uri, made)
    study = read_study(uri)
    states = [running(), complete(), State(status="failed", error="x")]
    for planned, state in zip(made.trials, states, strict=False):
        synthetic.write_trial(uri, made, planned, points=30, state=state)
        study = read_study(uri, study)
    at = trial_path(uri)
    put_segment(at, 20, 2, [record(step, loss=9.0) for step in range(20, 25)])  # a later start, which undoes steps
    schema.write_state(uri, made.trials[2].name, running())  # the failed one is tried again
    study = read_study(uri, study)
    schema.write_state(uri, made.trials[0].name, complete())
    study, anew = read_study(uri, study), read_study(uri)
    for new, old in zip(anew.trials, study.trials, strict=True):
        assert new.state == old.state
        for mine, truth in ((old.curve, new.curve), (old.readouts, new.readouts)):
            for key, value in vars(truth).items():
                np.testing.assert_equal(getattr(mine, key), value)
    assert study.trials[0].curve.loss[-1] == 9.0
    assert study.trials[0].segments == {}


def test_a_study_that_was_made_anew_is_not_mixed_with_what_was_there(tmp_path: Path):
    uri = str(tmp_path / "study")
    synthetic.write(uri, 2, 10)
    study = read_study(uri)
    schema.write_study(uri, synthetic.head(2, created=NOW))
    schema.write_state(uri, study.trials[0].name, running())
    assert [trial.state.status for trial in read_study(uri, study).trials] == ["running", "complete"]


def test_a_trial_that_became_another_is_read_anew(tmp_path: Path):
    uri = str(tmp_path / "study")
    made = synthetic.write(uri, 2, 10)
    study = read_study(uri)
    changed = dataclasses.replace(made.trials[0], settings=made.trials[0].settings | {"views.count": 16})
    schema.write_study(uri, dataclasses.replace(made, trials=(changed, made.trials[1])))
    again = read_study(uri, study)
    assert again.trials[0].m == 16
    assert again.trials[1] is study.trials[1]


def test_a_segment_that_goes_while_it_is_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = one_trial(tmp_path, running(), points=10)
    at = trial_path(uri)
    put_segment(at, 10, 1, [record(10)])
    read_bytes = storage.read_bytes

    def resumed_meanwhile(file: str) -> bytes:
        if file.endswith("0000000010-000001.jsonl"):
            os.unlink(file)
        return read_bytes(file)

    monkeypatch.setattr(storage, "read_bytes", resumed_meanwhile)
    assert read_study(uri).trials[0].curve.step[-1] == 10


def test_studies_below_a_folder_are_found(tmp_path: Path):
    for name in ("b", "a"):
        schema.write_study(str(tmp_path / name), synthetic.head(0))
    schema.write_study(str(tmp_path / "paper" / "part"), synthetic.head(0))
    (tmp_path / "run").mkdir()
    (tmp_path / "claims.json").write_text("{}")
    found = [tmp_path / "a", tmp_path / "b", tmp_path / "paper" / "part"]
    assert results.find_studies(str(tmp_path)) == list(map(str, found))
    assert results.find_studies(str(tmp_path / "a")) == [str(tmp_path / "a")]
    assert read_study(str(tmp_path / "a")).trials == ()


def test_a_study_on_s3_reads_as_on_a_disk(tmp_path: Path, server: seaweedfs.Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    local, uri = str(tmp_path / "study"), f"s3://{seaweedfs.BUCKET}/{tmp_path.name}/study"
    synthetic.write(local, 3, 30)
    schema.write_state(local, schema.read_head(local).trials[1].name, running())
    for path in Path(local).rglob("*.json*"):
        storage.write_atomic(storage.join(uri, str(path.relative_to(local))), path.read_bytes())
    study, truth = read_study(uri), read_study(local)
    for mine, there in zip(study.trials, truth.trials, strict=True):
        assert mine.state == there.state
        np.testing.assert_equal(vars(mine.curve), vars(there.curve))
        np.testing.assert_equal(vars(mine.readouts), vars(there.readouts))
    name = study.trials[1].name
    longer = "".join(json.dumps(record(step)) + "\n" for step in range(31)).encode()
    storage.write_atomic(storage.join(uri, "trials", name, "metrics", "0000000000-000001.jsonl"), longer)
    again = read_study(uri, study)
    assert again.trials[1].curve.step[-1] == 31
    assert again.trials[0] is study.trials[0]
    more = (json.dumps(record(31)) + "\n").encode()  # of a trial that goes on after a kill
    storage.write_atomic(storage.join(uri, "trials", name, "metrics", "0000000031-000002.jsonl"), more)
    assert read_study(uri, again).trials[1].curve.step[-1] == 32
    fsspec.filesystem("s3").clear_instance_cache()


# Damage --------------------------------------------------------------------------------------------------------------


def failure(uri: str) -> str:
    with pytest.raises(DataError) as caught:
        read_study(uri)
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    return message


def test_where_there_is_no_study_the_error_says_so(tmp_path: Path):
    assert "no study here (no study.json)." in failure(str(tmp_path))
    for name in ("views", "recipe", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("notes.txt" if name == "notes" else "study.json")).touch()
    assert "no study here (no study.json), but in recipe, views below it." in failure(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"objective": "loss"}, "objective is 'loss'"),
        ({"mode": ["max"]}, "mode is ['max']"),
        ({"mode": "near"}, "target is null"),
        ({"created": "today"}, "created is 'today'"),
        ({"created": True}, "created is True"),
        ({"created": 10**400}, "too large"),
        ({"trials": {}}, "trials is {}"),
        ({"trials": [{"name": "a"}]}, "settings is absent"),
        ({"seeds": [0.5]}, "seeds is 0.5"),
        ({"base": {}}, "is not whole"),
        ({"base": {"loss": []}}, "is not whole"),
        ({"budget": {"views": "many"}}, "budget.views is 'many'"),
        ({"trials": [{"name": "../../etc", "settings": {}, "seed": 0, "hash": ""}]}, "'../../etc' is no name of a trial"),
        ({"trials": [{"name": "a", "settings": {}, "seed": 0, "hash": ""}] * 2}, "same name"),
        ({"trials": [{"name": "a", "settings": {"views.count": "<b>"}, "seed": 0, "hash": ""}]}, "is not whole"),
    ],
)
def test_a_damaged_study_is_an_error_that_names_what_is_wrong(tmp_path: Path, changes: dict, says: str):
    uri = one_trial(tmp_path, None)
    at = Path(uri, "study.json")
    at.write_text(json.dumps(json.loads(at.read_text()) | changes))
    assert says in failure(uri)


def test_an_absent_key_is_named(tmp_path: Path):
    uri = one_trial(tmp_path, None)
    at = Path(uri, "study.json")
    value = json.loads(at.read_text())
    del value["objective"]
    at.write_text(json.dumps(value))
    assert "objective is absent" in failure(uri)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trial.json", "{"),
        ("trial.json", "[]"),
        ("trial.json", '{"format_version": 1, "status": "sleeping"}'),
        ("trial.json", '{"format_version": 1, "status": "running", "heartbeat": "now"}'),
        ("metrics/0000000000-000001.jsonl", '{"step": 0}\n'),
        ("metrics/0000000000-000001.jsonl", '{"step": 0, "loss"\n'),
        ("metrics/0000000000-000001.jsonl", "[1]\n"),
        ("metrics/0000000000-000001.jsonl", json.dumps(record(0) | {"loss": "low"})),
        ("metrics/0000000000-000001.jsonl", json.dumps(record(0) | {"step": None})),
        ("evaluations/0000000050.json", "null"),
        ("evaluations/0000000050.json", '{"linear_accuracy": 0.5}'),
        ("evaluations/0000000050.json", '{"step": 50, "linear_accuracy": "high"}'),
        ("evaluations/0000000050.json", '{"step": NaN}'),
    ],
)
def test_a_damaged_file_of_a_trial_is_named(tmp_path: Path, file: str, content: str):
    uri = one_trial(tmp_path, running())
    (trial_path(uri) / file).write_text(content)
    assert failure(uri).startswith(f"{trial_path(uri) / file}: ")


def test_files_of_other_names_are_left_alone(tmp_path: Path):
    uri = one_trial(tmp_path, running())
    for name in ("metrics/.writing-12", "metrics/notes.txt", "metrics/0000000000-x.jsonl", "evaluations/best.json"):
        (trial_path(uri) / name).write_text("no JSON")
    assert read_study(uri).trials[0].curve.step[-1] == 50
