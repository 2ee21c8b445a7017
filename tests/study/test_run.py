"""Studies that run for real: to their end, killed and continued, stopped, with trials that fail."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from command import ssl_ray
from harness import VARYING, finish, records, start, wait_until
from nodes import PACED

from ssl_ray.study.results import Study, read_study

TINY = """
recipe: digits
keys:
  {data.eval_uri: null, train.workers: 0, train.digest: true, checkpoint.every_steps: 4, views.size_px: 8,
   evaluate.max_images: 50}
sweep:
  model.projector_dim: {grid: [16, 24, 32]}
  views.count: {grid: [2]}
budget: {views: 6000}
readouts: 3
prices: {here: 0.6}
"""


def tiny(folder: Path, text: str = TINY) -> Path:
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


def comparable(study: Study) -> dict[str, tuple]:
    """What must not differ between two goes at a study: of each trial its status, steps and read-outs."""
    found = {}
    for trial in study.trials:
        run = Path(study.uri) / "trials" / trial.name
        steps = [{key: value for key, value in record.items() if key not in VARYING} for record in records(run)]
        readouts = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]
        found[trial.name] = (trial.state.status, steps, readouts)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    uri = folder / "study"
    done = ssl_ray({}, "study", "run", str(tiny(folder)), "-o", str(uri), "--json").ok().json
    assert done["counts"] == {"complete": 3}
    return read_study(str(uri))


def test_a_study_runs_each_trial_to_its_budget_and_says_what_it_took(whole: Study):
    assert [trial.name for trial in whole.trials] == ["0000-d16-m2-s0", "0001-d24-m2-s0", "0002-d32-m2-s0"]
    for trial in whole.trials:
        assert trial.state.status == "complete"
        assert trial.curve.views[-1] == pytest.approx(6000, abs=128 * trial.m)
        assert len(trial.readouts.step) >= 4  # the untrained network's too
        assert 0 < trial.result("linear_accuracy") <= 1
        assert trial.state.cost == pytest.approx(trial.state.seconds * 0.6 / 3600)
    summary = whole.summary
    assert summary is not None
    assert summary["predicted"]["steps"] == summary["real"]["steps"] == sum(int(trial.curve.step[-1]) for trial in whole.trials)


def test_places_are_those_of_the_folder_in_which_the_study_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert ssl_ray({}, "data", "pack", "digits", "shards").ok()
    tiny(tmp_path, TINY.replace("[16, 24, 32]", "[16]"))
    given = ("tiny.yaml", "data.uri=shards", "data.cache_dir=cache", "-o", "study", "--json")
    assert ssl_ray({}, "study", "run", *given).ok().json["counts"] == {"complete": 1}


def test_a_study_that_is_whole_is_not_run_again_and_another_is_refused(whole: Study, tmp_path: Path):
    before = {trial.name: trial.state for trial in whole.trials}
    again = ssl_ray({}, "study", "run", str(tiny(tmp_path)), "-o", whole.uri, "--json").ok().json
    assert again == whole.summary
    assert {trial.name: trial.state for trial in read_study(whole.uri).trials} == before
    other = tiny(tmp_path, TINY.replace("6000", "7000"))
    ssl_ray({}, "study", "run", str(other), "-o", whole.uri).refused(2, "holds another study")


def test_status_and_list_show_it(whole: Study):
    rows = ssl_ray({}, "study", "status", whole.uri, "--json").ok().json
    assert [(row["trial"], row["status"], row["model.projector_dim"]) for row in rows] == [
        (trial.name, "complete", trial.d) for trial in whole.trials
    ]
    (row,) = ssl_ray({}, "study", "list", str(Path(whole.uri).parent), "--json").ok().json
    assert (row["trials"], row["ended"]) == (3, 3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_whose_driver_is_killed_goes_on_to_the_same_results(whole: Study, tmp_path: Path):
    uri = tmp_path / "study"
    driver = start("study", "run", str(tiny(tmp_path)), "-o", str(uri), "--json")
    assert wait_until(lambda: steps_are_stored(uri, 1), driver, "a step")
    os.killpg(driver.pid, signal.SIGKILL)
    finish(driver)
    time.sleep(5)  # Ray's workers notice
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == {"complete": 3}
    assert_same_after_restarts(uri, whole)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trial_that_fails_is_shown_and_the_others_go_on(tmp_path: Path):
    text = TINY.replace("  views.count: {grid: [2]}\n", "  optim.lr: {grid: [0.001, 1.0e+30]}\n").replace("[16, 24, 32]", "[16]")
    uri = tmp_path / "study"
    done = ssl_ray({}, "study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json")
    assert (done.code, done.json["counts"]) == (1, {"complete": 1, "failed": 1})
    failed = read_study(str(uri)).trials[1]
    assert failed.state.error
    assert "NaN" in failed.state.error or "finite" in failed.state.error


def trial_processes(driver: psutil.Process) -> list[psutil.Process]:
    return [process for process in driver.children(recursive=True) if process.name().startswith("ray::ImplicitFunc")]


def assert_same_after_restarts(uri: Path, whole: Study) -> None:
    study = read_study(str(uri))
    assert comparable(study) == comparable(whole)
    assert sum(trial.state.attempts for trial in study.trials) > 3


def steps_are_stored(uri: Path, number: int) -> bool:
    """Whether so many trials have a step in their metrics."""
    return len({path.parent for path in uri.glob("trials/*/metrics/*")}) >= number


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trial_whose_process_is_killed_goes_on_by_itself_and_a_signal_leaves_checkpoints(whole: Study, tmp_path: Path):
    uri = tmp_path / "study"
    driver = start("study", "run", str(tiny(tmp_path)), "-o", str(uri), "--json", env=PACED)
    assert wait_until(lambda: steps_are_stored(uri, 1), driver, "a step")
    victims = trial_processes(psutil.Process(driver.pid))
    assert victims
    for victim in victims:
        victim.kill()
    again = lambda: any(json.loads(path.read_text())["attempts"] > 1 for path in uri.glob("trials/*/trial.json"))  # noqa: E731
    assert wait_until(again, driver, "the next start of a trial")
    assert wait_until(lambda: steps_are_stored(uri, 2), driver, "a step of another trial")
    driver.terminate()
    code, _, said = finish(driver, 200)
    assert code == 130, said
    assert "Traceback" not in said
    assert {trial.state.status for trial in read_study(str(uri)).trials} <= {"queued", "complete"}
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == {"complete": 3}
    assert_same_after_restarts(uri, whole)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_one_trial_is_stopped_for_good_and_the_others_end(tmp_path: Path):
    uri = tmp_path / "study"
    text = TINY.replace("[16, 24, 32]", "[16]").replace("views: 6000", "views: 1.0e+6")
    driver = start("study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json")
    assert wait_until(lambda: steps_are_stored(uri, 1), driver, "a step")
    ssl_ray({}, "study", "stop", str(uri), "no-such").refused(2, "no-such", "0000-d16-m2-s0")
    ssl_ray({}, "study", "stop", str(uri), "0000-d16-m2-s0").ok()
    code, out, err = finish(driver)
    assert code == 0, err
    assert json.loads(out)["counts"] == {"stopped": 1}
    (trial,) = read_study(str(uri)).trials
    assert (trial.state.status, trial.state.reason) == ("stopped", "`ssl-ray study stop` asked for it")
    steps = [record["step"] for record in records(uri / "trials" / trial.name)]
    assert steps == list(range(len(steps)))
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == {"stopped": 1}  # it stays so


ASHA = """
recipe: digits
keys: {train.workers: 0, evaluate.max_images: 200, checkpoint.every_steps: 4, views.size_px: 8, model.projector_dim: 32}
sweep:
  optim.lr: {grid: [0.01, 1.0e-9, 1.1e-9]}
