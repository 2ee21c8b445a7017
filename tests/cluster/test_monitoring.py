"""Prometheus really scrapes runs on a cluster, and every alert and panel is asked of it; alerts fire on series made by hand."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from harness import SMALL, finish, start, wait_until
from nodes import PACED, Nodes, free_port, several_nodes
from ray.util.metrics import Metric

from ssl_ray.train.gauges import COUNTERS, GAUGES, _Gauges

FILES = Path(__file__).parents[2] / "cluster" / "monitoring"
RULES = yaml.safe_load((FILES / "rules.yml").read_text())["groups"][0]["rules"]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
PANELS = {
    (panel["title"], target["refId"]): target["expr"].replace("$run", ".*")
    for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]
    for target in panel["targets"]
}
OF_RAY = {"ray_data_task_submission_backpressure_time", "ray_data_dataset_state", "ray_node_cpu_utilization"}
OF_RAY |= {"ray_object_store_memory", "ALERTS"}


def test_files_use_what_a_run_exports_and_leave_nothing_out():
    exported = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    asked = set(re.findall(r"\bray_\w+", " ".join([*RECORDED.values(), *ALERTS.values(), *PANELS.values()])))
    assert asked - OF_RAY == exported
    used = set(re.findall(r"\bssl:\w+", " ".join(PANELS.values())))
    assert used == RECORDED.keys()
    assert set(re.findall(r"\bssl:\w+", " ".join(ALERTS.values()))) <= used  # what alerts look at can be seen
    assert "http" not in RULES  # nothing is sent anywhere


# Alerts -------------------------------------------------------------------------------------------------------------

DRIVER = "02000000" + "f" * 48
RUN = f'{{run="runs/a",SessionName="s",WorkerId="{DRIVER}"}}'
HELD_BACK = 'ray_data_task_submission_backpressure_time{dataset="d",operator="MapBatches(_work_round)_2"}'
HEALTHY = {
    f"ray_ssl_position{RUN}": "0+15x240",
    f"ray_ssl_steps_planned{RUN}": "100000x240",
    f"ray_ssl_data_wait_share{RUN}": "0.1x240",
    f"ray_ssl_effective_rank{RUN}": "20x240",
    f"ray_ssl_embedding_std{RUN}": "0.4x240",
    f"ray_ssl_bad_samples{RUN}": "0x240",
    f"ray_ssl_restarts{RUN}": "0x240",
    # As it is where training is what takes long: the tasks that make views are ahead.
    HELD_BACK: "0+14x240",
    'ray_data_dataset_state{dataset="d",job_id="02000000",SessionName="s"}': "1x240",
    'ray_data_task_submission_backpressure_time{dataset="d",operator="Input_0"}': "0x240",
}
"""Samples of an hour, one every 15 s."""

SICK = {
    "SslStepsStalled": {f"ray_ssl_position{RUN}": "0+15x40 600x200"},
    "SslDataWait": {f"ray_ssl_data_wait_share{RUN}": "0.1x40 0.9x200", HELD_BACK: "0x240"},
    "SslBackpressure": {f"ray_ssl_data_wait_share{RUN}": "0.1x40 0.4x200"},
    "SslCollapse": {f"ray_ssl_effective_rank{RUN}": "20-0.25x72 1.2x168"},
    "SslBadSamples": {f"ray_ssl_bad_samples{RUN}": "0x40 2x200"},
    "SslRestarts": {f"ray_ssl_restarts{RUN}": "0x180 0+1x4 4x56"},
}


def alerts_tested(series: dict[str, str], firing: set[str]) -> dict:
    """A test of promtool's: after 55 minutes these alerts fire and no others."""
    given = [{"series": name, "values": values} for name, values in series.items()]
    asked = []
    for name in ALERTS:
        # The name alone: what is said of them is for people.
        expression = f'count by (alertname) (ALERTS{{alertstate="firing", alertname="{name}"}})'
        expected = [{"labels": f'{{alertname="{name}"}}', "value": 1}] if name in firing else []
        asked.append({"expr": expression, "eval_time": "55m", "exp_samples": expected})
    return {"interval": "15s", "input_series": given, "promql_expr_test": asked}


