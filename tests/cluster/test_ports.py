"""What listens on a local cluster while a job runs, against the list of cluster/local/cluster.py, and what its `down` ends."""

import ipaddress
import json
import runpy
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from harness import SMALL, newest_step
from local_cluster import SCRIPT, Local, local_cluster, typed

long = pytest.mark.long
pytestmark = pytest.mark.timeout(600)

KINDS = {
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "runtime env",
    "ray.util.client.server": "client",
    "dashboard/dashboard.py": "dashboard",
    "ray-dashboard-": "dashboard",
    "monitor.py": "monitor",
    "-m ssl_ray": "driver",
    "ray::": "worker",
}
"""By what is in a command line, the first that fits."""


def kind(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((name for part, name in KINDS.items() if part in line), process.name())


def where(ip: str) -> str:
    address = ipaddress.ip_address(ip.removeprefix("::ffff:"))
    return "loopback" if address.is_loopback else "anywhere" if address.is_unspecified else ip


def started(cluster: Local) -> list[psutil.Process]:
    """All processes of the cluster, asked of the system: those below the keeper."""
    ((pid, _),) = json.loads((cluster.folder / "started.json").read_text())["keeper"]
    return psutil.Process(pid).children(recursive=True)


def listening(cluster: Local) -> set[tuple[str, str]]:
    found = set()
    for process in started(cluster):
        try:
            sockets = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            found |= {(kind(process), where(each.laddr.ip)) for each in sockets}
        except psutil.NoSuchProcess:
            continue
    return found


def status_without(token: str | None, url: str) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@long
def test_what_listens_is_what_is_stated_and_down_ends_all_that_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    other = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with local_cluster("--max=1") as cluster:
            run = tmp_path / "run"
            keys = [*SMALL, "train.workers=2", "train.steps=100000", "evaluate.max_images=50"]
            cluster.submit("job", "-m", "ssl_ray", "pretrain", f"run={run}", *keys)
            cluster.until(lambda: newest_step(run) >= 20, "steps", job="job")
            assert listening(cluster) - set(script["LISTENS_AT_TIMES"]) == set(script["LISTENS"])
            for token in (None, "0" * 64):
                assert status_without(token, f"{cluster.url}/api/jobs/") in (401, 403)
            assert status_without(cluster.token, f"{cluster.url}/api/jobs/") == 200
            assert (cluster.folder / "token").stat().st_mode & 0o777 == 0o600
            assert cluster.folder.stat().st_mode & 0o777 == 0o700
            second = typed(cluster.folder, "up")
            assert second.returncode == 1
            assert "runs in" in second.stderr
            foreign = typed(cluster.folder.parent, "up")
            assert foreign.returncode == 1
            assert "holds something else" in foreign.stderr
            there = started(cluster)
            assert len(there) > 20
        assert [process for process in there if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
        assert other.is_running()
    finally:
        other.kill()
        other.wait()


@long
def test_up_ends_what_a_killed_keeper_left_before_it_begins_anew():
    with local_cluster("--max=1") as cluster:
        there = started(cluster)
        ((pid, _),) = json.loads((cluster.folder / "started.json").read_text())["keeper"]
        psutil.Process(pid).kill()
        again = typed(cluster.folder, "up", "--max=1")
        assert again.returncode == 0, again.stderr
        assert [process for process in there if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []


@long
def test_the_status_of_a_head_that_is_there_but_does_not_answer_ends():
    with local_cluster("--max=1") as cluster:
        shown = typed(cluster.folder, "status")
        assert shown.returncode == 0, shown.stderr
        assert "1 nodes" in shown.stdout
        assert "  head: 0 CPUs, " in shown.stdout
        (gcs,) = [process for process in started(cluster) if process.name() == "gcs_server"]
        gcs.suspend()
        try:
            shown = typed(cluster.folder, "status")
        finally:
            gcs.resume()
    assert shown.returncode == 1
    assert shown.stderr.startswith("The head ")
    assert shown.stderr.count("\n") == 1


@long
def test_down_ends_what_a_killed_keeper_left_and_nothing_else(tmp_path: Path):
    with local_cluster("--max=1") as cluster:
        notes = json.loads((cluster.folder / "started.json").read_text())
        there = started(cluster)
        ((pid, _),) = notes["keeper"]
        psutil.Process(pid).kill()
        assert typed(cluster.folder, "down").returncode == 0
        assert [process for process in there if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
        # Numbers of processes are given again: one that has such a number, but another start, is not theirs.
        other = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        notes["keeper"], notes["processes"] = [[other.pid, other.create_time() - 1]], [[other.pid, other.create_time() - 1]]
        (cluster.folder / "started.json").write_text(json.dumps(notes))
        assert typed(cluster.folder, "down").returncode == 0
        assert other.is_running()
        other.kill()
        other.wait()
        (cluster.folder / "started.json").write_text(json.dumps(notes))  # for the end of the context


@pytest.mark.parametrize(
    ("verb", "option", "said"),
    [
        ("up", "--idle-s=-5", "--idle-s: got -5, expected a number of seconds above 0"),
        ("up", "--idle-s=nan", "--idle-s: got nan"),
        ("up", "--max=0", "--max and --cpus: expected 1 or more"),
        ("upp", "--max=1", "got upp, expected up, down or status"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, verb: str, option: str, said: str):
    done = typed(tmp_path / "c", verb, option)
    assert done.returncode == 2
    assert said in done.stderr
    assert "keep" not in done.stderr
    assert not (tmp_path / "c").exists()


def test_lines_to_paste_have_the_folder_quoted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    typed_line = runpy.run_path(str(SCRIPT))["_typed"]("down", Path("/tmp/a b;c"))
    assert typed_line.endswith(" down --folder '/tmp/a b;c'")