budget: {views: 60000}
readouts: 6
objective: knn_accuracy
asha: {grace: 0.3, reduction: 2}
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_asha_ends_bad_trials_early_and_resume_leaves_them_ended(tmp_path: Path):
    uri = tmp_path / "study"
    counts = ssl_ray({}, "study", "run", str(tiny(tmp_path, ASHA)), "-o", str(uri), "--json").ok().json["counts"]
    trials = read_study(str(uri)).trials
    assert sum(counts.values()) == len(trials) == 3
    ended = [trial for trial in trials if trial.state.status == "stopped"]
    assert ended
    for trial in ended:
        assert "scheduler" in trial.state.reason
        assert trial.settings["optim.lr"] < 1e-6
        assert trial.curve.views[-1] < 60000 - 512
    for trial in set(trials) - set(ended):
        assert trial.state.status == "complete"
        assert trial.curve.views[-1] == pytest.approx(60000, abs=512)
    before = {path: path.stat().st_mtime_ns for path in uri.glob("trials/*/trial.json")}
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == counts
    assert {path: path.stat().st_mtime_ns for path in uri.glob("trials/*/trial.json")} == before


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_budget_of_minutes_becomes_steps_before_the_start(tmp_path: Path):
    uri = tmp_path / "study"
    text = TINY.replace("views: 6000", "minutes: 0.05").replace("[16, 24, 32]", "[16]").replace("[2]", "[2, 4]")
    summary = ssl_ray({}, "study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json").ok().json
    study = read_study(str(uri))
    assert summary["counts"] == {"complete": 2}
    assert summary["real"]["steps"] == summary["predicted"]["steps"] > 2
    # Each trial has its three seconds of steps, as far as whole steps give them, and some for its start.
    assert 0.1 < summary["predicted"]["minutes"] < 1
    assert all(len(trial.readouts.step) >= 2 for trial in study.trials)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_trials_of_several_workers_train_through_ray_train(tmp_path: Path):
    uri = tmp_path / "study"
    text = TINY.replace("train.workers: 0", "train.workers: 2").replace("[16, 24, 32]", "[16]")
    text = text.replace("readouts: 3", "readouts: 1")  # none on the way: Tune would tell of such a trial on stdout
    assert ssl_ray({}, "study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json").ok().json["counts"] == {"complete": 1}
    (trial,) = read_study(str(uri)).trials
    assert trial.curve.views[-1] == pytest.approx(6000, abs=128 * trial.m)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_optuna_proposes_trials_and_a_study_that_was_killed_goes_on(tmp_path: Path):
    uri = tmp_path / "study"
    sweep = "sweep:\n  optim.lr: {log_uniform: [1.0e-4, 1.0e-1]}\n  views.count: {choice: [2, 4]}\ndraws: 4\nsearch: optuna\n"
    text = TINY.partition("sweep:")[0] + sweep + TINY[TINY.index("budget:") :]
    driver = start("study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json")
    assert wait_until(
        lambda: any('"complete"' in path.read_text() for path in uri.glob("trials/*/trial.json")), driver, "a trial"
    )
    os.killpg(driver.pid, signal.SIGKILL)
    finish(driver)
    time.sleep(5)  # Ray's workers notice
    before = {trial.name: trial.settings for trial in read_study(str(uri)).trials}
    assert 0 < len(before) < 4
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == {"complete": 4}
    study = read_study(str(uri))
    assert {trial.name: trial.settings for trial in study.trials}.items() >= before.items()
    assert len({json.dumps(trial.settings) for trial in study.trials}) == 4
    for trial in study.trials:
        assert 1e-4 <= trial.settings["optim.lr"] <= 1e-1
        assert trial.m in (2, 4)