def of_two(series: dict[str, str], *, waiting: str, held_back: str) -> dict[str, str]:
    """These series of runs/a, and the like of runs/b; the runs that wait for data, and those whose dataset is held back."""
    made = {}
    for name, values in series.items():
        for run in "ab":
            if "data_wait_share" in name:
                values = "0.1x40 0.4x200" if run in waiting else "0.1x240"
            elif name == HELD_BACK:
                values = "0+14x240" if run in held_back else "0x240"
            job = name if run == "a" else name.replace("runs/a", "runs/b").replace('"d"', '"e"').replace("02000000", "03000000")
            made[job.replace('WorkerId="0000', f'WorkerId="{run}000')] = values
    return made


@pytest.mark.long
def test_promtool_accepts_the_files(tmp_path):
    for name in ("rules.yml", "prometheus.yml"):
        shutil.copy(FILES / name, tmp_path)
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True, timeout=60)


@pytest.mark.long
def test_each_alert_fires_on_its_illness_alone_and_of_the_run_that_is_ill(tmp_path):
    shutil.copy(FILES / "rules.yml", tmp_path)
    complete = {f"ray_ssl_position{RUN}": "0+15x40 100000x200"}
    ended = {name: f"{values.partition('x')[0]}x40" for name, values in HEALTHY.items()}  # its driver is gone
    tests = [alerts_tested(HEALTHY, set()), alerts_tested(HEALTHY | complete, set()), alerts_tested(ended, set())]
    tests += [alerts_tested(HEALTHY | series, {name}) for name, series in SICK.items()]
    tests += [alerts_tested(of_two(HEALTHY, waiting="a", held_back="b"), set())]
    tests += [alerts_tested(of_two(HEALTHY, waiting="b", held_back="b"), {"SslBackpressure"})]
    # Of a study's trials nothing says which dataset is whose: only where both wait is the one that is held back surely to blame.
    trials = {name.replace(DRIVER, "0" * 56): values for name, values in HEALTHY.items()}
    tests += [alerts_tested(of_two(trials, waiting="b", held_back="b"), set())]
    tests += [alerts_tested(of_two(trials, waiting="ab", held_back="b"), {"SslBackpressure"})]
    assert SICK.keys() == ALERTS.keys()
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / "test.yml").write_text(json.dumps(test))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# A real cluster -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prometheus(folder: Path, nodes: Nodes, dashboard: int) -> Iterator[str]:
    """Prometheus with the files that are shipped, but for address, token and pace; its own address."""
    config = (FILES / "prometheus.yml").read_text()
    changes = {"127.0.0.1:8265": f"127.0.0.1:{dashboard}", "/etc/prometheus/ray_auth_token": nodes.env["RAY_AUTH_TOKEN_PATH"]}
    for old, new in (changes | {"interval: 15s": "interval: 2s"}).items():
        assert old in config
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(FILES / "rules.yml", folder)
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'tsdb'}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def get(url: str, token: str = "") -> dict:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    # Not through the proxy that the environment may name.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.load(answer)


def ask(address: str, expression: str) -> list[dict]:
    answer = get(f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]


def runs_seen(address: str) -> set[str]:
    with contextlib.suppress(OSError):  # it is starting
        return {each["metric"]["run"] for each in ask(address, "ssl:position")}
    return set()


def end(driver: subprocess.Popen) -> None:
    """Kills a driver that a failed test left behind."""
    if driver.poll() is None:
        driver.kill()
        finish(driver)


STUDY = """
recipe: digits
keys: {train.workers: 0, train.steps: 1000000}
sweep: {optim.lr: {grid: [0.001]}}
seeds: [0]
"""


