"""Studies that run for real: to their end, killed and continued, stopped, with trials that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ssl_ray
from harness import VARYING, records

from ssl_ray.study.results import Study, read_study

TINY = """
recipe: digits
keys: {train.workers: 0, train.digest: true, evaluate.max_images: 50, checkpoint.every_steps: 4, views.size_px: 8}
sweep:
  model.projector_dim: {grid: [16, 32]}
  views.count: {grid: [2, 4]}
budget: {views: 6000}
readouts: 3
price_per_hour: 0.6
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
    assert done["counts"] == {"complete": 4}
    return read_study(str(uri))


def test_a_study_runs_each_trial_to_its_budget_and_says_what_it_took(whole: Study):
    assert [trial.name for trial in whole.trials] == ["0000-d16-m2-s0", "0001-d16-m4-s0", "0002-d32-m2-s0", "0003-d32-m4-s0"]
    for trial in whole.trials:
        assert trial.state.status == "complete"
        assert trial.curve.views[-1] == pytest.approx(6000, abs=128 * trial.m)
        assert len(trial.readouts.step) >= 4  # the untrained network's too
        assert 0 < trial.result("linear_accuracy") <= 1
        assert trial.state.cost == pytest.approx(trial.state.seconds * 0.6 / 3600)
    summary = whole.summary
    assert summary is not None
    assert summary["predicted"]["steps"] == summary["real"]["steps"] == sum(int(trial.curve.step[-1]) for trial in whole.trials)


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
    assert (row["trials"], row["ended"]) == (4, 4)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", ["running", "complete"])
def test_a_study_whose_driver_is_killed_goes_on_to_the_same_results(whole: Study, tmp_path: Path, after: str):
    uri = tmp_path / "study"
    command = [sys.executable, "-m", "ssl_ray", "study", "run", str(tiny(tmp_path)), "-o", str(uri)]
    driver = subprocess.Popen(
        command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 300
    while not any(f'"status": "{after}"' in path.read_text() for path in uri.glob("trials/*/trial.json")):
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(5)  # Ray's workers notice
    done = ssl_ray({}, "study", "resume", str(uri), "--json").ok().json
    assert done["counts"] == {"complete": 4}
    assert comparable(read_study(str(uri))) == comparable(whole)
    attempts = [trial.state.attempts for trial in read_study(str(uri)).trials]
    assert sum(attempts) > 4 if after == "running" else sum(attempts) >= 4  # none may have run at that moment


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trial_that_fails_is_shown_and_the_others_go_on(tmp_path: Path):
    text = TINY.replace("  views.count: {grid: [2, 4]}\n", "  optim.lr: {grid: [0.001, 1.0e+30]}\n").replace("[16, 32]", "[16]")
    uri = tmp_path / "study"
    done = ssl_ray({}, "study", "run", str(tiny(tmp_path, text)), "-o", str(uri), "--json").ok().json
    assert done["counts"] == {"complete": 1, "failed": 1}
    failed = read_study(str(uri)).trials[1]
    assert failed.state.error
    assert "NaN" in failed.state.error or "finite" in failed.state.error


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_signal_leaves_checkpoints_and_resume_gives_the_same_results(whole: Study, tmp_path: Path):
    uri = tmp_path / "study"
    command = [sys.executable, "-m", "ssl_ray", "study", "run", str(tiny(tmp_path)), "-o", str(uri)]
    driver = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not list(uri.glob("trials/*/metrics/*")):
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=200)
    assert driver.returncode == 130, said
    assert "Traceback" not in said
    assert {trial.state.status for trial in read_study(str(uri)).trials} <= {"queued", "complete"}
    assert ssl_ray({}, "study", "resume", str(uri), "--json").ok().json["counts"] == {"complete": 4}
    assert comparable(read_study(str(uri))) == comparable(whole)