def test_a_run_whose_name_is_not_ascii_has_metrics(monkeypatch):
    told, record = [], Metric._record

    def spied(metric: Metric, value: float, tags: dict[str, str]) -> None:
        record(metric, value, tags)  # by Ray, which takes it or not
        told.append(tags)

    monkeypatch.setattr(Metric, "_record", spied)
    gauges = _Gauges("runs/50%-größe-\udcff", step=1, total_steps=3)
    gauges.close()
    assert told == [{"run": "runs/50%-gr%C3%B6%C3%9Fe-%FF"}] * 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_prometheus_and_the_train_page_show_a_run_and_a_trial_of_a_study(tmp_path):
    run = tmp_path / "run"
    keys = [*SMALL, "train.batch=32", "train.steps=1000000", "evaluate.max_images=50", "checkpoint.every_steps=10"]
    dashboard = free_port()
    with several_nodes(PACED | {"RAY_metrics_report_interval_ms": "5000"}) as nodes:
        nodes.add("head", cpus=3, dashboard=dashboard)
        token = Path(nodes.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        with prometheus(tmp_path, nodes, dashboard) as address, contextlib.ExitStack() as undo:
            driver = start("pretrain", f"run={run}", "train.workers=2", *keys, env=nodes.env)
            undo.callback(end, driver)

            def told() -> bool:
                return str(run) in runs_seen(address) and bool(ask(address, "ssl:data_held_back and ssl:data_held_back > 0"))

            assert wait_until(told, driver, "the run in Prometheus"), finish(driver)[2]
            time.sleep(10)  # for rates
            for name, expression in (RECORDED | PANELS).items():
                found = ask(address, expression)
                assert found or "ALERTS" in expression, f"{name}: {expression} returns nothing"
                if isinstance(name, str):
                    assert {each["metric"]["run"] for each in found} == {str(run)}
            for expression in ALERTS.values():
                ask(address, expression)
            rules = get(f"{address}/api/v1/rules")["data"]["groups"][0]["rules"]
            assert {rule["health"] for rule in rules} == {"ok"}
            value = {name: float(ask(address, name)[0]["value"][1]) for name in RECORDED}
            assert value["ssl:steps_planned"] == 1000000
            assert value["ssl:images_per_s_of_steps"] > 0
            assert 1 < value["ssl:effective_rank"] <= 16
            assert (value["ssl:bad_samples"], value["ssl:restarts"]) == (0, 0)
            terms = {each["metric"]["term"] for each in ask(address, "ssl:loss_term")}
            assert terms == {"diagonal", "off_diagonal"}
            pages = get(f"http://127.0.0.1:{dashboard}/api/train/v2/runs/v1", token)["train_runs"]
            assert [(page["name"].rpartition("-")[0], page["status"]) for page in pages] == [("run", "RUNNING")]
            position = int(value["ssl:position"])
            next(each for each in nodes.family("head") if "RayTrainWorker" in " ".join(each.cmdline())).kill()
            assert wait_until(lambda: bool(ask(address, "ssl:restarts == 1")), driver, "the restart"), finish(driver)[2]
            driver.terminate()
            assert finish(driver)[0] == 130
            assert position <= json.loads((run / "latest.json").read_text())["step"]

            (tmp_path / "tiny.yaml").write_text(STUDY)
            study = tmp_path / "study"
            driver = start("study", "run", f"{tmp_path / 'tiny.yaml'}", "-o", f"{study}", *keys[:-3], env=nodes.env)
            undo.callback(end, driver)
            trial = str(study / "trials")

            def trial_told() -> bool:
                return any(name.startswith(trial) for name in runs_seen(address))

            assert wait_until(trial_told, driver, "the trial in Prometheus"), finish(driver)[2]
            assert str(run) not in runs_seen(address)  # its driver is gone
            driver.terminate()
            assert finish(driver)[0] == 130
        logs = nodes.folder / "session_latest" / "logs"
        lines = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in logs.glob("ssl-ray-run-*.log")}
        assert {(line["rank"], line["run"]) for each in lines.values() for line in each} == {
            ("driver", str(run)),
            (0, str(run)),
            (1, str(run)),
        }
        said = [line for each in lines.values() for line in each]
        assert {line["rank"] for line in said if line["level"] == "ERROR"} <= {0, 1}  # of the worker that lost the one killed
        (committed,) = [line["step"] for line in said if line["message"].startswith("step 10 committed")]
        assert committed >= 10
        assert all(line["time"].endswith("+00:00") for line in said)
